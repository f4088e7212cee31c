"""Kappa over persistence, for every task that has one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cloud_learner.evaluate.baseline import over_persistence
from cloud_learner.evaluate.offline import EvaluationSet
from cloud_learner.stats.tasks import Task


def rows(labels, before):
    return EvaluationSet(
        np.zeros((len(labels), 1), np.float32),
        np.array(labels, np.float32),
        before=np.array(before, np.float32),
    )


def answers(*values):
    return np.array(values, np.float32).reshape(len(values), -1)


def test_it_is_the_share_of_what_persistence_leaves_to_be_won():
    # persistence errs in 2 of 4 rows, the answers in 1
    found = over_persistence(Task(), rows([0, 1, 0, 0], [0, 0, 1, 0]), answers(0.1, 0.8, 0.9, 0.2))

    assert found == 0.5


def test_the_label_before_as_an_answer_is_worth_nothing_and_the_truth_one():
    labels, before = [0, 1, 1, 0, 1], [1, 0, 1, 1, 0]

    assert over_persistence(Task(), rows(labels, before), answers(*before)) == 0.0
    assert over_persistence(Task(), rows(labels, before), answers(*labels)) == 1.0
    assert over_persistence(Task(), rows(labels, before), answers(*(1 - np.array(labels)))) < 0


def test_classes_are_told_by_the_largest_answer():
    task = Task(kind="multiclass", classes=3)
    outputs = np.eye(3, dtype=np.float32)[[2, 1, 0]]

    assert over_persistence(task, rows([2, 1, 1], [0, 1, 0]), outputs) == 0.5


def test_numbers_are_compared_by_their_squared_error():
    task = Task(kind="regression")

    assert over_persistence(task, rows([1, 2], [3, 4]), answers(2, 3)) == pytest.approx(0.75)


def test_rows_without_a_label_before_do_not_count():
    found = over_persistence(Task(), rows([1, 1], [math.nan, 0]), answers(0.1, 0.9))

    assert found == 1.0


@pytest.mark.parametrize(
    ("task", "labels", "before", "outputs"),
    [
        (Task(), [], [], np.zeros((0, 1), np.float32)),
        (Task(), [1, 0], [math.nan, math.nan], answers(0.5, 0.5)),
        (Task(), [1, 0], [1, 0], answers(0.9, 0.1)),  # persistence is always right
        (Task(), [1, 0], [0, 1], answers(math.nan, 0.1)),
        (Task(kind="ranking", group="query"), [1, 0], [0, 1], answers(1, 0)),
    ],
)
def test_it_is_undefined_where_there_is_nothing_to_compare(task, labels, before, outputs):
    assert math.isnan(over_persistence(task, rows(labels, before), outputs))
