"""How good are answers whose labels are not known yet? Confidence-based performance estimation.

Why: where a label takes a month, a month of damage is done before the loss can tell. Probabilities
that are calibrated say themselves how often they are right.

Method (CBPE): scores are calibrated on rows with labels by isotonic regression; each unlabelled row
then counts as positive with its calibrated probability, which gives the expected confusion matrix
and all that follows from it. Described by NannyML's authors (Białek et al., "Estimating model
performance under covariate shift without labels", 2024). Isotonic regression by pool adjacent
violators (Ayer et al. 1955).

Valid while the chance of a label at a score stays what it was (the rows may change). Under concept
drift, where the same rows get other labels, it is blind: it goes on telling the old quality. So it
adds to the loss, and never stands in for it.

Invariants: an expectation that is undefined is NaN: of regression and ranking, whose outputs are no
probabilities, always.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.stats.tasks import Task

Floats = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]

_PROBABILITY_MIN = 1e-7


class Expected(msgspec.Struct, frozen=True):
    """What is expected of answers without labels; `quality` is AUC or accuracy, by the task."""

    rows: int
    quality: float = math.nan
    accuracy: float = math.nan
    log_loss: float = math.nan
    brier: float = math.nan


class Isotonic:
    """The non-decreasing function of a score that fits labels best in squares."""

    def __init__(self, scores: Floats, labels: Floats) -> None:
        """`scores` and `labels` of shape (rows,), at least one row."""
        order = np.argsort(scores, kind="stable")
        edges, first = np.unique(scores[order], return_index=True)
        counts = np.diff(np.r_[first, len(scores)]).astype(np.float64)
        means = np.add.reduceat(labels[order].astype(np.float64), first) / counts
        self._edges, self._values = edges, _pooled(means, counts)

    def __call__(self, scores: Floats) -> Floats:
        """The fitted value of each score, straight lines between the scores that are known."""
        fitted: Floats = np.interp(scores, self._edges, self._values)
        return fitted


def _pooled(means: Floats, counts: Floats) -> Floats:
    """Pool adjacent violators: neighbours out of order become their common mean."""
    blocks: list[tuple[float, float, int]] = []
    for mean, count in zip(means.tolist(), counts.tolist(), strict=True):
        block = (mean, count, 1)
        while blocks and blocks[-1][0] >= block[0]:
            before = blocks.pop()
            rows = before[1] + block[1]
            common = (before[0] * before[1] + block[0] * block[1]) / rows
            block = (common, rows, before[2] + block[2])
        blocks.append(block)
    return np.repeat([block[0] for block in blocks], [block[2] for block in blocks])


class Cbpe:
    """Expectations of `task`, calibrated on `labels` (rows,) and `outputs` (rows, outputs)."""

    def __init__(self, task: Task, labels: Matrix, outputs: Matrix) -> None:
        self._task = task
        self._fit: Isotonic | None = None
        if not len(labels) or task.kind not in ("binary", "multiclass"):
            return
        right = labels if task.kind == "binary" else outputs.argmax(1) == labels
        self._fit = Isotonic(_confidence(outputs), right.astype(np.float64))

    def expected(self, outputs: Matrix) -> Expected:
        """What `outputs` (rows, outputs) are worth, by their calibrated probabilities."""
        if self._fit is None or not len(outputs):
            return Expected(len(outputs))
        scores = _confidence(outputs)
        chances = self._fit(scores)
        if self._task.kind == "multiclass":
            accuracy = float(chances.mean())
            return Expected(len(outputs), accuracy, accuracy)
        s = scores.clip(_PROBABILITY_MIN, 1 - _PROBABILITY_MIN)
        return Expected(
            len(outputs),
            quality=expected_auc(scores, chances),
            accuracy=float(np.where(scores >= 0.5, chances, 1 - chances).mean()),
            log_loss=float(-(chances * np.log(s) + (1 - chances) * np.log1p(-s)).mean()),
            brier=float((chances * (1 - scores) ** 2 + (1 - chances) * scores**2).mean()),
        )

    def spread(self, outputs: Matrix) -> float:
        """The standard deviation of the expected quality over rows like these, times sqrt(rows).

        That of the influence of a row (Hampel 1974). NaN where the quality is undefined.
        """
        if self._fit is None or not len(outputs):
            return math.nan
        scores = _confidence(outputs)
        chances = self._fit(scores)
        is_binary = self._task.kind == "binary"
        return float(np.std(auc_influences(scores, chances) if is_binary else chances))


def _confidence(outputs: Matrix) -> Floats:
    """The probability that is calibrated: of the outcome 1, or of the class that is answered."""
    confidence: Floats = outputs.max(1).astype(np.float64)
    return confidence


def expected_auc(scores: Floats, chances: Floats) -> float:
    """The expected share of pairs in order, when row i is positive with `chances[i]`.

    A ratio of expectations; a row is not paired with itself, a tie counts one half. NaN where no
    pair is expected.
    """
    order = np.argsort(scores, kind="stable")
    p = chances[order]
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    positive, negative = np.add.reduceat(p, starts), np.add.reduceat(1 - p, starts)
    below = np.cumsum(negative) - negative
    alone = float((p * (1 - p)).sum())
    pairs = float(p.sum() * (1 - p).sum()) - alone
    in_order = float((positive * (below + negative / 2)).sum()) - alone / 2
    return in_order / pairs if pairs > 0 else math.nan


def auc_influences(scores: Floats, chances: Floats) -> Floats:
    """How the expected AUC moves with the weight of each row, in the order of scores; mean 0.

    The first term of Hoeffding's decomposition of a ratio of U-statistics (1948). NaN where no pair
    is expected.
    """
    order = np.argsort(scores, kind="stable")
    p, q = chances[order], 1 - chances[order]
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    sizes = np.diff(np.r_[starts, len(p)])
    positive, negative = np.add.reduceat(p, starts), np.add.reduceat(q, starts)
    above = np.repeat(positive.sum() - np.cumsum(positive) + positive / 2, sizes) / len(p)
    below = np.repeat(np.cumsum(negative) - negative / 2, sizes) / len(p)
    pairs = float(p.mean() * q.mean())
    if not pairs:
        return np.full(len(p), math.nan)
    in_order = p * below + q * above
    area = float(in_order.mean()) / 2 / pairs
    moved: Floats = (in_order - area * (p * q.mean() + q * p.mean())) / pairs
    return moved
