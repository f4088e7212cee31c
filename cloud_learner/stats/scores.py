"""How well scores order what turned out to be true: the area under the ROC curve, in numpy.

Why: every gate, report and test speaks of the same number, computed in one way.

Invariants: inputs are two arrays of shape (rows,), labels 0 or 1; where one class is absent the
area is NaN, and NaN never passes a comparison, so a gate on it holds.

Knows nothing about models, families or where the numbers come from.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


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
