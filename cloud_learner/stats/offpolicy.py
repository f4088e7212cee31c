"""What would another choice of arms have earned? Estimates from answers with logged propensities.

Why: the rewards of a bandit are those of the shares that it gave; to compare releases, or to judge
shares that were never given, each reward is weighted by how likely the other choice would have made
it.

Methods: inverse propensity scores (IPS; Horvitz & Thompson 1952), self-normalised (SNIPS;
Swaminathan & Joachims 2015), doubly robust (DR; Dudík, Langford & Li 2011). Intervals are normal,
of the estimate's influence function; SNIPS is a ratio, by the delta method.

Invariants: arrays are of shape (rows,), `logged` is above 0; IPS and DR are unbiased, SNIPS nearly,
for any propensities that were really used. Without a row, or where SNIPS has no weight, the
estimate is NaN and its interval says nothing. The intervals need some hundred rows that weigh.

Knows nothing about arms: `chance` and `logged` are of the arm that answered.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_DEVIATIONS = 1.959964  # 95 percent of a normal distribution


class Estimate(msgspec.Struct, frozen=True):
    """A mean reward, between what it lies with 95 percent confidence, and how many rows weigh."""

    value: float
    low: float
    high: float
    effective_rows: float


def ips(rewards: Floats, chance: Floats, logged: Floats) -> Estimate:
    """Mean reward if the arm that answered had been chosen with `chance` instead of `logged`."""
    weights = chance / logged
    return _estimate(weights * rewards, weights)


def snips(rewards: Floats, chance: Floats, logged: Floats) -> Estimate:
    """The same, relative to the sum of the weights: a little bias, often far less variance."""
    weights = chance / logged
    if not weights.sum() > 0:
        return _estimate(np.empty(0), weights)
    value = float((weights * rewards).sum() / weights.sum())
    return _estimate(value + weights * (rewards - value) / weights.mean(), weights)


def dr(
    rewards: Floats, chance: Floats, logged: Floats, believed: Floats, expected: Floats
) -> Estimate:
    """A model of the rewards, corrected by what it missed.

    `believed` is the reward that a model expects of the arm that answered, `expected` its mean over
    all arms as the other choice draws them. The model may not have been fitted on these rewards.
    """
    weights = chance / logged
    return _estimate(expected + weights * (rewards - believed), weights)


def _estimate(terms: Floats, weights: Floats) -> Estimate:
    """The mean of independent `terms`."""
    if len(terms) < 2:
        return Estimate(math.nan, -math.inf, math.inf, 0.0)
    value = float(terms.mean())
    reach = _DEVIATIONS * float(terms.std(ddof=1)) / math.sqrt(len(terms))
    squares = float((weights**2).sum())
    effective = float(weights.sum()) ** 2 / squares if squares else 0.0
    return Estimate(value, value - reach, value + reach, effective)
