"""Test, then learn: every prediction of a stream answered by what had been learned before it.

Why: what a learner is worth shows on rows that it has not seen yet, in the order in which they came
in; so does what each of its parts is worth.

The first `WARM_SHARE` of the stream's time is known beforehand, with the labels that had come by
its end. Then each micro-batch is learned when it is full, and whatever is asked until the next is
answered by replicas, mixture and student as they stand.

Invariants: same stream and family, same answers. A row is answered once by each part; rows that the
hold-out keeps are never trained on, neither before the stream nor in it.

Knows nothing about cadences: all that was learned serves at once.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from cloud_learner.cycle import Cycle
from cloud_learner.evaluate.alarms import Alarm
from cloud_learner.evaluate.offline import is_held_out
from cloud_learner.experiment.asked import Asked, Index
from cloud_learner.experiment.scoring import Truth, truth_of
from cloud_learner.experiment.stream import Stream
from cloud_learner.experiment.worlds import REFERENCE_ROWS
from cloud_learner.train.dataset import Matrix
from cloud_learner.train.family import Family
from cloud_learner.train.teaching import TrainingError

WARM_SHARE = 0.15

Looks = Callable[[Cycle], None]


class Course(msgspec.Struct, frozen=True):
    """A stream that was learned: `answers` of each part to the rows of `truth`.

    `warm` are the rows that were learned beforehand, `warm_held_out` those of that time that nobody
    ever learns. `alarms` are all that were raised on the way.
    """

    truth: Truth
    answers: dict[str, Matrix]
    cycle: Cycle
    warm: Index
    warm_held_out: Index
    batches: int
    alarms: list[Alarm]


def stream_start_s(asked: Asked) -> float:
    """When the stream begins, if nothing else is said."""
    return asked.start_s + WARM_SHARE * (asked.end_s - asked.start_s)


def course(
    family: Family, stream: Stream, *, after_s: float | None = None, looks: Looks | None = None
) -> Course:
    """Learn the stream; `looks` sees the cycle after each micro-batch.

    `after_s` is when the stream begins, by default after `WARM_SHARE` of its time.
    """
    asked = stream.asked
    if after_s is None:
        after_s = stream_start_s(asked)
    known = stream.known_before(after_s)
    held = np.array([is_held_out(stream.example(at), stream.group) for at in known.tolist()], bool)
    warm = stream.rows_at(known[~held])
    cycle = Cycle(family, warm.features[:REFERENCE_ROWS])
    cycle.pretrain(warm)
    truth = truth_of(family.config.task, asked, after_s, family.config.label.window_s)
    answering = _Answering(cycle, truth, asked.features)
    cuts = stream.cuts(family.config, after_s)
    alarms: list[Alarm] = []
    for number, cut in enumerate(cuts, start=1):
        answering.up_to(cut.released_s)
        try:
            cycle.learn(stream.batch(number, cut))
        except TrainingError:
            continue
        alarms += cycle.alarms
        if looks is not None:
            looks(cycle)
    answering.up_to(np.inf)
    rows = stream.released.rows
    return Course(
        truth, answering.found, cycle, rows[known[~held]], rows[known[held]], len(cuts), alarms
    )


class _Answering:
    """Asks all parts of a cycle for the rows of a stretch of time."""

    def __init__(self, cycle: Cycle, truth: Truth, features: Matrix) -> None:
        self._cycle, self._truth = cycle, truth
        self._features = features[truth.rows]
        frozen = cycle.answers(self._features)
        self.found = {"frozen": frozen}
        for name in ("student", "mixed", *cycle.replicas.all):
            self.found[name] = np.zeros_like(frozen)
        self._done = 0

    def up_to(self, time_s: float) -> None:
        """Everything asked before `time_s`, or at that very moment."""
        end = int(np.searchsorted(self._truth.times_s, time_s, side="right"))
        if end <= self._done:
            return
        features, rows = self._features[self._done : end], slice(self._done, end)
        replicas = self._cycle.replicas
        self.found["student"][rows] = self._cycle.answers(features)
        self.found["mixed"][rows] = replicas.answers(features)
        for name, replica in replicas.all.items():
            self.found.setdefault(name, np.zeros_like(self.found["frozen"]))[rows] = (
                replica.answers(features)
            )
        self._done = end
