"""The uplink brings every durable record to the learner, whatever the broker does meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

from edge_runtime.bus.base import Message
from edge_runtime.bus.memory import MemoryBroker, MemoryBus
from edge_runtime.clock import ManualClock
from edge_runtime.errors import CapacityError, TransportError
from edge_runtime.events.log import EventLog
from edge_runtime.events.uplink import ENVELOPE_BYTES, Uplink
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import Envelope, EventClass, Mark, ObservationRecord, Watermark

DEVICE = "EWR"
Learned = dict[tuple[int, EventClass], int]


class RefusingBus(MemoryBus):
    """A bus whose second publish is refused as full, after the third was stored."""

    count = 0

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker, "refusing", None)
        self._overtaken = asyncio.Event()

    async def publish(self, *arguments: object, **named: object) -> int:
        self.count += 1
        number = self.count
        if number == 2:
            await self._overtaken.wait()
            raise CapacityError("stream_full", "full")
        seq = await super().publish(*arguments, **named)  # type: ignore[arg-type]
        if number == 3:
            self._overtaken.set()
        return seq


class Learner:
    """Accepts envelopes as the learner does: no gap, nothing twice; tells what it holds."""

    def __init__(self, bus: MemoryBus) -> None:
        self._bus = bus
        self.learned: Learned = {}
        self.records: list[tuple[int, EventClass, int, object]] = []
        self.envelopes: list[tuple[Envelope, Message]] = []

    async def run(self) -> None:
        async with self._bus.pull(subjects.EVENTS_STREAM, "learner", subjects.EVENTS_ALL) as pull:
            while True:
                for message in await pull.next_batch(100, 60.0):
                    self.take(message)
                    await message.ack()
                with contextlib.suppress(TransportError):
                    await self.tell()

    def take(self, message: Message) -> None:
        envelope = codec.decode_envelope(message.data)
        assert message.subject == subjects.events(DEVICE, envelope.event_class)
        self.envelopes.append((envelope, message))
        key = (envelope.epoch, envelope.event_class)
        held = self.learned.get(key, 0)
        if envelope.base_seq > held + 1:
            return
        for seq, data in enumerate(envelope.records, envelope.base_seq):
            if seq > held:
                self.records.append((*key, seq, codec.decode_record(bytes(data))))
                self.learned[key] = seq

    async def tell(self) -> None:
        marks = [Mark(epoch, name, seq) for (epoch, name), seq in self.learned.items()]
        data = codec.encode(Watermark(1, DEVICE, marks))
        await self._bus.publish(subjects.watermark(DEVICE), data)


class World:
    """A device's log, the broker, and what runs over them."""

    def __init__(self, directory: Path, broker: MemoryBroker, bus: MemoryBus) -> None:
        self.directory, self.broker, self.bus = directory, broker, bus
        self.clock = ManualClock(1_700_000_000.0)
        self.learner = Learner(bus)
        self.logged: dict[tuple[int, EventClass], int] = {}

    def open_log(self, **settings: int) -> EventLog:
        return EventLog(
            self.directory,
            device=DEVICE,
            step=lambda: 1,
            linger_ms=0.0,
            **settings,  # type: ignore[arg-type]
        )

    async def log(self, log: EventLog, event_class: EventClass, count: int, size: int = 8) -> None:
        for _ in range(count):
            data = codec.encode(record(log.epoch, log.handed_out(event_class) + 1, size))
            seq = log.append(event_class, data)
        self.logged[log.epoch, event_class] = seq
        await log.wait_durable(event_class, seq)

    def all_learned(self) -> bool:
        return self.learner.learned == self.logged

    @asynccontextmanager
    async def uplink(
        self, log: EventLog, trim_floor: Callable[[], tuple[int, int]] | None = None
    ) -> AsyncIterator[Uplink]:
        uplink = Uplink(log, self.bus, DEVICE, self.clock, trim_floor=trim_floor)
        log.on_commit = uplink.wake
        async with running(uplink.run()):
            yield uplink


