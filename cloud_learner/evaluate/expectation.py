"""What answers without labels are worth, held against what answers with labels were worth.

Why: where a label takes a month, a month of damage is done before the loss can tell. An answer says
itself how sure it is; where answers are less sure than they used to be, the world has moved away
from what the model knows (`stats.estimate` says when that is true, and to what it is blind).

Which answers are the newest depends on when records came, so nothing that is learned may hang on
it: it stands beside the stream's `Watch`, for people, for the gate and for the status.

Invariants: it judges what was served, by whichever release, and keeps the newest `ROWS` of each
kind. An expectation is undefined, and raises nothing, below `ROWS_MIN` rows of either kind, and for
tasks whose outputs are no probabilities. An early label says nothing: soon is not alike.

Knows nothing about devices: one that floods moves what is expected, and at worst makes the gate
stricter. `look` belongs to one thread; `take` to one, which may be another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist

import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.evaluate.alarms import SOURCES, Alarm, Alarms, Sign
from cloud_learner.evaluate.watch import Limits
from cloud_learner.stats.columns import LEVELS_KEPT
from cloud_learner.stats.estimate import Cbpe
from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example

Matrix = npt.NDArray[np.float32]

ROWS, ROWS_MIN = 3000, 200
DROP_MIN = 0.02


class Estimate(msgspec.Struct, frozen=True):
    """What one look found: quality of `rows` answers without labels, and of those with.

    `reach` is what is expected at least, unless something has changed. NaN where undefined.
    """

    rows: int = 0
    quality: float = math.nan
    reached: float = math.nan
    reach: float = math.nan


class Expectation:
    """What the newest answers of a family are worth."""

    def __init__(self, limits: Limits, task: Task) -> None:
        self._task = task
        self._surely = NormalDist().inv_cdf(1 - limits.delta / len(SOURCES))
        self._is_defined = limits.on and task.kind in ("binary", "multiclass")
        nothing = np.zeros((0, task.outputs), np.float32)
        self._known = np.zeros(0, np.float32), nothing  # labels, outputs
        self._unknown = nothing
        self._clock_s = -math.inf
        self._levels: list[float] = []
        self._alarms = Alarms(limits.calm_batches)
        self.estimate = Estimate()

    def take(
        self, examples: Sequence[Example], answers: Sequence[Sequence[float]], clock_s: float
    ) -> None:
        """Take what was released by the event time `clock_s`, and outputs that were served."""
        if not self._is_defined:
            return
        self._clock_s = clock_s
        known = [each for each in examples[-ROWS:] if not each.early and each.scored]
        known = [each for each in known if self._fits(each.scored[0].outputs)]
        if known:
            labels = np.array([each.label for each in known], np.float32)
            outputs = self._outputs(each.scored[0].outputs for each in known)
            self._known = _newest(self._known[0], labels), _newest(self._known[1], outputs)
        unknown = [each for each in answers[-ROWS:] if self._fits(each)]
        if unknown:
            self._unknown = _newest(self._unknown, self._outputs(unknown))

    def look(self, batch: int) -> list[Alarm]:
        """Estimate anew, when micro-batch `batch` is the newest; the alarm if it is worse."""
        (labels, outputs), unknown = self._known, self._unknown
        if min(len(labels), len(unknown)) < ROWS_MIN:
            return []
        found = self.estimate = self._estimated(labels, outputs, unknown)
        if math.isfinite(found.quality):
            self._levels = [*self._levels, found.quality][-LEVELS_KEPT:]
        signs = []
        if found.quality < found.reach:
            signs = [Sign("estimate", "", found.quality, found.reach, self._levels)]
        return self._alarms.take(signs, batch, self._clock_s)

    def standing(self, batch: int) -> list[Alarm]:
        """The alarm, if it stands when micro-batch `batch` is the newest; any thread may ask."""
        return self._alarms.standing(batch)

    def facts(self) -> dict[str, object]:
        """What was found last, as plain data; an undefined number is null."""
        found = self.estimate
        return {
            "measure": self._task.measure,
            "rows": found.rows,
            "expected": _plain(found.quality),
            "reached": _plain(found.reached),
        }

    def _fits(self, outputs: Sequence[float]) -> bool:
        """A release of another shape may have answered."""
        return len(outputs) == self._task.outputs

    def _outputs(self, outputs: Iterable[Sequence[float]]) -> Matrix:
        """Finite already, as ingest sees to; what is no probability becomes the nearest one."""
        return np.array(list(outputs), np.float64).clip(0.0, 1.0).astype(np.float32)

    def _estimated(self, labels: Matrix, outputs: Matrix, unknown: Matrix) -> Estimate:
        cbpe = Cbpe(self._task, labels, outputs)
        expected, reached = cbpe.expected(unknown), self._task.quality(labels, outputs)
        by_chance = cbpe.spread(outputs) * math.sqrt(1 / len(outputs) + 1 / len(unknown))
        drop = max(self._surely * by_chance, DROP_MIN)
        return Estimate(len(unknown), expected.quality, reached, reached - drop)


def _newest(before: Matrix, new: Matrix) -> Matrix:
    return np.concatenate([before, new])[-ROWS:]


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
