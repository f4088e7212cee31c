"""What answers without labels are worth: less than before is an alarm before any label comes."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from cloud_learner.evaluate.expectation import ROWS, ROWS_MIN, Expectation
from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from cloud_learner.train.declaration import Drift
from edge_runtime.wire.messages import Scored

TASKS = [Task(), Task(kind="multiclass", classes=3)]
COIN = Example("a", 1, 1, "coin", 0.0, 5.0, b"", "s", 1.0, 1.0, [], 1.0, 2.0)


class Fleet:
    """Devices whose answers are calibrated, whatever they are asked."""

    def __init__(self, seed, task=TASKS[0], **drift):
        self.random, self.task = np.random.default_rng(seed), task
        self.batch, self.clock_s = 0, 1000.0
        self.expectation = Expectation(Drift(**drift), task)

    def answers(self, count, spread=1.0):
        """Outputs for `count` rows; the less `spread`, the less sure."""
        if self.task.kind == "multiclass":
            scores = self.random.normal(0, 2 * spread, (count, self.task.classes))
            chances = np.exp(scores)
            return (chances / chances.sum(1, keepdims=True)).tolist()
        chances = 1 / (1 + np.exp(-2.0 * self.random.normal(0, spread, (count, 1))))
        return chances.tolist()

    def label(self, outputs):
        if self.task.kind == "multiclass":
            return float(self.random.choice(self.task.classes, p=outputs))
        return float(self.random.random() < outputs[0])

    def examples(self, answers, **changed):
        return [
            msgspec.structs.replace(
                COIN, **({"label": self.label(each), "scored": scored(each)} | changed)
            )
            for each in answers
        ]

    def live(self, labelled, unlabelled, spread=1.0):
        """Rows with labels, as ever, and rows without; the alarms that a look raises."""
        self.batch, self.clock_s = self.batch + 1, self.clock_s + 60
        examples = self.examples(self.answers(labelled))
        self.expectation.take(examples, self.answers(unlabelled, spread), self.clock_s)
        return self.expectation.look(self.batch)


def scored(outputs):
    return [Scored("r1", "stable", outputs), Scored("r2", "canary", [0.5] * len(outputs))]


@pytest.mark.parametrize("task", TASKS)
def test_answers_that_are_less_sure_than_they_were_are_an_alarm_before_any_label(task):
    fleet = Fleet(1, task)
    calm = [fleet.live(600, 600) for _ in range(8)]
    before = fleet.expectation.estimate
    [alarm] = fleet.live(0, 1500, spread=0.3)
    after = fleet.expectation.estimate

    assert calm == [[]] * 8
    assert abs(before.quality - before.reached) < 0.02
    assert (alarm.source, alarm.batch, alarm.time_s) == ("estimate", 9, fleet.clock_s)
    assert alarm.found == after.quality < alarm.reach < after.reached == before.reached
    assert fleet.expectation.standing(9) == [alarm]
    assert fleet.expectation.standing(9 + Drift().calm_batches) == []


@pytest.mark.parametrize(
    "worlds", [pytest.param(30, id="few"), pytest.param(300, id="many", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("task", TASKS)
def test_a_world_that_stands_still_raises_fewer_alarms_than_its_share_of_looks(worlds, task):
    raised = []
    for seed in range(worlds):
        fleet = Fleet(100 + seed, task)
        raised += [each for _ in range(12) for each in fleet.live(250, 250)]
    print(f"{len(raised)} alarms in {worlds * 12} looks at a world that stands still")

    assert len(raised) <= 1 + 2 * Drift().delta / 6 * worlds * 12


@pytest.mark.parametrize("rows", [(ROWS_MIN - 1, ROWS), (ROWS, ROWS_MIN - 1), (0, ROWS), (ROWS, 0)])
def test_of_too_few_rows_nothing_is_expected(rows):
    fleet = Fleet(2)

    assert fleet.live(*rows, spread=0.1) == []
    found = json.loads(json.dumps(fleet.expectation.facts()))
    assert found == {"measure": "AUC", "rows": 0, "expected": None, "reached": None}


@pytest.mark.parametrize(
    ("task", "drift"),
    [
        (Task(kind="regression"), {}),
        (Task(kind="ranking", group="q"), {}),
        (Task(), {"on": False}),
    ],
)
def test_what_has_no_chances_or_is_not_watched_has_no_expectation(task, drift):
    fleet = Fleet(3, task, **drift)

    assert fleet.live(ROWS, ROWS) + fleet.live(0, ROWS, spread=0.1) == []
    assert fleet.expectation.facts()["expected"] is None


def test_early_labels_answers_of_another_shape_and_examples_without_any_are_left_out():
    fleet = Fleet(4)
    answers = fleet.answers(ROWS_MIN)
    odd = fleet.examples(answers, early=True, label=0.0)
    odd += fleet.examples(answers, scored=[]) + fleet.examples(answers, scored=scored([0.1, 0.9]))
    fleet.expectation.take(odd, [[0.1, 0.9], [], [0.2] * 7] * ROWS_MIN, 1.0)

    assert fleet.expectation.look(1) == []
    assert fleet.expectation.estimate.rows == 0
    fleet.live(ROWS_MIN, ROWS_MIN)
    assert fleet.expectation.estimate.rows == ROWS_MIN


def test_numbers_that_are_no_probabilities_are_taken_for_the_nearest():
    fleet = Fleet(5)
    fleet.live(600, 0)
    fleet.expectation.take([], [[1e300], [-1e300]] * ROWS_MIN, 1.0)
    fleet.expectation.look(2)

    assert 0.5 <= fleet.expectation.estimate.quality <= 1.0


def test_the_newest_rows_are_kept_and_no_more():
    fleet = Fleet(6)
    fleet.live(2000, 2000)
    fleet.live(0, 2 * ROWS, spread=0.3)
    for _ in range(3):
        fleet.live(ROWS // 2, ROWS // 2)

    assert fleet.expectation.estimate.rows == ROWS
    assert abs(fleet.expectation.estimate.quality - fleet.expectation.estimate.reached) < 0.02
