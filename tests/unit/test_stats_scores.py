"""The area under the ROC curve against its definition, in the slow obvious way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_learner.stats.scores import auc

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


@pytest.mark.parametrize("labels", [[], [0.0], [1.0, 1.0]])
def test_auc_needs_both_classes_and_is_nan_without_them(labels):
    assert math.isnan(auc(labels, np.full(len(labels), 0.5)))


def test_rows_that_do_not_match_are_a_broken_invariant():
    with pytest.raises(AssertionError):
        auc([0, 1], [0.5])
