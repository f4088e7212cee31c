"""Scores of a stream, the baselines beside them, and what they say about cadences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cloud_learner.experiment.asked import Asked
from cloud_learner.experiment.scoring import (
    Measures,
    kappa,
    later,
    majority,
    persistence,
    truth_of,
)
from cloud_learner.experiment.trajectory import AtCadence
from cloud_learner.experiment.verdict import is_none, knee_of, recency_of
from cloud_learner.stats.blocks import Interval
from cloud_learner.stats.tasks import Task

DAY_S = 86_400.0
BINARY = Task()


def asked(labels, times_s, known_s, devices=None):
    """Predictions of one feature."""
    known = np.array([np.nan if each is None else each for each in known_s], np.float64)
    return Asked(
        devices or ["a"] * len(labels),
        np.array(times_s, np.float64),
        known,
        np.zeros((len(labels), 1), np.float32),
        np.array([np.nan if each is None else each for each in labels], np.float32),
        [],
        float(times_s[0]),
        float(max(times_s[-1], np.nanmax(known))),
    )


def test_rows_are_scored_after_the_warm_up_when_labelled_and_when_all_could_be_known():
    some = asked([0, 1, None, 1, 0], [0, 10, 20, 30, 40], [5, 15, None, 35, 45])

    truth = truth_of(BINARY, some, after_s=10.0, window_s=10.0)

    assert truth.rows.tolist() == [1, 3]  # row 4 had half its window only
    assert truth.labels.tolist() == [1.0, 1.0]


def test_a_loss_is_over_that_of_the_best_constant_answer():
    some = asked([0, 0, 0, 1], [0, 1, 2, 3], [4, 4, 4, 4])
    truth = truth_of(BINARY, some, 0.0, 0.0)

    constant = truth.measures(np.full((4, 1), 0.25, np.float32))
    perfect = truth.measures(np.array([[0], [0], [0], [1]], np.float32))

    assert (constant.loss, constant.quality, constant.accuracy) == (pytest.approx(1), 0.5, 0.75)
    assert (perfect.loss, perfect.quality) == (pytest.approx(0, abs=1e-5), 1.0)


def test_persistence_answers_with_what_its_device_knew_by_then():
    labels, devices = [1, 0, 0, 1, 1], ["a", "b", "a", "a", "b"]
    some = asked(labels, [0, 1, 2, 3, 4], [1.5, 9, 2.5, 9, 9], devices)
    truth = truth_of(BINARY, some, 0.0, 0.0)

    found = persistence(truth, some, np.array([0.0], np.float32))

    # Before anything is known: 0, as in the warm-up. Then a is 1, then 0; of b nothing is known.
    assert found.accuracy == pytest.approx(np.mean(np.array([0, 0, 1, 0, 0]) == labels))
    assert math.isnan(found.loss)


def test_majority_knows_the_warm_up_alone():
    some = asked([1, 1, 1, 0], [0, 1, 2, 3], [4, 4, 4, 4])
    truth = truth_of(BINARY, some, 0.0, 0.0)

    assert majority(truth, np.array([0, 0, 1], np.float32)).accuracy == 0.25
    assert majority(truth, np.array([1, 1, 0], np.float32)).accuracy == 0.75


@pytest.mark.parametrize("kind", ["multiclass", "regression"])
def test_other_tasks_are_scored_too(kind):
    task = Task(kind=kind, classes=3) if kind == "multiclass" else Task(kind=kind)
    some = asked([0, 1, 2, 2], [0, 1, 2, 3], [0, 1, 2, 3])
    truth = truth_of(task, some, 0.0, 0.0)
    perfect = np.eye(3, dtype="f4")[[0, 1, 2, 2]] if kind == "multiclass" else truth.labels[:, None]

    before = persistence(truth, some, np.array([0.0], np.float32))

    assert truth.measures(perfect).loss == pytest.approx(0, abs=1e-6)
    assert truth.measures(perfect).quality == 1.0
    assert kappa(truth.measures(perfect), before) == 1.0
    if kind == "multiclass":
        assert before.accuracy == 0.5  # 0 by the warm-up, 0, 1, 2 of 0, 1, 2, 2
    else:
        assert before.loss == pytest.approx(2 / 2.75)


def test_kappa_is_what_part_of_the_errors_of_persistence_is_gone():
    def measures(accuracy):
        return Measures(math.nan, 0.0, accuracy, 1.0)

    assert kappa(measures(0.9), measures(0.8)) == pytest.approx(0.5)
    assert kappa(measures(0.7), measures(0.8)) == pytest.approx(-0.5)
    assert math.isnan(kappa(measures(0.9), measures(1.0)))


def interval(mean, spread=0.01):
    return Interval(mean, mean - spread, mean + spread)


def test_the_knee_is_the_slowest_from_which_on_nothing_is_sure_or_matters():
    worse, none, tiny = interval(0.3), interval(0.005), Interval(0.0005, 0.0004, 0.0006)

    assert knee_of([worse, worse, none]) == 2
    assert knee_of([worse, none, tiny]) == 1
    assert knee_of([worse, worse]) == 2
    assert knee_of([none, none]) == 0
    assert knee_of([none, worse, none]) == 2, "a lucky slow one behind a bad one is no knee"
    assert is_none(tiny)
    assert is_none(Interval(math.nan, math.nan, math.nan))


def test_more_data_alone_are_no_recency_and_newer_data_are():
    times_s = np.arange(0, 40 * DAY_S, DAY_S / 20)
    truth = truth_of(BINARY, asked([0, 1] * 400, times_s, times_s), 0.0, 0.0)
    after = later(truth)
    assert len(after) < len(truth)
    assert after.times_s[0] < times_s[25]

    def played(some, ahead):
        slow = AtCadence([], some.counts * (1.0 + ahead), 0.0, 0.0, 0.0)
        return [slow, AtCadence([], some.counts * 1.0, 0.0, 0.0, 0.0)]

    def recency(own, other):
        return recency_of(played(truth, own), played(after, other), (truth, after))

    assert recency(0.2, 0.2) == Interval(
        pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9)
    )
    assert recency(0.2, 0.05).low == pytest.approx(0.15)
