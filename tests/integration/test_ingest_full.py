"""A learner's disk that is full: ingest pauses, acknowledges nothing, and goes on when there is
space, with everything once. On a real file system that is too small.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import struct
from functools import partial
from pathlib import Path

import msgspec
import pytest

from cloud_learner.ingest.consumer import Ingest
from cloud_learner.ingest.guard import Batcher
from cloud_learner.ingest.intake import Intake, Strand
from cloud_learner.ingest.joiner import Rules
from cloud_learner.store.archive import Archive
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.raw import RawLog
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import ManualClock
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import (
    WIRE_VERSION,
    Envelope,
    LabelRecord,
    ObservationRecord,
    PredictionRecord,
    Scored,
)

DISK = 64 << 20
WAIT_S = 60.0
WINDOW_S = 10_000.0
RECORDS = 200  # of an envelope
ENVELOPES = 30


@pytest.fixture
def disk(small_disk):
    """A file system that is small."""
    return small_disk(DISK)


def fill(folder: Path, leaving: int) -> Path:
    """Fill the disk but for a few bytes; removing the file makes it empty again."""
    path = folder / "filler"
    stat = os.statvfs(folder)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, stat.f_bavail * stat.f_frsize - leaving))
    return path


def opened(home: Path) -> Intake:
    rules = Rules(family="fam", label_window_s=WINDOW_S, idle_s=60.0)
    db, raw, archive = (
        IngestDb(home / "db", ["fam"]),
        RawLog(home / "raw"),
        Archive(home / "archive"),
    )
    return Intake(
        db, raw, archive, [Strand(rules, Batcher(10, 10))], clock=ManualClock(), indices={}
    )


def events(at: int) -> list[PredictionRecord]:
    """Records that do not shrink."""
    scored = [Scored("r1", "stable", [0.5])]
    noise = struct.pack("<100f", *(byte / 7 for byte in os.urandom(100)))
    first = at * RECORDS
    return [
        PredictionRecord("fam", "k", float(first + n), {}, "s", noise, 1.0, scored)
        for n in range(RECORDS)
    ]


async def send(bus, event_class, base_seq, records) -> None:
    raws = [msgspec.Raw(codec.encode(record)) for record in records]
    data = codec.encode(Envelope(WIRE_VERSION, "EWR", 1, event_class, base_seq, raws))
    await bus.publish(subjects.events("EWR", event_class), data)


class Learner:
    """An ingest on the disk, with the ids that it handed to be learned."""

    def __init__(self, bus, home: Path) -> None:
        self.learned: list = []
        self.ingest = Ingest(bus, partial(opened, home), ManualClock(), on_commit=self.note)
        self.task = asyncio.create_task(self.ingest.run())

    async def note(self, commit):
        self.learned += [
            example.id for batch in commit.families["fam"].batches for example in batch.examples
        ]

    async def until(self, name, number) -> None:
        """Looks now and then: a pause tells nobody."""
        async with asyncio.timeout(WAIT_S):
            for _ in itertools.count():
                if self.ingest.statistics().get(name, 0) >= number:
                    return
                assert not self.task.done(), self.task.exception()
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


@pytest.mark.parametrize("leaving", [0, 100_000, 1_500_000])
def test_a_full_disk_pauses_ingest_and_with_space_everything_is_there_once(disk, leaving):
    async def scenario():
        broker = MemoryBroker()
        bus = await broker.connect()
        for name, patterns in (
            (subjects.EVENTS_STREAM, [subjects.EVENTS_ALL]),
            (subjects.STATE_STREAM, subjects.STATE_ALL),
        ):
            await bus.ensure_stream(name, patterns, max_bytes=DISK, discard_new=True)
        learner = Learner(bus, disk)
        await send(bus, "event", 1, events(0))
        await learner.until("predictions", RECORDS)
        filler = fill(disk, leaving)
        for at in range(1, ENVELOPES):
            await send(bus, "event", at * RECORDS + 1, events(at))
        await learner.until("paused", 1)
        held = learner.ingest.totals["held"]
        assert held < ENVELOPES * RECORDS
        filler.unlink()
        total = ENVELOPES * RECORDS
        await learner.until("predictions", total)
        assert learner.ingest.totals == {
            **dict.fromkeys(("held", "archived"), total),
            **dict.fromkeys(("quarantined", "dropped", "under_way"), 0),
            "balanced": 1,
        }
        labels = [LabelRecord("fam", 1, seq, 1.0, float(seq)) for seq in range(1, total + 1)]
        await send(bus, "label", 1, labels)
        end_s = total + 2 * WINDOW_S
        await send(bus, "event", total + 1, [ObservationRecord("fam", "o", end_s, {})])
        await send(bus, "label", total + 1, [LabelRecord("fam", 1, 10**6, 1.0, end_s)])
        await learner.until("examples", total)
        await learner.close()
        assert learner.learned == [("EWR", 1, seq) for seq in range(1, total + 1)]

    asyncio.run(scenario())
