"""The moving-block bootstrap: intervals that cover as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from cloud_learner.stats.blocks import Interval, interval

TRUE_MEAN = 0.3


def stream(seed, days=60, rows=40):
    """Sums and counts of rows that share the luck of their day."""
    random = np.random.default_rng(seed)
    counts = random.integers(rows // 2, 2 * rows, days)
    means = TRUE_MEAN + random.normal(0, 0.5, days)
    return counts * means + np.sqrt(counts) * random.normal(0, 1, days), counts


@pytest.mark.parametrize("tries", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_interval_covers_the_truth_as_often_as_it_says(tries):
    found = [interval(*stream(seed), seed=seed) for seed in range(tries)]

    covered = np.mean([each.low <= TRUE_MEAN <= each.high for each in found])
    assert 0.90 <= covered <= 0.98, covered


def test_rows_that_were_taken_for_independent_would_cover_too_seldom():
    """Guards the guard: days matter, and blocks of days would where days go together."""
    sums, counts = stream(1)
    days = np.repeat(sums / counts, counts)

    by_row = interval(days, np.ones(len(days)), seed=1)
    by_day = interval(sums, counts, seed=1)

    assert by_row.high - by_row.low < 0.5 * (by_day.high - by_day.low)


def test_blocks_are_wider_where_days_go_together():
    walk = np.repeat(np.random.default_rng(3).normal(size=12), 5)

    by_day = interval(walk, np.ones(60), seed=1)
    by_five = interval(walk, np.ones(60), seed=1, block=5)

    assert by_five.high - by_five.low > 1.5 * (by_day.high - by_day.low)


def test_the_mean_is_that_of_all_rows_and_the_same_seed_gives_the_same_interval():
    sums, counts = [1.0, 0.0, 8.0], [2, 0, 8]

    found = interval(sums, counts, seed=5)

    assert found.mean == pytest.approx(0.9)
    assert found == interval(sums, counts, seed=5)
    assert found.low <= found.mean <= found.high


def test_no_rows_give_no_interval_and_no_sign():
    found = interval([0.0, 0.0], [0, 0], seed=1)

    assert np.isnan([found.mean, found.low, found.high]).all()
    assert not found.covers_zero


def test_an_interval_covers_zero_with_its_ends():
    assert Interval(1.0, 0.0, 2.0).covers_zero
    assert not Interval(1.0, 0.1, 2.0).covers_zero
    assert not Interval(-1.0, -2.0, -0.1).covers_zero
