"""Ingest over a bus: what reached the broker is held once, whatever fails on the way."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from cloud_learner.broker import Broker
from cloud_learner.ingest.consumer import Ingest
from cloud_learner.ingest.guard import Batcher
from cloud_learner.ingest.intake import Intake, Strand
from cloud_learner.ingest.joiner import Rules
from cloud_learner.ingest.opening import Incoming
from cloud_learner.store.archive import Archive
from cloud_learner.store.ingest_db import IngestDb, read_accounts
from cloud_learner.store.raw import RawLog
from edge_runtime.bus.base import Bus
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.bus.nats import connect
from edge_runtime.clock import ManualClock
from edge_runtime.errors import CapacityError, ConfigError
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import (
    WIRE_VERSION,
    Envelope,
    LabelRecord,
    Mark,
    ObservationRecord,
    PredictionRecord,
    Report,
    Scored,
)

WAIT_S = 10.0
WINDOW_S = 100.0


def prediction(time_s):
    scored = [Scored("r1", "stable", [0.5])]
    features = struct.pack("<2f", time_s, 1.0)
    return PredictionRecord("fam", "asked", time_s, {"n": 1}, "spec", features, 1.0, scored)


def observation(time_s):
    return ObservationRecord("fam", "seen", time_s, {})


def label(seq, time_s, value=1.0):
    return LabelRecord("fam", 1, seq, value, time_s)


def life(count):
    """The records of a device: a prediction every second, each labelled 10 s later."""
    events = [prediction(float(at)) for at in range(count)]
    labels = [label(at + 1, at + 10.0) for at in range(count)]
    return events, labels


def opened(home: Path, raw_log: type[RawLog] = RawLog) -> Intake:
    """An intake over the files in `home`."""
    rules = Rules(family="fam", label_window_s=WINDOW_S, idle_s=60.0)
    db, raw, archive = (
        IngestDb(home / "db", ["fam"]),
        raw_log(home / "raw"),
        Archive(home / "archive"),
    )
    return Intake(
        db, raw, archive, [Strand(rules, Batcher(10, 10))], clock=ManualClock(), indices={}
    )


class Learner:
    """An ingest over the files in `home`, with all its commits at hand."""

    def __init__(self, bus: Bus, home: Path, raw_log: type[RawLog] = RawLog) -> None:
        self.home = home
        self.commits: list = []
        self._news = asyncio.Event()
        make = partial(opened, home, raw_log)
        self.ingest = Ingest(bus, make, ManualClock(), on_commit=self.note)
        self._task = asyncio.create_task(self.ingest.run())

    async def note(self, commit):
        self.commits.append(commit)
        self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._news.clear()
                await self._news.wait()

    def count(self, name):
        return self.ingest.statistics().get(name, 0)

    async def until_count(self, name, number) -> None:
        await self.until(lambda: self.count(name) >= number)

    def accounts(self):
        """The mark of each lane, all of it archived, as another process reads it."""
        found = read_accounts(self.home / "db")
        assert all(account.is_balanced for account in found.values())
        return {lane: account.archived for lane, account in found.items()}

    async def failure(self) -> BaseException | None:
        async with asyncio.timeout(WAIT_S):
            await asyncio.wait([self._task])
        return self._task.exception()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()


@contextlib.contextmanager
def database(home):
    db = IngestDb(home / "db")
    try:
        yield db
    finally:
        db.close()


def archived(home, sql="SELECT device, epoch, seq FROM examples ORDER BY ALL"):
    """The rows of the example files that the database names."""
    with database(home) as db:
        files = db.files()
    archive = Archive(home / "archive")
    try:
        return archive.query(sql, files).fetchall()
    finally:
        archive.close()


def batched(home):
    with database(home) as db:
        return list(db.batches_after("fam", 0))


def raw_messages(home):
    return list(RawLog(home / "raw").replay())


async def ready(bus: Bus) -> Bus:
    megabyte = 1 << 20
    for name, patterns in (
        (subjects.EVENTS_STREAM, [subjects.EVENTS_ALL]),
        (subjects.STATE_STREAM, subjects.STATE_ALL),
    ):
        await bus.ensure_stream(name, patterns, max_bytes=32 * megabyte, discard_new=True)
    return bus


def envelope(records, *, base_seq=1, device="EWR", epoch=1, event_class="event"):
    raws = [
        each if isinstance(each, msgspec.Raw) else msgspec.Raw(codec.encode(each))
        for each in records
    ]
    return codec.encode(Envelope(WIRE_VERSION, device, epoch, event_class, base_seq, raws))


async def send(bus, records, *, base_seq=1, device="EWR", epoch=1, event_class="event"):
    data = envelope(records, base_seq=base_seq, device=device, epoch=epoch, event_class=event_class)
    await bus.publish(subjects.events(device, event_class), data)


async def watermark(bus, device="EWR"):
    """The device's marks as the learner said them last."""
    message = await bus.last(subjects.STATE_STREAM, subjects.watermark(device))
    return codec.decode_watermark(message.data).marks if message else None


