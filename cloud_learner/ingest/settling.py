"""Settling: what becomes of a prediction when its time to be labelled is over.

Why: which examples come out, and in which order, must follow from what happened and not from what
came first.

Invariants: a prediction settles once: as an example when it has a label, else as the family
declares: expired, or an example of the outcome 0. It matures when the joint clock has passed its
time by more than the label window; strictly, because records of that very second may still come. An
unlabelled prediction of a device that lags behind the joint clock waits until the device's own time
has passed as well. When very much is due at once it is settled bit by bit, the earliest first, and
`clock_s` says how far: labels that wait for a moment are taken up to just there. What is settled is
remembered for `keep_s` more, so that a late label is known as late, and then forgotten.

Knows nothing about how labels are attached.
"""

from __future__ import annotations

import math
from collections import Counter

import msgspec

from cloud_learner.ingest.joint_clock import JointClock
from cloud_learner.ingest.releases import Releases
from cloud_learner.ingest.rules import Rules
from cloud_learner.store.ingest_state import EXPIRED, PENDING, Label, Row, id_of
from cloud_learner.store.runs import FORGET, SETTLE, StoredRun, Taken, Waiting

_NEVER_S, _ALWAYS_S = float("-inf"), float("inf")
NEGATIVE = 0.0
KEPT_WINDOWS = 3  # how long what is settled is known as settled, not as unknown
AT_ONCE = (
    20_000  # records that one commit looks at, about; memory does not grow with a jump in time
)


class _Left(msgspec.Struct):
    """What a look at a run left to be done, and when the last of it happened."""

    immature_s: float = _ALWAYS_S
    overdue_s: float = _ALWAYS_S
    latest_s: float = _NEVER_S


class Settling:
    """Settles what `waiting` holds, by `clock`, into `releases`; counts into `counters`."""

    def __init__(
        self,
        rules: Rules,
        waiting: Waiting,
        clock: JointClock,
        releases: Releases,
        counters: Counter[str],
        *,
        clock_s: float,
        at_once: int,
    ) -> None:
        self._rules, self._waiting, self._clock = rules, waiting, clock
        self._releases, self._counters = releases, counters
        self._window_s = rules.label_window_s
        self._keep_s = max(KEPT_WINDOWS * rules.label_window_s, rules.amend_s)
        self._devices = dict.fromkeys(waiting.devices_waited_for(), _NEVER_S)
        self.clock_s, self.mature_s = clock_s, clock_s - self._window_s
        self.is_behind = False
        self._at_once = at_once
        self._due = Taken({}, _NEVER_S, is_all=True)

    def advance(self, now_s: float) -> list[tuple[bytes, Label]]:
        """Move on, as far as one commit can; the labels whose moment has come, in order."""
        clock_s = self._clock.advance(now_s)
        self._due = self._waiting.take(SETTLE, clock_s - self._window_s, self._at_once)
        mature_s = self._due.before_s
        if not self._due.is_all:  # just past what matures now, whatever rounding says
            clock_s = min(clock_s, math.nextafter(mature_s + self._window_s, math.inf))
        labels = self._waiting.take_labels(clock_s, self._at_once)
        if not labels.is_all:
            clock_s = labels.before_s
            mature_s = min(mature_s, clock_s - self._window_s)
        self.is_behind = not (self._due.is_all and labels.is_all)
        self.clock_s = max(self.clock_s, clock_s)
        self.mature_s = max(self.mature_s, mature_s)
        return labels.labels

    def settle(self, touched: set[bytes], wall_s: float, now_s: float) -> None:
        """Settle what has matured; `touched` are runs with a late label."""
        runs = touched | self._due.runs.keys() | self._overdue(now_s)
        for run in sorted(runs):
            own_s = self._clock.of(id_of(run)[0], now_s) - self._window_s
            self._settle_run(run, own_s, wall_s)

    def forget(self) -> None:
        """Forget what settled long ago; after the labels that may still speak of it."""
        old = self._waiting.take(FORGET, self.mature_s - self._keep_s, self._at_once)
        self.is_behind |= not old.is_all
        for run, last in old.runs.items():
            self._waiting.forget(run, last)

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

    def _settle_run(self, run: bytes, own_s: float, wall_s: float) -> None:
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
                self._close(key, row, stored, wall_s)
        self._file_again(run, stored.last_seq, left)

    def _close(self, key: bytes, row: Row, stored: StoredRun, wall_s: float) -> None:
        """Settle one prediction; at most one example comes of it."""
        if row.label is None:
            self._counters["expired"] += 1
            if self._rules.expiry == "negative":
                outcome_s = row.time_s + self._window_s
                row.label = Label(NEGATIVE, outcome_s, final=False, arrived_s=wall_s)
        if row.label is None:
            self._counters["pending"] -= 1
            row.state = EXPIRED
        else:
            corrected = row.early is not None and row.early != row.label.value
            self._counters["early_corrected"] += corrected
            self._releases.settle(row)
            self._releases.add(key, stored, row, wall_s)
        self._waiting.set_row(key, row)

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
            if self._rules.amend_s <= 0:
                self._waiting.forget_records(run)
