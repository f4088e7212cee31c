"""The uplink brings every durable record to the learner, whatever the broker does meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import random
import re
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from edge_runtime.bus.base import Message, Subscription
from edge_runtime.bus.memory import MemoryBroker, MemoryBus
from edge_runtime.clock import ManualClock
from edge_runtime.config import UplinkConfig
from edge_runtime.errors import CapacityError, HeadwaterError, TransportError
from edge_runtime.events.log import CLASSES, EventLog, Piece
from edge_runtime.events.packing import ENVELOPE_BYTES, RECORDS_BYTES_MAX
from edge_runtime.events.tally import EPOCHS_KEPT
from edge_runtime.events.uplink import Uplink
from edge_runtime.events.watermarks import Watermarks, ends
from edge_runtime.events.withhold import Withhold, in_sample
from edge_runtime.files import OsFiles
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import (
    OMITTED,
    Envelope,
    EventClass,
    Mark,
    ObservationRecord,
    PredictionRecord,
    Scored,
    Watermark,
)

DEVICE = "EWR"
SLOW = pytest.mark.slow
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


class AckLosingBus(MemoryBus):
    """A bus that stores the first envelope, and loses its acknowledgement."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker, "losing", None)
        self.lost = 0
        self.message_ids: list[str | None] = []

    async def publish(self, subject: str, *arguments: object, **named: object) -> int:
        seq = await super().publish(subject, *arguments, **named)  # type: ignore[arg-type]
        if subject.startswith("hw.ev."):
            self.message_ids.append(named["message_id"])  # type: ignore[arg-type]
            if not self.lost:
                self.lost += 1
                raise TransportError("timeout", "no answer within 5 s")
        return seq


class PickyBus(MemoryBus):
    """A bus that refuses class event while `error` is set, and notes when it was asked."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker, "picky", None)
        self.error: HeadwaterError | None = None
        self.asked_s: list[float] = []
        self.clock: ManualClock | None = None

    async def publish(self, subject: str, *arguments: object, **named: object) -> int:
        if subject == subjects.events(DEVICE, "event") and self.error is not None:
            now_s = self.clock.monotonic_s() if self.clock else asyncio.get_running_loop().time()
            self.asked_s.append(now_s)
            await asyncio.sleep(0)
            raise self.error
        return await super().publish(subject, *arguments, **named)  # type: ignore[arg-type]


class HeldBus(MemoryBus):
    """A bus that refuses events as full, then does `then` with them; counts the loop's turns."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker, "held", None)
        self.is_full, self.turns = True, 0
        self.then: Callable[[], Coroutine[object, object, None]] | None = None

    async def publish(self, subject: str, *arguments: object, **named: object) -> int:
        is_event = subject == subjects.events(DEVICE, "event")
        if is_event and self.is_full:
            raise CapacityError("stream_full", "full")
        seq = await super().publish(subject, *arguments, **named)  # type: ignore[arg-type]
        if is_event and self.then is not None:
            then, self.then = self.then, None
            await then()
        return seq

    def statistics(self) -> dict[str, int]:
        self.turns += 1  # asked once in a turn
        return super().statistics()

    async def turns_in(self, seconds: float) -> int:
        before = self.turns
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), seconds)
        return self.turns - before


