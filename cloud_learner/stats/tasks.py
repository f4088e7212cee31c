"""What a family is asked for: a class, a number or an order, and how good an answer is.

Why: gates, experiments and the learner must mean the same thing by "better", whatever the task.

Outputs are float32 of shape (rows, outputs): `binary` one probability, `multiclass` one for each
class, `regression` a value in units of the label, `ranking` a score that orders the rows of a
group. Labels are of shape (rows,): a share in [0, 1], the number of a class, a value, a relevance
of at least 0.

Invariants: quality is higher where answers are better and NaN where it is undefined; a loss that is
`bounded` lies in [0, 1] for every row, so that differences may be wagered on. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.stats import scores

Floats = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]
Groups = npt.NDArray[np.int64]

QUALITY = {"binary": "AUC", "multiclass": "accuracy", "regression": "R2", "ranking": "NDCG"}
_PROBABILITY_MIN = 1e-7
PARTNERS_MAX = 500  # of a large group, evenly spaced, that a row is compared with
_CLASS_ROWS_MIN = 30  # below it a class says nothing about calibration


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[task]` of a family. `classes` only for `multiclass`, `group` only for `ranking`.

    `group` names the field whose value the rows that compete with one another share. `scale`, of
    regression and ranking, is the error that counts as a full miss, in units of the label.
    """

    kind: Literal["binary", "multiclass", "regression", "ranking"] = "binary"
    classes: int = 2
    group: str = ""
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind == "multiclass" and self.classes < 2:
            raise ValueError("task.classes must be at least 2")
        if self.kind != "multiclass" and self.classes != 2:
            raise ValueError(f"task.classes has no meaning for {self.kind}")
        if (self.kind == "ranking") != bool(self.group):
            raise ValueError("task.group belongs to ranking, and ranking needs it")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"task.scale is {self.scale}, not a positive number")

    @property
    def outputs(self) -> int:
        """How many numbers an answer has."""
        return self.classes if self.kind == "multiclass" else 1

    @property
    def measure(self) -> str:
        """What `quality` is called."""
        return QUALITY[self.kind]

    def why_unfit(self, label: float) -> str:
        """Why `label` cannot be one of this task; empty when it can."""
        if not math.isfinite(label):
            return "is not a finite number"
        if self.kind == "binary" and not 0 <= label <= 1:
            return "is not in [0, 1]"
        if self.kind == "multiclass" and not (0 <= label < self.classes and label % 1 == 0):
            return f"is not one of the classes 0 to {self.classes - 1}"
        if self.kind == "ranking" and label < 0:
            return "is below 0"
        return ""

    def is_answer(self, outputs: Sequence[float]) -> bool:
        """Whether these numbers can be an answer to it."""
        if len(outputs) != self.outputs:
            return False
        if self.kind in ("binary", "multiclass"):
            return all(0 <= value <= 1 for value in outputs)
        return all(map(math.isfinite, outputs))

    def reward(self, label: float) -> float:
        """What an answer earned that brought about `label`, in [0, 1]: a share is its own reward,
        a value or a relevance of `scale` or more earns 1. The number of a class is no reward.
        """
        assert self.kind != "multiclass", "the number of a class is no reward"
        return label if self.kind == "binary" else min(max(label / self.scale, 0.0), 1.0)

    def quality(self, labels: Matrix, outputs: Matrix, groups: Groups | None = None) -> float:
        """AUC, accuracy, R squared, or mean NDCG over groups; NaN where it is undefined."""
        if not len(labels):
            return math.nan
        if self.kind == "binary":
            return scores.auc(labels, outputs[:, 0])
        if self.kind == "multiclass":
            return float(np.mean(outputs.argmax(1) == labels))
        if self.kind == "regression":
            return _r_squared(labels.astype(np.float64), outputs[:, 0].astype(np.float64))
        assert groups is not None, "ranking without groups"
        return ndcg(labels.astype(np.float64), outputs[:, 0].astype(np.float64), groups)

    def losses(self, labels: Matrix, outputs: Matrix, groups: Groups | None = None) -> Floats:
        """Log loss in nats, or squared error in squared scales; of shape (rows,).

        Of `ranking`, whose scores only order, that of the order against each row of the same
        group with another label, on average; 0 for a row that has none.
        """
        if self.kind == "ranking" and groups is not None:
            return _order_losses(labels, outputs[:, 0].astype(np.float64) / self.scale, groups)
        y, p = labels.astype(np.float64), outputs.astype(np.float64)
        if self.kind == "binary":
            p = p[:, 0].clip(_PROBABILITY_MIN, 1 - _PROBABILITY_MIN)
            return -_sum_of(y * np.log(p), (1 - y) * np.log1p(-p))
        if self.kind == "multiclass":
            chosen = p[np.arange(len(y)), y.astype(np.intp)]
            return -_sum_of(np.log(chosen.clip(_PROBABILITY_MIN, 1.0)), 0.0)
        return ((p[:, 0] - y) / self.scale) ** 2

    def bounded_losses(
        self, labels: Matrix, outputs: Matrix, groups: Groups | None = None
    ) -> Floats:
        """Brier score in [0, 1], or squared error in squared scales, at most 1; (rows,).

        Of `ranking` with groups half of `losses`, at most 1.
        """
        if self.kind == "ranking" and groups is not None:
            return np.minimum(self.losses(labels, outputs, groups) / 2, 1.0)
        y, p = labels.astype(np.float64), outputs.astype(np.float64)
        if self.kind == "binary":
            return np.minimum((p[:, 0] - y) ** 2, 1.0)
        if self.kind == "multiclass":
            hit = p[np.arange(len(y)), y.astype(np.intp)]
            return np.minimum(_sum_of((p**2).sum(1), 1 - 2 * hit) / 2, 1.0)
        return np.minimum(((p[:, 0] - y) / self.scale) ** 2, 1.0)

    def calibration(self, labels: Matrix, outputs: Matrix) -> float:
        """Mean answer over mean label; 1 is calibrated.

        Of `multiclass` that of the class farthest from it. Of `regression` 1 + the mean error in
        scales. NaN where it is undefined, and for `ranking`, whose scores only order.
        """
        if not len(labels) or self.kind == "ranking":
            return math.nan
        if self.kind == "regression":
            return 1.0 + float(np.mean(outputs[:, 0].astype(np.float64) - labels)) / self.scale
        if self.kind == "binary":
            return _ratio(float(outputs[:, 0].mean(dtype=np.float64)), float(labels.mean()))
        rates = np.bincount(labels.astype(np.intp), minlength=self.classes) / len(labels)
        means = outputs.mean(0, dtype=np.float64)
        ratios = [
            _ratio(float(mean), float(rate))
            for mean, rate in zip(means, rates, strict=True)
            if rate * len(labels) >= _CLASS_ROWS_MIN
        ]
        return max(ratios, key=lambda ratio: abs(math.log(max(ratio, 1e-9))), default=math.nan)


