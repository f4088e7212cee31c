"""Has the world changed? Tests of numbers, histograms and vectors, each with its source.

Why: a learner that does not notice a change defends yesterday. No single sign shows every change:
the loss needs labels, scores and features come without, embeddings see what no column shows.

| sign | detector |
|---|---|
| loss | `MeanShift`: ADWIN of river |
| scores | `ks_test`: KSWIN of river, one test for each micro-batch |
| a feature | `psi`: population stability index of two histograms |
| embeddings | `mmd_test`: maximum mean discrepancy with a permutation test |

Invariants: the same values in the same order and the same seed give the same findings, also across
`state` and `restore`. Every rate of false alarms holds for rows that are exchangeable; rows that
depend on one another, as neighbours in time do, alarm more often (`shifts` has an answer).

Knows nothing about tasks, families and what an alarm does.
"""

from __future__ import annotations

import copy
import math
from statistics import NormalDist
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_CHECK_EVERY = 32  # values between two checks of ADWIN
_PERMUTATIONS_AT_ONCE = 100
_EXCEEDED_MAX = 10  # permutations beyond the found value after which the test is over


class Rise(msgspec.Struct, frozen=True):
    """A mean that rose: of what was cut off, and of the newest `rows` values, which were kept.

    ADWIN cuts as little as it must, so values from before the change may be among the kept.
    """

    before: float
    after: float
    rows: int


class MeanShift:
    """ADWIN: a window that shrinks when the mean of its newer part differs from its older part's.

    Bifet & Gavaldà, "Learning from time-changing data with adaptive windowing" (SDM 2007). `delta`
    bounds the chance that a check of a mean that stands still cuts. After a cut it starts anew.
    """

    def __init__(self, delta: float) -> None:
        from river.drift.adwin import ADWIN

        self._adwin = ADWIN(delta=delta, clock=_CHECK_EVERY)

    def add(self, values: Floats) -> Rise | None:
        """Take values in [0, 1], in order; the last rise that was found. A fall is no alarm."""
        adwin, found = self._adwin, None
        for value in values.tolist():
            total, width = adwin.total + value, adwin.width + 1
            if adwin.drift_detected:
                total, width = value, 1
            adwin.update(value)
            if adwin.drift_detected and width > adwin.width:
                after = adwin.estimation
                before = (total - adwin.total) / (width - adwin.width)
                found = Rise(before, after, int(adwin.width)) if after > before else found
        return found

    def state(self) -> Any:
        """All that is needed to go on from here."""
        return copy.deepcopy(self._adwin)

    def restore(self, state: Any) -> None:
        """Go on from `state`."""
        self._adwin = copy.deepcopy(state)


class Difference(msgspec.Struct, frozen=True):
    """Two samples compared: the chance of so large a difference (`p`) if they were alike."""

    size: float
    p: float


