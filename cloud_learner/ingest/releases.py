"""The releases of a commit: what came out of it, in order, and how much it weighs.

Why: early and mature examples come about in different ways; which of them leaves first must follow
from event time alone.

Invariants: examples leave in the order of (moment of release, time, device, epoch, seq), and an
early one is weighed by what had matured before its moment. What the bootstrap has learned counts
among the matured, and leaves apart. The same example never leaves twice in one form, because a row
settles once and goes out early once.

Knows nothing about labels and clocks.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from cloud_learner.ingest.rules import Rules
from cloud_learner.ingest.shares import Shares
from cloud_learner.store.examples import Example
from cloud_learner.store.ingest_state import COVERED, PENDING, RELEASED, Row, id_of
from cloud_learner.store.runs import StoredRun, Waiting
from edge_runtime.wire.messages import PredictionRecord

_SHARES = b"shares"
_NEVER_S = float("-inf")

Order = tuple[float, float, str, int, int]


class Releases:
    """Collects what one commit after the other brings out; counts into `counters`."""

    def __init__(self, rules: Rules, waiting: Waiting, counters: Counter[str]) -> None:
        self._rules, self._waiting, self._counters = rules, waiting, counters
        self._shares = Shares(rules.task, rules.weight_max, waiting.note(_SHARES))
        self._newest: Order = (_NEVER_S, _NEVER_S, "", 0, 0)
        self._out: list[Example] = []
        self._covered: list[Example] = []
        self.covered: list[Example] = []

    def settle(self, row: Row) -> None:
        """A labelled row is settled: released, or covered by the bootstrap."""
        self._counters["pending"] -= 1
        covered = row.time_s < self._rules.learn_from_s
        row.state = COVERED if covered else RELEASED
        self._counters["covered_by_bootstrap" if covered else "examples"] += 1

    def add(self, key: bytes, stored: StoredRun, row: Row, wall_s: float) -> None:
        """What comes of a row that is settled, or goes out early."""
        made = example(key, stored, row, wall_s)
        (self._covered if row.state == COVERED else self._out).append(made)

    def finish(self) -> list[Example]:
        """All that came out since the last time, in order; `covered` is what the bootstrap knew."""
        out, self._out = sorted(self._out, key=self._order), []
        self.covered, self._covered = sorted(self._covered, key=self._order), []
        self._note_order(out)
        return self._weighed(out) if self._rules.policy == "weighted" else out

    def _weighed(self, out: list[Example]) -> list[Example]:
        weighed = {}
        for each in sorted(out + self.covered, key=self._order):
            if each.early:
                weight = self._shares.weight(each.label)
                weighed[each.id] = msgspec.structs.replace(each, weight=weight)
            else:
                soon = each.label_time_s - each.time_s <= self._rules.early_s
                self._shares.count(each.label, is_early=soon)
        self._waiting.set_note(_SHARES, self._shares.packed())
        return [weighed[each.id] if each.early else each for each in out]

    def _note_order(self, examples: list[Example]) -> None:
        for each in examples:
            order = self._order(each)
            if order < self._newest:
                self._counters["released_out_of_order"] += 1
            self._newest = max(self._newest, order)

    def _order(self, each: Example) -> Order:
        moment_s = self._rules.released_s(each)
        return (moment_s, each.time_s, each.device, each.epoch, each.seq)


def example(key: bytes, stored: StoredRun, row: Row, matured_s: float) -> Example:
    """The example that a labelled prediction becomes; the early one while it is not settled."""
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
        early=row.state == PENDING,
    )
