"""The intake: one commit, from messages as they came to facts on disk; synchronous, in one thread.

Why: decoding, joining and writing together take longer than an event loop may wait.

Invariants: state moves in memory first, then the messages are appended to the raw log, now and then
released examples are written to Parquet, then one transaction of the ingest database is the commit
point for all of it. If any step raises, memory is ahead of the disk and the intake must be thrown
away; a new one goes on from what was committed, and what no transaction names is removed. Of every
lane each number up to the mark is archived, quarantined or dropped, once. Garbage never raises: it
is quarantined and counted.

Knows nothing about the broker: a message's subject, headers and bytes, and an opaque token for it.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from cloud_learner.ingest.accounting import Accounting
from cloud_learner.ingest.guard import Batcher
from cloud_learner.ingest.joiner import Joiner, Portion, Rules
from cloud_learner.ingest.opening import Incoming, Opened, opened
from cloud_learner.ingest.outlet import Outlet
from cloud_learner.ingest.sequencer import Accepted, Sequencer
from cloud_learner.store.archive import Archive
from cloud_learner.store.examples import Batch, Example
from cloud_learner.store.ingest_db import IngestDb, put_quarantined
from cloud_learner.store.raw import Position, RawLog, RawMessage
from cloud_learner.store.rocks import Transaction
from edge_runtime.clock import Clock
from edge_runtime.errors import ConfigError, RequestError
from edge_runtime.wire import subjects
from edge_runtime.wire.codec import ENCODING_HEADER
from edge_runtime.wire.messages import (
    LabelRecord,
    Mark,
    ObservationRecord,
    PredictionRecord,
    Watermark,
)

EXPIRE_S = 600.0


class Commit(msgspec.Struct):
    """What one commit made true.

    `clock_s` is the joint event time up to which all mature examples are released; `batches` are
    new ones, `examples` all that were released, batched or not, and `amended` those that came out
    once more; `counters` count since the learner's first start, and also hold what waits now;
    `totals` are sums over the accounts.
    """

    number: int
    clock_s: float
    records: int
    examples: list[Example]
    amended: list[Example]
    batches: list[Batch]
    counters: dict[str, int]
    totals: dict[str, int]
    watermarks: list[Watermark]
    done: list[Any]


class Intake:
    """Turns messages into commits; made once for each start. Raises: ConfigError, CapacityError."""

    def __init__(
        self,
        db: IngestDb,
        raw: RawLog,
        archive: Archive,
        rules: Rules,
        guard: Batcher,
        *,
        clock: Clock,
        widths: Mapping[str, int],
    ) -> None:
        self._db, self._raw, self._archive, self._clock = db, raw, archive, clock
        self._widths, self._ahead_s_max = widths, rules.ahead_s_max
        state = db.load()
        self._meta, self._base = state.meta, state.counters
        raw.adopt(Position(*state.meta.raw) if state.meta.raw else None)
        self.orphans = archive.adopt(state.files)
        self.accounting = Accounting(state.accounts)
        self._sequencer: Sequencer[Opened] = Sequencer(self.accounting.marks())
        self.joiner = Joiner(
            rules, db, self.accounting.accounts, state.meta.clock_s, clock.monotonic_s()
        )
        self._outlet = Outlet(db, archive, guard, state, clock.monotonic_s())
        self._counters: Counter[str] = Counter()
        self._expire_at_s = float("-inf")

    @property
    def clock_s(self) -> float:
        """The joint event time of the last commit."""
        return self._meta.clock_s

    @property
    def reached(self) -> tuple[int, int]:
        """The numbers of the last committed batch, and of what was released last."""
        return self._meta.batch, self._meta.released

    def commit(
        self,
        messages: Iterable[Incoming],
        reported: Mapping[str, list[Mark]] | None = None,
        *,
        learned: int = 0,
        flush: bool = False,
    ) -> Commit:
        """Take in messages, durable on return.

        `reported` is where lanes end by the devices' last reports; batches up to `learned` are
        kept for a while only; `flush` writes what was released to files now.
        Raises: CapacityError; then make a new intake.
        """
        change = self._db.begin()
        self._meta.commit += 1
        with _uncollected():
            portions, kept, devices = self._accepted(messages, change)
        now_s, wall_s = self._clock.monotonic_s(), self._clock.now_s()
        for device, marks in (reported or {}).items():
            self.accounting.hear(device, marks)
        self.joiner.join(portions, self.accounting.moved, change, now_s)
        examples = self.joiner.settle(wall_s, now_s)
        if kept:
            self._meta.raw = self._raw.append(kept)
        others = self.joiner.for_files_only
        batches = self._outlet.put(examples, others, self._meta, change, now_s)
        self._outlet.tidy(self._meta, change, now_s, learned=learned, flush=flush)
        self._meta.clock_s = self.joiner.clock_s
        self.accounting.write(change)
        counters = self.counters()
        self._db.commit(change, self._meta, counters)
        self._outlet.settle()
        self._expire_raw(now_s, wall_s)
        return Commit(
            number=self._meta.commit,
            clock_s=self._meta.clock_s,
            records=sum(len(portion.records) for portion in portions),
            examples=examples,
            amended=self.joiner.amended,
            batches=batches,
            counters=counters | self.waiting(),
            totals=self.accounting.totals(),
            watermarks=[self.accounting.watermark(device) for device in sorted(devices)],
            done=self._sequencer.done(),
        )

    @property
    def is_behind(self) -> bool:
        """Whether a commit without messages should follow at once: more is there to be settled."""
        return self.joiner.is_behind

    def is_due(self) -> bool:
        """Whether a commit without messages would settle something, or write a file."""
        return self.is_behind or self._outlet.is_due(self._clock.monotonic_s())

    def caught_up(self, batch: int, released: int) -> tuple[list[Batch], list[Example]]:
        """The committed batches, and the examples for batches, above what was `reached` once."""
        return list(self._db.batches_after(batch)), self._db.examples_after(released)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """The rows of a query of the view `examples`: of what lies in files."""
        rows: list[tuple[Any, ...]] = self._archive.query(sql, self._db.files()).fetchall()
        return rows

    def batches_after(self, number: int) -> Iterator[Batch]:
        """The committed batches above `number`, in order."""
        return self._db.batches_after(number)

    def close(self) -> None:
        """Write to files what was released, and close everything. Raises: CapacityError."""
        try:
            if self._outlet.holds_any:
                self.commit([], flush=True)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close everything as it is: what was committed is kept."""
        self._outlet.close()
        self._raw.close()
        self._archive.close()
        self._db.close()

    def watermarks(self) -> list[Watermark]:
        """What is held of every known device."""
        return [self.accounting.watermark(device) for device in self.accounting.devices()]

    def counters(self) -> dict[str, int]:
        """Counts since the learner's first start."""
        total = Counter(self._base)
        parts = (self._sequencer, self.joiner, self.accounting, self._outlet)
        for counters in (self._counters, *(part.counters for part in parts)):
            total.update(counters)
        return dict(total)

    def waiting(self) -> dict[str, int]:
        """How much waits now, and what this run wrote to files."""
        return {
            **self._archive.statistics(),
            **self.joiner.waiting(),
            **self._outlet.waiting(),
            "beyond_gap": self._sequencer.statistics()["beyond_gap"],
        }

    def _expire_raw(self, now_s: float, wall_s: float) -> None:
        """Let go of raw messages that were kept long enough."""
        if now_s >= self._expire_at_s:
            self._expire_at_s = now_s + EXPIRE_S
            self._raw.expire(wall_s)

    def _accepted(
        self, messages: Iterable[Incoming], change: Transaction
    ) -> tuple[list[Portion], list[RawMessage], set[str]]:
        """What is new in the messages, the messages to keep, and whose they are."""
        portions: list[Portion] = []
        kept: list[RawMessage] = []
        devices: set[str] = set()
        for message in messages:
            try:
                arrival = opened(message, self._widths)
            except (RequestError, ConfigError) as error:
                self._quarantine(
                    message.arrived_s, message.subject, error.code, message.data, change
                )
                self._sequencer.skip(message.token)
                continue
            if not self.accounting.has_room(arrival.lane):
                refused = message.arrived_s, message.subject, "too_many_epochs", message.data
                self._quarantine(*refused, change)
                self._sequencer.skip(message.token)
                continue
            devices.add(arrival.lane[0])
            self.accounting.notice(arrival.lane)
            for part in self._sequencer.accept(arrival):
                portions.append(self._enter(part, change))
                kept.append(_raw_message(part.arrival.what.message))
        return portions, kept, devices

    def _enter(self, part: Accepted[Opened], change: Transaction) -> Portion:
        """Account for an accepted part; what is refused of it is kept to be looked at."""
        arrival, what = part.arrival, part.arrival.what
        records = what.records[part.cut :] if part.cut else what.records
        first_seq = arrival.base_seq + part.cut
        for index, refused in what.refused.items():
            if index >= part.cut:
                device, epoch, event_class = arrival.lane
                place = f"{subjects.events(device, event_class)}#{epoch}/{arrival.base_seq + index}"
                arrived_s = what.message.arrived_s
                self._quarantine(arrived_s, place, refused.reason, refused.data, change)
        for kind, number in Counter(map(type, records)).items():
            if kind is not int:
                self._counters[_COUNTED[kind]] += number
        entry = arrival.lane, part.lost, what.reason, records, what.prior
        newest_s_max = what.message.arrived_s + self._ahead_s_max
        self.accounting.enter(*entry, newest_s_max=newest_s_max)
        return Portion(arrival.lane, first_seq, records, what.data, what.message.arrived_s)

    def _quarantine(
        self, arrived_s: float, subject: str, reason: str, data: bytes, change: Transaction
    ) -> None:
        self._counters["quarantined"] += 1
        self._counters[f"quarantined_{reason}"] += 1
        self._meta.quarantined += 1
        put_quarantined(change, self._meta.quarantined, (arrived_s, subject, reason, data))


_COUNTED: dict[type, str] = {
    PredictionRecord: "predictions",
    ObservationRecord: "observations",
    LabelRecord: "labels",
}


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without looks for cycles: thousands of records that hold none cost a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _raw_message(message: Incoming) -> RawMessage:
    encoding = message.headers.get(ENCODING_HEADER, "")
    return RawMessage(message.subject, encoding, message.data, message.arrived_s)
