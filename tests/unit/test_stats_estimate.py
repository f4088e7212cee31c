"""Quality without labels: near the truth when rows change, blind when their meaning does."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cloud_learner.stats import scores
from cloud_learner.stats.estimate import Cbpe, Isotonic, auc_influences, expected_auc
from cloud_learner.stats.tasks import Task

BINARY = Task()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class World:
    """Rows of two features whose label is drawn; the model knows one and is badly calibrated."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)

    def rows(self, count, mean=0.0, spread=1.5, turned=False):
        """Labels (rows,) and outputs (rows, 1)."""
        x = self.random.normal(mean, spread, count)
        chance = sigmoid(1.4 * x - 0.6)
        labels = (self.random.random(count) < (1 - chance if turned else chance)).astype("f4")
        return labels, sigmoid(0.7 * x + 0.3)[:, None].astype("f4")


def test_isotonic_is_the_least_squares_fit_that_never_falls():
    fit = Isotonic(np.array([1.0, 2, 3, 4, 5, 6]), np.array([0.0, 1, 0, 1, 0.5, 2]))

    assert fit(np.arange(1, 7.0)).tolist() == [0.0, 0.5, 0.5, 0.75, 0.75, 2.0]
    assert fit(np.array([-9.0, 9.0])).tolist() == [0.0, 2.0]


@pytest.mark.parametrize("seed", range(20))
def test_isotonic_fits_better_than_any_other_rising_function_that_is_tried(seed):
    random = np.random.default_rng(seed)
    x, y = np.round(random.random(60), 1), random.random(60)
    fitted = Isotonic(x, y)(x)
    order = np.argsort(x, kind="stable")

    assert (np.diff(fitted[order]) >= -1e-12).all(), f"seed {seed}"
    for _ in range(50):
        edges = np.unique(x)
        other = np.sort(random.random(len(edges)))[np.searchsorted(edges, x)]
        mixed = 0.9 * fitted + 0.1 * other  # rising, too, and near
        assert ((y - fitted) ** 2).sum() <= ((y - mixed) ** 2).sum() + 1e-12, f"seed {seed}"


def test_the_expected_auc_of_certain_chances_is_the_auc():
    random = np.random.default_rng(1)
    labels, answers = random.integers(0, 2, 300), np.round(random.random(300), 2)

    found = expected_auc(answers, labels.astype(float))

    assert found == pytest.approx(scores.auc(labels, answers), abs=1e-12)


def test_the_expected_auc_is_the_mean_over_drawn_labels():
    random = np.random.default_rng(2)
    answers = random.random(400)
    chances = sigmoid(4 * answers - 2)
    drawn = [scores.auc(random.random(400) < chances, answers) for _ in range(400)]

    assert expected_auc(answers, chances) == pytest.approx(np.mean(drawn), abs=0.003)


@pytest.mark.parametrize("shift", [{}, {"mean": 1.5}, {"mean": -1.5}, {"spread": 0.6}])
@pytest.mark.parametrize("seed", range(3))
def test_under_covariate_shift_the_estimate_is_within_two_points_of_what_came_true(shift, seed):
    world = World(seed)
    cbpe = Cbpe(BINARY, *world.rows(6000))
    labels, outputs = world.rows(6000, **shift)

    expected, answers = cbpe.expected(outputs), outputs[:, 0]

    print(f"seed {seed}, {shift}: AUC {expected.quality:.4f}, {scores.auc(labels, answers):.4f}")
    right = float(np.mean((answers >= 0.5) == labels))
    assert expected.quality == pytest.approx(scores.auc(labels, answers), abs=0.02)
    assert expected.accuracy == pytest.approx(right, abs=0.02)
    assert expected.log_loss == pytest.approx(BINARY.losses(labels, outputs).mean(), abs=0.03)
    assert expected.brier == pytest.approx(BINARY.bounded_losses(labels, outputs).mean(), abs=0.02)


def test_a_quality_that_fell_by_ten_points_with_the_rows_is_seen_without_labels():
    world = World(5)
    labels, outputs = world.rows(6000)
    cbpe = Cbpe(BINARY, labels, outputs)

    narrow = cbpe.expected(world.rows(3000, spread=0.4)[1])

    assert narrow.quality < BINARY.quality(labels, outputs) - 0.1


def test_under_concept_drift_it_is_blind_and_tells_the_old_quality():
    world = World(7)
    cbpe = Cbpe(BINARY, *world.rows(6000))
    labels, outputs = world.rows(6000, turned=True)

    expected, realised = cbpe.expected(outputs).quality, BINARY.quality(labels, outputs)

    print(f"expected AUC {expected:.3f}, realised {realised:.3f}")
    assert expected > 0.8
    assert realised < 0.2


def test_of_several_classes_it_expects_the_accuracy():
    random, task = np.random.default_rng(3), Task(kind="multiclass", classes=3)

    def rows(count, spread):
        logits = random.normal(0, spread, (count, 3))
        true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        labels = (random.random(count)[:, None] > true.cumsum(1)).sum(1).astype("f4")
        sharp = np.exp(2 * logits) / np.exp(2 * logits).sum(1, keepdims=True)
        return labels, sharp.astype("f4")

    cbpe = Cbpe(task, *rows(5000, 1.5))
    labels, outputs = rows(5000, 0.8)

    found = cbpe.expected(outputs)
    assert found.quality == pytest.approx(task.quality(labels, outputs), abs=0.02)
    assert math.isnan(found.log_loss)


@pytest.mark.parametrize(
    "task", [Task(kind="regression"), Task(kind="ranking", group="query"), BINARY]
)
def test_what_is_no_probability_or_was_never_labelled_has_no_estimate(task):
    rows = 100 if task.kind != "binary" else 0
    cbpe = Cbpe(task, np.ones(rows, "f4"), np.ones((rows, 1), "f4"))

    found = cbpe.expected(np.full((10, 1), 0.5, "f4"))

    assert (found.rows, math.isnan(found.quality)) == (10, True)


@pytest.mark.parametrize("digits", [1, 6], ids=["ties", "hardly any tie"])
def test_the_spread_of_the_expected_auc_is_that_of_many_draws(digits):
    random = np.random.default_rng(3)
    scores = random.beta(2, 4, 400).round(digits)
    chances = scores.clip(0.05, 0.95)
    draws = random.integers(0, 400, (600, 400))
    drawn = np.std([expected_auc(scores[each], chances[each]) for each in draws])
    moved = auc_influences(scores, chances)

    assert abs(float(moved.mean())) < 1e-9
    assert float(moved.std()) / 20 == pytest.approx(drawn, rel=0.1)


def test_without_a_pair_there_is_no_spread():
    assert np.isnan(auc_influences(np.array([0.1, 0.2]), np.array([0.0, 0.0]))).all()