async def until_told(bus, marks) -> None:
    heard = asyncio.Event()

    async def hear(_message) -> None:
        heard.set()

    subscription = await bus.subscribe(subjects.watermark("EWR"), hear)
    async with asyncio.timeout(WAIT_S):
        heard.clear()
        while await watermark(bus) != marks:
            await heard.wait()
            heard.clear()
    await subscription.close()


def play(scenario: Callable[[MemoryBroker, Bus], Awaitable[None]]) -> None:
    """Run a scenario against a broker in memory."""

    async def played() -> None:
        broker = MemoryBroker()
        bus = await ready(await broker.connect())
        await scenario(broker, bus)

    asyncio.run(played())


def test_records_are_archived_joined_batched_and_told(tmp_path):
    async def scenario(broker, bus):
        learner = Learner(bus, tmp_path)
        events, labels = life(20)
        await send(bus, events)
        await send(bus, labels, event_class="label")
        await send(bus, [observation(500.0)], base_seq=21)
        await send(bus, [label(99, 500.0)], base_seq=21, event_class="label")
        await learner.until_count("examples", 20)
        assert learner.accounts() == {("EWR", 1, "event"): 21, ("EWR", 1, "label"): 21}
        assert [
            batch.number for commit in learner.commits for batch in commit.families["fam"].batches
        ] == [1, 2]
        await until_told(bus, [Mark(1, "event", 21), Mark(1, "label", 21)])
        await learner.close()
        seqs = [[example.seq for example in batch.examples] for batch in batched(tmp_path)]
        assert seqs == [list(range(1, 11)), list(range(11, 21))]
        assert archived(tmp_path) == [("EWR", 1, seq) for seq in range(1, 21)]
        assert len(raw_messages(tmp_path)) == 4

    play(scenario)


def test_duplicates_overlaps_and_repeats_are_held_once(tmp_path):
    async def scenario(broker, bus):
        learner = Learner(bus, tmp_path)
        events, _ = life(9)
        for base, last in ((1, 3), (1, 3), (2, 5), (4, 4), (5, 9), (1, 9)):
            await send(bus, events[base - 1 : last], base_seq=base)
        await learner.until_count("duplicates", 15)
        assert learner.accounts() == {("EWR", 1, "event"): 9}
        assert (learner.count("predictions"), learner.count("pending")) == (9, 9)
        await learner.close()

    play(scenario)


def test_what_the_broker_delivers_again_is_held_once(tmp_path):
    async def scenario(broker, bus):
        events, _ = life(6)
        first = Learner(bus, tmp_path)
        await send(bus, events[:3])
        await first.until_count("predictions", 3)
        await first.close()
        broker.streams[subjects.EVENTS_STREAM].consumers.clear()  # it forgot all acknowledgements
        await send(bus, events[3:], base_seq=4)
        second = Learner(bus, tmp_path)
        await second.until_count("predictions", 6)
        assert second.count("duplicates") == 3
        assert second.accounts() == {("EWR", 1, "event"): 6}
        await second.close()

    play(scenario)


