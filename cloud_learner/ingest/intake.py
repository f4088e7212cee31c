"""The intake: one commit, from messages as they came to facts on disk; synchronous, in one thread.

Why: decoding, joining, Parquet and SQLite together take longer than an event loop may wait.

Invariants: state moves in memory first, then the archive file is written, then one transaction of
the ingest database is the commit point for all of it. If any step raises, memory is ahead of the
disk and the intake must be thrown away; a new one goes on from what was committed, and the file
without a transaction is removed. Garbage never raises: it is quarantined and counted.

Knows nothing about the broker: a message's subject and bytes, and an opaque token for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from cloud_learner.ingest.guard import NUMBER_MAX, Batcher, refusal
from cloud_learner.ingest.joiner import ArchivedRecord, Joiner
from cloud_learner.ingest.sequencer import Arrival, Sequencer
from cloud_learner.store.archive import Archive
from cloud_learner.store.examples import Batch, Example
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.ingest_state import DROPPED, Changes
from edge_runtime.clock import Clock
from edge_runtime.errors import ConfigError, RequestError
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import (
    WIRE_VERSION,
    LabelRecord,
    Mark,
    ObservationRecord,
    PredictionRecord,
    Record,
    Watermark,
)

EPOCHS_MAX = 64  # of one device in a watermark; older ones were trimmed long ago


class Incoming(msgspec.Struct):
    """A message as it came; `token` is handed back when it may be acknowledged."""

    subject: str
    data: bytes
    arrived_s: float
    token: Any


class Commit(msgspec.Struct):
    """What one commit made true.

    `clock_s` is the joint event time up to which all mature examples are released; `batches` are
    new ones, `examples` all that were released, batched or not; `counters` count since the
    learner's first start, and also hold what waits now.
    """

    number: int
    clock_s: float
    records: int
    examples: list[Example]
    batches: list[Batch]
    counters: dict[str, int]
    watermarks: list[Watermark]
    done: list[Any]


class Intake:
    """Turns messages into commits; made once for each start. Raises: ConfigError."""

    def __init__(
        self,
        db: IngestDb,
        archive: Archive,
        joiner: Joiner,
        guard: Batcher,
        *,
        clock: Clock,
        widths: Mapping[str, int],
    ) -> None:
        self._db, self._archive, self._joiner, self._guard = db, archive, joiner, guard
        self._clock, self._widths = clock, widths
        state = db.load()
        self.orphans = archive.adopt(db.files())
        self._number, self._base = state.commit, state.counters
        self._counters: Counter[str] = Counter()
        self._newest_s = {lane: newest_s for lane, (_, newest_s) in state.marks.items()}
        self._sequencer = Sequencer({lane: seq for lane, (seq, _) in state.marks.items()})
        joiner.restore(state, clock.monotonic_s())
        guard.restore(state.batch, state.unbatched)

    def commit(self, messages: Iterable[Incoming]) -> Commit:
        """Take in messages, durable on return. Raises: CapacityError; then make a new intake."""
        self._number += 1
        changes = Changes(self._number)
        devices: set[str] = set()
        records: list[ArchivedRecord] = []
        for message in messages:
            try:
                arrival = _opened(message)
            except (RequestError, ConfigError) as error:
                self._quarantine(message, error.code, changes)
                self._sequencer.skip(message.token)
                continue
            devices.add(arrival.lane[0])
            for part in self._sequencer.accept(arrival):
                records += self._read(part, changes)
        examples, batches = self._learn(records, changes)
        if archived := changes.covered + examples:
            changes.files = self._archive.write(archived, self._number)
        changes.counters = self.counters()
        self._db.apply(changes)
        return Commit(
            number=self._number,
            clock_s=changes.clock_s,
            records=len(records),
            examples=examples,
            batches=batches,
            counters=changes.counters | self.waiting(),
            watermarks=[self._watermark(device) for device in sorted(devices)],
            done=self._sequencer.done(),
        )

    def watermarks(self) -> list[Watermark]:
        """What is held of every known device."""
        return [self._watermark(device) for device in self._sequencer.devices()]

    def counters(self) -> dict[str, int]:
        """Counts since the learner's first start."""
        parts = (self._counters, self._sequencer.counters, self._joiner.counters)
        total = Counter(self._base)
        for part in (*parts, self._guard.counters):
            total.update(part)
        return dict(total)

    def waiting(self) -> dict[str, int]:
        """How much waits now: for a label, a prediction, a batch, or for a gap to be filled."""
        parts = (self._joiner.statistics(), self._guard.statistics(), self._sequencer.statistics())
        names = ("pending", "labels_waiting", "unbatched", "beyond_gap")
        return {name: part[name] for part in parts for name in names if name in part}

    def _read(self, part: Arrival, changes: Changes) -> list[ArchivedRecord]:
        """The records of an accepted part; what is wrong with one stops none of the others."""
        device, epoch, event_class = part.lane
        found = []
        newest_s = self._newest_s.get(part.lane, float("-inf"))
        for seq, raw in enumerate(part.records, part.base_seq):
            data = bytes(raw)
            record = self._record(part, seq, data, changes)
            if record is not None:
                newest_s = max(newest_s, record.time_s)
                identity = (device, epoch, event_class, seq)
                found.append(ArchivedRecord(*identity, record, data, part.arrived_s))
        self._newest_s[part.lane] = newest_s
        changes.marks[part.lane] = (part.last_seq, newest_s)
        return found

    def _record(self, part: Arrival, seq: int, data: bytes, changes: Changes) -> Record | None:
        device, epoch, event_class = part.lane
        try:
            record = codec.decode_record(data)
            reason = refusal(record, event_class, self._widths)
        except RequestError as error:
            reason = error.code
        if reason:
            place = f"{subjects.events(device, event_class)}#{epoch}/{seq}"
            self._quarantine(Incoming(place, data, part.arrived_s, None), reason, changes)
            return None
        self._counters[_COUNTER[type(record)]] += 1
        return record

    def _quarantine(self, what: Incoming, reason: str, changes: Changes) -> None:
        self._counters["quarantined"] += 1
        self._counters[f"quarantined_{reason}"] += 1
        changes.quarantine.append((what.arrived_s, what.subject, reason, what.data))

    def _learn(
        self, records: list[ArchivedRecord], changes: Changes
    ) -> tuple[list[Example], list[Batch]]:
        """Join, release and batch."""
        wall_s, monotonic_s = self._clock.now_s(), self._clock.monotonic_s()
        self._joiner.join(records, changes, self._db.state_of, monotonic_s)
        examples = self._joiner.settle(changes, wall_s, monotonic_s)
        changes.batched = [(DROPPED, *example.id) for example in self._guard.add(examples)]
        batches = []
        while (batch := self._guard.next()) is not None:
            changes.batched += [(batch.number, *example.id) for example in batch.examples]
            batches.append(batch)
        changes.batch = self._guard.number
        return examples, batches

    def _watermark(self, device: str) -> Watermark:
        lanes = self._sequencer.lanes(device)[-2 * EPOCHS_MAX :]
        marks = [Mark(lane[1], lane[2], self._sequencer.marks[lane]) for lane in lanes]
        return Watermark(WIRE_VERSION, device, marks)


_COUNTER: dict[type, str] = {
    PredictionRecord: "predictions",
    ObservationRecord: "observations",
    LabelRecord: "labels",
}


def _opened(message: Incoming) -> Arrival:
    """The envelope, if it is one and says what its subject says. Raises: HeadwaterError."""
    device = subjects.checked_name(subjects.device_of(message.subject), "device")
    envelope = codec.decode_envelope(message.data)
    subject = subjects.events(device, envelope.event_class)
    if message.subject != subject or envelope.device != device:
        raise RequestError("wrong_subject", f"{message.subject} carries what belongs to {subject}")
    highest = max(envelope.epoch, envelope.base_seq + len(envelope.records))
    if min(envelope.epoch, envelope.base_seq) < 1 or highest > NUMBER_MAX:
        raise RequestError("bad_number", f"{subject}: an epoch or sequence number out of range")
    lane = (device, envelope.epoch, envelope.event_class)
    return Arrival(lane, envelope.base_seq, envelope.records, message.token, message.arrived_s)