def thinned(values: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """At most `count` of the values, evenly spaced, the last one among them."""
    if len(values) <= count:
        return values
    places: npt.NDArray[np.intp] = np.linspace(0, len(values) - 1, count).astype(np.intp)
    chosen: npt.NDArray[Any] = values[places]
    return chosen


def ks_test(before: Floats, recent: Floats, seed: int) -> Difference:
    """KSWIN: do the `recent` values follow the distribution of those `before`, which are more?

    Raab, Heusinger & Schleif, "Reactive soft prototype computing for concept drift streams"
    (Neurocomputing 2020): as many of the values before as are recent are drawn, and both compared
    by Kolmogorov and Smirnov. river tests after every value, which costs a quarter of a millisecond
    each time and makes hundreds of dependent tests of a micro-batch; this is one.
    """
    from river.drift.kswin import KSWIN

    test = KSWIN(
        window_size=len(before) + len(recent),
        stat_size=len(recent),
        seed=seed,
        window=[*before.tolist(), *recent[:-1].tolist()],
    )
    test.update(float(recent[-1]))
    return Difference(ks_distance(before, recent), float(test.p_value))


def ks_distance(first: Floats, second: Floats) -> float:
    """The largest difference of the two empirical distribution functions (Kolmogorov-Smirnov)."""
    first, second = np.sort(first), np.sort(second)
    every = np.concatenate([first, second])
    below = np.searchsorted(first, every, "right") / len(first)
    return float(np.abs(below - np.searchsorted(second, every, "right") / len(second)).max())


def psi(reference: Floats, found: Floats) -> float:
    """Population stability index of two histograms with the same bins; 0 where they are alike.

    Siddiqi, "Credit Risk Scorecards" (2006): below 0.1 stable, above 0.25 shifted. Half a count is
    added to each bin, so that an empty one has a logarithm.
    """
    p = (reference + 0.5) / (reference.sum() + 0.5 * len(reference))
    q = (found + 0.5) / (found.sum() + 0.5 * len(found))
    return float(((q - p) * np.log(q / p)).sum())


def psi_by_chance(reference_rows: float, found_rows: float, bins: int, alpha: float) -> float:
    """What `psi` of samples of one distribution passes with the chance `alpha`.

    Yurdakul & Naranjo, "Statistical properties of the population stability index" (J. Risk Model
    Validation 2020): psi over (1/n + 1/m) follows chi-square with bins - 1 degrees of freedom;
    its quantile by Wilson & Hilferty (1931).
    """
    if bins < 2 or not reference_rows or not found_rows:
        return math.inf
    degrees = bins - 1
    spread = 2 / (9 * degrees)
    root = 1 - spread + NormalDist().inv_cdf(1 - alpha) * math.sqrt(spread)
    return float((1 / reference_rows + 1 / found_rows) * degrees * max(root, 0.0) ** 3)


def mmd_test(first: Floats, second: Floats, alpha: float, seed: int) -> Difference:
    """Squared maximum mean discrepancy of two samples of vectors, with a permutation test.

    Gretton et al., "A kernel two-sample test" (JMLR 2012): the unbiased estimate with a Gaussian
    kernel, its width the median distance. As many permutations as it takes for a `p` of `alpha`,
    fewer where ten of them pass the found value before (Besag & Clifford, Biometrika 1991).
    """
    kernel = _kernel(np.concatenate([first, second]).astype(np.float64))
    sides = np.r_[np.ones(len(first)), np.zeros(len(second))]
    found = float(_mmd2(kernel, sides[None])[0])
    random, tried, beyond = np.random.default_rng(seed), 0, 0
    while tried < math.ceil(1 / alpha) and beyond < _EXCEEDED_MAX:
        shuffled = random.permuted(np.tile(sides, (_PERMUTATIONS_AT_ONCE, 1)), axis=1)
        beyond += int((_mmd2(kernel, shuffled) >= found).sum())
        tried += _PERMUTATIONS_AT_ONCE
    return Difference(found, (beyond + 1) / (tried + 1))


def _kernel(rows: Floats) -> Floats:
    """exp(-distance^2 / (2 median^2)) of each pair, the diagonal left out; (rows, rows)."""
    squares = (rows**2).sum(1)
    apart = np.maximum(squares[:, None] + squares - 2 * rows @ rows.T, 0.0)
    pairs = apart[np.triu_indices(len(rows), 1)]
    median = float(np.median(pairs)) or 1.0
    kernel: Floats = np.exp(-apart / (2 * median))
    np.fill_diagonal(kernel, 0.0)
    return kernel


def _mmd2(kernel: Floats, sides: Floats) -> Floats:
    """The estimate for each way to split the rows: 1 for the first sample; (splits,)."""
    others = 1 - sides
    n, m = sides[0].sum(), others[0].sum()
    weighted = sides @ kernel
    within_first = (weighted * sides).sum(1) / (n * (n - 1))
    across = (weighted * others).sum(1) / (n * m)
    within_second = ((kernel.sum(0) - weighted) * others).sum(1) / (m * (m - 1))
    estimate: Floats = within_first + within_second - 2 * across
    return estimate


def is_gradual(levels: Floats) -> bool:
    """Whether the newest of these levels rose, or fell, as a ramp rather than as a step.

    Both have two levels and one moment: the step jumps there, the ramp leaves there on a straight
    line that ends with the newest level. The one with the smaller squared error names it; a change
    of which there is one level so far is a step.
    """
    count = len(levels)
    step = min((_step_error(levels, at) for at in range(1, count)), default=0.0)
    ramp = min((_ramp_error(levels, at) for at in range(1, count - 2)), default=math.inf)
    return ramp < step


def _step_error(levels: Floats, at: int) -> float:
    return float(np.var(levels[:at]) * at + np.var(levels[at:]) * (len(levels) - at))


def _ramp_error(levels: Floats, at: int) -> float:
    hinge = np.maximum(np.arange(len(levels)) - (at - 1), 0.0)
    fit = np.stack([np.ones(len(levels)), hinge], 1)
    solution = np.linalg.lstsq(fit, levels, rcond=None)[0]
    return float(((levels - fit @ solution) ** 2).sum())
