"""Connections that look open and are not: noticed and replaced, whichever way they are dead."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from cloud_learner.broker import Broker
from cloud_learner.simulate.chaos import Proxy, half_open
from edge_runtime.bus.keeper import HALF_OPEN_S
from edge_runtime.bus.nats import connect
from edge_runtime.errors import TransportError

WAIT_S = 10.0
LIMIT_S = 15.0
MB = 1 << 20


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker.start(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.mark.parametrize(
    "connections", [3, pytest.param(100, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_half_open_connections_with_unsent_bytes_are_replaced(broker, connections):
    took = asyncio.run(half_open(broker.url, connections))
    assert len(took) == connections
    assert max(took) < LIMIT_S, sorted(took)


def test_the_bounds_of_the_probes_leave_time_to_dial():
    assert HALF_OPEN_S + 2.0 < LIMIT_S


@pytest.mark.slow
def test_a_connection_that_only_hears_is_replaced_although_much_comes_in(broker):
    async def scenario() -> None:
        async with Proxy(broker.url) as proxy:
            speaker = await connect(broker.url, name="speaker")
            back, heard = asyncio.Event(), asyncio.Event()
            bus = await connect(proxy.url, name="deaf", on_reconnect=back.set)

            async def hear(_message: object) -> None:
                heard.set()

            await bus.subscribe("news.>", hear)
            proxy.freeze(up=True, down=False)

            async def speak() -> None:
                while not back.is_set():
                    await speaker.send("news.now", b"x")
                    await asyncio.sleep(0.05)

            async with asyncio.timeout(LIMIT_S):
                await asyncio.gather(speak(), back.wait())
            assert heard.is_set()
            await bus.close()
            await speaker.close()

    asyncio.run(scenario())


def test_a_cut_connection_is_replaced_at_once_and_loses_and_doubles_nothing(broker):
    async def scenario() -> None:
        async with Proxy(broker.url) as proxy:
            back = asyncio.Event()
            bus = await connect(proxy.url, name="cut", on_reconnect=back.set)
            await bus.ensure_stream("CUT", ["cut.>"], max_bytes=MB, discard_new=True)
            for number in range(60):
                if number % 20 == 10:
                    proxy.cut()
                while True:
                    try:
                        await bus.publish("cut.a", b"%d" % number, message_id=str(number))
                        break
                    except TransportError as error:
                        assert error.code == "unreachable"  # noqa: PT017
                        await asyncio.wait_for(back.wait(), WAIT_S)
                        back.clear()
            async with bus.pull("CUT", "r", "cut.>") as reader:
                bodies: list[bytes] = []
                while len(bodies) < 60:
                    bodies += [each.data for each in await reader.next_batch(60, WAIT_S)]
            assert bodies == [b"%d" % number for number in range(60)]
            assert proxy.accepted == 4
            await bus.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_slow_network_is_no_dead_one(broker):
    """Larger than what passes in one probe: 512 KB at 128 KB/s."""

    async def scenario() -> None:
        async with Proxy(broker.url, latency_s=0.002, bytes_per_s=1 << 17) as proxy:
            bus = await connect(proxy.url, name="slow")
            await bus.ensure_stream("SLOW", ["slow.>"], max_bytes=4 * MB, discard_new=True)
            await asyncio.gather(
                *(bus.publish("slow.a", bytes(1 << 16), timeout_s=20) for _ in range(8))
            )
            assert bus.statistics()["reconnects"] == 0
            await bus.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))
