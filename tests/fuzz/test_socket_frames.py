"""Garbage for the Unix socket, cut anywhere: it is answered or refused, and service goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.api.client import Client
from edge_runtime.api.frames import FRAME_BYTES_MAX
from edge_runtime.api.socket import SocketServer
from edge_runtime.personal.policy import Policy
from edge_runtime.personal.prior import Prior
from edge_runtime.runtime import Runtime

COUNT = pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
REPLIES = {129, 130, 131, *range(133, 142), 255}
SCHEDULED = {"carrier": "AA", "distance": 100.0}
ROWS = np.linspace(0, 1, 10, dtype=np.float32).reshape(2, 5)
RAW = ["features", "FP32", [2, 5], ROWS.tobytes()]

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.binary(max_size=16)
    | st.text(max_size=8)
    | st.sampled_from(["toy", "scheduled", "features", "FP32", "BYTES", "carrier"]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=10,
)
raws = st.tuples(
    st.just("features") | values,
    st.sampled_from(["FP32", "FP16", "BYTES", "BOOL", "INT64"]) | values,
    st.just([2, 5]) | st.lists(st.integers(-2, 7), max_size=4) | values,
    st.just(ROWS.tobytes()) | st.binary(max_size=64) | values,
)
right = st.sampled_from(
    [
        [1, 1],
        [2, 2, "toy", "scheduled", 10.0, SCHEDULED],
        [3, 3, "toy", "departed", 11.0, {"carrier": "AA", "delay": 2.0}],
        [4, 4, "toy", "local.1.1", 1.0],
        [5, 5],
        [6, 6, "toy", [RAW]],
        [7, 7, "toy", "fuzz"],
        [8, 8, "toy", "ada", "scheduled", 10.0, SCHEDULED],
        [9, 9, "toy", "ada", "scheduled", 10.0, SCHEDULED, [{}, {"distance": 5.0}], 1],
        [9, 9, "toy", "ada", "scheduled", 10.0, SCHEDULED, [{}, {}], 2, ROWS.tobytes()],
        [10, 10, "toy", "ada", "local.1.1", 1.0],
        [11, 11, "toy", "ada"],
        [12, 12, "toy", "ada"],
        [13, 13, "toy", "ada"],
        [14, 14, "toy"],
    ]
)
messages = (
    right
    | st.lists(values, max_size=10)
    | values
    | st.tuples(right, st.integers(0, 9), values).map(
        lambda each: [*each[0][: each[1]], each[2], *each[0][each[1] + 1 :]]
    )
    | st.tuples(st.just(6), st.just(6), st.just("toy"), st.lists(raws, max_size=3), values)
)


def framed(message: Any) -> bytes:
    body = msgpack.packb(message)
    return len(body).to_bytes(4, "little") + body


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Right frames, some of whose bytes were changed, taken away or put in."""
    data = bytearray(
        b"".join(framed(each) for each in draw(st.lists(right, min_size=1, max_size=5)))
    )
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
        data = data or bytearray(1)
    return bytes(data)


streams = (
    st.binary(max_size=200)
    | st.lists(messages, max_size=12).map(lambda each: b"".join(map(framed, each)))
    | mutated()
)


class Served:
    """A real runtime behind a real socket on a thread of its own, and one client that behaves."""

    def __init__(self, path: Path, runtime: Runtime) -> None:
        self.path = path
        self.server = SocketServer(runtime, runtime.statistics)
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.crashes: list[dict[str, Any]] = []
        self._loop.set_exception_handler(lambda _loop, context: self.crashes.append(context))
        asyncio.run_coroutine_threadsafe(self.server.start(path), self._loop).result(10)
        self.bystander = Client(path)

    def attack(self, data: bytes, cuts: list[int]) -> list[Any]:
        """Send `data` in pieces, then no more; the replies until the server closes."""
        replies = bytearray()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
            end.settimeout(10)
            end.connect(str(self.path))
            with contextlib.suppress(BrokenPipeError):
                for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
                    end.sendall(data[start:stop])
                end.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while piece := end.recv(1 << 16):
                    replies += piece
        return list(unframed(bytes(replies)))

    def check(self) -> None:
        """The server answers the one who behaves, rightly, and holds nothing of the others."""
        answer = self.bystander.infer("toy", {"features": ROWS})["probability"]
        expected = 1 / (1 + np.exp(-ROWS.sum(1, keepdims=True) / 1000))
        np.testing.assert_allclose(answer, expected, atol=1e-5)
        while self.server.statistics()["open"] > 1:
            self.bystander.hello()
        assert self.server.statistics()["held_bytes"] == 0
        assert self.crashes == []

    def close(self) -> None:
        self.bystander.close()
        asyncio.run_coroutine_threadsafe(self.server.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def unframed(data: bytes) -> Iterator[Any]:
    while data:
        size = int.from_bytes(data[:4], "little")
        assert 0 < size <= FRAME_BYTES_MAX
        yield msgpack.unpackb(data[4 : 4 + size], strict_map_key=False)
        data = data[4 + size :]


@pytest.fixture
def served(tmp_path: Path, write_package: Callable[..., tuple[Path, str]]) -> Iterator[Served]:
    eye = np.eye(6, dtype=np.float32)
    prior = Prior("binary", np.zeros(6, np.float32), eye, region=2.0, norm_max=10.0)
    package, _ = write_package(policy=Policy(prior, explore=0.5, optimism=1.0))
    with Runtime.open(package=package, step=lambda: 1) as runtime:
        served = Served(tmp_path / "edge.sock", runtime)
        try:
            yield served
        finally:
            served.close()


def rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@COUNT
def test_whatever_comes_is_answered_or_refused(served: Served, count: int) -> None:
    @settings(max_examples=count)
    @given(streams, st.lists(st.integers(0, 400), max_size=6))
    def attack(data: bytes, cuts: list[int]) -> None:
        replies = served.attack(data, sorted(min(cut, len(data)) for cut in cuts))
        assert {reply[0] for reply in replies} <= REPLIES
        last_words = ([255, 0, "bad_frame"], [255, 0, "frame_too_large"])
        assert [reply for reply in replies[:-1] if reply[:3] in last_words] == []
        served.check()

    attack()
    assert served.server.statistics()["bad_frames"] > count / 10


@COUNT
def test_how_the_stream_is_cut_does_not_change_the_answers(served: Served, count: int) -> None:
    @settings(max_examples=count // 3)
    @given(st.lists(right.filter(lambda each: each[0] in (1, 6)), max_size=20), st.data())
    def attack(asked: list[Any], data: Any) -> None:
        stream = b"".join(map(framed, asked))
        cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12))
        replies = served.attack(stream, sorted(cuts))
        assert [reply[0] for reply in replies] == [each[0] + 128 for each in asked]
        served.check()

    attack()


def test_garbage_leaves_no_memory_behind(served: Served) -> None:
    """The beginnings of 2,000 large frames, and as many frames of nonsense."""
    start = (FRAME_BYTES_MAX - 1).to_bytes(4, "little") + bytes(50_000)
    nonsense = framed([6, 1, "toy", [["features", "FP32", [1 << 40, 6], bytes(100)]] * 50])
    for data in (start, nonsense):
        served.attack(data, [])
    before = rss_bytes()
    for _ in range(2000):
        served.attack(start, [])
        served.attack(nonsense, [])
    served.check()
    assert rss_bytes() - before < 8 << 20
