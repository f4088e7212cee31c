"""Confidence sequences: the truth is inside at every look, and they narrow."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from cloud_learner.stats.confidence import ConfidenceSequence

FEW = pytest.param(60, 500, id="60")
FULL = pytest.param(500, 4000, id="500", marks=pytest.mark.slow)


@pytest.mark.parametrize(("seeds", "values"), [FEW, FULL])
@pytest.mark.parametrize("rate", [0.01, 0.3, 0.97])
def test_the_mean_is_inside_at_all_looks_together(seeds, values, rate):
    missed = 0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        sequence = ConfidenceSequence(alpha=0.05)
        inside = True
        for value in (rng.random(values) < rate).astype(float).tolist():
            sequence.add(value)
            low, high = sequence.interval
            inside &= low <= rate <= high
        missed += not inside
    assert missed <= 0.05 * seeds + 3 * (0.05 * seeds) ** 0.5


def test_small_differences_are_told_from_nought():
    rng = np.random.default_rng(0)
    sequence = ConfidenceSequence(low=-1.0, high=1.0)
    for value in rng.normal(0.01, 0.04, 4000).tolist():
        sequence.add(value)
    low, high = sequence.interval
    assert 0 < low < 0.01 < high < 0.015
    assert sequence.mean == pytest.approx(0.01, abs=0.002)


def test_without_values_all_is_possible():
    sequence = ConfidenceSequence(low=-1.0, high=1.0)
    assert sequence.interval == (-1.0, 1.0)
    assert math.isnan(sequence.mean)


def test_a_stored_sequence_goes_on_as_if_it_had_not_been_stored():
    values = np.random.default_rng(2).random(300).tolist()
    whole, first = ConfidenceSequence(), ConfidenceSequence()
    for value in values:
        whole.add(value)
    for value in values[:100]:
        first.add(value)
    again = msgspec.json.decode(msgspec.json.encode(first), type=ConfidenceSequence)
    for value in values[100:]:
        again.add(value)
    assert whole == again


def test_a_mean_that_moves_leaves_an_interval_and_no_contradiction():
    sequence = ConfidenceSequence()
    for value in [0.1] * 2000 + [0.9] * 2000:
        sequence.add(value)
        low, high = sequence.interval
        assert low <= high


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_value_out_of_bounds_is_a_broken_invariant(value):
    with pytest.raises(AssertionError):
        ConfidenceSequence().add(value)


@pytest.mark.parametrize(
    ("seeds", "most"), [(40, 2), pytest.param(500, 10, marks=pytest.mark.slow)]
)
def test_with_a_horizon_it_is_narrower_there_and_still_holds_the_mean(seeds, most):
    missed, widths = 0, []
    for seed in range(seeds):
        draws = (np.random.default_rng(seed).random(4000) < 0.1).astype(float).tolist()
        tuned, plain = (ConfidenceSequence(alpha=0.01, horizon=each) for each in (4000, 0))
        for value in draws:
            tuned.add(value)
            plain.add(value)
        low, high = tuned.interval
        missed += not low <= 0.1 <= high
        widths.append((high - low) / (plain.interval[1] - plain.interval[0]))
    assert missed <= most
    assert np.mean(widths) < 0.65
