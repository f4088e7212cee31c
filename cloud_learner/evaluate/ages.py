"""Calibration by the age of labels: what tells a learner that believed the labels that came first.

Why: where one outcome is known sooner than the other, whoever learns labels as they come takes the
quick one for the usual one. The mean over all rows may hide it: rows whose outcomes come soon are
learned well, the others make it up.

What is judged: rows are put into groups by the label age that was to be *expected* when they were
predicted. That is known beforehand, so in each group the mean answer of a good model is the mean
label. Groups by the age that a label *had* are shown, too, but decide nothing: the outcome made
the age, so in such a group the means differ for the best of models (docs/experiments.md).

The expected age is a least-squares fit of the logarithm of the age to the features, where an index
counts as the mean of its rows. It is fitted on one half of the rows and read on the other, both
ways round: fitted on itself, it would know something of each row's outcome.

Invariants: the same rows give the same groups. Knows nothing about limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from cloud_learner.evaluate.offline import (
    Codes,
    EvaluationSet,
    Floats,
    Mask,
    Matrix,
    ScoredSet,
    score,
)
from cloud_learner.stats.tasks import Task

GROUPS = 3  # soon, later, last
_RIDGE = 1e-3  # of the rows, on standardised columns


def age_groups(rows: EvaluationSet, index_columns: Iterable[int]) -> list[Mask]:
    """Rows by the label age to be expected of them, soonest first; fewer where ages do not differ.

    `index_columns` are the positions of those features that are indices.
    """
    known = np.isfinite(rows.ages_s)
    ages = np.log1p(rows.ages_s[known].clip(min=0.0))
    expected = np.full(len(rows), np.nan)
    expected[known] = _expected(rows.features[known].astype(np.float64), ages, set(index_columns))
    return _groups(expected)


def known_age_groups(rows: EvaluationSet) -> list[Mask]:
    """Rows by the age that their labels had, youngest first."""
    return _groups(rows.ages_s)


def score_groups(
    task: Task, rows: EvaluationSet, outputs: Matrix, groups: Sequence[Mask]
) -> list[ScoredSet]:
    """How good the answers are in each group."""
    return [score(task, rows, outputs, where) for where in groups]


def _expected(features: Floats, ages: Floats, index_columns: set[int]) -> Floats:
    half = np.arange(len(ages)) % 2 == 0
    expected = np.empty(len(ages))
    for fitted in (half, ~half):
        if fitted.any() and not fitted.all():
            expected[~fitted] = _fit(features, ages, index_columns, fitted)[~fitted]
        else:
            expected[~fitted] = 0.0
    return expected


def _fit(features: Floats, ages: Floats, index_columns: set[int], fitted: Mask) -> Floats:
    """Expected log ages of all rows, learned from the `fitted` ones; (rows,)."""
    columns = features.copy()
    for at in index_columns:
        columns[:, at] = _means(features[:, at].astype(np.int64), ages, fitted)
    known, target = columns[fitted], ages[fitted]
    mean, spread = known.mean(0), known.std(0)
    spread[spread == 0] = 1.0
    known = (known - mean) / spread
    ridge = _RIDGE * len(known) * np.eye(known.shape[1])
    weights = np.linalg.solve(known.T @ known + ridge, known.T @ (target - target.mean()))
    found: Floats = target.mean() + (columns - mean) / spread @ weights
    return found


def _means(values: Codes, ages: Floats, fitted: Mask) -> Floats:
    """For each row the mean age of those fitted rows that have its index."""
    values = values - values.min(initial=0)
    counts = np.bincount(values[fitted], minlength=values.max(initial=0) + 1)
    sums = np.bincount(values[fitted], ages[fitted], minlength=len(counts))
    usual = ages[fitted].mean()
    means: Floats = (sums + usual) / (counts + 1)  # an index of few rows stays near the usual age
    found: Floats = means[values]
    return found


def _groups(ages: Floats) -> list[Mask]:
    known = np.isfinite(ages)
    if not known.any():
        return []
    edges = np.quantile(ages[known], np.linspace(0, 1, GROUPS + 1)[1:-1])
    group = np.searchsorted(edges, ages, side="left")
    return [where for at in range(GROUPS) if (where := known & (group == at)).any()]