def ndcg(labels: Floats, answers: Floats, groups: Groups) -> float:
    """Mean normalised discounted cumulative gain of the groups that hold anything relevant.

    Gain is the label, the discount of place k is log2(k + 1) (Järvelin & Kekäläinen 2002); ties are
    broken against the answer. NaN when no group has a positive label.
    """
    order = np.lexsort((labels, -answers, groups))
    ideal = np.lexsort((-labels, groups))
    sorted_groups = groups[order]
    starts = np.flatnonzero(np.r_[True, sorted_groups[1:] != sorted_groups[:-1]])
    places = np.arange(len(labels)) - np.repeat(starts, np.diff(np.r_[starts, len(labels)]))
    discounts = 1.0 / np.log2(places + 2.0)
    found = np.add.reduceat(labels[order] * discounts, starts)
    best = np.add.reduceat(labels[ideal] * discounts, starts)
    return float(np.mean(found[best > 0] / best[best > 0])) if (best > 0).any() else math.nan


def _order_losses(labels: Matrix, scores: Floats, groups: Groups) -> Floats:
    """Logistic loss of each row's order against its group's other labels, on average; (rows,)."""
    losses = np.zeros(len(labels))
    order = np.argsort(groups, kind="stable")
    ends = np.flatnonzero(np.diff(groups[order])) + 1
    for group in np.split(order, ends):
        others = group[
            np.linspace(0, len(group) - 1, min(len(group), PARTNERS_MAX)).astype(np.intp)
        ]
        above = np.sign(labels[group, None] - labels[None, others])
        each = np.logaddexp(0.0, -above * (scores[group, None] - scores[None, others]))
        losses[group] = (each * (above != 0)).sum(1) / np.maximum((above != 0).sum(1), 1)
    return losses


def _sum_of(first: Floats, second: Floats | float) -> Floats:
    return first + second


def _r_squared(y: Floats, p: Floats) -> float:
    spread = float(((y - y.mean()) ** 2).sum())
    return 1.0 - float(((y - p) ** 2).sum()) / spread if spread else math.nan


def _ratio(mean: float, rate: float) -> float:
    return mean / rate if rate else math.nan
