"""The Unix socket: its server over a runtime that only remembers, and both clients."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest

from edge_runtime.api import frames
from edge_runtime.api.client import IN_FLIGHT_MAX, AsyncClient, Client
from edge_runtime.api.socket import SocketServer
from edge_runtime.errors import CapacityError, ConfigError, RequestError, TransportError
from edge_runtime.runtime import Event, Prediction

FIELDS = {"carrier": "AA", "distance": 2475, "delay": -3.5}


class Notebook:
    """A service that writes down what it is asked; kind `refuse` and `full` fail as asked."""

    device = "EWR"
    epoch = 3

    def __init__(self, release: str = "r1") -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.release = release

    def predict(self, family: str, event: Event) -> Prediction:
        seq = self.observe(family, event)
        return Prediction(f"EWR.3.{seq}", [float(seq)], self.release, "stable")

    def observe(self, family: str, event: Event) -> int:
        if event.kind == "refuse":
            raise RequestError("unknown_kind", "kind 'refuse' is unknown", "kinds: scheduled")
        if event.kind == "full":
            raise CapacityError("log_full", "the log is full")
        self.seen.append((family, event.kind, event.time_s, event.fields))
        return len(self.seen)

    def label(
        self,
        prediction_id: str,
        value: float,
        *,
        time_s: float | None = None,
        final: bool = True,
        family: str | None = None,
    ) -> int:
        self.seen.append((family, prediction_id, value, time_s, final))
        return len(self.seen)

    def survived(self) -> list[tuple[int, str, int]]:
        return [(2, "event", 41), (2, "label", 0)]


Stage = Callable[[Notebook, SocketServer, Path], Awaitable[None]]


@asynccontextmanager
async def serving(path: Path, notebook: Notebook) -> AsyncIterator[SocketServer]:
    server = SocketServer(notebook, lambda: {"device": "EWR", "numbers": [1, 2]})
    await server.start(path)
    try:
        yield server
    finally:
        await server.close()


def play(tmp_path: Path, stage: Stage, notebook: Notebook | None = None) -> Notebook:
    notebook = notebook or Notebook()
    path = tmp_path / "edge.sock"

    async def scene() -> None:
        async with serving(path, notebook) as server:
            await asyncio.wait_for(stage(notebook, server, path), 4)

    asyncio.run(scene())
    return notebook


def framed(message: Any) -> bytes:
    body = msgpack.packb(message)
    return len(body).to_bytes(4, "little") + body


async def read_frame(reader: asyncio.StreamReader) -> Any:
    size = int.from_bytes(await reader.readexactly(4), "little")
    return msgpack.unpackb(await reader.readexactly(size))


def test_each_request_has_its_answer(tmp_path: Path) -> None:
    async def stage(_notebook: Notebook, _server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as client:
            hello = await client.hello()
            assert (hello.device, hello.epoch) == ("EWR", 3)
            assert [(s.epoch, s.event_class, s.seq) for s in hello.survived] == [
                (2, "event", 41),
                (2, "label", 0),
            ]
            answer = await client.predict("delay", "scheduled", 10.0, FIELDS)
            assert (answer.id, answer.outputs) == ("EWR.3.1", [1.0])
            assert (answer.release, answer.arm) == ("r1", "stable")
            assert (await client.observe("delay", "landed", 11.0, FIELDS)).seq == 2
            assert (await client.label("delay", answer.id, 1, 12.0, final=False)).seq == 3
            assert (await client.status()).status == {"device": "EWR", "numbers": [1, 2]}

    assert play(tmp_path, stage).seen == [
        ("delay", "scheduled", 10.0, FIELDS),
        ("delay", "landed", 11.0, FIELDS),
        ("delay", "EWR.3.1", 1.0, 12.0, False),
    ]


def test_pipelined_requests_are_answered_in_their_order(tmp_path: Path) -> None:
    async def stage(_notebook: Notebook, _server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as client:
            futures = [client.predict("delay", "k", float(n), FIELDS) for n in range(2000)]
            answers = await asyncio.gather(*futures)
        assert [answer.outputs for answer in answers] == [[n + 1.0] for n in range(2000)]

    seen = play(tmp_path, stage).seen
    assert [entry[2] for entry in seen] == [float(n) for n in range(2000)]


def test_the_sync_client_speaks_the_same_words(tmp_path: Path) -> None:
    def ask(path: Path) -> tuple[Any, ...]:
        with Client(path) as client:
            answer = client.predict("delay", "scheduled", 10.0, FIELDS)
            done = client.observe("delay", "landed", 11.0, FIELDS)
            label = client.label("delay", answer.id, 0.0)
            return client.hello().epoch, answer.id, done.seq, label.seq, client.status().status

    async def stage(_notebook: Notebook, _server: SocketServer, path: Path) -> None:
        found = await asyncio.to_thread(ask, path)
        assert found == (3, "EWR.3.1", 2, 3, {"device": "EWR", "numbers": [1, 2]})

    assert play(tmp_path, stage).seen[2] == ("delay", "EWR.3.1", 0.0, None, True)


def test_a_refused_request_fails_alone(tmp_path: Path) -> None:
    async def stage(_notebook: Notebook, _server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as client:
            first = client.predict("delay", "scheduled", 1.0, FIELDS)
            second = client.predict("delay", "refuse", 2.0, FIELDS)
            third = client.predict("delay", "full", 3.0, FIELDS)
            fourth = client.predict("delay", "scheduled", 4.0, FIELDS)
            assert (await first).id == "EWR.3.1"
            with pytest.raises(RequestError) as caught:
                await second
            assert (caught.value.code, caught.value.hint) == ("unknown_kind", "kinds: scheduled")
            with pytest.raises(CapacityError, match="log_full"):
                await third
            assert (await fourth).id == "EWR.3.2"

    play(tmp_path, stage)


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        ([9, 7], "unknown_op", "tag 9"),
        ([2, 7, "delay", "k", "soon", {}], "bad_request", "field time_s"),
        ([2, 7, 3, "k", 1.0, {}], "bad_request", "field family"),
        ([2, 7, "delay", "k", 1.0, []], "bad_request", "field fields"),
        ([2, 7, "delay"], "bad_request", "Predict"),
        ([4, 7, "delay", "EWR.3.1", True], "bad_request", "field value"),
        ([1, 7, 99], "bad_version", "version 99"),
    ],
)
def test_a_wrong_request_is_named_and_the_connection_goes_on(
    tmp_path: Path, message: list[Any], code: str, text: str
) -> None:
    async def stage(_notebook: Notebook, _server: SocketServer, path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(framed(message) + framed([3, 8, "delay", "k", 1.0, {}]))
        failed = await read_frame(reader)
        assert failed[:3] == [255, 7, code]
        assert text in failed[3]
        assert await read_frame(reader) == [131, 8, 1]
        writer.close()
        await writer.wait_closed()

    play(tmp_path, stage)


@pytest.mark.parametrize(
    ("garbage", "code"),
    [
        (b"\x05\x00\x00\x00\xc1\xc1\xc1\xc1\xc1", "bad_frame"),
        (b"\x00\x00\x00\x00", "bad_frame"),
        (framed({"tag": 1}), "bad_frame"),
        (framed([2]), "bad_frame"),
        (framed([2, "seven"]), "bad_frame"),
        (framed([True, True]), "bad_frame"),
        ((frames.FRAME_BYTES_MAX + 1).to_bytes(4, "little"), "frame_too_large"),
        (b"GET / HTTP/1.1\r\n\r\n", "frame_too_large"),
    ],
)
def test_garbage_closes_its_own_connection_only(tmp_path: Path, garbage: bytes, code: str) -> None:
    async def stage(_notebook: Notebook, server: SocketServer, path: Path) -> None:
        bystander = await AsyncClient.connect(path)
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(framed([3, 1, "delay", "k", 1.0, {}]) + garbage)
        assert await read_frame(reader) == [131, 1, 1]
        assert (await read_frame(reader))[:3] == [255, 0, code]
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        assert (await bystander.observe("delay", "k", 2.0, {})).seq == 2
        assert server.statistics()["bad_frames"] == 1
        await bystander.close()

    play(tmp_path, stage)


def test_frames_may_arrive_byte_by_byte(tmp_path: Path) -> None:
    data = framed([3, 1, "delay", "k", 1.0, {"a": 1}]) + framed([3, 2, "delay", "k", 2.0, {}])
    splitter = frames.Splitter()
    bodies = [bytes(body) for byte in data for body in splitter.feed(bytes([byte]))[0]]
    assert [msgpack.unpackb(body)[1] for body in bodies] == [1, 2]
    assert not splitter.started


def test_half_a_frame_and_an_end_leave_no_trace(tmp_path: Path) -> None:
    async def stage(notebook: Notebook, server: SocketServer, path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        whole = framed([3, 1, "delay", "k", 1.0, {}])
        writer.write(whole + whole[:-1])
        writer.write_eof()
        assert await read_frame(reader) == [131, 1, 1]
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        assert len(notebook.seen) == 1
        async with await AsyncClient.connect(path) as client:
            await client.status()
        assert server.statistics()["half_frames"] == 1

    play(tmp_path, stage)


def test_a_client_that_does_not_read_is_not_read_either(tmp_path: Path) -> None:
    """Answers of 1 KB to requests of 30 bytes: unread, they must stop the reading of requests."""

    async def stage(notebook: Notebook, _server: SocketServer, path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(framed([2, 1, "delay", "k", 1.0, {}]) * 30_000)
        async with await AsyncClient.connect(path) as other:
            before = -1
            while before != len(notebook.seen):  # until the server makes no more progress
                before = len(notebook.seen)
                for _ in range(20):
                    await other.hello()
        assert 0 < len(notebook.seen) < 20_000
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        splitter, answers = frames.Splitter(), 0
        while answers < 30_000:
            answers += len(splitter.feed(await reader.read(1 << 20))[0])
        assert len(notebook.seen) == 30_000
        writer.close()
        await writer.wait_closed()

    play(tmp_path, stage, Notebook(release="r" * 1000))


def test_what_is_in_flight_when_the_connection_breaks_fails_by_name(tmp_path: Path) -> None:
    async def stage(_notebook: Notebook, server: SocketServer, path: Path) -> None:
        client = await AsyncClient.connect(path)
        await client.hello()
        await server.close()
        with pytest.raises(TransportError, match="connection_lost"):
            await client.observe("delay", "k", 1.0, {})
        with pytest.raises(TransportError, match="connection_lost"):
            client.status()
        with pytest.raises(TransportError, match="connection_lost"):
            await client.drain()
        await client.close()

    play(tmp_path, stage)


def test_the_client_bounds_what_is_in_flight(tmp_path: Path) -> None:
    async def stage(_notebook: Notebook, _server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as client:
            futures = [client.observe("delay", "k", 1.0, {}) for _ in range(IN_FLIGHT_MAX)]
            with pytest.raises(CapacityError, match="too_many_in_flight"):
                client.observe("delay", "k", 1.0, {})
            await client.drain(0)
            assert [future.result().seq for future in futures[-2:]] == [8191, 8192]

    play(tmp_path, stage)


def test_a_value_that_no_frame_can_carry_is_refused_by_the_client(tmp_path: Path) -> None:
    async def stage(notebook: Notebook, _server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as client:
            for value, code in [(object(), "bad_request"), (1 << 70, "bad_request")]:
                with pytest.raises(RequestError, match=code):
                    client.predict("delay", "k", 1.0, {"a": value})
            with pytest.raises(RequestError, match="frame_too_large"):
                client.predict("delay", "k", 1.0, {"a": "x" * (1 << 20)})
            await client.drain(0)
        assert notebook.seen == []

    play(tmp_path, stage)


def test_a_missing_runtime_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="unreachable"):
        Client(tmp_path / "none.sock")
    with pytest.raises(TransportError, match="unreachable"):
        asyncio.run(AsyncClient.connect(tmp_path / "none.sock"))


def test_a_socket_left_by_a_killed_process_is_replaced(tmp_path: Path) -> None:
    import socket

    stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stale.bind(str(tmp_path / "edge.sock"))
    stale.close()

    async def stage(_notebook: Notebook, _server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as client:
            assert (await client.hello()).device == "EWR"
        mode = await asyncio.to_thread(lambda: path.stat().st_mode)
        assert mode & 0o777 == 0o600

    play(tmp_path, stage)
    assert not (tmp_path / "edge.sock").exists()


def test_a_socket_that_answers_is_left_alone(tmp_path: Path) -> None:
    async def stage(_notebook: Notebook, _server: SocketServer, path: Path) -> None:
        with pytest.raises(ConfigError, match="socket_in_use"):
            await SocketServer(Notebook(), dict).start(path)
        async with await AsyncClient.connect(path) as client:
            assert (await client.hello()).epoch == 3

    play(tmp_path, stage)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "edge.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="bad_socket"):
        asyncio.run(SocketServer(Notebook(), dict).start(path))
    assert path.read_text() == "precious"


def test_the_clients_load_no_heavy_library() -> None:
    code = (
        "import sys, edge_runtime.api.client;"
        "print([m for m in ('onnxruntime','tuf','nats','numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
