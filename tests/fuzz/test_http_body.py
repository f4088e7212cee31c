"""HTTP under garbage: whatever comes is answered or refused, never with 500; service goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.api.http import HttpServer
from edge_runtime.runtime import Runtime

TENSOR = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
GOOD = json.dumps({"inputs": [TENSOR]}).encode()
SIZED = json.dumps(
    {"inputs": [TENSOR | {"data": None, "parameters": {"binary_data_size": 12}}]}
).replace('"data": null, ', "")
INFER = "/v2/models/same/infer"
PATHS = (INFER, "/edge/v1/predict/same", "/edge/v1/observe/same", "/edge/v1/label")
COUNT = pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow)])

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["FP32", "BYTES", "x", "INT64", "FP16"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "shape", "datatype", "data", "parameters", "inputs", "id"])
            | st.text(max_size=4),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
tensors = st.fixed_dictionaries(
    {
        "name": st.just("x") | json_values,
        "shape": st.just([1, 3]) | st.lists(st.integers(-2, 5), max_size=4) | json_values,
        "datatype": st.sampled_from(["FP32", "FP16", "BYTES", "BOOL", "UINT64"]) | json_values,
    },
    optional={
        "data": st.just([1, 2, 3]) | json_values,
        "parameters": st.dictionaries(
            st.sampled_from(["binary_data_size", "shared_memory_region", "other"]), json_values
        )
        | json_values,
    },
)
requests = st.fixed_dictionaries(
    {"inputs": st.lists(tensors, max_size=3) | json_values},
    optional={"id": json_values, "parameters": json_values, "outputs": json_values},
)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server of `same`, FP32 (batch, 3), with bodies of at most 64 KiB."""
    path = tmp_path_factory.mktemp("model") / "same.onnx"
    write_same(path)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    with Runtime.open(package=path) as runtime:
        server = HttpServer(runtime, runtime.statistics, body_bytes_max=1 << 16, silence_s=0.2)
        asyncio.run_coroutine_threadsafe(server.start(0), loop).result(10)
        assert server.port is not None
        yield server.port
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
        assert server.statistics()["held_bytes"] == 0
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def write_same(path: Path) -> None:
    from onnx import TensorProto, helper

    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("x", "y")
    )
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", [x], [y])
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    path.write_bytes(model.SerializeToString())


def spoken(port: int, data: bytes) -> bytes:
    """Everything that comes back for `data`, after which this side says no more."""
    received = b""
    client = socket.create_connection(("127.0.0.1", port), 10)
    with client, contextlib.suppress(ConnectionError):
        with contextlib.suppress(OSError):  # it may have heard enough, and be gone
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        while chunk := client.recv(1 << 16):
            received += chunk
    return received


def posted(port: int, path: str, body: bytes, *lines: str) -> int:
    """The status of the answer to a body."""
    head = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *lines]
    said = spoken(port, "\r\n".join([*head, "Connection: close", "", ""]).encode() + body)
    assert said.startswith(b"HTTP/1.1 "), said
    return int(said[9:12])


def assert_serves(port: int) -> None:
    assert posted(port, INFER, GOOD) == 200


def run(count: int, property_of: Any, *strategies: Any) -> None:
    settings(max_examples=count)(given(*strategies)(property_of))()


@COUNT
def test_any_bytes_as_a_body_are_no_failure(port: int, count: int) -> None:
    def holds(path: str, body: bytes) -> None:
        assert posted(port, path, body) in (400, 404)

    run(count, holds, st.sampled_from(PATHS), st.binary(max_size=200))
    assert_serves(port)


@COUNT
def test_any_json_as_a_body_is_no_failure(port: int, count: int) -> None:
    def holds(path: str, value: Any) -> None:
        status = posted(port, path, json.dumps(value).encode())
        assert status in (200, 400, 404, 501), value

    run(count, holds, st.sampled_from(PATHS), json_values | requests)
    assert_serves(port)


@COUNT
def test_any_bytes_behind_the_json_are_no_failure(port: int, count: int) -> None:
    def holds(request: Any, binary: bytes, off_by: int) -> None:
        text = json.dumps(request).encode() if request else SIZED.encode()
        size = f"Inference-Header-Content-Length: {len(text) + off_by}"
        assert posted(port, INFER, text + binary, size) in (200, 400, 404, 501)

    off_by = st.just(0) | st.integers(-100, 100)
    run(
        count,
        holds,
        st.none() | requests,
        st.binary(min_size=12, max_size=12) | st.binary(),
        off_by,
    )
    assert_serves(port)


@COUNT
def test_a_good_request_with_bytes_changed_is_no_failure(port: int, count: int) -> None:
    good = b"POST /v2/models/same/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (
        len(GOOD),
        GOOD,
    )

    def holds(changes: list[tuple[int, int]], cut: int) -> None:
        data = bytearray(good)
        for at, byte in changes:
            data[at % len(data)] = byte
        said = spoken(port, bytes(data[: cut or len(data)]))
        assert b"HTTP/1.1 500" not in said
        assert not said or said.startswith(b"HTTP/1.1 ")

    changes = st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), max_size=4)
    run(count, holds, changes, st.just(0) | st.integers(1, len(good)))
    assert_serves(port)


@COUNT
def test_any_bytes_on_a_connection_are_no_failure(port: int, count: int) -> None:
    def holds(data: bytes) -> None:
        assert b"HTTP/1.1 500" not in spoken(port, data)

    run(count, holds, st.binary(max_size=300))
    assert_serves(port)
