"""What unit tests share: HTTP on a thread of its own with a plain client, and plans of arms."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.api.http import HttpServer
from edge_runtime.inference.slot import Arm
from edge_runtime.rollout.plan import Plan, PlanArm, model_path
from edge_runtime.runtime import Runtime


class Served:
    """A server over a real runtime, and what a test asks of it."""

    def __init__(self, runtime: Runtime, server: HttpServer) -> None:
        self.runtime, self.server = runtime, server

    @property
    def port(self) -> int:
        assert self.server.port is not None
        return self.server.port

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to one request on a connection of its own."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, 10)) as client:
            client.request(method, path, data, headers or {})
            response = client.getresponse()
            return response.status, dict(response.headers), response.read()

    def json(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of the answer; a `_` in the name of a header is a `-`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        status, _, content = self.ask(method, path, body, named)
        return status, json.loads(content)


@contextlib.contextmanager
def serving(runtime: Runtime, **options: Any) -> Iterator[Served]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

    server = HttpServer(
        runtime, lambda: runtime.statistics() | {"http": server.statistics()}, **options
    )
    try:
        run(server.start(0))
        yield Served(runtime, server)
    finally:
        run(server.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """`serve(package)` serves an ONNX file over HTTP until the test ends."""
    with contextlib.ExitStack() as ends:

        def start(package: Path, **options: Any) -> Served:
            runtime = ends.enter_context(Runtime.open(package=package))
            return ends.enter_context(serving(runtime, **options))

        yield start


@pytest.fixture
def served(serve: Callable[..., Served], write_model: Callable[..., Path]) -> Served:
    """A server of the model `same`, FP32."""
    return serve(write_model())


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., Path]:
    """`write_model("INT64")` writes the file same.onnx: output `y` equals input `x`, (batch, 3).

    With `shape`, of that shape; `inputs` names several inputs, each with its output. With
    `only_rows`, no other number of rows will do: it cannot be timed with one, so it runs elsewhere.
    """

    def write(
        datatype: str = "FP32",
        shape: Any = ("batch", 3),
        inputs: Any = ("x",),
        only_rows: int | None = None,
    ) -> Path:
        from onnx import TensorProto, helper, numpy_helper

        names = {"FP16": "FLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE", "BYTES": "STRING"}
        kind = getattr(TensorProto, names.get(datatype, datatype))
        outputs = [name.replace("x", "y") for name in inputs]
        pairs = list(zip(inputs, outputs, strict=True))
        nodes = [helper.make_node("Identity", [x], [y]) for x, y in pairs]
        if only_rows is not None:
            rows = numpy_helper.from_array(np.array([only_rows, 3]), "rows")
            nodes = [
                helper.make_node("Constant", [], ["rows"], value=rows),
                helper.make_node("Reshape", ["x", "rows"], ["y"]),
            ]
        graph = helper.make_graph(
            nodes,
            "same",
            [helper.make_tensor_value_info(name, kind, shape) for name in inputs],
            [helper.make_tensor_value_info(name, kind, shape) for name in outputs],
        )
        opset = [helper.make_opsetid("", 17)]
        path = tmp_path / "same.onnx"
        model = helper.make_model(graph, opset_imports=opset, ir_version=9)
        path.write_bytes(model.SerializeToString())
        return path

    return write


@pytest.fixture
def floats() -> np.ndarray[Any, Any]:
    return np.array([[1.5, -2.25, 3e-7], [0.0, 7.0, -1e9]], dtype="<f4")


@pytest.fixture
def plan_of() -> Callable[..., Plan]:
    """`plan_of(stable)` or `plan_of(stable, canary)` is a plan of the family toy, of seq 5."""

    def plan_of(*arms: Arm, seq: int = 5) -> Plan:
        stable, *canaries = [
            PlanArm(
                arm.release,
                model_path("toy", arm.release),
                arm.sha256 or "0" * 64,
                1,
                arm.weight,
            )
            for arm in arms
        ]
        canary = canaries[0] if canaries else None
        return Plan(family="toy", seq=seq, stable=stable, canary=canary, salt="s")

    return plan_of
