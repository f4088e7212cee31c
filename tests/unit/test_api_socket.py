"""The Unix socket: its server over a runtime that only remembers, and both clients."""

from __future__ import annotations

import asyncio
import errno
import grp
import os
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import uvloop

from edge_runtime.api import frames
from edge_runtime.api.client import IN_FLIGHT_MAX, AsyncClient, Client
from edge_runtime.api.connection import SLICE
from edge_runtime.api.socket import SocketServer, bind
from edge_runtime.errors import (
    CapacityError,
    ConfigError,
    HeadwaterError,
    RequestError,
    TransportError,
)
from edge_runtime.inference.tensors import Tensor
from edge_runtime.runtime import Event, Prediction

FIELDS = {"carrier": "AA", "distance": 2475, "delay": -3.5}


class Model:
    """What a family serves; a heavy one answers when the test lets it."""

    def __init__(self, release: str, *, inline: bool) -> None:
        self.release, self.inline = release, inline
        self.inputs = (Tensor("x", "FP64", (-1,)),)
        self.outputs = (Tensor("y", "FP64", (-1,)), Tensor("names", "BYTES", (-1, 2)))
        self.quick_rows, self.quick_bytes = (1000, 1 << 30) if inline else (0, 0)


class Notebook:
    """A service that writes down what it is asked; kind `refuse` and `full` fail as asked.

    Its model doubles `x`, in `runs` of as many requests. Family `heavy` waits for `gate`.
    """

    device = "EWR"
    epoch = 3

    def __init__(self, release: str = "r1") -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.runs: list[int] = []
        self.release = release
        self.begun, self.given_up = 0, 0
        self.gate = asyncio.Event()

    def model(self, family: str) -> Model:
        if family == "none":
            raise RequestError("unknown_family", "this device does not serve 'none'")
        return Model(self.release, inline=family != "heavy")

    def predict(self, family: str, event: Event) -> Prediction:
        seq = self.observe(family, event)
        return Prediction(f"EWR.3.{seq}", [float(seq)], self.release, "stable")

    def predict_many(
        self, family: str, events: Sequence[Event]
    ) -> list[Prediction | HeadwaterError]:
        self.runs.append(len(events))
        return [self._tried(family, event) for event in events]

    async def predict_async(self, family: str, event: Event) -> Prediction:
        await self._gate()
        return self.predict(family, event)

    def infer(
        self,
        family: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
        *,
        release: str | None = None,
    ) -> dict[str, Any]:
        self.model(family)
        if "x" not in inputs:
            raise RequestError("missing_input", "input 'x' is missing")
        self.seen.append((family, {name: array.tolist() for name, array in inputs.items()}))
        answers = {"y": inputs["x"] * 2, "names": np.array([["a", "é"]])}
        return {name: answers[name] for name in outputs or answers}

    def infer_many(
        self, family: str, requests: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any] | HeadwaterError]:
        self.runs.append(len(requests))
        return [self.infer(family, each) for each in requests]

    async def infer_async(
        self,
        family: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
        *,
        release: str | None = None,
    ) -> dict[str, Any]:
        await self._gate()
        return self.infer(family, inputs, outputs, release=release)

    def observe(self, family: str, event: Event) -> int:
        if event.kind == "refuse":
            raise RequestError("unknown_kind", "kind 'refuse' is unknown", "kinds: scheduled")
        if event.kind == "full":
            raise CapacityError("log_closed", "the log is closed")
        self.seen.append((family, event.kind, event.time_s, event.fields))
        return len(self.seen)

    async def rollback_async(self, family: str, reason: str) -> str:
        if reason == "none":
            raise RequestError("nothing_to_roll_back", "there was no release before this one")
        self.seen.append((family, reason))
        self.release = "r0"
        return self.release

    def _tried(self, family: str, event: Event) -> Prediction | HeadwaterError:
        try:
            return self.predict(family, event)
        except HeadwaterError as error:
            return error

    async def _gate(self) -> None:
        self.begun += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise

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
    await server.start(path, 0o600)
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

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the daemon runs
        runner.run(scene())
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
            with pytest.raises(CapacityError, match="log_closed"):
                await third
            assert (await fourth).id == "EWR.3.2"

    play(tmp_path, stage)


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        ([99, 7], "unknown_op", "tag 99"),
        ([2, 7, "delay", "k", "soon", {}], "bad_request", "field time_s"),
        ([2, 7, 3, "k", 1.0, {}], "bad_request", "field family"),
        ([2, 7, "delay", "k", 1.0, []], "bad_request", "field fields"),
        ([2, 7, "delay"], "bad_request", "Predict"),
        ([4, 7, "delay", "EWR.3.1", True], "bad_request", "field value"),
        ([6, 7, "delay", {}], "bad_request", "field inputs"),
        ([6, 7, "delay", [["x", "FP32", [1], "text"]]], "bad_request", "field inputs[0].data"),
        ([6, 7, "delay", [["x", "FP32", ["1"], b""]]], "bad_request", "field inputs[0].shape"),
        ([6, 7, "delay", [["x", "FP33", [1], b"1234"]]], "bad_tensor", "unknown datatype"),
        ([6, 7, "delay", [["x", "FP32", [2], b"1234"]]], "bad_tensor", "4 bytes are not FP32"),
        ([6, 7, "delay", [["x", "FP32", [-1], b"1234"]]], "bad_tensor", "negative"),
        ([6, 7, "delay", [["x", "FP32", [1 << 62, 4], b""]]], "bad_tensor", "0 bytes"),
        ([6, 7, "delay", [["x", "FP32", [1] * 65, b"1234"]]], "bad_request", "inputs[0].shape"),
        ([6, 7, "delay", [["x", "BYTES", [1], b"\xff\0\0\0a"]]], "bad_tensor", "longer"),
        ([6, 7, "delay", [["x", "BYTES", [1], b"\1\0\0\0\xff"]]], "bad_tensor", "decode"),
        ([6, 7, "delay", [["x", "FP32", [1], b"1234"]] * 2], "bad_request", "same name"),
        ([6, 7, "delay", []], "missing_input", "'x'"),
        ([6, 7, "none", [["x", "FP32", [1], b"1234"]]], "unknown_family", "'none'"),
        ([7, 7, "delay"], "bad_request", "Rollback"),
        ([7, 7, "delay", "none"], "nothing_to_roll_back", "no release"),
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
    assert splitter.held == 0


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
                client.predict("delay", "k", 1.0, {"a": "x" * frames.FRAME_BYTES_MAX})
            await client.drain(0)
        assert notebook.seen == []

    play(tmp_path, stage)