def test_nothing_beyond_a_gap_is_held_until_it_is_filled(tmp_path):
    async def scenario(broker, bus):
        learner = Learner(bus, tmp_path)
        events, _ = life(6)
        await send(bus, events[:2])
        await send(bus, events[4:], base_seq=5)
        await learner.until_count("gaps", 1)
        await until_told(bus, [Mark(1, "event", 2)])
        assert learner.accounts() == {("EWR", 1, "event"): 2}
        await send(bus, events[2:4], base_seq=3)
        await learner.until_count("predictions", 6)
        assert learner.accounts() == {("EWR", 1, "event"): 6}
        await until_told(bus, [Mark(1, "event", 6)])
        await learner.close()

    play(scenario)


def test_garbage_is_quarantined_and_counted_and_the_stream_goes_on(tmp_path):
    async def scenario(broker, bus):
        learner = Learner(bus, tmp_path)
        subject = subjects.events("EWR", "event")
        future = codec.encode(Envelope(99, "EWR", 1, "event", 1, []))
        for data in (
            b"\xffgarbage",
            b"",
            future,
            envelope([], device="JFK"),
            envelope([], epoch=0),
        ):
            await bus.publish(subject, data)
        await bus.publish("hw.ev.EWR.gossip", envelope([observation(1.0)]))
        await bus.publish("hw.ev.E!R.event", envelope([observation(1.0)], device="E!R"))
        await send(bus, [observation(1.0)])
        await learner.until_count("observations", 1)
        names = ("bad_message", "bad_version", "wrong_subject", "bad_number", "bad_name")
        assert [learner.count(f"quarantined_{name}") for name in names] == [2, 1, 2, 1, 1]
        await learner.close()
        with database(tmp_path) as db:
            kept = db.quarantined()
        assert (kept[0][1], kept[0][2], kept[0][3]) == (subject, "bad_message", b"\xffgarbage")
        assert len(kept) == learner.count("quarantined") == 7
        again = Learner(bus, tmp_path)  # garbage is acknowledged: it does not come again
        await send(bus, [observation(2.0)], base_seq=2)
        await again.until_count("observations", 2)
        assert again.count("quarantined") == 7
        await again.close()

    play(scenario)


def test_a_bad_record_is_quarantined_alone(tmp_path):
    async def scenario(broker, bus):
        learner = Learner(bus, tmp_path)
        unknown_tag = msgspec.Raw(msgspec.msgpack.encode([77, "from", "the", "future"]))
        await send(bus, [prediction(1.0), unknown_tag, prediction(2.0)])
        await send(bus, [label(1, 3.0, float("nan")), label(3, 4.0)], event_class="label")
        await learner.until_count("labels", 1)
        await until_told(bus, [Mark(1, "event", 3), Mark(1, "label", 2)])
        assert learner.accounts() == {("EWR", 1, "event"): 2, ("EWR", 1, "label"): 1}
        assert learner.ingest.totals["quarantined"] == 2
        await learner.close()
        with database(tmp_path) as db:
            places = {reason: subject for _, subject, reason, _ in db.quarantined()}
        assert places == {
            "bad_message": "hw.ev.EWR.event#1/2",
            "bad_label": "hw.ev.EWR.label#1/1",
        }

    play(scenario)


