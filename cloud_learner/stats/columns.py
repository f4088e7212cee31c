"""Which column of the features has drifted: histograms against those of a reference, by PSI.

Why: the loss says that something changed; an engineer wants to know what. Histograms add up, so
rows of a micro-batch and sketches of a thousand devices are judged in one way.

A reference is cut into ten groups of about equal mass, an index into its twenty most frequent
values and the rest; what the reference never held, below, above or beside it, is a group of its
own. A column that differs from its reference all the time, such as an hour of the day in
micro-batches of an hour, is measured by its own habit: the first looks teach what is usual, and it
has drifted where it differs twice as much. After that it starts again, with what it finds next as
its reference.

Invariants: the same histograms in the same order give the same findings, also across `state` and
`restore`. `alpha` is shared out among the columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.stats import drift
from edge_runtime.features.feature import Column
from edge_runtime.features.histogram import Histograms

Floats = npt.NDArray[np.float64]
Counts = Mapping[int, float]

GROUPS = 10
OWN_INDICES = 20
LOOKS = 5  # that teach what is usual; and, after a drift, that make the new reference before
HABIT = 2.0
LEVELS_KEPT = 16


class Shift(msgspec.Struct, frozen=True):
    """A column that drifted: its PSI, what it must stay below, and those of its last looks."""

    name: str
    found: float
    reach: float
    levels: list[float]


class ColumnShifts:
    """Judges histograms of `columns` against that of `reference`, rows of shape (rows, columns)."""

    def __init__(
        self, columns: Sequence[Column], reference: Histograms, psi_max: float, alpha: float
    ) -> None:
        share = alpha / max(len(columns), 1)
        self._columns = [
            _Column(column, counts, psi_max, share)
            for column, counts in zip(columns, reference.counts, strict=True)
        ]

    def judge(self, found: Sequence[Counts], newest: Sequence[Counts]) -> list[Shift]:
        """One look at the histogram of each column; those that have drifted since the last.

        `newest` are those of the rows that came last, from which the shape of a change is told.
        """
        looks = zip(self._columns, found, newest, strict=True)
        shifts = [column.judge(counts, last) for column, counts, last in looks]
        return [shift for shift in shifts if shift is not None]

    def state(self) -> list[dict[str, Any]]:
        """All that is needed to go on from here."""
        return [column.state() for column in self._columns]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Go on from `state`. Raises: ValueError when it is of other columns."""
        for column, each in zip(self._columns, state, strict=True):
            column.restore(each)


class _Column:
    def __init__(self, column: Column, reference: Counts, psi_max: float, alpha: float) -> None:
        self._column, self._psi_max, self._alpha = column, psi_max, alpha
        self._gathered = 0  # looks that the reference still lacks
        self._refer(reference)

    def _refer(self, reference: Counts) -> None:
        self._reference = dict(reference)
        self._groups = _groups_of(self._reference, self._column)
        self._expected = self._grouped(self._reference)
        self._looks, self._usual = 0, 0.0
        self._levels: list[float] = []

    def judge(self, found: Counts, newest: Counts) -> Shift | None:
        if self._gathered:
            self._gather(newest)
            return None
        grouped = self._grouped(found)
        rows = float(grouped.sum())
        if not rows:
            return None
        level = drift.psi(self._expected, grouped)
        newest_level = drift.psi(self._expected, self._grouped(newest))
        self._levels = [*self._levels, newest_level][-LEVELS_KEPT:]
        if self._looks < LOOKS:
            self._looks, self._usual = self._looks + 1, max(self._usual, level)
            return None
        by_chance = drift.psi_by_chance(
            float(self._expected.sum()), rows, len(self._expected), self._alpha
        )
        reach = max(self._psi_max, by_chance, HABIT * self._usual)
        if level <= reach:
            return None
        self._gathered, self._reference = LOOKS, {}
        return Shift(self._column.name, level, reach, self._levels)

    def _gather(self, found: Counts) -> None:
        for bucket, count in found.items():
            self._reference[bucket] = self._reference.get(bucket, 0.0) + count
        self._gathered -= 1
        if not self._gathered:
            self._refer(self._reference)

    def _grouped(self, counts: Counts) -> Floats:
        grouped = np.zeros(len(self._groups) + 1)
        if not counts:
            return grouped
        buckets = np.fromiter(counts, np.int64, len(counts))
        values = np.fromiter(counts.values(), np.float64, len(counts))
        places = np.searchsorted(self._groups, buckets)
        if self._column.indices:  # only the very index, all else is the rest
            known = self._groups[np.minimum(places, len(self._groups) - 1)] == buckets
            places = np.where(known, places, len(self._groups))
        np.add.at(grouped, places, values)
        return grouped

    def state(self) -> dict[str, Any]:
        return {
            "reference": dict(self._reference),
            "groups": self._groups.copy(),
            "expected": self._expected.copy(),
            "gathered": self._gathered,
            "looks": self._looks,
            "usual": self._usual,
            "levels": list(self._levels),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._reference = dict(state["reference"])
        self._groups, self._expected = state["groups"].copy(), state["expected"].copy()
        self._gathered, self._looks = state["gathered"], state["looks"]
        self._usual, self._levels = state["usual"], list(state["levels"])


def _groups_of(reference: Counts, column: Column) -> npt.NDArray[np.int64]:
    """The highest bucket of each group, rising; or the indices that are groups of their own."""
    buckets = sorted(reference)
    if not buckets:
        return np.array([0])
    if column.indices:
        frequent = sorted(buckets, key=lambda bucket: (-reference[bucket], bucket))
        return np.array(sorted(frequent[:OWN_INDICES]))
    counts = np.array([reference[bucket] for bucket in buckets], np.float64)
    shares = np.cumsum(counts) / counts.sum()
    cuts = {buckets[int(at)] for at in np.searchsorted(shares, np.arange(1, GROUPS) / GROUPS)}
    return np.array(sorted({buckets[0] - 1, *cuts, buckets[-1]}))
