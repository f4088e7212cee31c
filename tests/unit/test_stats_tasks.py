"""Losses of an order: what a row's score is worth depends on the rows it competes with alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cloud_learner.stats.tasks import PARTNERS_MAX, Task

ORDER = Task(kind="ranking", group="query")


def column(*values):
    return np.array(values, np.float32)[:, None]


def test_the_loss_of_an_order_is_logistic_against_each_other_label_of_the_group():
    labels, groups = np.array([1, 0, 0, 1, 1], np.float32), np.array([7, 7, 7, 9, 9])

    losses = ORDER.losses(labels, column(2, 1, 3, 5, 4), groups)

    def loss(margin):
        return math.log1p(math.exp(-margin))

    expected = [(loss(1) + loss(-1)) / 2, loss(1), loss(-1), 0, 0]
    assert losses == pytest.approx(expected)


def test_the_level_of_scores_says_nothing_and_their_scale_is_the_declared_one():
    random = np.random.default_rng(0)
    labels, groups = random.integers(0, 3, 60).astype(np.float32), random.integers(1, 9, 60)
    scores = random.normal(size=(60, 1)).astype(np.float32)
    tenth = Task(kind="ranking", group="query", scale=10.0)

    losses = ORDER.losses(labels, scores, groups)

    assert ORDER.losses(labels, scores + 5, groups) == pytest.approx(losses, abs=1e-5)
    assert tenth.losses(labels, scores * 10, groups) == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("size", [PARTNERS_MAX, 20 * PARTNERS_MAX])
def test_bounded_losses_of_an_order_are_bounded_and_lower_for_the_better(size):
    labels = np.random.default_rng(1).integers(0, 2, size).astype(np.float32)
    groups = np.ones(size, np.int64)

    good = ORDER.bounded_losses(labels, labels[:, None] * 3, groups)
    bad = ORDER.bounded_losses(labels, labels[:, None] * -1e6, groups)

    assert good.max() < 0.1
    assert bad.min() == bad.max() == 1.0