def test_a_restart_goes_on_where_the_last_commit_stood(tmp_path):
    async def scenario(broker, bus):
        events, labels = life(25)
        first = Learner(bus, tmp_path / "halves")
        await send(bus, events[:15])
        await send(bus, labels[:8], event_class="label")
        await first.until_count("labels", 8)
        await first.close()
        second = Learner(bus, tmp_path / "halves")
        assert (second.count("pending"), second.count("labels_joined")) == (15, 8)
        await send(bus, events[15:], base_seq=16)
        await send(bus, labels[8:], base_seq=9, event_class="label")
        await send(bus, [observation(119.0)], base_seq=26)
        await send(bus, [label(99, 119.0)], base_seq=26, event_class="label")
        await second.until_count("examples", 19)
        assert second.count("duplicates") == 0  # all that was committed had been acknowledged
        await second.close()
        third = Learner(bus, tmp_path / "halves")
        assert third.count("unbatched") == 9
        await send(bus, [observation(500.0)], base_seq=27)
        await send(bus, [label(99, 500.0)], base_seq=27, event_class="label")
        await third.until_count("examples", 25)
        await third.close()
        batches = batched(tmp_path / "halves")
        assert [batch.number for batch in batches] == [1, 2]
        seqs = [example.seq for batch in batches for example in batch.examples]
        assert seqs == list(range(1, 21))
        assert batches[0].examples[0].features == struct.pack("<2f", 0.0, 1.0)
        with database(tmp_path / "halves") as db:
            assert list(db.batches_after("fam", 1)) == batches[1:]
        assert len(archived(tmp_path / "halves")) == 25

    play(scenario)


def test_a_label_that_overtook_its_prediction_waits_through_a_restart(tmp_path):
    async def scenario(broker, bus):
        first = Learner(bus, tmp_path)
        await send(bus, [label(1, 5.0)], event_class="label")
        await first.until_count("labels_early", 1)
        await first.close()
        second = Learner(bus, tmp_path)
        assert second.count("labels_waiting") == 1
        await send(bus, [prediction(1.0)])
        await second.until_count("labels_joined", 1)
        await second.close()
        third = Learner(bus, tmp_path)
        assert (third.count("labels_waiting"), third.count("pending")) == (0, 1)
        await third.close()

    play(scenario)


class Full(RawLog):
    """A raw log on a disk that takes nothing while `is_full`, and says when it was asked."""

    is_full = threading.Event()
    refused = threading.Event()

    def append(self, messages):
        if self.is_full.is_set():
            self.refused.set()
            raise CapacityError("disk_full", "no space left")
        return super().append(messages)


class Unnamed(RawLog):
    """A raw log after whose appends the disk is full."""

    def append(self, messages):
        super().append(messages)
        raise CapacityError("disk_full", "no space left")


def test_a_full_disk_pauses_ingest_and_nothing_is_acknowledged_until_it_has_room(tmp_path):
    async def scenario(broker, bus):
        events, labels = life(200)
        learner = Learner(bus, tmp_path, Full)
        await send(bus, events[:2])
        await learner.until_count("predictions", 2)
        Full.is_full.set()
        await send(bus, events[2:], base_seq=3)
        assert await asyncio.to_thread(Full.refused.wait, WAIT_S)
        assert learner.accounts() == {("EWR", 1, "event"): 2}
        await until_told(bus, [Mark(1, "event", 2)])
        Full.is_full.clear()
        await learner.until_count("predictions", 200)
        assert (learner.ingest.paused, learner.count("paused_disk_full") >= 1) == ("", True)
        await send(bus, labels, event_class="label")
        await send(bus, [observation(900.0)], base_seq=201)
        await send(bus, [label(999, 900.0)], base_seq=201, event_class="label")
        await learner.until_count("examples", 200)
        await learner.close()
        assert len(archived(tmp_path)) == 200
        handed = [b.number for commit in learner.commits for b in commit.families["fam"].batches]
        assert handed == list(range(1, 21))

    play(scenario)


