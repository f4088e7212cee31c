"""What clients of the Unix socket may hold: their number, their bytes, their time."""

from __future__ import annotations

import asyncio
import os
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import msgpack
import numpy as np
import pytest
import uvloop

from edge_runtime.api import frames
from edge_runtime.api.bounds import HELD_BYTES_MAX
from edge_runtime.api.client import AsyncClient, Client
from edge_runtime.api.connection import SLICE_S
from edge_runtime.api.socket import SocketServer
from edge_runtime.device.serving import ModelInfo
from edge_runtime.errors import CapacityError, RequestError
from edge_runtime.inference.tensors import Tensor
from edge_runtime.runtime import Event, Prediction

Stage = Callable[[SocketServer, Path], Awaitable[None]]
HALF = b"\x40\x00\x00\x00half"


class Counter:
    """A service that counts what it is asked, and answers predictions at length.

    It infers as many zeros as asked, or the size of what came; events of kind `slow` keep it.
    """

    device = "EWR"
    epoch = 1

    def __init__(self) -> None:
        self.asked = 0

    def model(self, family: str) -> Any:
        inputs, outputs = (Tensor("n", "INT64", (1,)),), (Tensor("zeros", "UINT8", (-1,)),)
        return ModelInfo("f", "r1", ("r1",), inputs, outputs, True, True, 9, 1 << 30)

    def predict(self, family: str, event: Event) -> Prediction:
        return Prediction(f"EWR.1.{self.observe(family, event)}", [0.5], "r" * 1000, "stable")

    def predict_many(self, family: str, events: Any) -> list[Prediction]:
        return [self.predict(family, event) for event in events]

    def observe(self, family: str, event: Event) -> int:
        self.asked += 1
        until_s = perf_counter() + SLICE_S
        while event.kind == "slow" and perf_counter() < until_s:
            pass
        return self.asked

    def infer(self, family: str, inputs: Any, outputs: Any, *, release: Any) -> Any:
        self.asked += 1
        if "n" in inputs:
            return {"zeros": np.zeros(inputs["n"], np.uint8)}
        return {"size": np.array([sum(each.nbytes for each in inputs.values())])}

    def infer_many(self, family: str, requests: Any) -> Any:
        return [self.infer(family, each, (), release=None) for each in requests]

    def survived(self) -> list[tuple[int, str, int]]:
        return []


def play(tmp_path: Path, stage: Stage, service: Any = None, **bounds: Any) -> None:
    async def scene() -> None:
        server = SocketServer(service or Counter(), dict, **bounds)
        await server.start(tmp_path / "edge.sock")
        try:
            await asyncio.wait_for(stage(server, tmp_path / "edge.sock"), 20)
        finally:
            await server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scene())


def framed(message: Any) -> bytes:
    body = msgpack.packb(message)
    return len(body).to_bytes(4, "little") + body


async def read_frame(reader: asyncio.StreamReader) -> Any:
    size = int.from_bytes(await reader.readexactly(4), "little")
    return msgpack.unpackb(await reader.readexactly(size))


def rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("started", [HALF, b"\x40", b"\x00\x00\x00\x01"])
def test_half_a_frame_and_silence_end_the_connection(tmp_path: Path, started: bytes) -> None:
    async def stage(server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as bystander:
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(framed([3, 1, "delay", "k", 1.0, {}]) + started)
            assert (await read_frame(reader))[0] == 131
            assert (await read_frame(reader))[:3] == [255, 0, "half_frame"]
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
            assert (await bystander.hello()).device == "EWR"
        found = server.statistics()
        assert (found["half_frames"], found["ended"], found["held_bytes"]) == (1, 1, 0)

    play(tmp_path, stage, half_frame_s=0.05)


def test_half_a_frame_after_half_a_frame_has_time_of_its_own(tmp_path: Path) -> None:
    """Each frame is whole in time, though the connection is never without half of one."""

    async def stage(server: SocketServer, path: Path) -> None:
        loop, whole = asyncio.get_running_loop(), framed([3, 1, "delay", "k", 1.0, {}])
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(whole[:7])
        began_s = loop.time()
        while loop.time() < began_s + 1.2:
            writer.write(whole[7:] + whole[:7])
            assert (await read_frame(reader))[0] == 131
        assert server.statistics()["ended"] == 0
        writer.close()
        await writer.wait_closed()

    play(tmp_path, stage, half_frame_s=0.5)


def test_a_client_that_does_not_read_is_not_called_silent(tmp_path: Path) -> None:
    """It is the server that reads no more of its frame; its time begins when it is read again."""

    async def stage(server: SocketServer, path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(framed([2, 1, "delay", "k", 1.0, {}]) * 5000)
        for _ in range(2):  # as long as two others need to be called silent
            other_reader, other = await asyncio.open_unix_connection(path)
            other.write(HALF)
            assert (await read_frame(other_reader))[2] == "half_frame"
            other.close()
            await other.wait_closed()
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(5000):
            assert (await read_frame(reader))[0] == 130
        assert server.statistics()["ended"] == 2
        writer.close()
        await writer.wait_closed()

    play(tmp_path, stage, half_frame_s=0.3)


def test_a_frame_of_four_gigabytes_is_refused_by_its_length(tmp_path: Path) -> None:
    async def stage(_server: SocketServer, path: Path) -> None:
        before = rss_bytes()
        for _ in range(100):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"\xff\xff\xff\xff" + b"x" * 1000)
            assert (await read_frame(reader))[:3] == [255, 0, "frame_too_large"]
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
        assert rss_bytes() - before < 8 << 20

    play(tmp_path, stage)


def test_a_thousand_idle_connections_cost_little(tmp_path: Path) -> None:
    async def stage(server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as client:
            await client.hello()
            before = rss_bytes()
            sockets = [await connected(path) for _ in range(1000)]
            while server.statistics()["open"] < 1001:
                await client.hello()
            each = (rss_bytes() - before) / 1000
            print(f"an idle connection costs {each:.0f} bytes, both ends together")
            assert each < 16 << 10
            for each_socket in sockets:
                each_socket.close()

    play(tmp_path, stage)


async def connected(path: Path) -> Any:
    import socket

    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    end.setblocking(False)
    await asyncio.get_running_loop().sock_connect(end, str(path))
    return end


def test_the_connection_above_the_bound_is_told_why(tmp_path: Path) -> None:
    def ask(path: Path) -> int:
        with Client(path) as client:
            return client.observe("delay", "k", 1.0, {}).seq

    async def stage(server: SocketServer, path: Path) -> None:
        first, second = await AsyncClient.connect(path), await AsyncClient.connect(path)
        await asyncio.gather(first.hello(), second.hello())
        with pytest.raises(CapacityError, match="too_many_connections"):
            await asyncio.to_thread(ask, path)
        third = await AsyncClient.connect(path)
        await third.wait_closed()
        with pytest.raises(CapacityError, match="too_many_connections"):
            third.hello()
        await second.close()
        while server.statistics()["open"] > 1:
            await first.hello()
        assert await asyncio.to_thread(ask, path) == 1
        assert server.statistics()["refused"] == 2
        await first.close()

    play(tmp_path, stage, connections_max=2)


def test_half_sent_large_frames_do_not_fill_the_memory(tmp_path: Path) -> None:
    """The connections that hold the most are ended; one with little goes on."""

    async def stage(server: SocketServer, path: Path) -> None:
        small = await connected(path)
        loop, before = asyncio.get_running_loop(), rss_bytes()
        frame = framed([3, 1, "delay", "k", 1.0, {}])
        await loop.sock_sendall(small, frame[:9])
        greedy = [await connected(path) for _ in range(24)]
        block = b"\0" * (1 << 20)
        for number in range(15):
            for end in greedy:
                try:
                    data = frames.FRAME_BYTES_MAX.to_bytes(4, "little") + block
                    await loop.sock_sendall(end, data if number == 0 else block)
                except (BrokenPipeError, ConnectionResetError):
                    continue
        await loop.sock_sendall(small, frame[9:])
        assert (await loop.sock_recv(small, 100))[4:] == msgpack.packb([131, 1, 1])
        found = server.statistics()
        assert found["held_bytes"] <= HELD_BYTES_MAX
        assert 20 <= found["ended"] <= 23
        # What grows in place moves about in the heap, which holds twice as much for a while.
        assert rss_bytes() - before < 3 * HELD_BYTES_MAX < 24 * 15 * len(block)
        for end in [small, *greedy]:
            end.close()

    play(tmp_path, stage)


def test_a_frame_of_the_largest_size_is_taken(tmp_path: Path) -> None:
    async def stage(server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as client:
            pixels = np.zeros(frames.FRAME_BYTES_MAX - 100, np.uint8)
            answer = await client.infer("delay", {"x": pixels})
            assert answer["size"].tolist() == [len(pixels)]
        assert server.statistics()["held_bytes"] == 0

    play(tmp_path, stage)


MANY = 8_000_000
EMPTY_MAPS = b"\xdd" + MANY.to_bytes(4, "big") + b"\x80" * MANY
ZEROS = b"\xdd" + MANY.to_bytes(4, "big") + b"\0" * MANY
TENSORS = b"\xdd" + (MANY // 5).to_bytes(4, "big") + b"\x94\xa0\xa0\x90\xc4\0" * (MANY // 5)


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        (b"\x96\x02\x07\xa1f\xa1k\x01\x81\xa1a" + EMPTY_MAPS, [255, 7, "too_large"]),
        (b"\xdc\0\x06\xcc\x03\x07\xa1f\xa1k\x01\x81\xa1a" + EMPTY_MAPS, [255, 7, "too_large"]),
        (b"\x93\x05\xd1\xff\x38" + EMPTY_MAPS, [255, -200, "too_large"]),
        (b"\x93\xcd\x03\xe7\xff" + EMPTY_MAPS, [255, -1, "unknown_op"]),
        (b"\x93\xa1a\x07" + EMPTY_MAPS, [255, 0, "bad_frame"]),
        (b"\x81\x07" + EMPTY_MAPS, [255, 0, "bad_frame"]),
        (b"\x94\x06\x07\xa1f" + TENSORS, [255, 7, "bad_request"]),
        (b"\x95\x06\x07\xa1f\x90" + ZEROS, [255, 7, "bad_request"]),
        (b"\x94\x06\x07\xa1f\x91\x94\xa1x\xa1y" + ZEROS + b"\xc4\0", [255, 7, "bad_request"]),
        (b"\x97\x06\x07\xa1f\x90\x90\xa0" + EMPTY_MAPS, [134, 7, "r1"]),
    ],
    ids=range(10),
)
def test_no_large_frame_takes_many_times_its_size(
    tmp_path: Path, body: bytes, reply: list[Any]
) -> None:
    """Empty maps would be sixty times as large as they were sent."""

    async def stage(_server: SocketServer, path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        tracemalloc.start()
        writer.write(len(body).to_bytes(4, "little"))
        writer.write(body)
        assert (await read_frame(reader))[:3] == reply
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * len(body)
        writer.close()
        await writer.wait_closed()

    play(tmp_path, stage)


def test_an_event_holds_no_arrays_and_maps(tmp_path: Path) -> None:
    async def stage(_server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as client:
            for value in ([], {}, b"bytes"):
                with pytest.raises(RequestError, match=r"got .* at field fields"):
                    await client.observe("delay", "k", 1.0, {"a": value})
            text = "x" * (frames.PLAIN_BYTES_MAX - 100)
            assert (await client.observe("delay", "k", 1.0, {"text": text})).seq == 1

    play(tmp_path, stage)


def test_large_answers_wait_until_the_client_reads(tmp_path: Path) -> None:
    """Sixty bytes ask for eight million; no more of them are made than are read."""
    service, size = Counter(), 8_000_000

    async def stage(_server: SocketServer, path: Path) -> None:
        end, loop = await connected(path), asyncio.get_running_loop()
        number = np.array([size], "<i8").tobytes()
        ask = framed([6, 7, "f", [["n", "INT64", [1], number]]])
        await loop.sock_sendall(end, ask * 64)
        async with await AsyncClient.connect(path) as other:
            while not service.asked:
                await other.hello()
            for _ in range(10):
                await other.hello()
            assert service.asked == 1
        left, answer, most = 64 * (size + 40), 0, 0
        while service.asked < 64 or left > 64 * 40:
            left -= len(data := await loop.sock_recv(end, 1 << 20))
            answer += len(data)
            most = max(most, service.asked - answer // size)
            assert data
        assert most <= 2
        end.close()

    play(tmp_path, stage, service)


def test_slow_requests_of_one_client_let_another_in(tmp_path: Path) -> None:
    """A slice ends by the clock, however few requests it had."""
    service = Counter()

    async def stage(_server: SocketServer, path: Path) -> None:
        end, loop = await connected(path), asyncio.get_running_loop()
        async with await AsyncClient.connect(path) as other:
            ask = framed([3, 7, "f", "slow", 1.0, {}])
            await loop.sock_sendall(end, ask * 100)
            await other.hello()
            assert service.asked <= 10
            expected = b"".join(framed([131, 7, number]) for number in range(1, 101))
            replies = b""
            while len(replies) < len(expected):
                replies += await loop.sock_recv(end, 10_000)
            assert replies == expected
        end.close()

    play(tmp_path, stage, service)