def record(epoch: int, seq: int, size: int) -> ObservationRecord:
    return ObservationRecord("flight_delay", "landed", float(seq), {"n": "x" * size, "e": epoch})


@asynccontextmanager
async def running(work: Coroutine[object, object, None]) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(work)
        yield
        task.cancel()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - it is the state of other tasks
            await asyncio.sleep(0)


def play(
    directory: Path,
    story: Callable[[World], Coroutine[object, object, None]],
    bus_of: type[RefusingBus] | None = None,
) -> None:
    async def main() -> None:
        broker = MemoryBroker()
        bus = bus_of(broker) if bus_of else await broker.connect()
        await ensure_streams(bus)
        await story(World(directory, broker, bus))
        await bus.close()

    asyncio.run(main())


async def ensure_streams(bus: MemoryBus) -> None:
    events, state = [subjects.EVENTS_ALL], subjects.STATE_ALL
    await bus.ensure_stream(subjects.EVENTS_STREAM, events, max_bytes=1 << 30, discard_new=True)
    await bus.ensure_stream(
        subjects.STATE_STREAM, state, max_bytes=1 << 30, per_subject=1, discard_new=False
    )


def test_every_record_arrives_in_order_over_epochs_and_classes(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        for _ in range(2):
            with world.open_log() as log:
                await world.log(log, "event", 700)
                await world.log(log, "label", 30)
        with world.open_log() as log:
            async with running(world.learner.run()), world.uplink(log) as uplink:
                await world.log(log, "event", 100)
                await until(world.all_learned)
                await until(lambda: uplink.statistics()["unlearned"] == 0)
        for key, last in world.logged.items():
            seqs = [seq for epoch, name, seq, _ in world.learner.records if (epoch, name) == key]
            assert seqs == list(range(1, last + 1))
        assert all(data == record(epoch, seq, 8) for epoch, _, seq, data in world.learner.records)

    play(tmp_path, story)


def test_a_backlog_goes_in_large_envelopes_labels_first(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        with world.open_log() as log:
            await world.log(log, "event", 2000, size=200)
            await world.log(log, "label", 10)
            async with running(world.learner.run()), world.uplink(log):
                await until(world.all_learned)
        sizes = [len(message.data) for _, message in world.learner.envelopes]
        classes = [envelope.event_class for envelope, _ in world.learner.envelopes]
        assert classes == ["label"] + ["event"] * 8
        assert max(sizes) <= ENVELOPE_BYTES
        assert min(sizes[1:-1]) > ENVELOPE_BYTES - 1000

    play(tmp_path, story)


def test_an_envelope_carries_cloudevents_attributes(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        with world.open_log() as log:
            await world.log(log, "event", 3)
            async with running(world.learner.run()), world.uplink(log):
                await until(world.all_learned)
        assert world.learner.envelopes[0][1].headers == {
            "ce-id": "EWR/1/event/1-3",
            "ce-source": "/headwater/EWR",
            "ce-type": "headwater.records.v1",
            "ce-specversion": "1.0",
            "ce-time": "2023-11-14T22:13:20+00:00",
        }

    play(tmp_path, story)


def test_a_start_goes_on_where_the_learner_stands(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        with world.open_log() as log:
            await world.log(log, "event", 10)
            world.learner.learned = {(1, "event"): 6}
            await world.learner.tell()
            async with running(world.learner.run()), world.uplink(log):
                await until(world.all_learned)
        assert [seq for _, _, seq, _ in world.learner.records] == [7, 8, 9, 10]
        assert world.learner.envelopes[0][0].base_seq == 7

    play(tmp_path, story)


def test_an_outage_is_waited_out(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        with world.open_log() as log:
            async with running(world.learner.run()), world.uplink(log) as uplink:
                await world.log(log, "event", 5)
                await until(world.all_learned)
                world.broker.down()
                await world.log(log, "event", 500)
                await until(lambda: uplink.statistics().get("failed_unreachable", 0) > 0)
                world.broker.up()
                await until(world.all_learned)

    play(tmp_path, story)


def test_what_a_broker_acknowledged_and_lost_is_sent_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        with world.open_log() as log:
            async with world.uplink(log) as uplink:
                await world.log(log, "event", 500)
                await until(lambda: uplink.statistics()["records"] == 500)
                world.broker.down()
                world.broker.streams.pop(subjects.EVENTS_STREAM)
                world.broker.up()
                await ensure_streams(world.bus)
                async with running(world.learner.run()):
                    await until(world.all_learned)

    play(tmp_path, story)


def test_an_envelope_refused_before_one_that_was_stored_reaches_the_learner(
    tmp_path: Path,
) -> None:
    async def story(world: World) -> None:
        with world.open_log() as log:
            await world.log(log, "event", 2000, size=200)
            async with world.uplink(log) as uplink:
                await until(lambda: uplink.statistics().get("failed_stream_full") == 1)
                async with running(world.learner.run()):
                    await until(world.all_learned)
        bases = [envelope.base_seq for envelope, _ in world.learner.envelopes]
        assert bases != sorted(bases), "nothing was stored behind the refused envelope"

    play(tmp_path, story, RefusingBus)


def test_an_envelope_that_the_learner_never_got_is_sent_again_once_it_speaks(
    tmp_path: Path,
) -> None:
    async def story(world: World) -> None:
        with world.open_log() as log:
            async with world.uplink(log) as uplink:
                await world.log(log, "event", 5)
                await until(lambda: uplink.statistics()["records"] == 5)
                stream = world.broker.streams[subjects.EVENTS_STREAM]
                stream.messages.clear()
                await world.learner.tell()
                world.clock.advance(6.0)
                assert uplink.statistics()["rewinds"] == 0
                await world.learner.tell()
                await until(lambda: uplink.statistics()["rewinds"] == 1)
                async with running(world.learner.run()):
                    await until(world.all_learned)

    play(tmp_path, story)


def test_the_log_is_trimmed_at_the_watermark_and_not_at_the_acknowledgement(
    tmp_path: Path,
) -> None:
    async def story(world: World) -> None:
        with world.open_log(segment_bytes=400) as log:
            async with world.uplink(log) as uplink:
                for _ in range(5):
                    await world.log(log, "event", 10)
                await until(lambda: uplink.statistics()["records"] == 50)
                assert log.epochs("event") == [(1, 1, 50)]
                async with running(world.learner.run()):
                    await until(lambda: log.epochs("event") == [(1, 41, 50)])

    play(tmp_path, story)


def test_what_the_window_snapshot_does_not_cover_is_not_trimmed(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        with world.open_log(segment_bytes=400) as log:
            for _ in range(5):
                await world.log(log, "event", 10)
        with world.open_log(segment_bytes=400) as log:
            for _ in range(5):
                await world.log(log, "label", 10)
            floor = [(1, 25)]
            async with running(world.learner.run()), world.uplink(log, lambda: floor[0]):
                await until(lambda: log.epochs("event") == [(1, 21, 50)])
                await until(lambda: log.epochs("label") == [(2, 41, 50)])
                floor[0] = (2, 0)
                await world.learner.tell()
                await until(lambda: log.epochs("event") == [])

    play(tmp_path, story)


def test_a_watermark_that_is_garbage_or_of_another_device_is_counted(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        with world.open_log() as log:
            async with running(world.learner.run()), world.uplink(log) as uplink:
                other = codec.encode(Watermark(1, "JFK", [Mark(1, "event", 10)]))
                await until(lambda: uplink.statistics()["attempts"] == 1)
                for data in (b"\xc1", other):
                    await world.bus.send(subjects.watermark(DEVICE), data)
                await until(lambda: uplink.statistics().get("bad_watermarks") == 2)
                await world.log(log, "event", 10)
                await until(world.all_learned)

    play(tmp_path, story)
