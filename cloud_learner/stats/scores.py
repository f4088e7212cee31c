"""How good probabilities are against what turned out to be true: four scores in numpy.

Why: every gate, report and test speaks of the same four numbers, computed in one way.

Invariants: inputs are two arrays of shape (rows,), labels 0 or 1, probabilities in [0, 1]; a score
that is undefined on its input (no rows, one class only where both are needed) is NaN, and NaN
never passes a comparison, so a gate on it holds.

Knows nothing about models, families or where the numbers come from.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

_PROBABILITY_MIN = 1e-7


def auc(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive row scores above a negative one.

    Mann-Whitney's U over midranks, so a tie counts one half. NaN when one class is absent.
    """
    y, p = _pair(labels, probabilities)
    positives = int(np.count_nonzero(y))
    negatives = len(y) - positives
    if positives == 0 or negatives == 0:
        return math.nan
    rank_sum = float(_midranks(p)[y > 0].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def brier(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean squared error of the probabilities; lower is better. NaN when there are no rows."""
    y, p = _pair(labels, probabilities)
    return float(np.mean((p - y) ** 2)) if len(y) else math.nan


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean negative log-likelihood in nats, probabilities kept 1e-7 away from 0 and 1."""
    y, p = _pair(labels, probabilities)
    return _cross_entropy(y, p) if len(y) else math.nan


def normalized_entropy(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Log loss over the log loss of always answering the base rate: below 1 is worth something.

    He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", 2014. NaN when one
    class is absent.
    """
    y, p = _pair(labels, probabilities)
    rate = float(y.mean()) if len(y) else 0.0
    if rate in (0.0, 1.0):
        return math.nan
    return _cross_entropy(y, p) / _cross_entropy(y, np.full_like(y, rate))


def _pair(labels: ArrayLike, probabilities: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    y = np.asarray(labels, dtype=np.float64)
    p = np.asarray(probabilities, dtype=np.float64)
    assert y.ndim == 1, f"labels have shape {y.shape}"
    assert y.shape == p.shape, f"{y.shape} labels, {p.shape} probabilities"
    return y, p


def _midranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, equal values sharing the mean of theirs. NaN compares as the largest."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return ranks


def _cross_entropy(y: NDArray[np.float64], p: NDArray[np.float64]) -> float:
    clipped = np.clip(p, _PROBABILITY_MIN, 1 - _PROBABILITY_MIN)
    return float(-np.mean(y * np.log(clipped) + (1 - y) * np.log1p(-clipped)))