def test_a_missing_runtime_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="unreachable"):
        Client(tmp_path / "none.sock")
    with pytest.raises(TransportError, match="unreachable"):
        asyncio.run(AsyncClient.connect(tmp_path / "none.sock"))


def infer_frame(number: int, *rows: float, family: str = "delay") -> bytes:
    data = np.array(rows, "<f4").tobytes()
    return framed([6, number, family, [["x", "FP32", [len(rows)], data]]])


def test_tensors_go_in_and_come_out(tmp_path: Path) -> None:
    x = np.array([[1.5, -2.0], [np.nan, np.inf]], np.float32)

    def ask(path: Path) -> Any:
        with Client(path) as client:
            return client.infer("delay", {"x": x}), client.infer("delay", {"x": x}, ["names"], "r7")

    async def stage(_notebook: Notebook, _server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as client:
            for answer in (
                await client.infer("delay", {"x": x}),
                (await asyncio.to_thread(ask, path))[0],
            ):
                assert answer.release == "r1"
                assert list(dict(answer)) == ["y", "names"]
                assert answer["y"].dtype == np.float32
                np.testing.assert_array_equal(answer["y"], x * 2)
                assert answer["names"].tolist() == [["a", "é"]]
            chosen = (await asyncio.to_thread(ask, path))[1]
            assert (chosen.release, chosen.keys()) == ("r7", ["names"])
            with pytest.raises(KeyError, match="y"):
                chosen["y"]
            with pytest.raises(RequestError, match="wrong_type"):
                client.infer("delay", {"x": np.array([1j])})

    play(tmp_path, stage)


def test_a_tensor_travels_as_the_documents_say(tmp_path: Path) -> None:
    async def stage(_notebook: Notebook, _server: SocketServer, path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(framed([6, 9, "delay", [["x", "INT16", [1, 2], b"\x01\x00\xff\xff"]]]))
        assert await read_frame(reader) == [
            *(134, 9, "r1"),
            [
                ["y", "INT16", [1, 2], b"\x02\x00\xfe\xff"],
                ["names", "BYTES", [1, 2], b"\1\0\0\0a\2\0\0\0\xc3\xa9"],
            ],
        ]
        writer.close()
        await writer.wait_closed()

    play(tmp_path, stage)


def test_requests_of_one_shape_and_family_share_a_run(tmp_path: Path) -> None:
    """Each still has its own answer; another shape, family or wish begins another group."""

    async def stage(notebook: Notebook, _server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as client:
            inputs = [
                *[("a", np.float32([n])) for n in range(5)],
                *[("b", np.float32([n])) for n in range(3)],
                *[("b", np.float32([n, n])) for n in range(2)],
                *[("b", np.float64([n, n])) for n in range(4)],
            ]
            futures = [client.infer(family, {"x": x}) for family, x in inputs]
            futures.append(client.infer("b", {"x": inputs[-1][1]}, ["y"]))
            answers = await asyncio.gather(*futures)
        for (_, x), answer in zip([*inputs, inputs[-1]], answers, strict=True):
            assert answer["y"].dtype == x.dtype
            assert answer["y"].tolist() == (x * 2).tolist()
        assert notebook.runs == [5, 3, 2, 4]

    play(tmp_path, stage)


def test_predictions_of_one_family_share_a_run_and_fail_alone(tmp_path: Path) -> None:
    async def stage(notebook: Notebook, _server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as client:
            kinds = ["k", "refuse", "k", "full", "k"]
            futures = [client.predict("delay", kind, 1.0, {}) for kind in kinds]
            found = await asyncio.gather(*futures, return_exceptions=True)
        codes = [getattr(each, "code", "ok") for each in found]
        assert codes == ["ok", "unknown_kind", "ok", "log_closed", "ok"]
        assert [each.id for each in found if hasattr(each, "id")] == [
            f"EWR.3.{n}" for n in (1, 2, 3)
        ]
        assert notebook.runs == [5]

    play(tmp_path, stage)


def test_a_wrong_tensor_fails_alone_beside_right_ones(tmp_path: Path) -> None:
    async def stage(_notebook: Notebook, _server: SocketServer, path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        short = framed([6, 2, "delay", [["x", "FP32", [1], b"123"]]])
        writer.write(infer_frame(1, 1.0) + short + short + infer_frame(4, 1.0))
        replies = [await read_frame(reader) for _ in range(4)]
        assert [reply[0] for reply in replies] == [134, 255, 255, 134]
        writer.close()
        await writer.wait_closed()

    play(tmp_path, stage)


def test_heavy_models_run_side_by_side_and_answers_keep_their_order(tmp_path: Path) -> None:
    """What comes behind them waits, for it may depend on them; other connections do not."""

    async def stage(notebook: Notebook, _server: SocketServer, path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(
            b"".join(infer_frame(n, float(n), family="heavy") for n in range(3))
            + framed([2, 3, "heavy", "k", 1.0, {}])
            + framed([3, 4, "delay", "behind", 1.0, {}])
            + infer_frame(5, 5.0, family="heavy")
        )
        async with await AsyncClient.connect(path) as other:
            while notebook.begun < 4:
                await other.hello()
            assert (await other.observe("delay", "beside", 1.0, {})).seq == 1
            assert notebook.begun == 4
            notebook.gate.set()
        replies = [await read_frame(reader) for _ in range(6)]
        assert [reply[1] for reply in replies] == [0, 1, 2, 3, 4, 5]
        assert [reply[0] for reply in replies] == [134, 134, 134, 130, 131, 134]
        assert [seen[1] for seen in notebook.seen if seen[0] == "delay"] == ["beside", "behind"]
        writer.close()
        await writer.wait_closed()

    play(tmp_path, stage)


def test_a_client_has_a_bounded_number_of_heavy_requests_running(tmp_path: Path) -> None:
    async def stage(notebook: Notebook, _server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as client:
            futures = [client.infer("heavy", {"x": np.float32([n])}) for n in range(1000)]
            async with await AsyncClient.connect(path) as other:
                before = -1
                while before != notebook.begun:
                    before = notebook.begun
                    for _ in range(20):
                        await other.hello()
            assert notebook.begun == SLICE
            notebook.gate.set()
            answers = await asyncio.gather(*futures)
        assert [answer["y"].tolist() for answer in answers] == [[2.0 * n] for n in range(1000)]

    play(tmp_path, stage)


def test_what_is_running_is_given_up_when_its_client_goes(tmp_path: Path) -> None:
    async def stage(notebook: Notebook, _server: SocketServer, path: Path) -> None:
        client = await AsyncClient.connect(path)
        future = client.infer("heavy", {"x": np.float32([1])})
        async with await AsyncClient.connect(path) as other:
            while not notebook.begun:
                await other.hello()
            await client.close()
            while not notebook.given_up:
                await other.hello()
        assert notebook.seen == []
        with pytest.raises(TransportError, match="connection_lost"):
            await future

    play(tmp_path, stage)


def test_a_client_that_only_stops_sending_still_gets_its_answers(tmp_path: Path) -> None:
    async def stage(notebook: Notebook, _server: SocketServer, path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"".join(framed([3, n, "delay", "k", 1.0, {}]) for n in range(3000)))
        writer.write_eof()
        for number in range(3000):
            assert (await read_frame(reader))[:2] == [131, number]
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()

    play(tmp_path, stage)


def test_garbage_behind_heavy_requests_is_answered_behind_them(tmp_path: Path) -> None:
    async def stage(notebook: Notebook, _server: SocketServer, path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(infer_frame(1, 1.0, family="heavy") + b"\xff" * 8)
        async with await AsyncClient.connect(path) as other:
            while not notebook.begun:
                await other.hello()
        notebook.gate.set()
        assert (await read_frame(reader))[0] == 134
        assert (await read_frame(reader))[:3] == [255, 0, "frame_too_large"]
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()

    play(tmp_path, stage)


def test_a_close_lets_what_is_running_end(tmp_path: Path) -> None:
    async def stage(notebook: Notebook, server: SocketServer, path: Path) -> None:
        client = await AsyncClient.connect(path)
        future = client.infer("heavy", {"x": np.float32([1])})
        async with await AsyncClient.connect(path) as other:
            while not notebook.begun:
                await other.hello()
        closing = asyncio.ensure_future(server.close())
        notebook.gate.set()
        assert (await future)["y"].tolist() == [2.0]
        await closing
        await client.wait_closed()

    play(tmp_path, stage)


def test_one_client_that_asks_much_leaves_room_for_another(tmp_path: Path) -> None:
    """Between two slices of the one, the other is answered."""

    async def stage(notebook: Notebook, _server: SocketServer, path: Path) -> None:
        other = await AsyncClient.connect(path)
        async with await AsyncClient.connect(path) as client:
            futures = [client.observe("delay", "k", 1.0, {}) for _ in range(4000)]
            client._flush()
            asked = other.hello()
            other._flush()
            await asked
            assert len(notebook.seen) <= 8 * SLICE
            await asyncio.gather(*futures)
        await other.close()

    play(tmp_path, stage)


def test_a_release_is_rolled_back(tmp_path: Path) -> None:
    async def stage(_notebook: Notebook, _server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as client:
            assert (await client.rollback("delay", "it is worse")).release == "r0"

        def ask() -> str:
            with Client(path) as client:
                return client.rollback("delay", "again").release

        assert await asyncio.to_thread(ask) == "r0"

    assert play(tmp_path, stage).seen == [("delay", "it is worse"), ("delay", "again")]


def test_an_answer_that_no_frame_can_carry_fails_alone(tmp_path: Path) -> None:
    async def stage(_notebook: Notebook, _server: SocketServer, path: Path) -> None:
        async with await AsyncClient.connect(path) as client:
            large = client.predict("delay", "k", 1.0, {})
            with pytest.raises(RequestError, match="frame_too_large"):
                await large
            assert (await client.hello()).device == "EWR"

    play(tmp_path, stage, Notebook(release="r" * frames.FRAME_BYTES_MAX))


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_file_has_the_mode_and_group_it_was_given(tmp_path: Path, mode: int) -> None:
    path, group = tmp_path / "edge.sock", grp.getgrgid(os.getegid())

    async def scene() -> None:
        server = SocketServer(Notebook(), dict)
        await server.start(path, mode, group.gr_name)
        found = await asyncio.to_thread(path.stat)
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (mode, group.gr_gid)
        await server.close()

    asyncio.run(scene())


def test_a_group_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "edge.sock"
    with pytest.raises(ConfigError, match="unknown_group"):
        asyncio.run(SocketServer(Notebook(), dict).start(path, 0o660, "nobody-has-this-group"))
    assert not path.exists()


def test_a_socket_left_by_a_killed_process_is_replaced(tmp_path: Path) -> None:
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


def test_a_socket_whose_owner_is_stopped_is_left_alone(tmp_path: Path) -> None:
    """As many wait there as may; to ask whether anybody listens must not wait, too."""
    path = tmp_path / "edge.sock"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as owner,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waiting,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as refused,
    ):
        owner.bind(str(path))
        owner.listen(0)
        waiting.connect(str(path))
        refused.setblocking(False)
        assert refused.connect_ex(str(path)) == errno.EAGAIN
        with pytest.raises(ConfigError, match="socket_in_use"):
            bind(path, 0o600, "")
        owner.accept()[0].close()


def test_a_socket_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
    ):
        other.bind(str(path))
        with pytest.raises(ConfigError, match="another kind"):
            bind(path, 0o600, "")
        sender.sendto(b"still here", str(path))
        assert other.recv(100) == b"still here"


def test_a_link_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "edge.sock"
    path.symlink_to(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="is no socket"):
        bind(path, 0o600, "")
    assert path.is_symlink()


def test_the_end_of_one_server_leaves_the_socket_of_the_next(tmp_path: Path) -> None:
    async def stage(notebook: Notebook, _server: SocketServer, path: Path) -> None:
        await asyncio.to_thread(path.unlink)
        async with serving(path, notebook) as first:
            await asyncio.to_thread(path.unlink)
            async with serving(path, notebook):
                await first.close()
                async with await AsyncClient.connect(path) as client:
                    assert (await client.hello()).device == "EWR"

    play(tmp_path, stage)
    assert not (tmp_path / "edge.sock").exists()


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
