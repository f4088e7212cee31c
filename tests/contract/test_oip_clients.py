"""The clients that people have, Triton's and KServe's own, against a server in a real process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROGRAM = """
import asyncio, sys
import uvloop
from edge_runtime.api.http import HttpServer
from edge_runtime.runtime import Runtime

async def main():
    with Runtime.open(package=sys.argv[1]) as runtime:
        server = HttpServer(runtime, runtime.statistics)
        await server.start(0)
        print(server.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.close()

uvloop.run(main())
"""
KINDS = {
    "b": ("BOOL", "BOOL", np.bool_),
    "f16": ("FP16", "FLOAT16", np.float16),
    "f32": ("FP32", "FLOAT", np.float32),
    "f64": ("FP64", "DOUBLE", np.float64),
    "i8": ("INT8", "INT8", np.int8),
    "i64": ("INT64", "INT64", np.int64),
    "u16": ("UINT16", "UINT16", np.uint16),
    "t": ("BYTES", "STRING", np.object_),
}


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a process that serves `echo`, whose outputs are its inputs."""
    path = tmp_path_factory.mktemp("model") / "echo.onnx"
    write_echo(path)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.communicate(timeout=20)
    assert process.returncode == 0


def write_echo(path: Path) -> None:
    from onnx import TensorProto, helper

    def declared(prefix: str) -> list[Any]:
        return [
            helper.make_tensor_value_info(prefix + name, getattr(TensorProto, kind), ["n", 2])
            for name, (_, kind, _) in KINDS.items()
        ]

    nodes = [helper.make_node("Identity", [name], [f"y_{name}"]) for name in KINDS]
    graph = helper.make_graph(nodes, "echo", declared(""), declared("y_"))
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    path.write_bytes(model.SerializeToString())


def arrays(rows: int = 3) -> dict[str, Any]:
    random = np.random.default_rng(7)
    found = {
        name: (random.normal(size=(rows, 2)) * 50).astype(dtype)
        for name, (_, _, dtype) in KINDS.items()
        if name != "t"
    }
    found["i8"] = np.array([[-128, 127], [0, 1], [2, 3]], dtype=np.int8)[:rows]
    found["u16"] = np.array([[0, 65535], [4, 5], [6, 7]], dtype=np.uint16)[:rows]
    found["t"] = np.array([["", "é"], ["a b", "c"], ["d", "e"]], dtype=object)[:rows]
    return found


def triton_inputs(http: Any, *, binary: bool) -> list[Any]:
    inputs = []
    for name, array in arrays().items():
        each = http.InferInput(name, list(array.shape), KINDS[name][0])
        each.set_data_from_numpy(array, binary_data=binary or name == "f16")
        inputs.append(each)
    return inputs


def assert_echoed(result_of: Callable[[str], Any]) -> None:
    for name, array in arrays().items():
        got = result_of(f"y_{name}")
        assert got.shape == array.shape
        values = got.ravel().tolist()  # a text is bytes to one client, and a text to the other
        texts = [each.decode() if isinstance(each, bytes) else each for each in values]
        assert texts == array.ravel().tolist(), name


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_triton_infers(port: int, compression: str | None, binary: bool) -> None:
    http = pytest.importorskip("tritonclient.http")
    outputs = [
        http.InferRequestedOutput(f"y_{name}", binary_data=binary or name == "f16")
        for name in KINDS
    ]

    with http.InferenceServerClient(f"127.0.0.1:{port}") as client:
        result = client.infer(
            "echo",
            triton_inputs(http, binary=binary),
            request_id="q-1",
            outputs=outputs,
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )

    assert result.get_response()["id"] == "q-1"
    assert_echoed(result.as_numpy)


def test_triton_infers_as_it_does_without_being_told_how(port: int) -> None:
    http = pytest.importorskip("tritonclient.http")
    with http.InferenceServerClient(f"127.0.0.1:{port}") as client:
        result = client.infer("echo", triton_inputs(http, binary=True), timeout=5_000_000)
        pending = [client.async_infer("echo", triton_inputs(http, binary=True)) for _ in range(3)]
        for each in [result, *(request.get_result() for request in pending)]:
            assert_echoed(each.as_numpy)


def test_triton_asks_after_health_and_models(port: int) -> None:
    http = pytest.importorskip("tritonclient.http")
    with http.InferenceServerClient(f"127.0.0.1:{port}") as client:
        about = client.get_model_metadata("echo")
        release = about["versions"][0]
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("echo")
        assert client.is_model_ready("echo", release)
        assert not client.is_model_ready("other")
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        assert client.get_model_metadata("echo", release) == about
        assert {each["name"]: each["datatype"] for each in about["inputs"]} == {
            name: kind for name, (kind, _, _) in KINDS.items()
        }


def test_triton_is_told_what_is_wrong(port: int) -> None:
    http = pytest.importorskip("tritonclient.http")
    from tritonclient.utils import InferenceServerException

    with http.InferenceServerClient(f"127.0.0.1:{port}") as client:
        inputs = triton_inputs(http, binary=True)
        with pytest.raises(InferenceServerException, match="unknown_family"):
            client.infer("other", inputs)
        with pytest.raises(InferenceServerException, match="unknown_release"):
            client.infer("echo", inputs, model_version="9")
        with pytest.raises(InferenceServerException, match="missing_input"):
            client.infer("echo", inputs[1:])
        with pytest.raises(InferenceServerException, match="sequence_id"):
            client.infer("echo", inputs, sequence_id=5, sequence_start=True)
        with pytest.raises(InferenceServerException, match="not built here"):
            client.get_inference_statistics("echo")


def test_triton_infers_from_async_code(port: int) -> None:
    aio = pytest.importorskip("tritonclient.http.aio")

    async def scene() -> None:
        async with aio.InferenceServerClient(f"127.0.0.1:{port}") as client:
            assert await client.is_server_ready()
            requests = [client.infer("echo", triton_inputs(aio, binary=True)) for _ in range(5)]
            for result in await asyncio.gather(*requests):
                assert_echoed(result.as_numpy)

    asyncio.run(scene())


@pytest.mark.parametrize("binary", [True, False])
def test_kserve_infers_and_asks_after_health(port: int, binary: bool) -> None:
    pytest.importorskip("kserve")
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
    from kserve.protocol.infer_type import RequestedOutput

    inputs = []
    for name, array in arrays().items():
        each = InferInput(name, list(array.shape), KINDS[name][0])
        each.set_data_from_numpy(array, binary_data=binary or name == "f16")
        inputs.append(each)
    outputs = [
        RequestedOutput(f"y_{name}", {"binary_data": binary or name == "f16"}) for name in KINDS
    ]
    request = InferRequest("echo", inputs, request_id="q-2", request_outputs=outputs)

    async def scene() -> Any:
        url = f"http://127.0.0.1:{port}"
        async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
            assert await client.is_server_live(url)
            assert await client.is_server_ready(url)
            assert await client.is_model_ready(url, "echo")
            assert not await client.is_model_ready(url, "other")
            return await client.infer(url, request, model_name="echo")

    response = asyncio.run(scene())

    assert (response.id, response.model_name) == ("q-2", "echo")
    by_name = {output.name: output for output in response.outputs}
    assert_echoed(lambda name: by_name[name].as_numpy())
