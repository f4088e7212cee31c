"""Settling: what becomes of a prediction when its time to be labelled is over.

Why: which examples come out, and in which order, must follow from what happened and not from what
came first.

Invariants: a prediction settles once: as an example when it has a label, else as the family
declares: expired, or an example of the outcome 0. It matures when the joint clock has passed its
time by more than the label window; strictly, because records of that very second may still come.
Examples leave in the order of (time, device, epoch, seq), whatever order the records came in. An
unlabelled prediction of a device that lags behind the joint clock waits until the device's own time
has passed as well. When very much matures at once it is settled bit by bit, the earliest first, and
`clock_s` says how far. What is settled is remembered for `keep_s` more, so that a late label is
known as late, and then forgotten.

Knows nothing about how labels are attached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec

from cloud_learner.ingest.joint_clock import JointClock
from cloud_learner.store.examples import Example
from cloud_learner.store.ingest_state import (
    COVERED,
    EXPIRED,
    PENDING,
    RELEASED,
    Label,
    Row,
    id_of,
)
from cloud_learner.store.runs import FORGET, SETTLE, StoredRun, Waiting
from edge_runtime.wire.messages import PredictionRecord

_NEVER_S, _ALWAYS_S = float("-inf"), float("inf")
NEGATIVE = 0.0
AT_ONCE = (
    20_000  # records that one commit looks at, about; memory does not grow with a jump in time
)

Order = tuple[float, str, int, int]


class _Left(msgspec.Struct):
    """What a look at a run left to be done, and when the last of it happened."""

    immature_s: float = _ALWAYS_S
    overdue_s: float = _ALWAYS_S
    latest_s: float = _NEVER_S


class Settling:
    """Settles what `waiting` holds, by `clock`; counts into `counters`."""

    def __init__(
        self,
        waiting: Waiting,
        clock: JointClock,
        counters: Counter[str],
        *,
        window_s: float,
        keep_s: float,
        keeps_records: bool,
        is_negative: bool,
        learn_from_s: float,
        clock_s: float,
        at_once: int,
    ) -> None:
        self._waiting, self._clock, self._counters = waiting, clock, counters
        self._window_s, self._keep_s, self._keeps_records = window_s, keep_s, keeps_records
        self._is_negative, self._learn_from_s = is_negative, learn_from_s
        self._devices = dict.fromkeys(waiting.devices_waited_for(), _NEVER_S)
        self._newest: Order = (_NEVER_S, "", 0, 0)
        self.covered: list[Example] = []
        self.clock_s, self.mature_s = clock_s, clock_s - window_s
        self.is_behind = False
        self._at_once = at_once

    def settle(self, touched: set[bytes], wall_s: float, now_s: float) -> list[Example]:
        """Advance the clock and settle what has matured; `touched` are runs with a late label.

        What the bootstrap has learned comes out as well, apart: in `covered`.
        """
        self.covered = []
        now_mature_s = self._clock.advance(now_s) - self._window_s
        due = self._waiting.take(SETTLE, now_mature_s, self._at_once)
        self.mature_s = max(self.mature_s, due.before_s)
        self.clock_s = self._clock.now_s if due.is_all else self.mature_s + self._window_s
        self.is_behind = not due.is_all
        runs = touched | due.runs.keys() | self._overdue(now_s)
        examples: list[Example] = []
        for run in sorted(runs):
            own_s = self._clock.of(id_of(run)[0], now_s) - self._window_s
            self._settle_run(run, own_s, wall_s, examples)
        old = self._waiting.take(FORGET, self.mature_s - self._keep_s, self._at_once)
        self.is_behind |= not old.is_all
        for run, last in old.runs.items():
            self._waiting.forget(run, last)
        examples.sort(key=_order)
        self._note_order(examples)
        return examples

    def _overdue(self, now_s: float) -> set[bytes]:
        """The runs that waited for their device's own time, and need to no longer."""
        runs: set[bytes] = set()
        for device, seen_s in list(self._devices.items()):
            own_s = self._clock.of(device, now_s) - self._window_s
            if own_s > seen_s:
                taken = self._waiting.take_for_device(device, own_s, self._at_once)
                self._devices[device] = taken.before_s
                self.is_behind |= not taken.is_all
                runs |= taken.runs.keys()
        return runs

    def _settle_run(self, run: bytes, own_s: float, wall_s: float, out: list[Example]) -> None:
        stored = self._waiting.run(run)
        if stored is None:
            return  # the entry was stale
        left = _Left()
        for key, row in self._waiting.rows_between(run, stored.last_seq):
            left.latest_s = max(left.latest_s, row.time_s)
            if row.state != PENDING:
                continue
            if row.time_s >= self.mature_s:
                left.immature_s = min(left.immature_s, row.time_s)
            elif row.label is None and row.time_s >= own_s:
                left.overdue_s = min(left.overdue_s, row.time_s)
            else:
                out += self._close(key, row, stored, wall_s)
        self._file_again(run, stored.last_seq, left)

    def _close(self, key: bytes, row: Row, stored: StoredRun, wall_s: float) -> list[Example]:
        """Settle one prediction; at most one example comes of it."""
        self._counters["pending"] -= 1
        if row.label is None:
            self._counters["expired"] += 1
            if self._is_negative:
                outcome_s = row.time_s + self._window_s
                row.label = Label(NEGATIVE, outcome_s, final=False, arrived_s=wall_s)
        if row.label is None:
            row.state = EXPIRED
        elif row.time_s < self._learn_from_s:
            row.state = COVERED
            self._counters["covered_by_bootstrap"] += 1
        else:
            row.state = RELEASED
            self._counters["examples"] += 1
        self._waiting.set_row(key, row)
        if row.state == COVERED:
            self.covered.append(example(key, stored, row, wall_s))
        return [example(key, stored, row, wall_s)] if row.state == RELEASED else []

    def _file_again(self, run: bytes, last_seq: int, left: _Left) -> None:
        """Enter in the calendar what there is still to do about a run."""
        if left.immature_s < _ALWAYS_S:
            self._waiting.file(SETTLE, left.immature_s, run, last_seq)
        if left.overdue_s < _ALWAYS_S:
            device = id_of(run)[0]
            self._waiting.file_for_device(left.overdue_s, run, last_seq)
            self._devices[device] = min(self._devices.get(device, _ALWAYS_S), left.overdue_s)
        if min(left.immature_s, left.overdue_s) == _ALWAYS_S:
            self._waiting.file(FORGET, left.latest_s, run, last_seq)
            if not self._keeps_records:
                self._waiting.forget_records(run)

    def _note_order(self, examples: Iterable[Example]) -> None:
        for each in examples:
            order = _order(each)
            if order < self._newest:
                self._counters["released_out_of_order"] += 1
            self._newest = max(self._newest, order)


def example(key: bytes, stored: StoredRun, row: Row, matured_s: float) -> Example:
    """The example that a labelled prediction becomes."""
    device, epoch, seq = id_of(key)
    record, label = stored.record(seq), row.label
    assert isinstance(record, PredictionRecord)
    assert label is not None
    return Example(
        device=device,
        epoch=epoch,
        seq=seq,
        family=record.family,
        time_s=record.time_s,
        label_time_s=label.time_s,
        features=record.features,
        spec=record.spec,
        label=label.value,
        propensity=record.propensity,
        scored=record.scored,
        arrived_s=label.arrived_s,
        matured_s=matured_s,
        kind=record.kind,
        fields=record.fields,
        final=label.final,
        revision=row.revision,
    )


def _order(each: Example) -> Order:
    return (each.time_s, each.device, each.epoch, each.seq)
