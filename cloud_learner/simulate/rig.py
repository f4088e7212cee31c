"""The rig: log, uplink, bus and ingest of a few devices in one process, to try faults on.

Why: what survives a fault shows only where all the rooms that a record passes are real; here each
can be ended and begun again while the others go on, and at the end every record is counted.

Invariants: the product's own rooms, nothing replaced. Every prediction that a device appends is
labelled; a sweep at the end moves event time on until all of it is mature, so each prediction that
was not reported lost must lie in the archive as exactly one example.

Knows nothing about which fault is tried, nor about the broker but how to connect to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cloud_learner.ingest.consumer import Ingest
from cloud_learner.ingest.guard import Batcher
from cloud_learner.ingest.intake import Commit, Intake, Strand
from cloud_learner.ingest.joiner import Rules
from cloud_learner.store.archive import Archive
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.ingest_state import Account, Lane
from cloud_learner.store.raw import RawLog
from cloud_learner.streams import make_streams
from edge_runtime.bus.base import Bus
from edge_runtime.bus.nats import connect
from edge_runtime.clock import Clock, SystemClock
from edge_runtime.errors import HeadwaterError
from edge_runtime.events.log import CLASSES, EventLog
from edge_runtime.events.uplink import Uplink
from edge_runtime.wire import codec
from edge_runtime.wire.messages import (
    LabelRecord,
    ObservationRecord,
    PredictionRecord,
    Scored,
)

FAMILY = "rig"
WINDOW_S = 50.0
IDLE_S = 60.0
WAIT_S = 60.0
_FAR_S = 20 * WINDOW_S

Id = tuple[str, int, int]
Connect = Callable[[str], Awaitable[Bus]]


def dialling(url: str) -> Connect:
    """How everybody comes to the broker at `url`."""

    async def dial(name: str) -> Bus:
        return await connect(url, name=name)

    return dial


def open_intake(home: Path) -> Intake:
    """An intake over the files in `home`."""
    rules = Rules(family=FAMILY, label_window_s=WINDOW_S, idle_s=IDLE_S)
    db, raw, archive = (
        IngestDb(home / "db", [FAMILY]),
        RawLog(home / "raw"),
        Archive(home / "archive"),
    )
    return Intake(
        db, raw, archive, [Strand(rules, Batcher(100, 100))], clock=SystemClock(), indices={}
    )


def examples(home: Path) -> Counter[Id]:
    """How often each prediction lies in the archive of the ingest that was closed in `home`."""
    db, archive = IngestDb(home / "db"), Archive(home / "archive")
    try:
        found = archive.query("SELECT device, epoch, seq FROM examples", db.files()).fetchall()
    finally:
        archive.close()
        db.close()
    return Counter(found)


class Cloud:
    """A learner's ingest over the files in `home`; `on_commit` hears of each commit."""

    def __init__(
        self, home: Path, bus: Bus, on_commit: Callable[[Commit], None] | None = None
    ) -> None:
        self.news = asyncio.Event()
        self._on_commit = on_commit
        self.ingest = Ingest(bus, partial(open_intake, home), SystemClock(), on_commit=self._note)
        self._bus = bus
        self._task = asyncio.create_task(self.ingest.run())

    @classmethod
    async def start(
        cls, home: Path, connect: Connect, on_commit: Callable[[Commit], None] | None = None
    ) -> Cloud:
        """Connect, make the streams, and ingest from then on."""
        bus = await connect("learner")
        await make_streams(bus)
        return cls(home, bus, on_commit)

    async def stop(self) -> None:
        """End in order; what was released lies in the archive."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._bus.close()

    def accounts(self) -> dict[Lane, Account]:
        """What became of every number of every lane so far."""
        return {} if self.ingest.intake is None else dict(self.ingest.intake.accounting.accounts)

    def mark(self, lane: Lane) -> int:
        """The highest number of a lane up to which all is held."""
        account = self.accounts().get(lane)
        return 0 if account is None else account.seq

    async def until(self, condition: Callable[[], bool], wait_s: float = WAIT_S) -> None:
        """Wait for what commits bring about. Raises: TimeoutError."""
        async with asyncio.timeout(wait_s):
            while not condition():
                self.news.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), 0.2)

    async def _note(self, commit: Commit) -> None:
        if self._on_commit is not None:
            self._on_commit(commit)
        self.news.set()


class Device:
    """A device's log and uplink; `predicted` holds the ids of all that it predicted.

    Event time begins at `start_s`; `options` are those of the log.
    """

    def __init__(
        self,
        home: Path,
        name: str,
        connect: Connect,
        *,
        start_s: float = 0.0,
        clock: Clock | None = None,
        **options: Any,
    ) -> None:
        self.name, self._home, self._connect, self._options = name, home, connect, options
        self._clock = clock or SystemClock()
        self.predicted: list[Id] = []
        self.time_s = start_s
        self._online: tuple[Bus, asyncio.Task[None]] | None = None
        self.log = self._opened()

    def predict(self, count: int = 1) -> None:
        """Predict so many events, a tenth of a second of event time apart, and label each."""
        for _ in range(count):
            self.time_s += 0.1
            seq = self.log.append("event", codec.encode(prediction(self.time_s)))
            self.predicted.append((self.name, self.log.epoch, seq))
            what = LabelRecord(FAMILY, self.log.epoch, seq, float(seq % 2), self.time_s + 1.0)
            self.log.append("label", codec.encode(what))

    def sweep(self) -> None:
        """Move event time far on, so that all that was predicted matures."""
        self.time_s += _FAR_S
        self.log.append("event", codec.encode(ObservationRecord(FAMILY, "swept", self.time_s, {})))

    async def connect(self) -> Uplink:
        """Begin to send what is logged."""
        bus = await self._connect(self.name)
        uplink = Uplink(self.log, bus, self.name, self._clock)
        self.log.on_commit = uplink.wake
        self._online = bus, asyncio.create_task(uplink.run())
        return uplink

    async def disconnect(self) -> None:
        """Stop sending; what is logged waits."""
        if self._online is None:
            return
        (bus, task), self._online = self._online, None
        self.log.on_commit = None
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, HeadwaterError):
            await task
        await bus.close()

    async def restart(self) -> None:
        """End the log in order, and open it again, offline."""
        await self.stop()
        self.log = self._opened()

    async def stop(self) -> None:
        """Send no more, and make everything durable."""
        await self.disconnect()
        self.log.close()

    def ends(self) -> Iterator[tuple[Lane, int]]:
        """Where each lane ends that the learner may not hold whole."""
        for event_class in CLASSES:
            for epoch, last_seq in self.log.owed(event_class):
                yield (self.name, epoch, event_class), last_seq

    def _opened(self) -> EventLog:
        return EventLog(self._home / self.name, device=self.name, **self._options)


async def until(condition: Callable[[], bool], wait_s: float = WAIT_S) -> None:
    """Wait for what other tasks bring about. Raises: TimeoutError."""
    async with asyncio.timeout(wait_s):
        while not condition():  # noqa: ASYNC110 - it is the state of others, who tell nobody
            await asyncio.sleep(0.005)


async def live(cloud: Cloud, device: Device, count: int = 50) -> Uplink:
    """Connect, predict so many, and wait until the learner holds them. Raises: TimeoutError."""
    uplink = await device.connect()
    device.predict(count)
    await delivered(cloud, device)
    return uplink


async def delivered(cloud: Cloud, *devices: Device, wait_s: float = WAIT_S) -> None:
    """Wait until the learner holds all that is durable, then sweep. Raises: TimeoutError."""
    await _held(cloud, devices, wait_s)
    for device in devices:
        device.sweep()
    await _held(cloud, devices, wait_s)


async def _held(cloud: Cloud, devices: Sequence[Device], wait_s: float) -> None:
    for device in devices:
        for event_class in CLASSES:
            await device.log.wait_durable(event_class, device.log.handed_out(event_class))
    await cloud.until(
        lambda: all(cloud.mark(lane) >= end for device in devices for lane, end in device.ends()),
        wait_s,
    )


def prediction(time_s: float) -> PredictionRecord:
    """A prediction of the family, whose features say when it was."""
    scored = [Scored("r1", "stable", [0.5])]
    features = struct.pack("<2f", time_s, 1.0)
    return PredictionRecord(FAMILY, "asked", time_s, {"n": 1}, "spec", features, 1.0, scored)


def missing_and_twice(expected: list[Id], found: Counter[Id]) -> tuple[int, int]:
    """How many predictions are no example, and how many examples are one too many."""
    missing = sum(1 for identity in set(expected) if not found[identity])
    return missing, sum(count - 1 for count in found.values())
