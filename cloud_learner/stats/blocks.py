"""The moving-block bootstrap: how sure a mean difference over a stream is.

Why: what happens on one day goes together, so rows are no independent draws; days, or blocks of
them, nearly are. Method: Künsch, "The jackknife and the bootstrap for general stationary
observations" (1989); differences are paired, since both arms answered to the same rows.

Invariants: same sums and seed give the same interval. Pure.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS, LEVEL = 1000, 0.95


class Interval(msgspec.Struct, frozen=True):
    """A mean, and the bounds that cover it with probability `LEVEL`."""

    mean: float
    low: float
    high: float

    @property
    def covers_zero(self) -> bool:
        """Whether there may be no difference at all."""
        return self.low <= 0 <= self.high


def interval(sums: ArrayLike, counts: ArrayLike, *, seed: int, block: int = 1) -> Interval:
    """Of the mean of all rows; `sums` and `counts` (days,) are those of each day's rows.

    `block` days in a row are drawn together. Without rows everything is NaN.
    """
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    assert sums.shape == counts.shape, f"{sums.shape} sums, {counts.shape} counts"
    if not counts.sum():
        return Interval(np.nan, np.nan, np.nan)
    drawn = _drawn(len(sums), min(block, len(sums)), np.random.default_rng(seed))
    totals = counts[drawn].sum(1)
    means = (sums[drawn].sum(1) / np.where(totals, totals, np.nan))[totals > 0]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def _drawn(days: int, block: int, random: np.random.Generator) -> NDArray[np.intp]:
    """Days of each round, (ROUNDS, days), as blocks that begin anywhere."""
    blocks = -(-days // block)
    starts = random.integers(0, days - block + 1, size=(ROUNDS, blocks))
    places = starts[:, :, None] + np.arange(block)
    return places.reshape(ROUNDS, -1)[:, :days].astype(np.intp)
