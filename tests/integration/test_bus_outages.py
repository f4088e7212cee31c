"""The bus over NATS when the server freezes, dies, talks nonsense or is not there yet."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterator

import pytest

from cloud_learner.broker import Broker
from edge_runtime.bus.link import Link
from edge_runtime.bus.nats import NatsBus, connect
from edge_runtime.errors import ConfigError, TransportError

WAIT_S = 10.0
MB = 1 << 20


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker.start(tmp_path_factory.mktemp("broker")) as running:
        yield running


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(bounded())


@contextlib.asynccontextmanager
async def stream(broker: Broker, name: str):
    bus = await connect(broker.url, name="test")
    assert isinstance(bus, NatsBus)
    await bus.ensure_stream(name, [f"{name}.>"], max_bytes=64 * MB, discard_new=True)
    try:
        yield bus
    finally:
        await bus.close()


@contextlib.asynccontextmanager
async def frozen(broker: Broker):
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if broker.running:
            os.kill(broker.pid, signal.SIGCONT)


def test_a_frozen_server_times_out_and_the_same_message_id_is_stored_once(broker):
    async def scenario() -> None:
        async with stream(broker, "frozen") as bus:
            async with frozen(broker):
                with pytest.raises(TransportError) as caught:
                    await bus.publish("frozen.a", b"x", message_id="1", timeout_s=0.05)
                assert caught.value.code == "timeout"
            assert await bus.publish("frozen.a", b"x", message_id="1") == 1
            assert await bus.publish("frozen.a", b"y", message_id="2") == 2

    run(scenario)


def test_a_cancelled_publish_ends_at_once_and_leaves_nothing_behind(broker):
    async def scenario() -> None:
        async with stream(broker, "cancelled") as bus:
            async with frozen(broker):
                waiting = [asyncio.create_task(bus.publish("cancelled.a", b"x")) for _ in range(9)]
                await asyncio.sleep(0)
                for task in waiting:
                    task.cancel()
                answers = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(answer, asyncio.CancelledError) for answer in answers)
            await bus.publish("cancelled.a", b"y")
            link = bus._keeper.link
            assert await link.probe(WAIT_S)
            assert link._questions.open == {}
            assert bus._window.statistics() == {"out": 0, "out_bytes": 0, "waiting": 0}

    run(scenario)


def test_publishes_that_wait_when_the_server_dies_fail_long_before_their_deadline(broker):
    async def scenario() -> None:
        async with stream(broker, "dies") as bus:
            async with frozen(broker):
                waiting = [
                    asyncio.create_task(bus.publish("dies.a", bytes(65536), timeout_s=600))
                    for _ in range(200)
                ]
                await asyncio.sleep(0)
                broker.kill()
                answers = await asyncio.gather(*waiting, return_exceptions=True)
            assert {error.code for error in answers} == {"unreachable"}
        await asyncio.to_thread(broker.restart)

    run(scenario)


def test_a_half_open_link_is_noticed_and_dropped_with_unsent_bytes(broker):
    async def scenario() -> None:
        bus = await connect(broker.url, name="test")
        assert isinstance(bus, NatsBus)
        link = await Link.dial(broker.url, "test", bus._keeper)
        assert await link.probe(WAIT_S)
        async with frozen(broker):
            while link._client.pending_data_size < MB:
                await link.send("nobody.listens", bytes(MB // 2))
                await asyncio.sleep(0)
            assert not await link.probe(0.05)
            question = await link.ask("nobody.listens", b"", None, 600)
            await link.abandon()
            with pytest.raises(TransportError) as caught:
                await question.answer()
        assert caught.value.code == "unreachable"
        await bus.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        assert not [task for task in tasks if not task.cancelling()]

    run(scenario)


def test_a_bus_starts_without_a_server_and_finds_it_later(broker):
    async def scenario() -> None:
        broker.kill()
        found, heard = asyncio.Event(), asyncio.Event()

        async def hear(_message: object) -> None:
            heard.set()

        bus = await connect(broker.url, name="test", on_reconnect=found.set)
        assert not bus.connected
        await bus.subscribe("later.a", hear)
        with pytest.raises(TransportError) as caught:
            await bus.send("later.a", b"x")
        assert caught.value.code == "unreachable"
        await asyncio.to_thread(broker.restart)
        await asyncio.wait_for(found.wait(), WAIT_S)
        await bus.send("later.a", b"x")
        await asyncio.wait_for(heard.wait(), WAIT_S)
        await bus.close()

    run(scenario)


def test_a_reader_recovers_when_its_consumer_is_deleted(broker):
    async def scenario() -> None:
        async with (
            stream(broker, "deleted") as bus,
            bus.pull("deleted", "r", "deleted.>") as reader,
        ):
            await bus.publish("deleted.a", b"1")
            (first,) = await reader.next_batch(1, WAIT_S)
            await bus._live().api("CONSUMER.DELETE.deleted.r", {})
            await bus.publish("deleted.a", b"2")
            bodies = [first.data]
            while bodies[-1] != b"2":
                bodies += [message.data for message in await reader.next_batch(9, WAIT_S)]
            assert bodies[-2:] == [b"1", b"2"]

    run(scenario)


def test_a_reader_holds_a_bounded_number_of_bytes_ahead(broker):
    async def scenario() -> None:
        async with stream(broker, "ahead") as bus:
            body = bytes(1 << 18)
            await asyncio.gather(*(bus.publish("ahead.a", body) for _ in range(120)))
            async with bus.pull("ahead", "r", "ahead.>") as reader:
                count, most = 0, 0
                while count < 120:
                    batch = await reader.next_batch(1, WAIT_S)
                    assert batch
                    count += 1
                    await bus.last("ahead", "ahead.a")
                    most = max(most, reader._buffer_bytes)
            assert most <= 24 * MB

    run(scenario)


def test_an_error_that_the_server_reports_leads_to_a_new_connection():
    async def scenario() -> None:
        writers: list[asyncio.StreamWriter] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            writer.write(b'INFO {"server_id":"x","version":"2.15.1","max_payload":1048576}\r\n')
            with contextlib.suppress(ConnectionResetError):
                while line := await reader.readline():
                    if line == b"PING\r\n":
                        writer.write(b"PONG\r\n")
                    elif line.startswith(b"PUB"):  # a probe: it has one subscriber, its sender
                        subject = line.split()[1]
                        writer.write(b"MSG %b 1 0\r\n\r\n" % subject)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        back = asyncio.Event()
        bus = await connect(f"nats://127.0.0.1:{port}", name="test", on_reconnect=back.set)
        assert bus.connected
        writers[0].write(b"-ERR 'User Authentication Expired'\r\n")
        await asyncio.wait_for(back.wait(), WAIT_S)
        assert bus.connected
        await bus.close()
        assert len(writers) == 2
        for writer in writers:
            writer.transport.abort()
            with contextlib.suppress(ConnectionResetError):
                await writer.wait_closed()
        server.close()
        await server.wait_closed()

    run(scenario)


@pytest.mark.parametrize("url", ["", "localhost:4222", "http://localhost"])
def test_what_is_no_broker_url_is_refused(url):
    async def scenario() -> None:
        with pytest.raises(ConfigError) as caught:
            await connect(url, name="test")
        assert caught.value.code == "bad_url"

    run(scenario)
