"""Shares: how rarely a label of each outcome comes early, and so how much an early one weighs.

Why: among labels that come early, quick outcomes are over-represented. An outcome of whose labels
the share s comes early is seen 1 / s times too seldom among early examples, so each of them counts
for 1 / s. These are importance weights (Horvitz and Thompson 1952): their expected sum is the true
number of examples of that outcome, whatever s is, and unlike a shift of log-odds they are right for
any number of classes and need nothing of the model. Delayed feedback is corrected in this way in
the fake-negative weighted loss (Ktena et al. 2019, arXiv 1907.06558) and, with a window for early
labels and the late ones duplicated, in ES-DFM (Yang et al. 2021, arXiv 2012.03245).

How: s = (early + 1) / (all + 1) over matured examples: 1 where nothing is known, never 0. At most
`weight_max`, since a rare early label would else outweigh all the others. Counts are halved when
they reach MEMORY, so that a share that changes is followed.

Invariants: only matured examples are counted, in the order of their release; an outcome of which
no early label ever comes cannot be made up for by weights (a click that never happened is reported
by nobody). Tasks with many values, regression and ranking, have no outcomes: every weight is 1.

Knows nothing about joins.
"""

from __future__ import annotations

import msgspec

from cloud_learner.stats.tasks import Task

MEMORY = 20_000.0

_counts = msgspec.msgpack.Decoder(dict[int, tuple[float, float]]).decode


class Shares:
    """The shares of one family, going on from what `packed` gave."""

    def __init__(self, task: Task, weight_max: float, packed: bytes | None = None) -> None:
        self._task, self._weight_max = task, weight_max
        self._counts: dict[int, tuple[float, float]] = _counts(packed) if packed else {}

    def weight(self, label: float) -> float:
        """How much an early example with this label counts, between 1 and `weight_max`."""
        everything, early = self._counts.get(self._outcome(label), (0.0, 0.0))
        return min((everything + 1) / (early + 1), self._weight_max)

    def count(self, label: float, *, is_early: bool) -> None:
        """A matured example has this label, which came early or did not."""
        outcome = self._outcome(label)
        if outcome < 0:
            return
        everything, early = self._counts.get(outcome, (0.0, 0.0))
        everything, early = everything + 1, early + is_early
        factor = 0.5 if everything >= MEMORY else 1.0
        self._counts[outcome] = everything * factor, early * factor

    def packed(self) -> bytes:
        """What has been counted, as bytes."""
        return msgspec.msgpack.encode(self._counts)

    def _outcome(self, label: float) -> int:
        """The number of the outcome; below 0 where the task has none, or the label is no class."""
        if self._task.kind == "binary":
            return int(label >= 0.5)  # a share counts for the likelier
        is_class = self._task.kind == "multiclass" and not self._task.why_unfit(label)
        return int(label) if is_class else -1
