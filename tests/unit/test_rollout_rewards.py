"""The ledger of a contest: which examples count, and what they say that each arm earned."""

from __future__ import annotations

import msgspec
import pytest

from cloud_learner.rollout.rewards import PLANS_MAX, Ledger, Tally
from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from edge_runtime.wire.messages import Scored

BINARY = Task()


def ledger(outcome="reward", task=BINARY, shares=(0.75, 0.25)) -> Ledger:
    made = Ledger(family="ads", outcome=outcome, task=task, arms=[Tally("r1"), Tally("r2")])
    made.plan(shares)
    return made


def example(answering="r1", propensity=0.75, label=1.0, **more):
    other = "r2" if answering == "r1" else "r1"
    fields = {
        "device": "d",
        "epoch": 1,
        "seq": 1,
        "family": "ads",
        "time_s": 1.0,
        "label_time_s": 2.0,
        "features": b"",
        "spec": "",
        "label": label,
        "propensity": propensity,
        "scored": [Scored(answering, "", [0.4]), Scored(other, "", [0.9])],
        "arrived_s": 0.0,
        "matured_s": 0.0,
    }
    return Example(**{**fields, **more})


def test_a_reward_counts_for_the_arm_that_answered_divided_by_its_propensity():
    found = ledger()
    earned = found.take(example("r2", 0.25, 1.0))
    assert earned == (1, 1.0, (0.5, 0.5 + (1.0 - 0.5) / 0.25))
    earned = found.take(example("r1", 0.75, 0.0))
    base = (1.0 + 0.5) / 2
    assert earned == (0, 0.0, (base - base / 0.75, base))
    assert [(arm.answered, arm.reward_sum) for arm in found.arms] == [(1, 0.0), (1, 1.0)]


def test_the_estimate_of_each_arm_is_its_mean_whatever_its_share():
    """Over both draws, weighted as they fall, an arm's estimate is what it would have earned."""
    truth = {"r1": 0.0, "r2": 1.0}
    both = [(0.75, "r1"), (0.25, "r2")]
    each = [ledger().take(example(name, share, truth[name])).estimates for share, name in both]
    for arm, name in enumerate(("r1", "r2")):
        mean = sum(share * found[arm] for (share, _), found in zip(both, each, strict=True))
        assert mean == pytest.approx(truth[name])


def test_quality_is_known_of_both_arms_whoever_answered():
    one, other = ledger("quality"), ledger("quality")
    told = one.take(example("r1", 0.75, 1.0))
    assert told.estimates == pytest.approx((1 - 0.36, 1 - 0.01))
    assert told.reward == pytest.approx(1 - 0.36)
    swapped = example("r2", 0.25, 1.0, scored=[Scored("r2", "", [0.9]), Scored("r1", "", [0.4])])
    assert other.take(swapped).estimates == told.estimates


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"family": "other"}, "other_arms"),
        ({"scored": [Scored("r1", "", [0.4])]}, "other_arms"),
        ({"scored": [Scored("r1", "", [0.4]), Scored("r3", "", [0.4])]}, "other_arms"),
        ({"early": True}, "early"),
        ({"propensity": 0.8}, "other_plan"),
        ({"propensity": 1e-9}, "other_plan"),
        ({"propensity": float("nan")}, "other_plan"),
        ({"label": 2.0}, "unusable"),
        ({"label": float("nan")}, "unusable"),
    ],
)
def test_what_does_not_count_is_told_by_its_reason(change, reason):
    found = ledger()
    assert found.take(example(**change)) is None
    facts = found.statistics()
    names = ("other_arms", "other_plan", "early", "unusable")
    assert {name: facts[name] for name in names if facts[name]} == {reason: 1}
    assert found.answered == 0


def test_an_answer_that_is_no_probability_has_no_quality():
    found = ledger("quality")
    bad = [Scored("r1", "", [float("nan")]), Scored("r2", "", [0.4])]
    assert found.take(example(scored=bad)) is None
    assert found.unusable == 1


def test_answers_given_under_an_earlier_plan_of_the_contest_count():
    found = ledger(shares=(0.5, 0.5))
    found.plan((0.9, 0.1))
    assert found.take(example("r2", 0.5)) is not None
    assert found.take(example("r2", 0.1)) is not None
    assert found.take(example("r1", 0.1)) is None  # of the other arm
    for _ in range(PLANS_MAX):
        found.plan((0.8, 0.2))
    assert found.take(example("r2", 0.1)) is None


@pytest.mark.parametrize(
    ("task", "label", "reward"),
    [
        (Task(), 0.3, 0.3),
        (Task(kind="regression", scale=60.0), 15.0, 0.25),
        (Task(kind="regression", scale=60.0), 90.0, 1.0),
        (Task(kind="regression", scale=60.0), -5.0, 0.0),
        (Task(kind="ranking", group="query", scale=4.0), 3.0, 0.75),
    ],
)
def test_the_task_says_how_a_label_becomes_a_bounded_reward(task, label, reward):
    assert ledger(task=task).take(example(label=label)).reward == reward


def test_a_ledger_that_was_stored_goes_on():
    whole, first = ledger(), ledger()
    examples = [example("r2", 0.25, 1.0), example("r1", 0.75, 0.0), example("r1", 0.75, 1.0)]
    told = [whole.take(each) for each in examples]
    first.take(examples[0])
    again = msgspec.json.decode(msgspec.json.encode(first), type=Ledger)
    assert [again.take(each) for each in examples[1:]] == told[1:]
    assert again == whole
