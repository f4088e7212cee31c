"""The probes of tools/bench-serving: each asks one thing so many times, and gives what it found.

Invariants: a probe can be called again and again; before its first call the windows were filled and
what the server answered was compared with the floor's answer, so nothing wrong is ever timed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import bench_serving_client as raw
import msgspec
import numpy as np
import onnxruntime as ort
from bench_serving_client import Wire, frame_size, hot, http_size, paced
from bench_serving_model import FAMILY, Matrix, Stream, rows
from bench_serving_server import Server, Started

from edge_runtime.api import frames
from edge_runtime.api.client import Client
from edge_runtime.runtime import Event, Runtime

FILLED = 2000  # observations that the windows have seen before anything is measured
FAILED = 255  # the tag of a reply
NOTHING_NS = 20_000
FLOODS = 5  # requests at full speed for each hot call

Probe = Callable[[], list[float]]


def paced_share(calls: int) -> int:
    """How many paced calls stand for so many hot ones: each takes 10 ms."""
    return max(10, calls // 25)


def do_nothing(for_ns: int) -> None:
    """Be busy for so long: what the machine itself adds shows in the slowest calls."""
    end_ns = time.perf_counter_ns() + for_ns
    while time.perf_counter_ns() < end_ns:
        pass


class Floor:
    """The model alone, asked about the row `x`."""

    def __init__(self, package: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(
            str(package), options, providers=["CPUExecutionProvider"]
        )
        self.x: Matrix = rows(1)

    def run(self, x: Matrix) -> Any:
        return self._session.run(["probability"], {"features": x})[0]

    def probes(self, calls: int) -> dict[str, Probe]:
        x = self.x
        return {
            "floor": lambda: hot(self.run, [x] * calls),
            "nothing": lambda: hot(do_nothing, [NOTHING_NS] * calls),
            "floor paced": lambda: paced(self.run, [x] * (paced_share(calls))),
        }

    def check(self, who: str, answer: Any, x: Matrix | None = None) -> None:
        """Raises: AssertionError when `answer` is not what the model says to `x`."""
        found = np.asarray(answer, dtype=np.float32).reshape(-1)
        expected = self.run(self.x if x is None else x).reshape(-1)
        assert np.allclose(found, expected, atol=1e-5), f"{who}: {found}, not {expected}"


def in_process(floor: Floor, runtime: Runtime, calls: int) -> dict[str, Probe]:
    """`infer` and `predict` by a plain call."""

    def infer(inputs: dict[str, Any]) -> dict[str, Any]:
        return runtime.infer(FAMILY, inputs)

    def predict(event: Event) -> Any:
        return runtime.predict(FAMILY, event)

    inputs = {"features": floor.x}
    floor.check("infer", infer(inputs)["probability"])
    stream = Stream()

    def questions(count: int) -> list[Event]:
        for event in stream.observations(max(count // 10, 1)):
            runtime.observe(FAMILY, event)
        return stream.questions(count)

    for event in questions(10 * FILLED)[::10]:
        predict(event)
    return {
        "infer": lambda: hot(infer, [inputs] * calls),
        "predict": lambda: hot(predict, questions(calls)),
        "predict paced": lambda: paced(predict, questions(paced_share(calls))),
    }


def by_socket(
    floor: Floor, servers: Started, server: Server, path: str, calls: int
) -> dict[str, Probe]:
    """One request after the other, and as many a second as one core answers."""
    wire = servers.enter_context(Wire(path, frame_size))
    client = servers.enter_context(Client(path))
    infer, stream = raw.socket_infer(floor.x), Stream()
    floor.check("socket", reply(wire.ask(infer), frames.Inferred)["probability"])
    floor.check("client", client.infer(FAMILY, {"features": floor.x})["probability"])
    flood(wire, questions(wire, stream, 10 * FILLED)[::10])

    def infers_a_second(count: int) -> list[float]:
        x = rows(count)
        with server.on_core(0):
            spent_s, bodies = flood(wire, [raw.socket_infer(each[None]) for each in x])
        answers = [cast("frames.Inferred", frames.reply_in(body)) for body in bodies]
        floor.check("pipelined", [answer["probability"] for answer in answers], x)
        return [count / spent_s]

    def predictions_a_second(count: int) -> list[float]:
        requests = questions(wire, stream, count)
        with server.on_core(0):
            return [count / flood(wire, requests)[0]]

    def by_client(_number: int) -> Any:
        return client.infer(FAMILY, {"features": floor.x})

    return {
        "socket": asked(server, path, frame_size, [infer] * calls),
        "socket apart": lambda: hot(wire.ask, [infer] * calls),
        "socket client": beside(server, lambda: hot(by_client, range(calls))),
        "socket predict": beside(server, lambda: hot(wire.ask, questions(wire, stream, calls))),
        "infer a second": lambda: infers_a_second(calls * FLOODS),
        "predict a second": lambda: predictions_a_second(calls * FLOODS),
    }


def questions(wire: Wire, stream: Stream, count: int) -> list[bytes]:
    """The next requests for predictions; the observations before them were made."""
    flood(wire, [raw.socket_event(event) for event in stream.observations(max(count // 10, 1))])
    return [raw.socket_event(event) for event in stream.questions(count)]


def flood(wire: Wire, requests: list[bytes]) -> tuple[float, list[memoryview]]:
    """Seconds to have all answered, and the answers. Raises: AssertionError when one is refused."""
    spent_s, bodies = wire.flood(requests)
    for body in bodies:
        tag, *rest = msgspec.msgpack.decode(body)  # what the echo sends back is no reply
        assert tag != FAILED, rest
    return spent_s, bodies


def reply(answer: bytes, kind: type[Any]) -> Any:
    found = frames.reply_in(memoryview(answer)[4:])
    assert isinstance(found, kind), found
    return found


def by_echo(floor: Floor, server: Server, path: str, calls: int) -> dict[str, Probe]:
    """What a round trip costs when nothing is done with the request."""
    return {"echo": asked(server, path, frame_size, [raw.socket_infer(floor.x)] * calls)}


def asked(
    server: Server, address: raw.Address, size: Callable[[bytes], int], requests: list[bytes]
) -> Probe:
    """Over a new connection each time: servers end those that were silent for seconds."""

    def probe() -> list[float]:
        with Wire(address, size) as wire:
            return hot(wire.ask, requests)

    return beside(server, probe)


def beside(server: Server, probe: Probe) -> Probe:
    """`probe` with asker and server on one core, since in a round trip they take turns: else it is
    the waking of an idle core that is measured, which takes a virtual machine longer than all else.
    """

    def pinned() -> list[float]:
        with server.on_core(0, shared=True):
            return probe()

    return pinned


def by_http(floor: Floor, server: Server, address: raw.Address, calls: int) -> dict[str, Probe]:
    """The Open Inference Protocol, JSON and binary tensors."""
    plain, binary = raw.http_json(floor.x), raw.http_binary(floor.x)
    with Wire(address, http_size) as wire:
        floor.check("HTTP JSON", open_inference(wire.ask(plain)))
        tensor = np.frombuffer(raw.http_body(wire.ask(binary))[-4:], dtype="<f4")
        floor.check("HTTP binary", tensor)
    return {
        "http": asked(server, address, http_size, [plain] * calls),
        "http binary": asked(server, address, http_size, [binary] * calls),
    }


def mosec(x: Matrix, form: str, library: Any) -> bytes:
    """What its worker expects, as JSON or MessagePack."""
    body = library.encode({"features": x.tolist()})
    return raw.http_request("/inference", body, f"application/{form}")


def in_json(answer: bytes) -> Any:
    return msgspec.json.decode(raw.http_body(answer))["probability"]


def in_msgpack(answer: bytes) -> Any:
    return msgspec.msgpack.decode(raw.http_body(answer))["probability"]


def open_inference(answer: bytes) -> Any:
    return json.loads(raw.http_body(answer))["outputs"][0]["data"]


def peers(floor: Floor, servers: Started, calls: int) -> tuple[dict[str, Probe], dict[str, str]]:
    """The probes of the peers that are installed, and why the others are left out."""
    starts = {
        "mosec JSON": (servers.mosec_json, mosec(floor.x, "json", msgspec.json), in_json),
        "mosec": (servers.mosec, mosec(floor.x, "msgpack", msgspec.msgpack), in_msgpack),
        "mlserver": (servers.mlserver, raw.http_json(floor.x), open_inference),
    }
    probes: dict[str, Probe] = {}
    skipped: dict[str, str] = {}
    for name, (start, request, values) in starts.items():
        try:
            server, address = start()
        except FileNotFoundError as error:
            skipped[name] = str(error)
            continue
        with Wire(address, http_size) as wire:
            floor.check(name, values(wire.ask(request)))
        probes[name] = asked(server, address, http_size, [request] * calls)
        probes[f"rss {name}"] = lambda server=server: [server.rss_mb()]
    return probes, skipped


def busy(servers: Started, server: Server, path: str, calls: int) -> Probe:
    """Per cent of a core that a server uses while it is asked for predictions at the pace."""
    wire = servers.enter_context(Wire(path, frame_size))
    stream = Stream()

    def probe() -> list[float]:
        due = questions(wire, stream, paced_share(calls))
        cpu_s, started_s = server.cpu_s(), time.perf_counter()
        paced(wire.ask, due)
        return [100 * (server.cpu_s() - cpu_s) / (time.perf_counter() - started_s)]

    return probe


def answers(path: str) -> bool:
    """Whether the device at `path` answers for tensors. Raises: OSError while nobody listens."""
    with Wire(path, frame_size) as wire:
        return bool(reply(wire.ask(raw.socket_infer(rows(1))), frames.Inferred))
