"""Attaching: what a label does to the prediction that it speaks of.

Why: a prediction may have several labels, and which of them counts must follow from when they
happened, not from how they were portioned.

Invariants: a label counts if its own event time lies in the window; a final label beats provisional
ones, and of equals the newest wins. A final label that says something else than a final one before
is counted as contradicting. Under `mature` a label attaches when it comes, since nothing depends on
it before the window is over. Under `arrival` and `weighted` a release does: there a label waits for
its moment, in the database, and labels take effect in the order of their moments. A label from
after the window waits for the end of the window, and then amends the example, if it may.

Knows nothing about lanes, records and the calendar of maturity.
"""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from cloud_learner.ingest.early import contradict, stands
from cloud_learner.ingest.releases import Releases, example
from cloud_learner.ingest.rules import Rules
from cloud_learner.store.examples import Example
from cloud_learner.store.ingest_state import (
    EXPIRED,
    PENDING,
    RELEASED,
    Label,
    Row,
    is_unlabelled,
    labelled,
    prediction_key,
    time_of,
)
from cloud_learner.store.runs import LabelNumber, Waiting

Heard = tuple[bytes, Label]
Out = tuple[bytes, bytes, Row]


class Attaching:
    """Attaches labels to the rows in `waiting`; counts into `counters`.

    `touched` are the runs in which a label came to what had matured already.
    """

    def __init__(
        self, rules: Rules, waiting: Waiting, releases: Releases, counters: Counter[str]
    ) -> None:
        self._rules, self._waiting = rules, waiting
        self._releases, self._counters = releases, counters
        self._clock_s = self._mature_s = float("-inf")
        self._waits = rules.policy != "mature"
        self.touched: set[bytes] = set()
        self.amended: list[Example] = []
        self._out: list[Out] = []

    def begin(self, clock_s: float, mature_s: float) -> None:
        """A commit begins; what was predicted before `mature_s` had matured by the last one."""
        self._clock_s, self._mature_s = clock_s, mature_s
        self.touched, self.amended = set(), []

    def hear(self, key: bytes, data: bytes, label: Label, number: LabelNumber) -> None:
        """A label of the prediction whose row is `data`; it may have to wait for its moment."""
        if self._waits:
            moment_s = min(label.time_s, time_of(data) + self._rules.label_window_s)
            self._waiting.stash(moment_s, key, number, label)
        elif is_unlabelled(data) and label.time_s <= time_of(data) + self._rules.label_window_s:
            self._attach_first(key, data, label)
        else:
            self._attach(key, Row.unpacked(data), label, number)

    def take(self, heard: list[Heard], wall_s: float) -> list[Heard]:
        """Labels whose moment has come, in order; returns those that speak of a later one.

        What they release is released at once; the rest follows when all that is mature has settled.
        """
        late: list[Heard] = []
        rows = self._waiting.rows([key for key, _ in heard])
        for key, label in heard:
            data = self._waiting.fresh.get(key) or rows.get(key)
            if data is None:
                self._counters["labels_unknown"] += 1
            elif label.time_s > time_of(data) + self._rules.label_window_s:
                late.append((key, label))
            else:
                self._attach(key, Row.unpacked(data), label, (0, 0))
        self._release(wall_s)
        return late

    def take_late(self, late: list[Heard]) -> None:
        """Labels from after the window, now that what they speak of has settled."""
        rows = self._waiting.rows([key for key, _ in late])
        for key, label in late:
            data = self._waiting.fresh.get(key) or rows.get(key)
            if data is not None:
                self._after(key, Row.unpacked(data), label)

    def _attach_first(self, key: bytes, data: bytes, label: Label) -> None:
        """What `_attach` does for nearly all labels, without taking the row apart."""
        self._counters["labels_joined"] += 1
        self._waiting.fresh[key] = labelled(data, label)
        if time_of(data) < self._mature_s:
            self.touched.add(run_of(key, Row.unpacked(data)))

    def _attach(self, key: bytes, row: Row, label: Label, number: LabelNumber) -> None:
        if row.state != PENDING:
            self._after(key, row, label)
        elif label.time_s > row.time_s + self._rules.label_window_s:
            self._wait_for_the_end(key, row, label, number)
        elif not self._stands(row.label, label):
            self._counters["labels_joined" if row.label is None else "labels_replaced"] += 1
            is_first, row.label = row.label is None, label
            self._take_effect(key, row, is_first=is_first)

    def _take_effect(self, key: bytes, row: Row, *, is_first: bool) -> None:
        """A pending prediction has a new label: keep it, and release what it brings out."""
        assert row.label is not None
        has_matured = row.time_s < self._mature_s
        if self._rules.policy == "arrival":
            self._releases.settle(row)
            self._out.append((run_of(key, row), key, row))
        elif has_matured:
            self.touched.add(run_of(key, row))
        elif is_first and self._rules.is_early(row.time_s, row.label.time_s):
            row.early = row.label.value
            self._counters["examples_early"] += 1
            self._out.append((run_of(key, row), key, row))
        self._waiting.set_row(key, row)

    def _release(self, wall_s: float) -> None:
        """Make the examples, one run after the other, so that each is decoded once."""
        out, self._out = sorted(self._out, key=lambda each: each[:2]), []
        for run, rows in groupby(out, key=lambda each: each[0]):
            stored = self._waiting.run(run)
            assert stored is not None, "kept while anything of it is pending"
            for _, key, row in rows:
                self._releases.add(key, stored, row, wall_s)

    def _wait_for_the_end(self, key: bytes, row: Row, label: Label, number: LabelNumber) -> None:
        """A label from after the window of a prediction that has not settled."""
        if self._rules.may_amend(row.time_s, label.time_s) and row.time_s >= self._mature_s:
            self._waiting.stash(row.time_s + self._rules.label_window_s, key, number, label)
        else:
            self._counters["labels_late"] += 1

    def _after(self, key: bytes, row: Row, label: Label) -> None:
        """A label for what is settled: it amends an example, or comes too late."""
        if row.state in (EXPIRED, PENDING):
            self._counters["labels_late"] += 1
            return
        in_time = self._rules.may_amend(row.time_s, max(label.time_s, self._clock_s))
        stays = self._stands(row.label, label)
        if row.state == RELEASED and in_time and not stays and not _same(row.label, label):
            self._amend(key, row, label)
        else:
            self._counters["labels_after_release"] += 1

    def _amend(self, key: bytes, row: Row, label: Label) -> None:
        stored = self._waiting.run(run_of(key, row))
        assert stored is not None, "kept as long as it may be amended"
        row.label, row.revision = label, row.revision + 1
        self._waiting.set_row(key, row)
        self._counters["amended"] += 1
        self.amended.append(example(key, stored, row, label.arrived_s))

    def _stands(self, old: Label | None, new: Label) -> bool:
        self._counters["labels_contradicting"] += contradict(old, new)
        return stands(old, new)


def run_of(key: bytes, row: Row) -> bytes:
    """The key of the run that a prediction lies in."""
    return prediction_key(key[:-8], int.from_bytes(key[-8:], "big") - row.place)


def _same(old: Label | None, new: Label) -> bool:
    return old is not None and old.value == new.value
