"""What the cloud knows of each item, from visits that are over: the table of features.toml.

Why: a network that has seen an item a hundred times could remember it; one that is given facts
about it also answers for an item that is new in the table, without being trained anew.

An item's row: `bias`, how much more it is liked than the mean; `popular`, how often it was shown,
as a logarithm; factors, which are directions in which visitors differ, of what is explained neither
by the item nor by the visitor as a whole (alternating least squares with regularisation by count,
Zhou et al. 2008), each with a variance of 1; and its genres as 0 and 1.

Invariants: the same visits give the same table; what nobody was shown has neither bias nor factors.

Knows nothing about the simulator: MovieLens is read in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

WIDTH, ROUNDS = 12, 10
RIDGE = 0.08  # on each label of a visitor or an item, in units of what is to be explained
ITEM_RIDGE, VISIT_RIDGE = 8.0, 5.0  # so many labels of the mean come with each


def facts(visits: Numbers, items: Numbers, labels: Floats, genres: Floats) -> Floats:
    """Rows of the table, (items, 2 + `WIDTH` + genres), from three columns of what was shown.

    `genres` (items, genres) are 0 and 1.
    """
    count, mean = len(genres), labels.mean()
    shown = np.bincount(items, minlength=count)
    bias = np.bincount(items, labels - mean, count) / (shown + ITEM_RIDGE)
    left = labels - mean - bias[items]
    own = np.bincount(visits, left) / (np.bincount(visits) + VISIT_RIDGE)
    factors = _factors(visits, items, left - own[visits], count)
    popular = (np.log1p(shown) - np.log1p(shown).mean()) / 2
    return np.column_stack([bias / labels.std(), popular, factors, genres])


def _factors(visits: Numbers, items: Numbers, left: Floats, count: int) -> Floats:
    """Directions in which visitors differ, (items, `WIDTH`)."""
    left = left / left.std()
    factors = np.random.default_rng(1).normal(0, 0.1, (count, WIDTH))
    for _ in range(ROUNDS):
        tastes = _solved(visits, factors[items], left, int(visits.max()) + 1)
        factors = _solved(items, tastes[visits], left, count)
    return np.asarray(factors / (factors.std(0) + 1e-9))


def _solved(groups: Numbers, rows: Floats, targets: Floats, count: int) -> Floats:
    """Ridge regression of each group's targets on its rows, of shape (count, `WIDTH`)."""
    order = np.argsort(groups, kind="stable")
    ends = np.cumsum(np.bincount(groups, minlength=count))[:-1]
    solved = np.zeros((count, WIDTH))
    for number, own in enumerate(np.split(order, ends)):
        if len(own):
            square = rows[own].T @ rows[own] + RIDGE * len(own) * np.eye(WIDTH)
            solved[number] = np.linalg.solve(square, rows[own].T @ targets[own])
    return solved


def columns(genres: Sequence[str]) -> list[str]:
    """The names of the table's columns."""
    return ["bias", "popular", *(f"factor_{n}" for n in range(WIDTH)), *genres]
