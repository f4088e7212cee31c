"""Evidence: which examples compare the two arms of a canary, and what the numbers then are."""

from __future__ import annotations

import math

import msgspec
import pytest

from cloud_learner.rollout.evidence import ArmTally, PairEvidence
from cloud_learner.stats.sequential import PairedTest
from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from edge_runtime.wire.messages import Scored


def new_evidence() -> PairEvidence:
    return PairEvidence(
        family="flight_delay",
        stable=ArmTally("r1"),
        canary=ArmTally("r2"),
        test=PairedTest.start(0.0025, 0.02, 0.01),
    )


def example(seq, scored, *, label=1.0, device="EWR", time_s=None, family="flight_delay", epoch=1):
    return Example(
        device=device,
        epoch=epoch,
        seq=seq,
        family=family,
        time_s=float(seq) if time_s is None else time_s,
        label_time_s=0.0,
        features=b"",
        spec="",
        label=label,
        propensity=0.5,
        scored=[Scored(release, "", outputs) for release, outputs in scored],
        arrived_s=0.0,
        matured_s=0.0,
    )


def pair(seq, old=0.4, new=0.6, **more):
    return example(seq, [("r1", [old]), ("r2", [new])], **more)


def test_a_pair_counts_as_the_difference_of_squared_errors_new_minus_old():
    evidence = new_evidence()
    evidence.add([pair(1, old=0.4, new=0.6, label=1.0), pair(2, old=0.1, new=0.3, label=0.0)])
    assert evidence.pairs == 2
    assert evidence.test.difference_sum == pytest.approx((0.16 - 0.36) + (0.09 - 0.01))
    assert evidence.statistics()["stable_loss"] == pytest.approx((0.36 + 0.01) / 2)
    assert evidence.statistics()["canary_loss"] == pytest.approx((0.16 + 0.09) / 2)


def test_the_order_of_the_arms_says_who_answered_and_changes_no_difference():
    one, other = new_evidence(), new_evidence()
    one.add([example(1, [("r1", [0.4]), ("r2", [0.9])])])
    other.add([example(1, [("r2", [0.9]), ("r1", [0.4])])])
    assert one.test == other.test
    assert (one.stable.answered, one.canary.answered) == (1, 0)
    assert (other.stable.answered, other.canary.answered) == (0, 1)


@pytest.mark.parametrize(
    "scored",
    [
        [("r1", [0.4])],
        [("r2", [0.4])],
        [],
        [("r1", [0.4]), ("r3", [0.4])],
        [("r0", [0.4]), ("r2", [0.4])],
        [("r1", [0.4]), ("r1", [0.4])],
        [("r1", [0.4]), ("r2", [])],
        [("r1", [0.4]), ("r2", [0.4]), ("r3", [0.4])],
    ],
)
def test_an_example_not_scored_by_exactly_both_arms_is_no_evidence(scored):
    evidence = new_evidence()
    evidence.add([example(1, scored)])
    assert (evidence.pairs, evidence.other_pair) == (0, 1)


def test_an_example_of_another_family_is_no_evidence():
    evidence = new_evidence()
    evidence.add([pair(1, family="fraud")])
    assert (evidence.pairs, evidence.other_pair) == (0, 1)


@pytest.mark.parametrize(
    "numbers",
    [
        {"new": math.nan},
        {"old": math.inf},
        {"new": 1.5},
        {"old": -0.1},
        {"label": math.nan},
        {"label": 2.0},
    ],
    ids=str,
)
def test_numbers_that_are_no_probabilities_are_counted_and_decide_nothing(numbers):
    evidence = new_evidence()
    assert evidence.add([pair(1, **numbers)]) == "hold"
    assert (evidence.pairs, evidence.unusable) == (0, 1)


@pytest.mark.parametrize(
    ("task", "label", "old", "new", "difference"),
    [
        (Task(kind="multiclass", classes=3), 2.0, [0.2, 0.2, 0.6], [0.0, 0.0, 1.0], -0.12),
        (Task(kind="regression", scale=10.0), 40.0, [45.0], [42.0], 0.04 - 0.25),
        (Task(kind="ranking", group="query", scale=2.0), 1.0, [1.0], [3.0], 1.0),
        (Task(kind="regression", scale=1.0), 0.0, [0.0], [1e6], 1.0),  # a full miss, no more
    ],
)
def test_each_task_is_compared_by_its_own_bounded_loss(task, label, old, new, difference):
    evidence = new_evidence()
    evidence.task = task
    evidence.add([example(1, [("r1", old), ("r2", new)], label=label)])
    assert evidence.test.difference_sum == pytest.approx(difference, abs=1e-6)


@pytest.mark.parametrize(
    ("label", "new"),
    [(3.0, [0.2, 0.2, 0.6]), (0.5, [0.2, 0.2, 0.6]), (1.0, [0.4, 0.6]), (1.0, [0.2, 0.2, 1.6])],
)
def test_what_is_no_answer_or_label_of_three_classes_decides_nothing(label, new):
    evidence = new_evidence()
    evidence.task = Task(kind="multiclass", classes=3)
    evidence.add([example(1, [("r1", [0.2, 0.2, 0.6]), ("r2", new)], label=label)])
    assert (evidence.pairs, evidence.unusable) == (0, 1)


def test_an_example_that_is_handed_over_twice_counts_once():
    evidence = new_evidence()
    batch = [pair(1), pair(2), pair(3)]
    evidence.add(batch)
    evidence.add([*batch, pair(4)])
    assert (evidence.pairs, evidence.repeated) == (4, 3)


def test_devices_are_ordered_each_by_itself_and_counted_apart():
    evidence = new_evidence()
    evidence.add([pair(9, device="EWR"), pair(2, device="JFK"), pair(3, device="JFK")])
    assert evidence.devices == {"EWR": 1, "JFK": 2}


def test_a_later_epoch_at_the_same_event_time_is_another_example():
    evidence = new_evidence()
    evidence.add([pair(7, time_s=5.0, epoch=1), pair(1, time_s=5.0, epoch=2)])
    assert evidence.pairs == 2


def test_what_follows_the_verdict_is_not_counted_however_it_is_grouped():
    examples = [pair(seq, old=0.9, new=0.1) for seq in range(1, 200)]
    at_once, one_by_one = new_evidence(), new_evidence()
    assert at_once.add(examples) == "stop"
    for each in examples:
        one_by_one.add([each])
    assert at_once == one_by_one
    assert at_once.pairs < 60


def test_stored_evidence_goes_on_where_it_stopped():
    whole, first = new_evidence(), new_evidence()
    examples = [pair(seq, old=0.4, new=0.41, label=seq % 2) for seq in range(1, 101)]
    whole.add(examples)
    first.add(examples[:40])
    again = msgspec.json.decode(msgspec.json.encode(first), type=PairEvidence)
    again.add(examples[30:])
    assert again.repeated == 10
    again.repeated = 0
    assert whole == again
