"""What unit tests share: HTTP on a thread of its own with a plain client, plans of arms, releases
on trial that misbehave on what really comes, and benchmarks run quickly.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_runtime.api.http import HttpServer
from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig
from edge_runtime.inference.slot import Arm
from edge_runtime.rollout.plan import Plan, PlanArm, model_path
from edge_runtime.runtime import Event, Prediction, Runtime
from edge_runtime.update.shelf import Shelf
from edge_runtime.wire import codec
from edge_runtime.wire.messages import PredictionRecord

TOOLS = Path(__file__).parents[2] / "tools"


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


# Graphs that answer as a package of the same bias does, until a feature is 500 or more, as the
# distance FAR is: then each shows a fault of its own. `slow` shows it always.
NEAR, FAR = 100.0, 1000.0
_SAID = """
    sum = ReduceSum (features, axis)
    scaled = Mul (sum, thousandth)
    logit = Add (scaled, bias)
    said = Sigmoid (logit)
    most = ReduceMax <axes = [1]> (features)
    part = Div (most, high)
    far = Cast <to = 7> (part)
    rows = ReduceMax <keepdims = 0> (far)"""
_LOOP = """
    same = Loop <body = b (int64 i, bool on, float[n,1] x) => (bool still, float[n,1] y) {
        still = Identity (on)
        y = Identity (x) }> (turns, yes, said)
    probability = Identity (same)"""
FAULTS = {
    "fails": """
    place = Squeeze (far, axis)
    nothing = Gather (table, place)
    probability = Add (said, nothing)""",
    "nan": """
    left = Sub (high, most)
    root = Sqrt (left)
    nothing = Mul (root, none)
    probability = Add (said, nothing)""",
    "shape": """
    more = Add (rows, one)
    times = Unsqueeze (more, first)
    pair = Concat <axis = 0> (times, ones)
    probability = Tile (said, pair)""",
    "hangs": """
    turns = Mul (rows, huge)"""
    + _LOOP,
    "slow": """
    turns = Add (rows, many)"""
    + _LOOP,
}


class Trials:
    """A device in a folder of its own: packages go onto its shelf, and plans of them."""

    def __init__(self, folder: Path, write_package: Callable[..., tuple[Path, str]]) -> None:
        self.config = EdgeConfig(
            device="EWR", families=["toy"], state_dir=folder / "state", socket=folder / "socket"
        )
        self._write = write_package
        self._plans = 0

    def again(self) -> None:
        """Another device of the same name, on which nothing lies yet."""
        folder = self.config.state_dir
        self.config = msgspec.structs.replace(
            self.config, state_dir=folder.with_name(folder.name + "x")
        )

    @property
    def shelf(self) -> Shelf:
        return Shelf(self.config.state_dir / "shelf")

    def arm(self, bias: float, weight: float = 1.0, fault: str = "", **options: Any) -> PlanArm:
        """A release `r<bias>` on the shelf, with a fault of FAULTS; `mode` as in plans."""
        mode = options.pop("mode", "live")
        path, _ = self._write(bias=bias, **options)
        data = path.read_bytes() if not fault else _faulty(path, bias, FAULTS[fault])
        sha256 = hashlib.sha256(data).hexdigest()
        self.shelf.put_whole(sha256, data)
        release = f"r{bias:g}"
        return PlanArm(release, model_path("toy", release), sha256, 1, weight, mode=mode)

    def plan(self, stable: PlanArm, *trials: PlanArm, **options: Any) -> Plan:
        """A plan of these arms, which is on the shelf as the current one."""
        self._plans += 1
        canary, others = (trials[0] if trials else None), trials[1:]
        arms = {"stable": stable, "canary": canary, "others": others}
        plan = Plan(family="toy", seq=self._plans, salt="s", **arms, **options)
        self.shelf.save_current(plan)
        return plan

    def open(self) -> Runtime:
        return Runtime.open(self.config, clock=ManualClock(1_360_000_000.0), step=lambda: 1)

    @staticmethod
    def event(*, far: bool = False, kind: str = "scheduled") -> Event:
        distance = FAR if far else NEAR
        fields = {"carrier": "UA"} | (
            {"distance": distance} if kind == "scheduled" else {"delay": distance}
        )
        return Event(kind, 1_360_000_000.0, fields)

    def ask(self, runtime: Runtime, *, far: bool = False) -> Prediction:
        return runtime.predict("toy", self.event(far=far))

    @staticmethod
    def logged(runtime: Runtime) -> list[PredictionRecord]:
        """The predictions in the log, oldest first."""
        asyncio.run(runtime.log.wait_durable("event", runtime.log.handed_out("event")))
        records = [codec.decode_record(data) for _, _, data in runtime.log.tail("event", 0, 0)]
        return [each for each in records if isinstance(each, PredictionRecord)]


def _faulty(path: Path, bias: float, body: str) -> bytes:
    import onnx
    from onnx import parser

    model = onnx.load(path)
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[n,5] features) => (float[n,1] probability)
    <float thousandth = {{0.001}}, float bias = {{{bias!r}}}, float high = {{500}},
     float none = {{0}}, float[1,1] table = {{0}}, int64[1] axis = {{1}}, int64 one = {{1}},
     int64[1] first = {{0}}, int64[1] ones = {{1}}, int64 huge = {{1152921504606846976}},
     int64 many = {{3000}}, bool yes = {{1}}> {{ {_SAID} {body} }}"""
    model.graph.CopyFrom(parser.parse_model(text).graph)
    return model.SerializeToString()


@pytest.fixture
def trials(tmp_path: Path, write_package: Callable[..., tuple[Path, str]]) -> Trials:
    """A device and what it tries; `trials.ask(runtime, far=True)` shows the faults."""
    return Trials(tmp_path, write_package)


@pytest.fixture
def measured() -> Callable[..., dict[str, float]]:
    """`measured(tool, *parts, **env)`: what each row of a benchmark says after a quick run."""

    def run(tool: str, *parts: str, **env: str) -> dict[str, float]:
        done = subprocess.run(
            [sys.executable, TOOLS / tool, "--quick", "--json", "--only", *parts],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | env,
        )
        return {row["what"]: row["value"] for row in json.loads(done.stdout)["rows"]}

    return run