class ChaosBus(MemoryBus):
    """A bus that, by `rng`, refuses envelopes, or stores them and does not say so."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker, "chaos", None)
        self.rng: random.Random | None = None

    async def publish(self, subject: str, *arguments: object, **named: object) -> int:
        fault = self.rng.random() if self.rng and subject.startswith("hw.ev.") else 1.0
        for _ in range(int(40 * fault)):
            await asyncio.sleep(0)  # answers come in another order than questions
        if fault < 0.1:
            raise CapacityError("stream_full", "full")
        if fault < 0.15:
            raise TransportError("timeout", "never arrived")
        seq = await super().publish(subject, *arguments, **named)  # type: ignore[arg-type]
        if fault < 0.2:
            raise TransportError("timeout", "stored, and the answer was lost")
        return seq


class ScriptedLog:
    """What the uplink asks of a log, from a table: each number is a record, or why it is lost."""

    def __init__(self, epoch: int, priors: dict[int, int] | None = None) -> None:
        self.epoch, self._priors = epoch, priors or {}
        self.numbers: dict[tuple[EventClass, int], list[bytes | str]] = {}
        self.told: list[tuple[EventClass, int, int]] = []

    def add(self, event_class: EventClass, epoch: int, *numbers: bytes | str) -> None:
        self.numbers.setdefault((event_class, epoch), []).extend(numbers)

    def owed(self, event_class: EventClass) -> list[tuple[int, int]]:
        return sorted(
            (epoch, len(numbers))
            for (name, epoch), numbers in self.numbers.items()
            if name == event_class
        )

    def ends(self, event_class: EventClass) -> list[tuple[int, int]]:
        return [(epoch, last) for epoch, last in self.owed(event_class) if epoch != self.epoch]

    def piece(
        self, event_class: EventClass, epoch: int, after_seq: int, max_bytes: int, max_records: int
    ) -> Piece | None:
        assert max_bytes > 0 < max_records
        left = self.numbers[event_class, epoch][after_seq:]
        reason = left[0] if left and isinstance(left[0], str) else ""
        skipped = len(list(itertools.takewhile(lambda number: number == reason, left)))
        records = list(itertools.takewhile(lambda n: isinstance(n, bytes), left[skipped:]))
        return Piece(skipped, reason, after_seq + skipped + 1, records) if left else None

    def recent(self, *_: object) -> None:
        return None

    def durable(self, event_class: EventClass) -> tuple[int, int]:
        return self.epoch, len(self.numbers.get((event_class, self.epoch), ()))

    def prior(self, epoch: int) -> int:
        return self._priors.get(epoch, 0)

    def learned(self, event_class: EventClass, epoch: int, seq: int) -> None:
        self.told.append((event_class, epoch, seq))


class Learner:
    """Accepts envelopes as the learner does: no gap, nothing twice; tells what it holds."""

    def __init__(self, bus: MemoryBus) -> None:
        self._bus = bus
        self.learned: Learned = {}
        self.records: list[tuple[int, EventClass, int, object]] = []
        self.dropped: list[tuple[int, EventClass, int, str]] = []
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
        data = codec.unpack_envelope(message.data, message.headers)
        envelope = codec.decode_envelope(data)
        assert message.subject == subjects.events(DEVICE, envelope.event_class)
        self.envelopes.append((envelope, message))
        key = (envelope.epoch, envelope.event_class)
        held = self.learned.get(key, 0)
        if envelope.base_seq - envelope.skipped > held + 1:
            return
        for seq in range(max(held + 1, envelope.base_seq - envelope.skipped), envelope.base_seq):
            self.dropped.append((*key, seq, envelope.reason))
            self.learned[key] = seq
        for seq, raw in enumerate(map(bytes, envelope.records), envelope.base_seq):
            if seq <= held:
                continue
            self.learned[key] = seq
            if len(raw) == 1:
                self.dropped.append((*key, seq, OMITTED[raw[0]]))
            else:
                self.records.append((*key, seq, codec.decode_record(raw)))

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

    def open_log(self, **settings: object) -> EventLog:
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
        self,
        log: EventLog | ScriptedLog,
        trim_floor: Callable[[], tuple[int, int]] | None = None,
        withhold: Withhold | None = None,
    ) -> AsyncIterator[Uplink]:
        uplink = Uplink(log, self.bus, DEVICE, self.clock, trim_floor=trim_floor, withhold=withhold)
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
    bus_of: type[MemoryBus] | None = None,
) -> None:
    async def main() -> None:
        broker = MemoryBroker()
        bus = bus_of(broker) if bus_of else await broker.connect()  # type: ignore[call-arg]
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
            await world.log(log, "event", 8000, size=200)
            await world.log(log, "label", 10)
            async with running(world.learner.run()), world.uplink(log):
                await until(world.all_learned)
        sizes = [len(codec.encode(envelope)) for envelope, _ in world.learner.envelopes]
        classes = [envelope.event_class for envelope, _ in world.learner.envelopes]
        assert classes == ["label"] + ["event"] * (len(classes) - 1)
        assert min(sizes[1:-1]) > ENVELOPE_BYTES - 1000
        assert ENVELOPE_BYTES < max(sizes) <= RECORDS_BYTES_MAX
        assert max(len(message.data) for _, message in world.learner.envelopes) <= ENVELOPE_BYTES

    play(tmp_path, story)


def test_an_envelope_carries_cloudevents_attributes(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        with world.open_log() as log:
            await world.log(log, "event", 3)
            async with running(world.learner.run()), world.uplink(log):
                await until(world.all_learned)
        headers = dict(world.learner.envelopes[0][1].headers)
        assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", headers.pop("traceparent"))
        assert headers == {
            "ce-id": "EWR/1/event/1-3",
            "ce-source": "/headwater/EWR",
            "ce-type": "headwater.records.v1",
            "ce-specversion": "1.0",
            "ce-time": "2023-11-14T22:13:20+00:00",
            "ce-dataschema": "urn:headwater:schema:envelope:1",
            "ce-datacontenttype": "application/msgpack",
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
                await until(lambda: uplink.statistics()["held"] == 1)
                world.clock.advance(1.5)
                uplink.wake()
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


def records(epoch: int, count: int, start: int = 1) -> list[bytes]:
    return [codec.encode(record(epoch, seq, 8)) for seq in range(start, start + count)]


def test_an_envelope_whose_acknowledgement_was_lost_is_stored_twice_and_learned_once(
    tmp_path: Path,
) -> None:
    async def story(world: World) -> None:
        with world.open_log() as log:
            await world.log(log, "event", 5)
            async with world.uplink(log) as uplink:
                await until(lambda: uplink.statistics()["records"] == 5)
                assert uplink.statistics()["failed_timeout"] == 1
                async with running(world.learner.run()):
                    await until(world.all_learned)
        bus = world.bus
        assert isinstance(bus, AckLosingBus)
        assert len(set(bus.message_ids)) == 2, "dedupe would have swallowed the second"
        assert [envelope.base_seq for envelope, _ in world.learner.envelopes] == [1, 1]
        assert [seq for _, _, seq, _ in world.learner.records] == [1, 2, 3, 4, 5]

    play(tmp_path, story, AckLosingBus)


def test_after_an_outage_labels_go_first(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        with world.open_log() as log:
            async with running(world.learner.run()), world.uplink(log) as uplink:
                await world.log(log, "event", 1)
                await until(world.all_learned)
                world.broker.down()
                await world.log(log, "event", 2000, size=200)
                await world.log(log, "label", 3)
                await until(lambda: uplink.statistics().get("failed_unreachable", 0) > 0)
                world.broker.up()
                await until(world.all_learned)
        later = [envelope.event_class for envelope, _ in world.learner.envelopes[1:]]
        assert later[0] == "label"
        assert later.count("event") >= 2

    play(tmp_path, story)


def test_a_loss_is_told_with_its_reason_and_what_follows_it(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        log = ScriptedLog(9, {9: 4})
        log.add("event", 9, *["dropped"] * 3, *records(9, 2, 4), "damaged", *records(9, 1, 7))
        async with running(world.learner.run()), world.uplink(log) as uplink:
            await until(lambda: world.learner.learned == {(9, "event"): 7})
        found = [envelope for envelope, _ in world.learner.envelopes]
        assert [(e.skipped, e.reason, e.base_seq, len(e.records), e.prior) for e in found] == [
            (3, "dropped", 4, 2, 4),
            (1, "damaged", 7, 1, 4),
        ]
        assert [message.headers["ce-id"] for _, message in world.learner.envelopes] == [
            "EWR/9/event/1-5",
            "EWR/9/event/6-7",
        ]
        assert uplink.statistics()["skipped"] == 4
        assert uplink.statistics()["records"] == 3

    play(tmp_path, story)


def test_an_epoch_of_which_nothing_is_left_is_told_as_lost(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        log = ScriptedLog(9, {9: 4, 4: 2})
        log.add("event", 2, *["dropped"] * 40)
        log.add("event", 4, *["stalled"] * 2)
        log.add("label", 4, *["dropped"] * 5)
        log.add("event", 9, *records(9, 1))
        async with running(world.learner.run()), world.uplink(log):
            await until(lambda: len(world.learner.learned) == 4)
        found = [envelope for envelope, _ in world.learner.envelopes]
        assert [
            (e.event_class, e.epoch, e.skipped, e.reason, e.base_seq, e.prior) for e in found
        ] == [
            ("label", 4, 5, "dropped", 6, 2),
            ("event", 2, 40, "dropped", 41, -1),
            ("event", 4, 2, "stalled", 3, 2),
            ("event", 9, 0, "", 1, 4),
        ]
        assert [e.records for e in found[:3]] == [[], [], []]

    play(tmp_path, story)


def test_after_long_away_what_was_learned_and_what_was_dropped_are_all_there_was(
    tmp_path: Path,
) -> None:
    async def story(world: World) -> None:
        for _ in range(2):
            with world.open_log(bytes_max=200_000) as log:
                await world.log(log, "label", 40)
                for _ in range(20):
                    await world.log(log, "event", 100, size=200)
        with world.open_log(bytes_max=200_000) as log:
            async with running(world.learner.run()), world.uplink(log) as uplink:
                await world.log(log, "event", 10)
                await until(world.all_learned)
                await until(lambda: uplink.statistics()["unlearned"] == 0)
                await until(lambda: ends(log) == [])
        arrived = [r[:3] for r in world.learner.records] + [d[:3] for d in world.learner.dropped]
        assert len(arrived) == len(set(arrived)) == sum(world.logged.values())
        assert {reason for *_, reason in world.learner.dropped} == {"dropped"}
        assert {name for _, name, *_ in world.learner.dropped} == {"event"}
        assert (1, "event", 2000, "dropped") in world.learner.dropped, "no epoch was dropped whole"
        kept = [
            seq for epoch, name, seq, _ in world.learner.records if (epoch, name) == (2, "event")
        ]
        assert kept == list(range(2001 - len(kept), 2001))
        assert len(kept) > 300

    play(tmp_path, story)


def test_a_learner_that_was_put_back_gets_what_is_there_and_hears_what_is_not(
    tmp_path: Path,
) -> None:
    async def story(world: World) -> None:
        log = ScriptedLog(9)
        log.add("event", 9, *records(9, 6))
        async with running(world.learner.run()), world.uplink(log) as uplink:
            await until(lambda: world.learner.learned == {(9, "event"): 6})
            await until(lambda: log.told == [("event", 9, 6)])
            log.numbers["event", 9][:4] = ["trimmed"] * 4
            world.learner.learned = {(9, "event"): 2}
            world.learner.records.clear()
            await world.learner.tell()
            await until(lambda: world.learner.learned == {(9, "event"): 6})
            assert uplink.statistics()["rewinds"] == 1
        assert world.learner.dropped == [(9, "event", 3, "trimmed"), (9, "event", 4, "trimmed")]
        assert [seq for _, _, seq, _ in world.learner.records] == [5, 6]

    play(tmp_path, story)


def test_the_report_says_where_the_log_ends_that_the_learner_may_not_hold_whole() -> None:
    log = ScriptedLog(9, {9: 4})
    log.add("event", 4, *["dropped"] * 40)
    log.add("event", 9, *records(9, 6))
    log.add("label", 9, *records(9, 2))
    assert ends(log) == [Mark(9, "label", 2), Mark(4, "event", 40), Mark(9, "event", 6)]  # type: ignore[arg-type]


def test_an_epoch_that_this_log_never_had_raises_the_alarm_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(world: World) -> None:
        log = ScriptedLog(90, {90: 40, 40: 20, 20: 20})  # 20 and before are forgotten
        log.add("event", 90, *records(90, 3))
        world.learner.learned = {(10, "event"): 5, (40, "event"): 2, (77, "event"): 8}
        await world.learner.tell()
        async with running(world.learner.run()), world.uplink(log) as uplink:
            await until(lambda: world.learner.learned.get((90, "event")) == 3)
            await until(lambda: ("event", 90, 3) in log.told)
            assert uplink.statistics()["duplicate_identity"] == 1
            world.learner.learned[99, "label"] = 1
            await world.learner.tell()
            await until(lambda: uplink.statistics()["duplicate_identity"] == 2)
        assert [message for message in caplog.messages if "never had" in message] == [
            f"EWR: the learner holds epoch {epoch}, which this log never had: another device has"
            " this name, or this disk was wiped, or an older copy of it was put back"
            for epoch in (77, 99)
        ]

    play(tmp_path, story)


def test_a_log_that_began_anew_is_told_from_the_one_before_it(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        log = ScriptedLog(90)
        log.add("event", 90, *records(90, 3))
        world.learner.learned = {(10, "event"): 5}
        await world.learner.tell()
        async with running(world.learner.run()), world.uplink(log) as uplink:
            await until(lambda: world.learner.learned.get((90, "event")) == 3)
            assert uplink.statistics()["duplicate_identity"] == 1

    play(tmp_path, story)


def test_the_epochs_of_an_older_part_of_this_log_are_no_alarm(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        for _ in range(3):
            with world.open_log() as log:
                await world.log(log, "event", 2)
        with world.open_log() as log:
            world.learner.learned = {(epoch, "event"): 2 for epoch in (1, 2, 3)}
            await world.learner.tell()
            async with running(world.learner.run()), world.uplink(log) as uplink:
                await world.log(log, "event", 2)
                await until(world.all_learned)
                assert uplink.statistics()["duplicate_identity"] == 0

    play(tmp_path, story)


def test_a_full_stream_is_tried_once_a_second_and_drains_by_itself(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        bus = world.bus
        assert isinstance(bus, PickyBus)
        bus.clock, bus.error = world.clock, CapacityError("stream_full", "full")
        with world.open_log() as log:
            await world.log(log, "event", 3_000, size=200)
            async with running(world.learner.run()), world.uplink(log) as uplink:
                await until(lambda: uplink.statistics()["held"] == 1)
                await until(lambda: uplink.statistics()["under_way"] == 0)
                for wait_s in (0.15, 0.3, 0.6, 1.2, 1.5):  # there may be room again in a moment
                    tried = len(bus.asked_s)
                    world.clock.advance(wait_s + 0.001)
                    uplink.wake()
                    await until(lambda: len(bus.asked_s) == tried + 1)  # noqa: B023
                    await until(lambda: uplink.statistics()["under_way"] == 0)
                for _ in range(5):
                    tried = len(bus.asked_s)
                    world.clock.advance(0.95)
                    uplink.wake()
                    for _ in range(50):
                        await asyncio.sleep(0)
                    assert len(bus.asked_s) == tried
                    world.clock.advance(0.6)
                    uplink.wake()
                    await until(lambda: len(bus.asked_s) == tried + 1)  # noqa: B023
                    await until(lambda: uplink.statistics()["under_way"] == 0)
                assert uplink.statistics()["failed_stream_full"] == len(bus.asked_s)
                bus.error = None
                world.clock.advance(1.6)
                uplink.wake()
                await until(world.all_learned)
                assert uplink.statistics()["held"] == 0
        assert [seq for _, _, seq, _ in world.learner.records] == list(range(1, 3_001))

    play(tmp_path, story, PickyBus)


def test_while_events_are_held_labels_go_on(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        bus = world.bus
        assert isinstance(bus, PickyBus)
        bus.clock, bus.error = world.clock, CapacityError("stream_full", "full")
        with world.open_log() as log:
            await world.log(log, "event", 500)
            async with running(world.learner.run()), world.uplink(log) as uplink:
                await until(lambda: uplink.statistics()["held"] == 1)
                for count in range(1, 4):
                    await world.log(log, "label", 1)
                    await until(lambda: world.learner.learned == {(1, "label"): count})  # noqa: B023
                assert uplink.statistics()["held"] == 1
                assert uplink.statistics()["attempts"] == 2  # only the events began again

    play(tmp_path, story, PickyBus)


def test_a_class_that_is_always_refused_makes_no_hot_loop_of_the_other(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        bus = world.bus
        assert isinstance(bus, PickyBus)
        bus.error = TransportError("refused", "no permission")
        with world.open_log() as log:
            await world.log(log, "event", 5)
            await world.log(log, "label", 5)
            async with world.uplink(log) as uplink:
                await until(lambda: uplink.statistics().get("failed_refused", 0) == 4)
        assert bus.asked_s[3] - bus.asked_s[0] >= 0.35  # 50, 100 and 200 ms at least

    play(tmp_path, story, PickyBus)


def test_a_disk_that_gives_nothing_back_stops_nothing_and_is_tried_again(tmp_path: Path) -> None:
    class Stuck(ScriptedLog):
        is_stuck = True

        def learned(self, event_class: EventClass, epoch: int, seq: int) -> None:
            if self.is_stuck:
                raise OSError(errno.ENOSPC, "no space left")
            super().learned(event_class, epoch, seq)

    async def story(world: World) -> None:
        log = Stuck(9)
        log.add("event", 9, *records(9, 2))
        async with running(world.learner.run()), world.uplink(log) as uplink:
            await until(lambda: uplink.statistics().get("give_back_errors", 0) > 0)
            log.is_stuck = False
            await world.learner.tell()
            await until(lambda: log.told == [("event", 9, 2)])

    play(tmp_path, story)


def test_what_cannot_be_read_any_more_is_counted_and_does_not_stop_the_rest(
    tmp_path: Path,
) -> None:
    class Forgetful(ScriptedLog):
        def piece(self, event_class: EventClass, epoch: int, *bounds: int) -> Piece | None:
            return None if epoch == 4 else super().piece(event_class, epoch, *bounds)

    async def story(world: World) -> None:
        log = Forgetful(9, {9: 4})
        log.add("event", 4, *records(4, 3))
        log.add("event", 9, *records(9, 2))
        async with running(world.learner.run()), world.uplink(log) as uplink:
            await until(lambda: world.learner.learned == {(9, "event"): 2})
            assert uplink.statistics()["unreadable"] == 3
            await until(lambda: uplink.statistics()["unlearned"] == 3)

    play(tmp_path, story)


def test_events_of_200_bytes_cost_less_than_100_on_the_wire(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        rng = random.Random(11)
        with world.open_log() as log:
            for _ in range(5000):
                log.append("event", telling_record(rng))
            await log.wait_durable("event", 5000)
            async with world.uplink(log) as uplink:
                await until(lambda: uplink.statistics()["records"] == 5000)
        messages = world.broker.streams[subjects.EVENTS_STREAM].messages.values()
        size = sum(
            len(message.data) + sum(len(k) + len(v) + 4 for k, v in message.headers.items())
            for message in messages
        )
        assert size / 5000 < 100, "seed 11"

    play(tmp_path, story)


def telling_record(rng: random.Random) -> bytes:
    """A prediction of about 200 bytes, half of its features noise."""
    noise = [rng.gauss(0, 1) if n % 2 else float(rng.randint(0, 20)) for n in range(16)]
    fields = {"carrier": rng.choice(["UA", "AA", "DL"]), "flight": rng.randint(1, 9999)}
    scored = [Scored("r2", "stable", [rng.random()]), Scored("r1", "canary", [rng.random()])]
    features = struct.pack("<16f", *noise)
    return codec.encode(
        PredictionRecord(
            "flight_delay", "scheduled", 1.5e9, fields, "ab" * 8, features, 0.9, scored
        )
    )


def test_what_is_kept_back_keeps_its_number_and_is_decided_alike_when_it_goes_again(
    tmp_path: Path,
) -> None:
    async def story(world: World) -> None:
        rules = {"flight_delay": UplinkConfig(sample=0.5, redact=["n"])}
        with world.open_log() as log:
            withhold = Withhold(rules, tmp_path / "quota", world.clock, log.epoch)
            await world.log(log, "event", 40)
            async with world.uplink(log, withhold=withhold) as uplink:
                await until(lambda: uplink.statistics()["records"] == 40)
                async with running(world.learner.run()):
                    await until(world.all_learned)
                    first = list(world.learner.records), list(world.learner.dropped)
                    world.learner.learned = {(1, "event"): 0}
                    world.learner.records, world.learner.dropped = [], []
                    await world.learner.tell()
                    await until(world.all_learned)
                    assert uplink.statistics()["rewinds"] == 1
        assert (world.learner.records, world.learner.dropped) == first
        kept = [seq for seq in range(1, 41) if in_sample(1, seq, 0.5)]
        assert [seq for _, _, seq, _ in world.learner.records] == kept
        assert {reason for *_, reason in world.learner.dropped} == {"sampled_out"}
        assert all(set(data.fields) == {"e"} for *_, data in world.learner.records)
        assert withhold.statistics() == {
            "flight_delay": {
                "sent": len(kept),
                "sampled_out": 40 - len(kept),
                "redacted": len(kept),
                "over_quota": 0,
            }
        }

    play(tmp_path, story)


def test_a_held_class_of_which_the_learner_holds_all_is_held_no_more(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        bus = world.bus
        assert isinstance(bus, HeldBus)
        with world.open_log() as log:
            await world.log(log, "event", 5)
            async with world.uplink(log) as uplink:
                await until(lambda: uplink.statistics()["held"] == 1)
                world.learner.learned = {(1, "event"): 5}
                await world.learner.tell()
                await until(lambda: uplink.statistics()["held"] == 0)
                world.clock.advance(2.0)
                assert await bus.turns_in(0.1) < 5

    play(tmp_path, story, HeldBus)


def test_a_probe_whose_acknowledgement_is_lost_leaves_no_class_held(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        bus = world.bus
        assert isinstance(bus, HeldBus)

        async def learned_and_not_acknowledged() -> None:
            world.learner.learned = {(1, "event"): 5}
            await world.learner.tell()
            raise TransportError("timeout", "no answer")

        with world.open_log() as log:
            await world.log(log, "event", 5)
            async with world.uplink(log) as uplink:
                await until(lambda: uplink.statistics()["held"] == 1)
                bus.is_full, bus.then = False, learned_and_not_acknowledged
                world.clock.advance(2.0)
                uplink.wake()
                await until(lambda: uplink.statistics().get("failed_timeout") == 1)
                attempts = uplink.statistics()["attempts"]
                await until(lambda: uplink.statistics()["attempts"] > attempts)
                world.clock.advance(2.0)
                assert await bus.turns_in(0.1) < 5
                assert uplink.statistics()["held"] == 0

    play(tmp_path, story, HeldBus)


def test_a_probe_that_is_answered_late_is_waited_for(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        bus = world.bus
        assert isinstance(bus, HeldBus)
        free = asyncio.Event()

        async def late() -> None:
            await free.wait()

        with world.open_log() as log:
            await world.log(log, "event", 5)
            async with world.uplink(log) as uplink:
                await until(lambda: uplink.statistics()["held"] == 1)
                bus.is_full, bus.then = False, late
                world.clock.advance(2.0)
                uplink.wake()
                await until(lambda: uplink.statistics()["under_way"] == 1)
                world.clock.advance(2.0)
                uplink.wake()
                assert await bus.turns_in(0.1) < 5
                free.set()
                await until(lambda: uplink.statistics()["held"] == 0)

    play(tmp_path, story, HeldBus)


def test_what_the_broker_lost_while_nobody_speaks_is_sent_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        with world.open_log() as log:
            async with world.uplink(log) as uplink:
                await world.log(log, "event", 5)
                await until(lambda: uplink.statistics()["records"] == 5)
                world.broker.streams[subjects.EVENTS_STREAM].messages.clear()
                for wait_s, rewinds in ((4.9, 0), (0.2, 1), (9.8, 1), (0.4, 2)):
                    world.clock.advance(wait_s)
                    uplink.wake()
                    await until(lambda: uplink.statistics()["rewinds"] == rewinds)  # noqa: B023
                    await until(lambda: uplink.statistics()["records"] == 5 * (rewinds + 1))  # noqa: B023
                async with running(world.learner.run()):
                    await until(world.all_learned)

    play(tmp_path, story)


def test_more_that_becomes_durable_while_it_is_packed_goes_once(tmp_path: Path) -> None:
    class Growing(ScriptedLog):
        def recent(self, event_class: EventClass, after_seq: int, *_: int) -> object:
            numbers = self.numbers.get((event_class, self.epoch), [])
            if len(numbers) == 3:
                self.add(event_class, self.epoch, *records(9, 2, 4))
            return list(enumerate(numbers, 1))[after_seq:]

    async def story(world: World) -> None:
        log = Growing(9)
        log.add("event", 9, *records(9, 3))
        async with world.uplink(log) as uplink:
            await until(lambda: uplink.statistics()["records"] == 5)
            log.add("event", 9, *records(9, 1, 6))
            uplink.wake()
            await until(lambda: uplink.statistics()["envelopes"] == 2)
        messages = world.broker.streams[subjects.EVENTS_STREAM].messages.values()
        names = [message.headers["ce-id"] for message in messages]
        assert names == ["EWR/9/event/1-5", "EWR/9/event/6-6"]

    play(tmp_path, story)


class FullDisk(OsFiles):
    """A disk that takes no tally while it is full."""

    is_full = False

    def create(self, path: Path, mode: int = 0o600) -> int:
        if self.is_full and "tally" in path.name:
            raise OSError(errno.ENOSPC, "no space left")
        return super().create(path, mode)


@pytest.mark.parametrize("speaks", [True, False])
def test_what_a_full_disk_did_not_let_give_back_is_given_back_once_there_is_space(
    tmp_path: Path, speaks: bool
) -> None:
    async def story(world: World) -> None:
        disk = FullDisk()
        with world.open_log(segment_bytes=400, files=disk) as log:
            for _ in range(5):
                await world.log(log, "event", 10)
            disk.is_full = True
            async with world.uplink(log) as uplink:
                world.learner.learned = {(1, "event"): 50}
                await world.learner.tell()
                await until(lambda: uplink.statistics().get("give_back_errors", 0) > 0)
                assert log.epochs("event") == [(1, 1, 50)]
                disk.is_full = False
                if speaks:
                    await world.learner.tell()
                await until(lambda: log.epochs("event") == [(1, 41, 50)])

    play(tmp_path, story)


@pytest.mark.parametrize("is_running", [True, False])
def test_a_learner_that_was_put_back_to_before_an_epoch_hears_of_it_again(
    tmp_path: Path, is_running: bool
) -> None:
    async def story(world: World) -> None:
        learner = world.learner

        async def restore() -> None:
            learner.learned, learner.records, learner.dropped = {(1, "event"): 20}, [], []
            learner.envelopes.clear()
            await learner.tell()

        for _ in range(4):
            with world.open_log(segment_bytes=400) as log:
                if log.epoch != 3:  # of epoch 3 there is no number
                    await world.log(log, "event", 20)
                if log.epoch == 2:
                    await world.log(log, "label", 5)
                async with running(learner.run()), world.uplink(log) as uplink:
                    await until(world.all_learned)
                    await until(lambda: uplink.statistics()["unlearned"] == 0)
                    if log.epoch == 4 and is_running:
                        await restore()
                        await until(world.all_learned)
                        await until(lambda: uplink.statistics()["unlearned"] == 0)
                        assert uplink.statistics()["rewinds"] == 2  # once for each class
        if not is_running:
            await restore()
            with world.open_log(segment_bytes=400) as log:
                async with running(learner.run()), world.uplink(log) as uplink:
                    await until(world.all_learned)
                    sent = len(learner.envelopes)
                    for _ in range(3):
                        await learner.tell()
                        await until(lambda: uplink.statistics()["under_way"] == 0)
                    assert len(learner.envelopes) == sent
        told = {r[:3] for r in learner.records} | {d[:3] for d in learner.dropped}
        assert len(told) == len(learner.records) + len(learner.dropped) == 45
        assert {d[3] for d in learner.dropped} == {"trimmed"}
        assert {envelope.epoch for envelope, _ in learner.envelopes} == {2, 4}

    play(tmp_path, story)


def marks_of(log: ScriptedLog, named: list[tuple[int, EventClass]]) -> list[tuple[int, str, int]]:
    """The marks of 7 that a device makes of a watermark that names `named`, and what it adds."""
    marks = [Mark(epoch, name, 7) for epoch, name in named]
    return read_marks(Watermarks(log, DEVICE, None, Counter()), marks)  # type: ignore[arg-type]


def read_marks(watermarks: Watermarks, marks: list[Mark]) -> list[tuple[int, str, int]]:
    found = watermarks.read(codec.encode(Watermark(1, DEVICE, marks)))
    assert found is not None
    assert found[: len(marks)] == marks
    return [(mark.epoch, mark.event_class, mark.seq) for mark in found[len(marks) :]]


def with_epochs(*epochs: int) -> ScriptedLog:
    log = ScriptedLog(epochs[-1], dict(zip(epochs[1:], epochs, strict=False)))
    for epoch in epochs:
        log.add("event", epoch, *records(epoch, 7))
    return log


def test_an_epoch_that_a_watermark_should_name_and_does_not_has_mark_0() -> None:
    log = with_epochs(1, 2, 3, 4)
    log.add("label", 3, *records(3, 1))
    log.add("label", 2)
    assert marks_of(log, [(2, "event"), (3, "event")]) == [(4, "event", 0), (3, "label", 0)]


def test_a_watermark_that_names_nothing_says_nothing() -> None:
    assert marks_of(with_epochs(1, 2, 3), []) == []


@pytest.mark.parametrize(("count", "absent"), [(63, [9, 68]), (64, [68])])
def test_where_all_names_are_taken_only_what_is_newer_than_all_is_absent(
    count: int, absent: list[int]
) -> None:
    log = with_epochs(*range(1, 69))
    named = [epoch for epoch in range(2, 68) if epoch != 9][:count]
    named[-1] = 67
    assert len(set(named)) == count
    found = marks_of(log, [(epoch, "event") for epoch in named])
    assert {9, 68} & {epoch for epoch, _, _ in found} == set(absent)
    if count == 64:
        assert len(found) == 1


def test_an_epoch_is_absent_once_until_it_was_named() -> None:
    watermarks = Watermarks(with_epochs(1, 2, 3), DEVICE, None, Counter())  # type: ignore[arg-type]
    one, both = [Mark(1, "event", 7)], [Mark(1, "event", 7), Mark(2, "event", 1)]
    assert read_marks(watermarks, one) == [(2, "event", 0), (3, "event", 0)]
    assert read_marks(watermarks, one) == []
    assert read_marks(watermarks, both) == []
    assert read_marks(watermarks, one) == [(2, "event", 0)]


def test_the_old_epochs_of_a_log_that_forgot_those_between_are_no_alarm(tmp_path: Path) -> None:
    for _ in range(EPOCHS_KEPT + 10):
        with EventLog(tmp_path, device=DEVICE, step=lambda: 1, files=Hasty()) as log:
            if log.epoch == 1:
                log.append("event", b"owed")
    with EventLog(tmp_path, device=DEVICE, step=lambda: 1, files=Hasty()) as log:
        counters = Counter[str]()
        marks = [Mark(epoch, "event", 0) for epoch in range(1, log.epoch)]
        read_marks(Watermarks(log, DEVICE, None, counters), marks)
        assert counters["duplicate_identity"] == 0
        read_marks(Watermarks(log, DEVICE, None, counters), [Mark(log.epoch + 1, "event", 0)])
        assert counters["duplicate_identity"] == 1


class Hasty(OsFiles):
    """A disk that is quick, for a log that is opened many times."""

    def sync(self, fd: int) -> None: ...

    def sync_directory(self, path: Path) -> None: ...


def test_the_end_waits_for_the_disk_off_the_event_loop(tmp_path: Path) -> None:
    began, went_on = threading.Event(), threading.Event()

    class SlowToSave(Withhold):
        def save(self) -> None:
            began.set()
            assert went_on.wait(5), "the event loop stands still"

    async def go_on() -> None:
        await until(began.is_set)
        went_on.set()

    async def story(world: World) -> None:
        withhold = SlowToSave({}, tmp_path / "quota", world.clock, 1)
        with world.open_log() as log:
            async with world.uplink(log, withhold=withhold) as uplink:
                await until(lambda: uplink.statistics()["attempts"] == 1)
                going_on = asyncio.create_task(go_on())
            await going_on

    play(tmp_path, story)


class ClosedBus(MemoryBus):
    """A bus of which a subscription cannot be closed any more."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker, "closed", None)

    async def subscribe(self, *arguments: object) -> Subscription:
        subscription = await super().subscribe(*arguments)  # type: ignore[arg-type]

        class Stuck:
            async def close(self) -> None:
                await subscription.close()
                raise TransportError("unreachable", "gone")

        return Stuck()


