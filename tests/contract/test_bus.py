"""The contract of the bus: what base.Bus promises, kept by NATS and by the fake in memory alike."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from itertools import count

import pytest

from cloud_learner.broker import Broker
from edge_runtime.bus.base import PAYLOAD_BYTES_MAX, UNHEARD_MAX, Bus, Message, PullSubscription
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.bus.nats import connect
from edge_runtime.errors import CapacityError, RequestError, TransportError

MB = 1 << 20
WAIT_S = 10.0  # how long a test waits for what must come
QUIET_S = 0.05  # how long it waits for what must not come


class World:
    """A broker that can fail, with a stream and subjects that no other test uses."""

    _numbers = count()

    def __init__(self, dial: Callable[..., Awaitable[Bus]], down, up) -> None:
        number = next(self._numbers)
        self.stream = f"T{number}"
        self._prefix = f"t{number}"
        self._dial = dial
        self.down = down
        self.up = up
        self.buses: list[Bus] = []

    async def bus(self, **options) -> Bus:
        bus = await self._dial(name="test", **options)
        self.buses.append(bus)
        return bus

    async def ready_bus(self, **options) -> Bus:
        bus = await self.bus(**options)
        await self.ensure(bus)
        return bus

    async def ensure(self, bus: Bus, **limits) -> None:
        settings = {"max_bytes": 32 * MB, "discard_new": True, **limits}
        await bus.ensure_stream(self.stream, [self.subject(">")], **settings)

    def subject(self, name: str) -> str:
        return f"{self._prefix}.{name}"

    def pull(self, bus: Bus, name: str = ">"):
        return bus.pull(self.stream, "reader", self.subject(name))


Scenario = Callable[[World], Awaitable[None]]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker.start(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture(params=["memory", "nats"])
def play(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """Runs a scenario in a fresh event loop against one of the two buses."""
    server = request.getfixturevalue("broker") if request.param == "nats" else None

    async def played(scenario: Scenario) -> None:
        world = nats_world(server) if server else memory_world()
        try:
            async with asyncio.timeout(30):
                await scenario(world)
        finally:
            for bus in world.buses:
                await bus.close()

    return lambda scenario: asyncio.run(played(scenario))


def nats_world(server: Broker) -> World:
    async def dial(**options) -> Bus:
        return await connect(server.url, **options)

    return World(dial, server.kill, server.restart)


def memory_world() -> World:
    server = MemoryBroker()
    return World(server.connect, server.down, server.up)


class Inbox:
    """Collects what a subscription delivers."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Message] = asyncio.Queue()

    async def __call__(self, message: Message) -> None:
        await self._queue.put(message)

    async def next(self) -> Message:
        return await asyncio.wait_for(self._queue.get(), WAIT_S)

    def empty(self) -> bool:
        return self._queue.empty()


async def read(reader: PullSubscription, wanted: int) -> list[Message]:
    """Exactly `wanted` messages, or those that came in time."""
    messages: list[Message] = []
    while len(messages) < wanted:
        batch = await reader.next_batch(wanted - len(messages), WAIT_S)
        if not batch:
            break
        messages += batch
    return messages


async def read_until(reader: PullSubscription, body: bytes) -> list[Message]:
    """The messages up to the one with this body."""
    messages = await read(reader, 1)
    while messages[-1].data != body:
        messages += await read(reader, 1)
    return messages


async def ack(messages: list[Message]) -> None:
    for message in messages:
        await message.ack()


def bodies(messages: list[Message]) -> list[bytes]:
    return [message.data for message in messages]


