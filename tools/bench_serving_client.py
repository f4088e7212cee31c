"""The clients of tools/bench-serving: the least that can ask a server, so that its time is seen.

Invariants: every server is asked with the same two system calls around the same clock; requests are
made before the clock starts, answers are looked into after it stopped.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from bench_serving_model import FAMILY, Matrix

from edge_runtime.api import frames
from edge_runtime.runtime import Event

PERIOD_S = 0.01  # paced: a hundred calls a second
READ_BYTES = 1 << 18
IN_FLIGHT, BURST = 512, 64

Address = str | tuple[str, int]


def hot(call: Callable[[Any], object], items: Iterable[Any]) -> list[float]:
    """Microseconds of each call, back to back; of many, the first tenth is not told: after another
    probe it finds the caches cold.
    """
    times = []
    for item in items:
        started_ns = time.perf_counter_ns()
        call(item)
        times.append((time.perf_counter_ns() - started_ns) / 1000)
    return times[len(times) // 10 :]


def paced(call: Callable[[Any], object], items: Iterable[Any]) -> list[float]:
    """Microseconds of each call, one every PERIOD_S."""
    times, due_s = [], time.perf_counter()
    for item in items:
        due_s += PERIOD_S
        time.sleep(max(0.0, due_s - time.perf_counter()))
        times += hot(call, [item])
    return times


class Wire:
    """A connection; `size` says how long the answer is of which the first bytes are given."""

    def __init__(self, address: Address, size: Callable[[bytes], int]) -> None:
        tcp = not isinstance(address, str)
        self._socket = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
        self._socket.connect(address)
        if tcp:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._size = size

    def ask(self, request: bytes) -> bytes:
        """One request, one whole answer."""
        self._socket.sendall(request)
        data = self._socket.recv(READ_BYTES)
        while len(data) < self._size(data):
            more = self._socket.recv(READ_BYTES)
            if not more:
                raise ConnectionError(f"the server hung up after {data!r:.200}")
            data += more
        return data

    def flood(self, requests: Sequence[bytes]) -> tuple[float, list[memoryview]]:
        """Seconds to have all frames answered, with some always in flight; and the answers."""
        splitter, answers, sent = frames.Splitter(), [], 0
        started_s = time.perf_counter()
        while len(answers) < len(requests):
            if sent < len(requests) and sent - len(answers) <= IN_FLIGHT - BURST:
                self._socket.sendall(b"".join(requests[sent : sent + BURST]))
                sent += BURST
                continue
            bodies, error = splitter.feed(self._socket.recv(READ_BYTES))
            if error is not None:
                raise error
            answers += bodies
        return time.perf_counter() - started_s, answers

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def frame_size(data: bytes) -> int:
    return 4 + int.from_bytes(data[:4], "little") if len(data) >= 4 else 4


def http_size(data: bytes) -> int:
    head = data.find(b"\r\n\r\n")
    if head < 0:
        return len(data) + 1
    lines = data[:head].lower()
    at = lines.index(b"content-length:") + 15
    return head + 4 + int(lines[at:].split(b"\r\n", 1)[0])


def http_body(answer: bytes) -> bytes:
    """The body of an answer. Raises: ConnectionError when it is no success."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise ConnectionError(f"refused: {answer!r:.500}")
    return body


def socket_infer(x: Matrix, request_id: int = 1) -> bytes:
    tensor = frames.RawTensor("features", "FP32", x.shape, x.tobytes())
    return frames.frame(frames.Infer(request_id, FAMILY, (tensor,)))


def socket_event(event: Event, request_id: int = 1) -> bytes:
    """A question or an observation, as its kind wants."""
    ask = frames.Predict if event.kind == "asked" else frames.Observe
    return frames.frame(ask(request_id, FAMILY, event.kind, event.time_s, dict(event.fields)))


def http_request(path: str, body: bytes, kind: str, *more: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", *more]
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body


def http_json(x: Matrix) -> bytes:
    """An Open Inference request, as device and MLServer take it."""
    tensor = {"name": "features", "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()}
    body = json.dumps({"inputs": [tensor]}).encode()
    return http_request(f"/v2/models/{FAMILY}/infer", body, "application/json")


def http_binary(x: Matrix) -> bytes:
    """The same with binary tensors both ways."""
    tensor = {
        "name": "features",
        "shape": x.shape,
        "datatype": "FP32",
        "parameters": {"binary_data_size": x.nbytes},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return http_request(
        f"/v2/models/{FAMILY}/infer",
        head + x.tobytes(),
        "application/octet-stream",
        f"Inference-Header-Content-Length: {len(head)}",
    )