def test_an_uplink_that_ends_leaves_no_thread_behind(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        with world.open_log() as log:
            await world.log(log, "event", 500)
            with pytest.raises(ExceptionGroup) as raised:
                async with running(world.learner.run()), world.uplink(log):
                    await until(world.all_learned)
            assert raised.group_contains(TransportError)
        left = [thread.name for thread in threading.enumerate()]
        assert [name for name in left if name.startswith("uplink")] == []

    play(tmp_path, story, ClosedBus)


def scripted(rng: random.Random) -> ScriptedLog:
    """Three epochs of both classes, of records and losses."""
    log = ScriptedLog(9, {9: 4, 4: 2})
    for epoch in (2, 4, 9):
        for event_class in CLASSES:
            for _ in range(rng.randint(0, 12)):
                start = len(log.numbers.get((event_class, epoch), ())) + 1
                if rng.random() < 0.3:
                    reason = rng.choice(["dropped", "stalled", "damaged"])
                    log.add(event_class, epoch, *[reason] * rng.randint(1, 50))
                else:
                    log.add(event_class, epoch, *records(epoch, rng.randint(1, 400), start))
    return log


def put_back(learner: Learner, rng: random.Random) -> None:
    """The learner is restored from an older state: what came since is gone there."""
    for key, held in list(learner.learned.items()):
        back = learner.learned[key] = rng.randint(0, held)
        learner.records = [r for r in learner.records if r[:2] != key or r[2] <= back]
        learner.dropped = [d for d in learner.dropped if d[:2] != key or d[2] <= back]


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(n, marks=SLOW) for n in range(8, 200))])
def test_every_number_arrives_once_whatever_is_refused_lost_or_put_back(
    tmp_path: Path, seed: int
) -> None:
    async def story(world: World) -> None:
        rng, bus = random.Random(seed), world.bus
        assert isinstance(bus, ChaosBus)
        log = scripted(rng)
        ends_of = {key: len(numbers) for key, numbers in log.numbers.items()}

        def is_done() -> bool:
            world.clock.advance(0.05)
            uplink.wake()
            held = world.learner.learned
            return {(epoch, name): end for (name, epoch), end in ends_of.items()} == held

        async with running(world.learner.run()), world.uplink(log) as uplink:
            for _ in range(3):
                bus.rng = rng
                for _ in range(rng.randint(1, 400)):
                    is_done()
                    await asyncio.sleep(0)
                if rng.random() < 0.5:
                    world.broker.down()
                    await asyncio.sleep(0)
                    world.broker.up()
                put_back(world.learner, rng)
            bus.rng = None
            await world.learner.tell()
            await until(is_done)
        arrived = {r[:3] for r in world.learner.records} | {d[:3] for d in world.learner.dropped}
        assert len(arrived) == len(world.learner.records) + len(world.learner.dropped)
        assert len(arrived) == sum(ends_of.values()), f"seed {seed}"
        for epoch, name, seq, reason in world.learner.dropped:
            assert log.numbers[name, epoch][seq - 1] == reason, f"seed {seed}"
        for epoch, name, seq, data in world.learner.records:
            assert data == record(epoch, seq, 8), f"seed {seed}"
            assert isinstance(log.numbers[name, epoch][seq - 1], bytes), f"seed {seed}"

    play(tmp_path, story, ChaosBus)
