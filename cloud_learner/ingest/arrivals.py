"""Arrivals: from messages as they came to what is new in them, accounted for.

Why: a broker brings some messages twice and garbage now and then; what is joined and kept must be
each record once.

Invariants: of every lane each number is taken in once, in order, and accounted for in the same
commit. Garbage never raises: it is quarantined and counted. A portion goes to each family that has
a record in it, and to no other; records of families that nobody here learns are counted, and kept
in the raw log only.

Knows nothing about joins, batches or files.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from cloud_learner.ingest.accounting import Accounting
from cloud_learner.ingest.guard import Indices, Tasks
from cloud_learner.ingest.joiner import Portion
from cloud_learner.ingest.opening import Incoming, Opened, opened
from cloud_learner.ingest.sequencer import Accepted, Arrival, Sequencer
from cloud_learner.store.ingest_db import put_quarantined
from cloud_learner.store.ingest_state import Meta
from cloud_learner.store.raw import RawMessage
from cloud_learner.store.rocks import Transaction
from edge_runtime.errors import ConfigError, RequestError
from edge_runtime.wire import subjects
from edge_runtime.wire.codec import ENCODING_HEADER
from edge_runtime.wire.messages import (
    LabelRecord,
    ObservationRecord,
    PredictionRecord,
    Record,
)


class Taken(msgspec.Struct):
    """What is new in some messages: how many records, those of each family, the messages to keep,
    and whose they are.
    """

    portions: dict[str, list[Portion]]
    records: int = 0
    kept: list[RawMessage] = []
    devices: set[str] = set()


class Arrivals:
    """Takes messages in; `accounting` is moved, `meta` numbers what is quarantined.

    `ahead_s_max` says of each family how far after its arrival an event may lie; `indices` are
    those of the columns of known specs, by hash, `tasks` those of the families.
    """

    def __init__(
        self,
        accounting: Accounting,
        meta: Meta,
        ahead_s_max: Mapping[str, float],
        indices: Indices,
        tasks: Tasks,
    ) -> None:
        self._accounting, self._meta = accounting, meta
        self._ahead_s_max, self._indices, self._tasks = ahead_s_max, indices, tasks
        self._sequencer: Sequencer[Opened] = Sequencer(accounting.marks())
        self.counters = self._sequencer.counters

    def take(self, messages: Iterable[Incoming], change: Transaction) -> Taken:
        """Take what is new in the messages."""
        taken = Taken({family: [] for family in self._ahead_s_max}, kept=[], devices=set())
        with _uncollected():
            for message in messages:
                self._take(message, taken, change)
        return taken

    def done(self) -> list[Any]:
        """The tokens of the messages that may be acknowledged once the commit is made."""
        return self._sequencer.done()

    def statistics(self) -> dict[str, int]:
        """Counters, and how many records wait beyond a gap."""
        return self._sequencer.statistics()

    def _take(self, message: Incoming, taken: Taken, change: Transaction) -> None:
        try:
            arrival = self._opened(message)
        except (RequestError, ConfigError) as error:
            self._quarantine(message.arrived_s, message.subject, error.code, message.data, change)
            self._sequencer.skip(message.token)
            return
        taken.devices.add(arrival.lane[0])
        self._accounting.notice(arrival.lane)
        for part in self._sequencer.accept(arrival):
            self._enter(part, taken, change)
            taken.kept.append(_raw_message(part.arrival.what.message))

    def _opened(self, message: Incoming) -> Arrival[Opened]:
        arrival = opened(message, self._indices, self._tasks)
        if not self._accounting.has_room(arrival.lane):
            raise RequestError("too_many_epochs", f"{message.subject}: no more lanes")
        return arrival

    def _enter(self, part: Accepted[Opened], taken: Taken, change: Transaction) -> None:
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
                self.counters[_COUNTED[kind]] += number
        newest_s = self._newest_s(records, what.message.arrived_s)
        entry = arrival.lane, part.lost, what.reason, records, what.prior
        self._accounting.enter(*entry, newest_s=newest_s)
        portion = Portion(arrival.lane, first_seq, records, what.data, what.message.arrived_s)
        taken.records += len(records)
        for family in newest_s:
            taken.portions[family].append(portion)

    def _newest_s(self, records: Sequence[Record | int], arrived_s: float) -> dict[str, float]:
        """The families that have records here, and the newest event time of each.

        No event is further ahead of its arrival than its family allows: its clock was wrong.
        """
        whole: list[Any] = [record for record in records if type(record) is not int]
        names = {record.family for record in whole}
        if strange := names - self._ahead_s_max.keys():
            self.counters["other_family"] += sum(
                [type(r) is not ObservationRecord and r.family in strange for r in whole]
            )
        found = {}
        for family in names - strange:
            ours = whole if len(names) == 1 else [r for r in whole if r.family == family]
            ahead_s = arrived_s + self._ahead_s_max[family]
            found[family] = min(max([record.time_s for record in ours]), ahead_s)
        return found

    def _quarantine(
        self, arrived_s: float, subject: str, reason: str, data: bytes, change: Transaction
    ) -> None:
        self.counters["quarantined"] += 1
        self.counters[f"quarantined_{reason}"] += 1
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
