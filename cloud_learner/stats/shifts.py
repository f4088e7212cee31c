"""Shifts between a micro-batch and those before it, beyond chance and beyond what is usual.

Why: a test asks whether two samples are alike, and in a real stream no two hours are: with its rows
alike within an hour and unlike between hours, a test of rows that ought to be independent fires at
every micro-batch. So a difference counts where it is both beyond chance and thrice what has been
usual between neighbours lately; the first five teach what that is.

Invariants: the same values in the same order and the same seed give the same findings, also across
`state` and `restore`. After a shift the reference starts anew with the micro-batch that showed it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.stats import drift
from cloud_learner.stats.drift import Difference

Floats = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]
Embed = Callable[[Matrix], Matrix | None]

HABIT = 3.0
_USUAL_OF = 20  # micro-batches
_USUAL_FROM = 5


class Shift(msgspec.Struct, frozen=True):
    """A difference beyond chance and beyond what is usual: its size, and what it had to pass."""

    found: float
    reach: float


class _Habit:
    """What differences between neighbours have been lately."""

    def __init__(self, least: float) -> None:
        self._least = least
        self.sizes: list[float] = []

    def judge(self, difference: Difference, alpha: float) -> Shift | None:
        """Whether the difference is a shift; it is usual from now on in either case."""
        known = self.sizes
        self.sizes = [*known, difference.size][-_USUAL_OF:]
        if len(known) < _USUAL_FROM or difference.p > alpha:
            return None
        reach = max(self._least, HABIT * float(np.median(known)))
        return Shift(difference.size, reach) if difference.size > reach else None


def usual_step(levels: Sequence[float]) -> float:
    """Thrice the median step from one level to the next: what a level moves without a reason.

    Steps, not distances from a mean: a slow climb leaves them small. 0 where there are too few.
    """
    steps = np.abs(np.diff(np.array(levels, np.float64)))
    return HABIT * float(np.median(steps)) if len(steps) >= _USUAL_FROM else 0.0


class ScoreShift:
    """KSWIN of at most 200 scores of a micro-batch against the 1,000 before; see `drift.ks_test`.

    A difference below 0.1 is none, however sure it is.
    """

    ROWS, KEPT_ROWS, LEAST = 200, 1000, 0.1

    def __init__(self, alpha: float, seed: int) -> None:
        self._alpha, self._seed = alpha, seed
        self._kept = np.zeros(0)
        self._tests = 0
        self._habit = _Habit(self.LEAST)

    def add(self, scores: Floats) -> Shift | None:
        """Take the scores of a micro-batch, (rows,)."""
        recent, kept = drift.thinned(scores, self.ROWS), self._kept
        self._kept = np.concatenate([kept, recent])[-self.KEPT_ROWS :]
        if not len(recent) or len(kept) < len(recent):
            return None
        self._tests += 1
        found = drift.ks_test(kept, recent, self._seed + self._tests)
        shift = self._habit.judge(found, self._alpha)
        if shift is not None:
            self._kept = recent
        return shift

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        return {"kept": self._kept, "tests": self._tests, "sizes": self._habit.sizes}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._kept, self._tests = state["kept"], state["tests"]
        self._habit.sizes = state["sizes"]


class EmbeddingShift:
    """MMD of at most 60 rows of a micro-batch against as many of the five before it, embedded.

    Both are embedded by the network of today: that the network has learned since is no shift.
    """

    ROWS, OF_EACH = 60, 12

    def __init__(self, alpha: float, seed: int) -> None:
        self._alpha, self._seed = alpha, seed
        self._kept: Matrix = np.zeros((0, 0), np.float32)
        self._tests = 0
        self._habit = _Habit(0.0)

    def add(self, features: Matrix, embed: Embed) -> tuple[float, Shift | None]:
        """Take a micro-batch, (rows, columns): the squared discrepancy, and the shift.

        `embed` gives (rows, width) for rows, or None where there is no embedding.
        """
        recent, few = drift.thinned(features, self.ROWS), drift.thinned(features, self.OF_EACH)
        kept = self._kept if len(self._kept) else few[:0]
        self._kept = np.concatenate([kept, few])[-self.ROWS :]
        if min(len(kept), len(recent)) < self.OF_EACH:
            return 0.0, None
        embedded = embed(np.concatenate([kept, recent]))
        if embedded is None or not np.isfinite(embedded).all():
            return 0.0, None
        self._tests += 1
        before, now = np.split(embedded.astype(np.float64), [len(kept)])
        found = drift.mmd_test(before, now, self._alpha, self._seed + self._tests)
        shift = self._habit.judge(found, self._alpha)
        if shift is not None:
            self._kept = few
        return found.size, shift

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        return {"kept": self._kept, "tests": self._tests, "sizes": self._habit.sizes}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._kept, self._tests = state["kept"], state["tests"]
        self._habit.sizes = state["sizes"]
