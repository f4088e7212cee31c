"""The scores against their definitions, counted out by hand or in the slow obvious way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_learner.stats.scores import auc, brier, log_loss, normalized_entropy

rows = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 8).map(lambda i: i / 8)), min_size=2, max_size=60
).filter(lambda rows: len({label for label, _ in rows}) == 2)


def split(rows):
    labels, probabilities = zip(*rows, strict=True)
    return np.array(labels), np.array(probabilities)


@given(rows)
def test_auc_is_the_share_of_pairs_in_order_and_a_tie_counts_half(rows):
    positives = [p for y, p in rows if y]
    negatives = [p for y, p in rows if not y]
    wins = sum((a > b) + 0.5 * (a == b) for a in positives for b in negatives)
    assert auc(*split(rows)) == pytest.approx(wins / (len(positives) * len(negatives)))


@given(rows)
def test_auc_depends_on_order_only(rows):
    labels, probabilities = split(rows)
    assert auc(labels, probabilities) == auc(labels, probabilities**3 / 2)
    assert auc(labels, probabilities) == pytest.approx(1 - auc(labels, -probabilities))


def test_auc_of_float32_with_all_values_equal_is_one_half():
    assert auc([0, 1, 0, 1, 1], np.full(5, 0.3, dtype=np.float32)) == 0.5


@pytest.mark.parametrize("score", [auc, normalized_entropy])
@pytest.mark.parametrize("labels", [[], [0.0], [1.0, 1.0]])
def test_a_score_that_needs_both_classes_is_nan_without_them(score, labels):
    assert math.isnan(score(labels, np.full(len(labels), 0.5)))


@pytest.mark.parametrize("score", [brier, log_loss])
def test_a_mean_over_no_rows_is_nan(score):
    assert math.isnan(score([], []))


def test_brier_and_log_loss_match_their_definitions():
    labels, probabilities = [1, 0, 0], [0.8, 0.4, 0.1]
    assert brier(labels, probabilities) == pytest.approx((0.04 + 0.16 + 0.01) / 3)
    expected = -(math.log(0.8) + math.log(0.6) + math.log(0.9)) / 3
    assert log_loss(labels, probabilities) == pytest.approx(expected)


def test_log_loss_of_a_certain_error_is_large_but_finite():
    assert log_loss([1, 0], [0.0, 1.0]) == pytest.approx(-math.log(1e-7))


def test_normalized_entropy_is_one_for_the_base_rate_and_less_for_more_knowledge():
    labels = np.array([1, 0, 0, 0])
    assert normalized_entropy(labels, np.full(4, 0.25)) == pytest.approx(1)
    assert normalized_entropy(labels, [0.7, 0.1, 0.1, 0.1]) < 1


def test_rows_that_do_not_match_are_a_broken_invariant():
    with pytest.raises(AssertionError):
        brier([0, 1], [0.5])