def test_publish_returns_the_place_in_the_stream(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        places = [await bus.publish(world.subject("a"), b"x") for _ in range(3)]
        assert places == [1, 2, 3]
        assert bus.statistics()["published"] == 3

    play(scenario)


def test_publish_of_the_same_message_id_stores_once_and_succeeds(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        first = await bus.publish(world.subject("a"), b"x", message_id="EWR/1/event/1")
        again = await bus.publish(world.subject("a"), b"x", message_id="EWR/1/event/1")
        other = await bus.publish(world.subject("a"), b"x", message_id="EWR/1/event/2")
        assert (first, again, other) == (1, 1, 2)
        assert bus.statistics()["duplicates"] == 1

    play(scenario)


def test_many_publishes_may_be_outstanding(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        subject = world.subject("a")
        places = await asyncio.gather(*(bus.publish(subject, b"%d" % i) for i in range(300)))
        assert sorted(places) == list(range(1, 301))

    play(scenario)


def test_a_message_keeps_its_bytes_and_headers(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        body = bytes(range(256)) * 400
        headers = {"ce-id": "EWR/1/7", "ce-time": "2013-01-01T00:00:00Z"}
        seq = await bus.publish(world.subject("a"), body, headers=headers, message_id="m")
        found = await bus.last(world.stream, world.subject("a"))
        assert found is not None
        assert (found.subject, found.seq) == (world.subject("a"), seq)
        assert (found.data, found.headers) == (body, headers)
        async with world.pull(bus) as reader:
            (pulled,) = await read(reader, 1)
        assert (pulled.data, pulled.headers, pulled.seq) == (body, headers, seq)

    play(scenario)


def test_publish_on_a_subject_of_no_stream_is_refused(play):
    async def scenario(world: World) -> None:
        bus = await world.bus()
        with pytest.raises(TransportError) as caught:
            await bus.publish("nobody.holds.this", b"x")
        assert caught.value.code == "no_stream"

    play(scenario)


@pytest.mark.parametrize("subject", ["", "a b", "a..b", ".a", "a.*", "a.>", "a\r\nPUB b 1"])
def test_a_subject_that_cannot_be_published_on_is_refused(play, subject):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        for attempt in (bus.publish, bus.send):
            with pytest.raises(RequestError) as caught:
                await attempt(subject, b"x")
            assert caught.value.code == "bad_subject"
        assert await bus.publish(world.subject("a"), b"the bus still works") == 1

    play(scenario)


def test_a_message_above_the_limit_is_refused_and_the_largest_is_carried(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        with pytest.raises(RequestError) as caught:
            await bus.publish(world.subject("a"), bytes(PAYLOAD_BYTES_MAX))
        assert caught.value.code == "too_large"
        largest = bytes(PAYLOAD_BYTES_MAX - 64)
        await bus.publish(world.subject("a"), largest)
        async with world.pull(bus) as reader:
            assert bodies(await read(reader, 1)) == [largest]

    play(scenario)


def test_a_full_stream_refuses_and_keeps_what_it_has(play):
    async def scenario(world: World) -> None:
        bus = await world.bus()
        await world.ensure(bus, max_bytes=64 * 1024)
        for _ in range(10):
            await bus.publish(world.subject("a"), bytes(4096))
        with pytest.raises(CapacityError) as caught:
            await bus.publish(world.subject("a"), bytes(40_000))
        assert caught.value.code == "stream_full"
        await world.ensure(bus, max_bytes=128 * 1024)
        assert await bus.publish(world.subject("a"), bytes(40_000)) == 11

    play(scenario)


def test_a_stream_that_discards_old_messages_never_refuses(play):
    async def scenario(world: World) -> None:
        bus = await world.bus()
        await world.ensure(bus, max_bytes=64 * 1024, discard_new=False)
        for index in range(40):
            await bus.publish(world.subject("a"), b"%4096d" % index)
        async with world.pull(bus) as reader:
            (oldest,) = await read(reader, 1)
        assert int(oldest.data) > 20

    play(scenario)


def test_a_subject_keeps_its_newest_messages_only_even_when_the_stream_is_full(play):
    async def scenario(world: World) -> None:
        bus = await world.bus()
        await world.ensure(bus, max_bytes=64 * 1024, per_subject=1, discard_new=False)
        for index in range(40):
            await bus.publish(world.subject("a"), b"%4096d" % index)
        await bus.publish(world.subject("b"), b"only")
        async with world.pull(bus) as reader:
            messages = await read(reader, 2)
        assert [int(messages[0].data), messages[1].data] == [39, b"only"]

    play(scenario)


def test_a_full_subject_refuses_alone_until_what_it_holds_is_dealt_with(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        await world.ensure(bus, per_subject=2)
        for index in range(2):
            await bus.publish(world.subject("a"), b"%d" % index)
        for _ in range(3):
            with pytest.raises(CapacityError) as caught:
                await bus.publish(world.subject("a"), b"refused", message_id="m")
            assert caught.value.code == "stream_full"
        await bus.publish(world.subject("b"), b"other")
        async with world.pull(bus) as reader:
            messages = await read(reader, 3)
            assert bodies(messages) == [b"0", b"1", b"other"]
            await ack(messages)
        assert await bus.purge(world.stream) == 3
        assert await bus.publish(world.subject("a"), b"again", message_id="m") == 4

    play(scenario)


def test_a_purge_drops_what_all_readers_have_acknowledged_and_no_more(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        for index in range(6):
            await bus.publish(world.subject("a"), b"%d" % index)
        assert await bus.purge(world.stream) == 0  # nobody reads
        async with world.pull(bus) as reader:
            held = await read(reader, 6)
            await ack([*held[:3], held[5]])
        async with bus.pull(world.stream, "slow", world.subject(">")) as slow:
            assert await bus.purge(world.stream) == 0
            await ack((await read(slow, 6))[:2])
        assert await bus.purge(world.stream) == 2
        assert await bus.purge(world.stream) == 0
        async with world.pull(bus) as reader:
            assert bodies(await read(reader, 2)) == [b"3", b"4"]
        async with bus.pull(world.stream, "slow", world.subject(">")) as slow:
            assert bodies(await read(slow, 4)) == [b"2", b"3", b"4", b"5"]

    play(scenario)


def test_a_purge_of_an_unknown_stream_is_refused(play):
    async def scenario(world: World) -> None:
        bus = await world.bus()
        with pytest.raises(TransportError):
            await bus.purge("NONE")

    play(scenario)


def test_ensuring_a_stream_twice_keeps_its_messages(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        await bus.publish(world.subject("a"), b"kept")
        await world.ensure(bus)
        await world.ensure(bus, max_bytes=16 * MB, per_subject=5)
        found = await bus.last(world.stream, world.subject("a"))
        assert found is not None
        assert found.data == b"kept"

    play(scenario)


def test_last_is_the_newest_of_exactly_that_subject(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        for name, body in (("a", b"old"), ("a", b"new"), ("a.b", b"deeper")):
            await bus.publish(world.subject(name), body)
        found = await bus.last(world.stream, world.subject("a"))
        assert found is not None
        assert (found.data, found.seq) == (b"new", 2)
        await found.ack()
        assert await bus.last(world.stream, world.subject("c")) is None

    play(scenario)


def test_last_of_an_unknown_stream_is_refused(play):
    async def scenario(world: World) -> None:
        bus = await world.bus()
        with pytest.raises(TransportError) as caught:
            await bus.last("NONE", "a")
        assert caught.value.code == "no_stream"

    play(scenario)


def test_last_many_answers_in_the_order_asked(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        subjects = [world.subject(f"chunk.{index}") for index in range(100)]
        for index in range(0, 100, 2):
            await bus.publish(subjects[index], b"%d" % index)
        found = await bus.last_many(world.stream, subjects[::-1])
        expected = [b"%d" % index if index % 2 == 0 else None for index in range(99, -1, -1)]
        assert [message and message.data for message in found] == expected
        assert await bus.last_many(world.stream, []) == []

    play(scenario)


def test_core_messages_reach_the_matching_subscribers_in_order(play):
    async def scenario(world: World) -> None:
        here, there = await world.bus(), await world.bus()
        exact, token, rest = Inbox(), Inbox(), Inbox()
        await there.subscribe(world.subject("cmd.go"), exact)
        await there.subscribe(world.subject("*.go"), token)
        await there.subscribe(world.subject(">"), rest)
        await here.send(world.subject("cmd.stop.now"), b"1")
        await here.send(world.subject("cmd.go"), b"2")
        await here.send(world.subject("end"), b"3")
        assert [(await rest.next()).data for _ in range(3)] == [b"1", b"2", b"3"]
        assert (await exact.next()).data == (await token.next()).data == b"2"
        assert exact.empty()
        assert token.empty()

    play(scenario)


def test_a_published_message_reaches_subscribers_too(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        inbox = Inbox()
        await bus.subscribe(world.subject("wm.EWR"), inbox)
        await bus.publish(world.subject("wm.EWR"), b"held", headers={"a": "1"}, message_id="m")
        message = await inbox.next()
        assert (message.data, message.headers) == (b"held", {"a": "1"})
        await message.ack()

    play(scenario)


def test_a_closed_subscription_hears_no_more(play):
    async def scenario(world: World) -> None:
        bus = await world.bus()
        closed, open_ = Inbox(), Inbox()
        subscription = await bus.subscribe(world.subject("a"), closed)
        await bus.subscribe(world.subject("a"), open_)
        await subscription.close()
        await subscription.close()
        await bus.send(world.subject("a"), b"x")
        await open_.next()
        assert closed.empty()

    play(scenario)


def test_a_failing_callback_is_counted_and_the_deliveries_go_on(play):
    async def scenario(world: World) -> None:
        bus = await world.bus()
        inbox = Inbox()

        async def callback(message: Message) -> None:
            await inbox(message)
            raise ValueError("a callback of a test")

        await bus.subscribe(world.subject("a"), callback)
        await bus.send(world.subject("a"), b"1")
        await bus.send(world.subject("a"), b"2")
        assert [(await inbox.next()).data for _ in range(2)] == [b"1", b"2"]
        await bus.send(world.subject("a"), b"3")
        await inbox.next()
        assert bus.statistics()["callback_errors"] >= 2

    play(scenario)


def test_what_a_slow_subscriber_misses_is_counted(play):
    async def scenario(world: World) -> None:
        here, there = await world.bus(), await world.bus()
        held, inbox = asyncio.Event(), Inbox()

        async def slow(message: Message) -> None:
            await held.wait()
            await inbox(message)

        await there.subscribe(world.subject("a"), slow)
        quick = Inbox()
        await there.subscribe(world.subject("b"), quick)
        sent = UNHEARD_MAX + 200
        for number in range(sent):
            await here.send(world.subject("a"), b"%d" % number)
            if number % 500 == 0:
                await asyncio.sleep(0)
        await here.send(world.subject("b"), b"others are heard")
        await quick.next()
        dropped = there.statistics()["dropped"]
        assert 0 < dropped <= 200
        held.set()
        heard = [(await inbox.next()).data for _ in range(sent - dropped)]
        assert heard == [b"%d" % number for number in range(sent - dropped)]
        await here.send(world.subject("a"), b"again")
        assert (await inbox.next()).data == b"again"
        assert here.statistics()["dropped"] == 0

    play(scenario)


def test_pull_reads_all_in_stream_order(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        wanted = [b"%d" % index for index in range(700)]
        for start in range(0, 700, 100):
            await asyncio.gather(
                *(bus.publish(world.subject("a"), body) for body in wanted[start : start + 100])
            )
        async with world.pull(bus) as reader:
            messages = await read(reader, 700)
            await ack(messages)
            assert await reader.next_batch(10, QUIET_S) == []
        assert bodies(messages) == wanted
        assert [message.seq for message in messages] == list(range(1, 701))

    play(scenario)


def test_pull_waits_for_what_is_published_later(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        async with world.pull(bus) as reader:
            waiting = asyncio.create_task(reader.next_batch(5, WAIT_S))
            await bus.publish(world.subject("a"), b"late")
            assert bodies(await waiting) == [b"late"]

    play(scenario)


def test_pull_gives_at_most_the_messages_asked_for(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        for index in range(5):
            await bus.publish(world.subject("a"), b"%d" % index)
        async with world.pull(bus) as reader:
            assert len(await reader.next_batch(2, WAIT_S)) <= 2
            assert len(await reader.next_batch(1, WAIT_S)) == 1

    play(scenario)


def test_pull_reads_only_its_subject(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        for name in ("ev.EWR.event", "other", "ev.JFK.label"):
            await bus.publish(world.subject(name), name.encode())
        async with world.pull(bus, "ev.*.*") as reader:
            assert bodies(await read(reader, 2)) == [b"ev.EWR.event", b"ev.JFK.label"]
            assert await reader.next_batch(1, QUIET_S) == []

    play(scenario)


def test_a_reopened_pull_starts_at_the_first_unacknowledged_message(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        for index in range(6):
            await bus.publish(world.subject("a"), b"%d" % index)
        async with world.pull(bus) as reader:
            await ack((await read(reader, 4))[:2])
        async with world.pull(bus) as reader:
            messages = await read(reader, 4)
            assert bodies(messages) == [b"2", b"3", b"4", b"5"]
            await ack(messages)
        async with world.pull(bus) as reader:
            assert await reader.next_batch(1, QUIET_S) == []

    play(scenario)


def test_a_message_left_out_of_the_acknowledgements_comes_again(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        for index in range(3):
            await bus.publish(world.subject("a"), b"%d" % index)
        async with world.pull(bus) as reader:
            first, _, third = await read(reader, 3)
            await ack([first, third])
        async with world.pull(bus) as reader:
            (again,) = await read(reader, 1)
        assert again.data == b"1"

    play(scenario)


def test_a_cancelled_read_loses_nothing(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        async with world.pull(bus) as reader:
            reading = asyncio.create_task(reader.next_batch(10, WAIT_S))
            await asyncio.sleep(0)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await bus.publish(world.subject("a"), b"x")
            assert bodies(await read(reader, 1)) == [b"x"]

    play(scenario)


def test_pull_from_an_unknown_stream_is_refused(play):
    async def scenario(world: World) -> None:
        bus = await world.bus()
        with pytest.raises(TransportError):
            async with bus.pull("NONE", "reader", "a"):
                pass

    play(scenario)


def test_a_closed_bus_refuses_and_closes_again(play):
    async def scenario(world: World) -> None:
        bus = await world.ready_bus()
        assert bus.connected
        await bus.close()
        await bus.close()
        assert not bus.connected
        for attempt in (
            bus.publish(world.subject("a"), b"x"),
            bus.send(world.subject("a"), b"x"),
            bus.last(world.stream, world.subject("a")),
        ):
            with pytest.raises(TransportError) as caught:
                await attempt
            assert caught.value.code == "unreachable"

    play(scenario)


def test_what_was_sent_before_close_arrives(play):
    async def scenario(world: World) -> None:
        here, there = await world.bus(), await world.ready_bus()
        inbox = Inbox()
        await there.subscribe(world.subject("a"), inbox)
        await here.send(world.subject("a"), b"goodbye")
        await here.close()
        assert (await inbox.next()).data == b"goodbye"

    play(scenario)


def test_after_an_outage_everything_goes_on(play):
    async def scenario(world: World) -> None:
        back = asyncio.Event()
        bus = await world.ready_bus(on_reconnect=back.set)
        inbox = Inbox()
        await bus.subscribe(world.subject("b"), inbox)
        for index in range(4):
            await bus.publish(world.subject("a"), b"%d" % index)
        async with world.pull(bus, "a") as reader:
            held = await read(reader, 2)
            await ack(held[:1])
            world.down()
            await until_unreachable(bus, world.subject("c"))
            assert not bus.connected
            await held[1].ack()
            assert await reader.next_batch(1, QUIET_S) == []
            world.up()
            await asyncio.wait_for(back.wait(), WAIT_S)
            assert bus.connected
            await bus.publish(world.subject("b"), b"after")
            assert (await inbox.next()).data == b"after"
            messages = await read_until(reader, b"3")
            assert bodies(messages)[-3:] == [b"1", b"2", b"3"]
        assert bus.statistics()["reconnects"] == 1
        assert bus.statistics()["acks_lost"] == 1

    play(scenario)


async def until_unreachable(bus: Bus, subject: str) -> None:
    """Publish until the bus has noticed the outage."""
    while bus.connected:
        try:
            await bus.publish(subject, b"x")
        except TransportError as error:
            assert error.code == "unreachable"  # noqa: PT017
        await asyncio.sleep(0)


def test_a_question_is_answered_by_who_listens(play):
    async def scenario(world: World) -> None:
        asking, answering = await world.bus(), await world.bus()

        async def double(message: Message) -> None:
            await message.answer(message.data * 2)

        subscription = await answering.subscribe(world.subject("ask"), double)
        assert await asking.ask(world.subject("ask"), b"ab") == b"abab"
        await asking.send(world.subject("ask"), b"asks for nothing")
        assert await asking.ask(world.subject("ask"), b"c") == b"cc"
        assert answering.statistics()["callback_errors"] == 0
        await subscription.close()

    play(scenario)


def test_a_question_that_nobody_answers_ends(play):
    async def scenario(world: World) -> None:
        bus = await world.bus()
        with pytest.raises(TransportError, match="nobody"):
            await bus.ask(world.subject("ask"), b"")

        async def silent(_message: Message) -> None:
            pass

        await bus.subscribe(world.subject("ask"), silent)
        with pytest.raises(TransportError, match="timeout"):
            await bus.ask(world.subject("ask"), b"", timeout_s=QUIET_S)

    play(scenario)
