"""Settling: what becomes of a prediction when its time to be labelled is over.

Why: which examples come out, and in which order, must follow from what happened and not from what
came first.

Invariants: a prediction settles once: as an example when it has a label, else as the family
declares: expired, or an example of the outcome 0. It matures when the joint clock has passed its
time by more than the label window; strictly, because records of that very second may still come.
Examples leave in the order of (time, device, epoch, seq), whatever order the records came in. An
unlabelled prediction of a device that lags behind the joint clock waits until the device's own time
has passed as well. What is settled is remembered for `keep_s` more, so that a late label is known
as late, and then forgotten.

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
    ) -> None:
        self._waiting, self._clock, self._counters = waiting, clock, counters
        self._window_s, self._keep_s, self._keeps_records = window_s, keep_s, keeps_records
        self._is_negative, self._learn_from_s = is_negative, learn_from_s
        self._devices = dict.fromkeys(waiting.devices_waited_for(), _NEVER_S)
        self._newest: Order = (_NEVER_S, "", 0, 0)
        self.covered: list[Example] = []

    def settle(self, touched: set[bytes], wall_s: float, now_s: float) -> list[Example]:
        """Advance the clock and settle what has matured; `touched` are runs with a late label.

        What the bootstrap has learned comes out as well, apart: in `covered`.
        """
        self.covered = []
        mature_s = self._clock.advance(now_s) - self._window_s
        runs = touched | {run for run, _ in self._waiting.take(SETTLE, mature_s)}
        for device, seen_s in list(self._devices.items()):
            own_s = self._clock.of(device, now_s) - self._window_s
            if own_s > seen_s:
                runs.update(self._waiting.take_for_device(device, own_s))
                self._devices[device] = own_s
        examples: list[Example] = []
        for run in sorted(runs):
            own_s = self._clock.of(id_of(run)[0], now_s) - self._window_s
            self._settle_run(run, mature_s, own_s, wall_s, examples)
        for run, last in self._waiting.take(FORGET, mature_s - self._keep_s):
            self._waiting.forget(run, int.from_bytes(last, "big"))
        examples.sort(key=_order)
        self._note_order(examples)
        return examples

    def _settle_run(
        self, run: bytes, mature_s: float, own_s: float, wall_s: float, out: list[Example]
    ) -> None:
        rows = self._waiting.rows_of(run)
        if not rows:
            return  # the entry was stale
        left = _Left()
        stored: StoredRun | None = None
        for key, row in rows:
            left.latest_s = max(left.latest_s, row.time_s)
            if row.state != PENDING:
                continue
            if row.time_s >= mature_s:
                left.immature_s = min(left.immature_s, row.time_s)
            elif row.label is None and row.time_s >= own_s:
                left.overdue_s = min(left.overdue_s, row.time_s)
            else:
                stored = stored or self._waiting.run(run)
                assert stored is not None, "a run lies there as long as it has rows that wait"
                out += self._close(key, row, stored, wall_s)
        self._file_again(run, left)

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

    def _file_again(self, run: bytes, left: _Left) -> None:
        """Enter in the calendar what there is still to do about a run."""
        if left.immature_s < _ALWAYS_S:
            self._waiting.file(SETTLE, left.immature_s, run)
        if left.overdue_s < _ALWAYS_S:
            device = id_of(run)[0]
            self._waiting.file_for_device(left.overdue_s, run)
            self._devices[device] = min(self._devices.get(device, _ALWAYS_S), left.overdue_s)
        if min(left.immature_s, left.overdue_s) == _ALWAYS_S:
            last = self._waiting.last_seq(run).to_bytes(8, "big")
            self._waiting.file(FORGET, left.latest_s, run, last)
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
    record, label = stored.records[seq - stored.base_seq], row.label
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
