"""Calibration by the label age that was to be expected: it tells who believed early labels."""

from __future__ import annotations

import numpy as np
import pytest

from cloud_learner.evaluate.ages import age_groups, known_age_groups, score_groups
from cloud_learner.evaluate.gates import Evidence, Limits, Measured, judge
from cloud_learner.evaluate.offline import EvaluationSet, score
from cloud_learner.stats.tasks import Task

DAY_S = 86_400.0
LIMITS = Limits(
    static_drop_max=0.01,
    recent_drop_max=0.01,
    quality_min=0.5,
    int8_gap_max=0.001,
    calibration_min=0.7,
    calibration_max=1.4,
    recent_rows_min=300,
    variants=("float32",),
)


class Stream:
    """Bookings: one in seven is far ahead, and of those "kept" is known only at the very end.

    Whether one is cancelled does not depend on how far ahead it is: 40 % of all, more where `x` is
    large. A cancellation is known within three days.
    """

    def __init__(self, seed: int, count: int = 24_000) -> None:
        random = np.random.default_rng(seed)
        self.time_s = np.sort(random.uniform(0, 60, count)) * DAY_S
        far = random.random(count) < 0.15
        x = random.normal(size=count)
        chance = 1 / (1 + np.exp(0.5 - x))
        self.label = (random.random(count) < chance).astype(np.float32)
        lead_days = np.where(far, random.uniform(20, 40, count), random.uniform(1, 4, count))
        wait_days = np.where(self.label > 0, random.uniform(0, 1, count) * 3, lead_days)
        self.age_s = np.minimum(wait_days, lead_days) * DAY_S
        self.features = np.stack([np.log1p(lead_days), x], 1).astype(np.float32)

    def rows(self, where) -> EvaluationSet:
        return EvaluationSet(
            self.features[where],
            self.label[where],
            times_s=self.time_s[where],
            ages_s=self.age_s[where],
        )


def fitted(features, labels):
    """The answers of a logistic regression, by Newton's method, to any features."""

    def design(rows):
        return np.c_[rows, rows[:, :1] * rows[:, 1:], np.ones(len(rows))].astype(np.float64)

    x, weights = design(features), np.zeros(features.shape[1] + 2)
    for _ in range(12):
        p = 1 / (1 + np.exp(-x @ weights))
        curvature = x.T @ (x * (p * (1 - p))[:, None]) + 1e-6 * np.eye(len(weights))
        weights += np.linalg.solve(curvature, x.T @ (labels - p))
    return lambda rows: (1 / (1 + np.exp(-design(rows) @ weights)))[:, None].astype(np.float32)


def verdicts(rows, outputs):
    """What the gate says of these answers on the recent hold-out, by rule."""
    task = Task()
    scored = score(task, rows, outputs)
    measured = Measured(
        size_bytes=1,
        latency_us=1.0,
        broken_rows=0,
        static=scored,
        recent=scored,
        ages=score_groups(task, rows, outputs, age_groups(rows, ())),
        label_ages=score_groups(task, rows, outputs, known_age_groups(rows)),
    )
    found = judge(Evidence(forms={"float32": measured}), LIMITS)
    return {each.rule: each for each in found}, measured


@pytest.mark.parametrize("seed", range(3))
def test_the_gate_refuses_who_learned_labels_as_they_came_and_passes_who_waited(seed):
    stream, now_s = Stream(seed), 50 * DAY_S
    held = np.random.default_rng(seed).random(len(stream.label)) < 0.2
    mature = stream.time_s + 40 * DAY_S <= now_s
    arrived = (stream.time_s + stream.age_s <= now_s) & (stream.time_s > now_s - 20 * DAY_S)
    recent = stream.rows(mature & held)

    def answers(learned):
        return fitted(stream.features[learned & ~held], stream.label[learned & ~held])

    waited, _ = verdicts(recent, answers(mature)(recent.features))
    hasty, measured = verdicts(recent, answers(arrived)(recent.features))

    assert {rule for rule, each in waited.items() if each.outcome == "fail"} == set()
    assert {rule for rule, each in hasty.items() if each.outcome == "fail"} == {
        "calibration_by_age"
    }
    soon, _, late = (group.calibration for group in measured.ages)
    assert soon < 1.15
    assert late > 1.4
    assert hasty["calibration_by_age"].found == late


def test_groups_by_the_age_itself_condemn_even_the_truth():
    """Why they decide nothing."""
    stream = Stream(0)
    truth = (1 / (1 + np.exp(0.5 - stream.features[:, 1:]))).astype(np.float32)

    found, measured = verdicts(stream.rows(slice(None)), truth)

    assert found["calibration_by_age"].outcome == "pass"
    by_age = [group.calibration for group in measured.label_ages]
    assert by_age[0] < 0.7
    assert by_age[-1] > 1.4


def test_an_index_is_taken_for_what_its_rows_waited():
    random = np.random.default_rng(0)
    index = random.integers(0, 6, 3000)
    ages_s = np.array([9.0, 1.0, 500.0, 3.0, 40.0, 0.1])[index] * random.uniform(0.9, 1.1, 3000)
    rows = EvaluationSet(
        index[:, None].astype(np.float32), np.zeros(3000, np.float32), ages_s=ages_s
    )

    soon, later, last = (set(index[where].tolist()) for where in age_groups(rows, [0]))

    assert (soon, later, last) == ({1, 5}, {0, 3}, {2, 4})


def test_every_row_of_a_known_age_is_in_one_group():
    stream = Stream(0, 999)
    stream.age_s[:99] = np.nan
    groups = age_groups(stream.rows(slice(None)), ())

    assert sum(groups).tolist() == [0] * 99 + [1] * 900


@pytest.mark.parametrize("count", [0, 1, 2, 50])
@pytest.mark.parametrize("age_s", [5.0, np.nan, -3.0])
def test_ages_that_do_not_differ_make_one_group_or_none(count, age_s):
    rows = EvaluationSet(
        np.ones((count, 2), np.float32), np.ones(count, np.float32), ages_s=np.full(count, age_s)
    )

    groups = [where.sum() for where in age_groups(rows, [0])]

    assert sum(groups) == (0 if np.isnan(age_s) else count)
    assert len(groups) <= 1
