"""How good the answers to a stream were: each prediction once, with what turned out to be true.

Why: arms may be compared only by what they answered to the same rows; and a number says little
beside none of those that cost nothing: the label before, and the most frequent one.

A loss is given over that of the best constant answer: for classes that is normalised entropy (He et
al. 2014), for regression 1 - R squared. Below 1 is worth something.

Invariants: rows are scored that had the whole label window to be labelled, and were. Persistence
answers with the newest label of the device that was known before the prediction.

Knows nothing about how answers came about.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec
import numpy as np

from cloud_learner.experiment.asked import Asked, Floats, Index
from cloud_learner.stats.tasks import Groups, Matrix, Task
from cloud_learner.train.dataset import groups_of

DAY_S = 86_400.0
LATER_SHARE = 0.25
BLOCKS_MIN = 20  # a stream of fewer days is cut into so many blocks


class Measures(msgspec.Struct, frozen=True):
    """Over all rows; NaN where a measure is undefined for the task."""

    loss: float
    quality: float
    accuracy: float
    calibration: float


class Truth(msgspec.Struct, frozen=True):
    """What the scored rows turned out to be; arrays share the first dimension.

    `days` numbers the block of the stream that a row lies in; `base_loss` is the mean loss of the
    best constant answer.
    """

    task: Task
    rows: Index
    times_s: Floats
    labels: Matrix
    groups: Groups
    days: Index
    day_s: float
    base_loss: float

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def counts(self) -> Floats:
        """Rows of each day."""
        return np.bincount(self.days).astype(np.float64)

    def losses(self, outputs: Matrix) -> Floats:
        """The loss of each row over that of the best constant answer."""
        return self.task.losses(self.labels, outputs, self.groups) / self.base_loss

    def day_losses(self, losses: Floats) -> Floats:
        """Sums of the losses of each day."""
        return np.bincount(self.days, losses).astype(np.float64)

    def measures(self, outputs: Matrix) -> Measures:
        """How good `outputs` (rows, outputs) are."""
        return Measures(
            float(self.losses(outputs).mean()),
            self.task.quality(self.labels, outputs, self.groups),
            self.accuracy(outputs),
            self.task.calibration(self.labels, outputs),
        )

    def accuracy(self, outputs: Matrix) -> float:
        """The share of rows whose likeliest class is the true one; NaN where there are none."""
        if self.task.kind == "binary":
            return float(np.mean((outputs[:, 0] >= 0.5) == (self.labels >= 0.5)))
        if self.task.kind == "multiclass":
            return float(np.mean(outputs.argmax(1) == self.labels))
        return math.nan


def truth_of(task: Task, asked: Asked, after_s: float, window_s: float) -> Truth:
    """The rows predicted after `after_s` of which all that will be known is known."""
    due = (asked.times_s >= after_s) & (asked.times_s + window_s <= asked.end_s)
    rows = np.flatnonzero(due & np.isfinite(asked.labels))
    labels, times_s = asked.labels[rows], asked.times_s[rows]
    span_s = float(times_s[-1] - times_s[0]) if len(rows) else 0.0
    day_s = min(DAY_S, span_s / BLOCKS_MIN) or DAY_S
    groups = groups_of([asked.fields[row] if task.group else {} for row in rows], task.group)
    constant = _constant(task, labels, len(labels))
    return Truth(
        task,
        rows,
        times_s,
        labels,
        groups,
        ((times_s - after_s) // day_s).astype(np.intp),
        day_s,
        float(task.losses(labels, constant, groups).mean()) if len(rows) else math.nan,
    )


def later(truth: Truth) -> Truth:
    """The rows of the last three quarters of the stream, each as if asked a quarter earlier."""
    first_s, last_s = float(truth.times_s[0]), float(truth.times_s[-1])
    shift = max(int((last_s - first_s) * LATER_SHARE / truth.day_s), 1)
    chosen = np.flatnonzero(truth.days >= truth.days[0] + shift)
    return msgspec.structs.replace(
        truth,
        rows=truth.rows[chosen],
        times_s=truth.times_s[chosen] - shift * truth.day_s,
        labels=truth.labels[chosen],
        groups=truth.groups[chosen],
        days=truth.days[chosen] - shift,
    )


def majority(truth: Truth, known: Matrix) -> Measures:
    """The constant answer that fits the labels that were `known` before the stream."""
    return truth.measures(_constant(truth.task, known, len(truth)))


def persistence(truth: Truth, asked: Asked, known: Matrix) -> Measures:
    """The label before; what was `known` before the stream stands in where there is none.

    It is sure of itself, so where answers are probabilities its loss says nothing: NaN.
    """
    first = _constant(truth.task, known, len(asked))
    last = np.fromiter(_labels_before(asked), np.float32, len(asked))
    has = np.isfinite(last)
    if truth.task.kind == "multiclass":
        first[has] = np.eye(truth.task.classes, dtype=np.float32)[last[has].astype(np.intp)]
    else:
        first[has, 0] = last[has]
    found = truth.measures(first[truth.rows])
    if truth.task.kind in ("binary", "multiclass"):
        return msgspec.structs.replace(found, loss=math.nan)
    return found


def kappa(found: Measures, persisting: Measures) -> float:
    """Kappa over persistence: what part of its errors is gone; of regression, of squared ones.

    NaN where persistence makes none.
    """
    if math.isnan(found.accuracy):
        return 1 - found.loss / persisting.loss if persisting.loss else math.nan
    if persisting.accuracy == 1:
        return math.nan
    return (found.accuracy - persisting.accuracy) / (1 - persisting.accuracy)


def _labels_before(asked: Asked) -> Iterator[float]:
    """For each prediction the newest label of its device that was known before it, or NaN."""
    order = np.argsort(asked.known_s, kind="stable")
    known = iter(order[: int(np.isfinite(asked.known_s).sum())].tolist())
    newest: dict[str, float] = {}
    row = next(known, None)
    for device, time_s in zip(asked.devices, asked.times_s.tolist(), strict=True):
        while row is not None and asked.known_s[row] <= time_s and asked.times_s[row] < time_s:
            newest[asked.devices[row]] = float(asked.labels[row])
            row = next(known, None)
        yield newest.get(device, math.nan)


def _constant(task: Task, labels: Matrix, count: int) -> Matrix:
    """The best answer that is the same for all of `count` rows (count, outputs)."""
    if task.kind == "multiclass":
        shares = np.bincount(labels.astype(np.intp), minlength=task.classes) / max(len(labels), 1)
    else:
        shares = np.array([labels.mean(dtype=np.float64) if len(labels) else 0.0])
    return np.tile(shares.astype(np.float32), (count, 1))