def test_a_commit_that_was_not_written_leaves_nothing_behind(tmp_path):
    events, _ = life(8)
    first = opened(tmp_path)
    first.commit([Incoming("hw.ev.EWR.event", envelope(events[:4]), 0.0, None)])
    first.abandon()
    torn = opened(tmp_path, Unnamed)
    with pytest.raises(CapacityError):
        torn.commit([Incoming("hw.ev.EWR.event", envelope(events[4:], base_seq=5), 0.0, None)])
    torn.abandon()
    assert len(raw_messages(tmp_path)) == 2  # appended, and named by no transaction
    second = opened(tmp_path)
    assert len(raw_messages(tmp_path)) == 1
    commit = second.commit([Incoming("hw.ev.EWR.event", envelope(events), 0.0, "token")])
    second.close()
    assert (commit.counters["predictions"], commit.counters["duplicates"]) == (8, 4)
    assert commit.done == ["token"]


def test_a_device_that_floods_holds_up_no_other(tmp_path):
    async def scenario(broker, bus):
        wide = [msgspec.structs.replace(observation(1.0), fields={"x": "x" * 32_000})] * 2
        for at in range(200):
            await send(bus, wide, base_seq=2 * at + 1, device="FLOOD")
        for at in range(3):
            await send(bus, [observation(1.0)], base_seq=at + 1, device="EWR")
        learner = Learner(bus, tmp_path)
        await learner.until_count("observations", 403)
        await learner.close()
        held = [{w.device: w.marks[0].seq for w in each.watermarks} for each in learner.commits]
        first = next(at for at, marks in enumerate(held) if "EWR" in marks)
        assert held[first]["EWR"] == 3
        flood = max(marks.get("FLOOD", 0) for marks in held[: first + 1])
        assert flood < 400, f"all of the flood went first, in {len(held)} commits"

    play(scenario)


