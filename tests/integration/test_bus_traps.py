"""The traps of the client library and of the protocol, each with a test that needs its fence.

trap -> test (here, unless a file is named)

- its asynchronous publish swallows refusals -> test_a_refused_publish_says_so
- acknowledgements that wait leak at a disconnect ->
  test_a_disconnect_leaves_no_question_and_no_room
- a publish that timed out is sent after the reconnect -> test_nothing_is_sent_after_it_was_refused
- the outbound buffer of 2 MB ends in an error -> test_a_frozen_server_bounds_what_is_under_way
- half-open with unsent data hangs for ever -> test_bus_half_open.py
- two minutes until a silent peer is noticed -> test_bus_half_open.py, and its bound of the probes
- closed for good after 60 attempts -> test_dialling_never_ends_and_is_jittered_and_quiet
- no jitter -> the same
- a traceback for each failed attempt -> the same
- a dial whose TLS failed hangs when it is closed -> test_bus_tls.py
- a cancellation is swallowed while it dials -> test_a_bus_that_is_dialling_closes_at_once
- fetch: an error for an empty stream, orphaned requests -> test_bus.py (contract): test_pull_...
- a dead pull after a reboot or a deletion -> test_a_reader_survives_its_stream, and
  test_bus_outages.py: test_a_reader_recovers_when_its_consumer_is_deleted
- ordered consumers, key-value watches, object store -> test_what_is_a_trap_is_not_used
- a slow subscriber loses messages without a word -> test_bus.py (contract):
  test_what_a_slow_subscriber_misses_is_counted
- acknowledgement subjects of the second form crash it -> test_both_forms_of_acknowledgement_work
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from cloud_learner.broker import Broker
from edge_runtime.bus.nats import NatsBus, connect
from edge_runtime.errors import CapacityError, HeadwaterError, TransportError

ROOT = Path(__file__).parents[2]
WAIT_S = 10.0
MB = 1 << 20
NOTHING = {"out": 0, "out_bytes": 0, "waiting": 0}


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker.start(tmp_path_factory.mktemp("broker")) as running:
        yield running


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


@contextlib.asynccontextmanager
async def stream(url: str, name: str, max_bytes: int = 64 * MB):
    bus = await connect(url, name="test")
    assert isinstance(bus, NatsBus)
    await bus.ensure_stream(name, [f"{name}.>"], max_bytes=max_bytes, discard_new=True)
    try:
        yield bus
    finally:
        await bus.close()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 # nothing tells of it
        await asyncio.sleep(0)


async def caught_of(attempt: Awaitable[object]) -> HeadwaterError:
    with pytest.raises(HeadwaterError) as caught:
        await attempt
    return caught.value


def test_a_refused_publish_says_so(broker):
    async def scenario() -> None:
        async with stream(broker.url, "refuse", max_bytes=4096) as bus:
            wrong = {"Nats-Expected-Stream": "other"}
            said = await caught_of(bus.publish("refuse.a", b"x", headers=wrong))
            assert (type(said), said.code) == (TransportError, "refused")
            full = await caught_of(bus.publish("refuse.a", bytes(5000)))
            assert (type(full), full.code) == (CapacityError, "stream_full")
            assert await bus.publish("refuse.a", b"x") == 1

    run(scenario)


def test_a_disconnect_leaves_no_question_and_no_room(broker):
    async def scenario() -> None:
        async with stream(broker.url, "leak") as bus:
            link = bus._live()
            os.kill(broker.pid, signal.SIGSTOP)
            waiting = [
                asyncio.create_task(bus.publish("leak.a", bytes(65536), timeout_s=600))
                for _ in range(300)
            ]
            await until(lambda: bus._window.statistics()["waiting"] > 0)
            broker.kill()
            ends = await asyncio.gather(*waiting, return_exceptions=True)
            assert {end.code for end in ends} == {"unreachable"}
            assert link._questions.open == {}
            assert bus._window.statistics() == NOTHING
            await asyncio.to_thread(broker.restart)

    run(scenario)


def test_nothing_is_sent_after_it_was_refused(broker):
    async def scenario() -> None:
        back = asyncio.Event()
        bus = await connect(broker.url, name="test", on_reconnect=back.set)
        await bus.ensure_stream("late", ["late.>"], max_bytes=MB, discard_new=True)
        broker.kill()
        for number in range(50):
            said = await caught_of(bus.publish("late.a", b"%d" % number, timeout_s=0.2))
            assert said.code in {"unreachable", "timeout"}
        await asyncio.to_thread(broker.restart)
        await asyncio.wait_for(back.wait(), WAIT_S)
        assert await bus.publish("late.a", b"first") == 1
        await bus.close()

    run(scenario)


def test_a_frozen_server_bounds_what_is_under_way(broker):
    async def scenario() -> None:
        async with stream(broker.url, "frozen") as bus:
            os.kill(broker.pid, signal.SIGSTOP)
            started_s = asyncio.get_running_loop().time()
            waiting = [
                asyncio.create_task(bus.publish("frozen.a", bytes(MB // 4), timeout_s=patience_s))
                for patience_s in [1.5] * 16 + [0.5] * 48
            ]
            ends = await asyncio.gather(*waiting, return_exceptions=True)
            took_s = asyncio.get_running_loop().time() - started_s
            os.kill(broker.pid, signal.SIGCONT)
            assert {getattr(end, "code", end) for end in ends} == {"timeout"}
            assert took_s < 3.0, "those that found no room waited longer than they were told to"
            assert bus._window.statistics() == NOTHING
            assert await bus.publish("frozen.a", b"x") <= 17  # 4 MB of 256 KB were on their way

    run(scenario)


def test_dialling_never_ends_and_is_jittered_and_quiet(caplog):
    """A server that hangs up 100 times, and then is well."""
    paused: list[float] = []
    hung_up = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal hung_up
        if hung_up < 100:
            hung_up += 1
            writer.close()
            return
        writer.write(b'INFO {"server_id":"x","version":"2.15.1","max_payload":1048576}\r\n')
        with contextlib.suppress(ConnectionResetError):
            while line := await reader.readline():
                if line == b"PING\r\n":
                    writer.write(b"PONG\r\n")
        writer.transport.abort()

    async def pause(seconds: float) -> None:
        paused.append(seconds)
        await asyncio.sleep(0)

    async def scenario() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        back = asyncio.Event()
        bus = NatsBus(f"nats://127.0.0.1:{port}", "test", on_reconnect=back.set, sleep=pause)
        await bus.start()
        await asyncio.wait_for(back.wait(), 30)
        assert bus.connected
        await bus.close()
        server.close()
        await server.wait_closed()

    with caplog.at_level(logging.INFO):
        run(scenario)
    assert (hung_up, len(paused)) == (100, 100)
    assert len(set(paused)) == 100
    assert max(paused[:1]) <= 0.1
    assert 1.0 < max(paused) <= 2.0
    assert min(paused[10:]) < 0.5, "full jitter: some come back soon"
    assert len(caplog.records) <= 3, [record.message for record in caplog.records]
    assert not any(record.exc_info for record in caplog.records)


def test_a_bus_that_is_dialling_closes_at_once():
    async def scenario() -> None:
        held: list[asyncio.StreamWriter] = []

        async def say_nothing(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            held.append(writer)

        server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        bus = await connect(f"nats://127.0.0.1:{port}", name="test")
        await until(lambda: len(held) == 2)  # the second dial is under way
        started_s = asyncio.get_running_loop().time()
        await bus.close()
        assert asyncio.get_running_loop().time() - started_s < 1.5
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("bus ")]
        for writer in held:
            writer.transport.abort()
        server.close()
        await server.wait_closed()

    run(scenario)


@pytest.mark.parametrize("how", ["deleted", "wiped"])
def test_a_reader_survives_its_stream(tmp_path, how):
    """The stream goes while it is read, by a request or with the whole store, and comes again."""

    async def scenario() -> None:
        with Broker.start(tmp_path / "broker") as server:
            back = asyncio.Event()
            bus = await connect(server.url, name="test", on_reconnect=back.set)
            assert isinstance(bus, NatsBus)

            async def make() -> None:
                await bus.ensure_stream("gone", ["gone.>"], max_bytes=MB, discard_new=True)

            await make()
            async with bus.pull("gone", "r", "gone.>") as reader:
                await bus.publish("gone.a", b"1")
                assert [each.data for each in await reader.next_batch(1, WAIT_S)] == [b"1"]
                if how == "deleted":
                    await bus._live().api("STREAM.DELETE.gone", {})
                else:
                    server.kill()
                    (tmp_path / "broker" / "jetstream").rename(tmp_path / "old")
                    await asyncio.to_thread(server.restart)
                    await asyncio.wait_for(back.wait(), WAIT_S)
                assert await reader.next_batch(1, 0.5) == []
                await make()
                await bus.publish("gone.a", b"2")
                assert [each.data for each in await reader.next_batch(1, WAIT_S)] == [b"2"]
            await bus.close()

    run(scenario)


TRAPS = re.compile(
    r"\.jetstream\(|publish_async|key_value|KeyValue|object_store|ObjectStore|ordered_consumer"
    r"|\.fetch\(|pull_subscribe|push_subscribe|nkeys_seed|user_credentials"
)


def test_what_is_a_trap_is_not_used():
    sources = sorted((ROOT / "edge_runtime" / "bus").glob("*.py"))
    assert len(sources) > 10
    used = {path.name: TRAPS.findall(path.read_text()) for path in sources}
    assert {name: found for name, found in used.items() if found} == {}
    assert TRAPS.search("await nc.jetstream().publish_async(x)")


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
def test_both_forms_of_acknowledgement_work(run_server, second):
    """A server that was not configured by us may send either; both are read and acknowledged."""
    forms: set[int] = set()

    async def scenario() -> None:
        flag = "true" if second else "false"
        url = run_server(f"feature_flags {{ js_ack_fc_v2: {flag} }}\n")
        async with stream(url, "form") as bus:
            for number in range(600):
                await bus.publish("form.a", b"%d" % number)
            read: list[bytes] = []
            async with bus.pull("form", "r", "form.>") as reader:
                while len(read) < 400:
                    for message in await reader.next_batch(100, WAIT_S):
                        assert message.seq == len(read) + 1
                        forms.add(len(message.ack.args[0].split(".")))
                        read.append(message.data)
                        await message.ack()
            async with bus.pull("form", "r", "form.>") as reader:
                while len(read) < 600:
                    read += [each.data for each in await reader.next_batch(600, WAIT_S)]
            assert read == [b"%d" % number for number in range(600)]

    run(scenario)
    assert forms == ({11, 12} & forms if second else {9}), forms
    assert forms