class Purged:
    """A bus that says when it has dropped anything."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.dropped = asyncio.Event()

    def __getattr__(self, name):
        return getattr(self._bus, name)

    async def purge(self, stream):
        number = await self._bus.purge(stream)
        if number:
            self.dropped.set()
        return number


def test_the_broker_lets_go_of_what_is_acknowledged(tmp_path):
    async def scenario(broker, bus):
        purged = Purged(bus)
        events, _ = life(8)
        for at in range(4):
            await send(bus, events[2 * at : 2 * at + 2], base_seq=2 * at + 1)
        learner = Learner(purged, tmp_path)
        await learner.until_count("predictions", 8)
        async with asyncio.timeout(WAIT_S):
            await purged.dropped.wait()
        assert list(broker.streams[subjects.EVENTS_STREAM].messages) == []
        assert learner.count("purged") == 4
        await learner.close()

    play(scenario)


def test_what_is_compressed_lost_or_omitted_comes_through(tmp_path):
    async def scenario(broker, bus):
        learner = Learner(bus, tmp_path)
        events, _ = life(100)
        raws = [msgspec.Raw(codec.encode(each)) for each in events]
        raws[50] = msgspec.Raw(msgspec.msgpack.encode(1))
        data, headers = codec.pack_envelope(
            Envelope(WIRE_VERSION, "EWR", 1, "event", 11, raws, 10, "dropped")
        )
        assert headers
        await bus.publish(subjects.events("EWR", "event"), data, headers=headers)
        await learner.until_count("predictions", 99)
        await until_told(bus, [Mark(1, "event", 110)])
        assert learner.ingest.totals["dropped"] == 11
        await learner.close()
        (raw,) = raw_messages(tmp_path)
        assert (raw.data, raw.encoding) == (data, "deflate")

    play(scenario)


def test_where_a_device_says_it_ends_is_in_the_accounts(tmp_path):
    async def scenario(broker, bus):
        learner = Learner(bus, tmp_path)
        await send(bus, [observation(1.0)])
        await learner.until_count("observations", 1)
        learner.ingest.hear(report("EWR", [Mark(1, "event", 5)]))
        await learner.until(lambda: learner.ingest.totals["under_way"] == 4)
        assert read_accounts(tmp_path / "db")["EWR", 1, "event"].durable == 5
        await learner.close()

    play(scenario)


def report(device, durable):
    zeros = {"counters": {}, "refused": {}, "predict_us": [], "log_bytes": 0, "log_pending": 0}
    return Report(
        version=WIRE_VERSION,
        device=device,
        epoch=1,
        time_s=0.0,
        attributes={},
        arms=[],
        plan_seq=0,
        durable=durable,
        **zeros,
    )


def test_an_outage_of_the_broker_is_waited_out(tmp_path):
    async def scenario(broker, bus):
        learner = Learner(bus, tmp_path)
        events, _ = life(4)
        await send(bus, events[:2])
        await learner.until_count("predictions", 2)
        broker.down()
        broker.up()
        await send(bus, events[2:], base_seq=3)
        await learner.until_count("predictions", 4)
        await until_told(bus, [Mark(1, "event", 4)])
        await learner.close()

    play(scenario)


def test_a_learner_that_starts_tells_every_device_what_it_holds(tmp_path):
    async def scenario(broker, bus):
        first = Learner(bus, tmp_path)
        await send(bus, [observation(1.0)])
        await first.until_count("observations", 1)
        await first.close()
        other = await ready(await MemoryBroker().connect())  # a broker that lost everything
        second = Learner(other, tmp_path)
        await until_told(other, [Mark(1, "event", 1)])
        await second.close()

    play(scenario)


def test_two_learners_never_share_one_database(tmp_path):
    db = IngestDb(tmp_path / "db")
    with pytest.raises(ConfigError) as caught:
        IngestDb(tmp_path / "db")
    assert caught.value.code == "already_owned"
    db.close()
    IngestDb(tmp_path / "db").close()


@pytest.mark.parametrize("damage", ["a file", "no list", "a wild list", "a lost table"])
def test_what_is_no_ingest_database_is_left_as_it_is(tmp_path, damage):
    path = tmp_path / "db"
    if damage == "a file":
        path.write_bytes(b"not a database, but somebody's notes" * 40)
    else:
        intake = opened(tmp_path)
        intake.commit([Incoming("hw.ev.EWR.event", envelope(life(4)[0]), 0.0, None)])
        intake.close()
        opened(tmp_path).close()  # what was in the log of the database becomes tables
        if damage == "no list":
            (path / "CURRENT").unlink()
        elif damage == "a wild list":
            (path / "CURRENT").write_bytes(b"notes")
        else:
            next(path.glob("*.sst")).unlink()
    before = files_of(tmp_path)
    with pytest.raises(ConfigError) as caught:
        IngestDb(path)
    assert caught.value.code == "ingest_db_damaged"
    assert files_of(tmp_path).items() >= before.items()


def files_of(folder):
    """What every file holds that is no log for people."""
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(("LOG", "LOCK", "db.lock"))
    }


def test_over_a_real_broker_that_restarts_every_record_is_held_once(tmp_path):
    events, labels = life(60)

    async def scenario(broker: Broker) -> None:
        back = asyncio.Event()
        bus = await connect(broker.url, name="test", on_reconnect=back.set)
        await ready(bus)
        learner = Learner(bus, tmp_path)
        for base in range(1, 31, 5):
            await send(bus, events[base - 1 : base + 7], base_seq=base)
        await learner.until_count("predictions", 33)
        await asyncio.to_thread(broker.restart)
        async with asyncio.timeout(WAIT_S):
            await back.wait()
        await send(bus, events[25:], base_seq=26)
        await send(bus, labels, event_class="label")
        await learner.until_count("labels_joined", 60)
        lanes = {("EWR", 1, "event"): 60, ("EWR", 1, "label"): 60}
        assert learner.accounts() == lanes
        await until_told(bus, [Mark(1, "event", 60), Mark(1, "label", 60)])
        await learner.close()
        await bus.close()

    with Broker.start(tmp_path / "broker") as broker:
        asyncio.run(scenario(broker))
