"""Evidence: which examples compare the two arms of a canary, and what the numbers then are."""

from __future__ import annotations

import math

import msgspec
import pytest

from cloud_learner.rollout.evidence import ArmTally, PairEvidence, TrialEvidence
from cloud_learner.stats.sequential import PairedTest
from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from edge_runtime.wire.messages import ArmReport, Report, Scored


def add(evidence, examples):
    for each in examples:
        evidence.count(each)


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


def report(device, number, *, answered=0, failed=0, stable_answered=0, stable_failed=0):
    arms = [
        ArmReport("flight_delay", "stable", "r1", 0.0, "", 0.0, stable_answered, stable_failed),
        ArmReport("flight_delay", "canary", "r2", 0.0, "", 0.0, answered, failed),
    ]
    return Report(1, device, 1, float(number), {}, arms, 2, {}, {}, [], 0, 0, number=number)


def test_a_pair_counts_as_the_difference_of_squared_errors_new_minus_old():
    evidence = new_evidence()
    add(evidence, [pair(1, old=0.4, new=0.6, label=1.0), pair(2, old=0.1, new=0.3, label=0.0)])
    assert evidence.pairs == 2
    assert evidence.test.difference_sum == pytest.approx((0.16 - 0.36) + (0.09 - 0.01))
    assert evidence.statistics()["stable_loss"] == pytest.approx((0.36 + 0.01) / 2)
    assert evidence.statistics()["canary_loss"] == pytest.approx((0.16 + 0.09) / 2)


def test_the_order_of_the_arms_says_who_answered_and_changes_no_difference():
    one, other = new_evidence(), new_evidence()
    add(one, [example(1, [("r1", [0.4]), ("r2", [0.9])])])
    add(other, [example(1, [("r2", [0.9]), ("r1", [0.4])])])
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
    add(evidence, [example(1, scored)])
    assert (evidence.pairs, evidence.other_pair) == (0, 1)


def test_an_example_of_another_family_is_no_evidence():
    evidence = new_evidence()
    add(evidence, [pair(1, family="fraud")])
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
    add(evidence, [pair(1, **numbers)])
    assert evidence.test.verdict == "hold"
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
    add(evidence, [example(1, [("r1", old), ("r2", new)], label=label)])
    assert evidence.test.difference_sum == pytest.approx(difference, abs=1e-6)


@pytest.mark.parametrize(
    ("label", "new"),
    [(3.0, [0.2, 0.2, 0.6]), (0.5, [0.2, 0.2, 0.6]), (1.0, [0.4, 0.6]), (1.0, [0.2, 0.2, 1.6])],
)
def test_what_is_no_answer_or_label_of_three_classes_decides_nothing(label, new):
    evidence = new_evidence()
    evidence.task = Task(kind="multiclass", classes=3)
    add(evidence, [example(1, [("r1", [0.2, 0.2, 0.6]), ("r2", new)], label=label)])
    assert (evidence.pairs, evidence.unusable) == (0, 1)


def test_an_example_that_is_handed_over_twice_counts_once():
    evidence = new_evidence()
    batch = [pair(1), pair(2), pair(3)]
    add(evidence, batch)
    add(evidence, [*batch, pair(4)])
    assert (evidence.pairs, evidence.repeated) == (4, 3)


def test_devices_are_ordered_each_by_itself_and_counted_apart():
    evidence = new_evidence()
    add(evidence, [pair(9, device="EWR"), pair(2, device="JFK"), pair(3, device="JFK")])
    assert evidence.test.devices == {"EWR": 1, "JFK": 2}


def test_a_later_epoch_at_the_same_event_time_is_another_example():
    evidence = new_evidence()
    add(evidence, [pair(7, time_s=5.0, epoch=1), pair(1, time_s=5.0, epoch=2)])
    assert evidence.pairs == 2


def test_stored_evidence_goes_on_where_it_stopped():
    whole, first = new_evidence(), new_evidence()
    examples = [pair(seq, old=0.4, new=0.41, label=seq % 2) for seq in range(1, 101)]
    add(whole, examples)
    add(first, examples[:40])
    again = msgspec.json.decode(msgspec.json.encode(first), type=PairEvidence)
    add(again, examples[30:])
    assert again.repeated == 10
    again.repeated = 0
    assert whole == again


# The whole evidence of a trial: labels and reports.


def new_trial(**more) -> TrialEvidence:
    rules = {"margin": 0.0025, "alpha_promote": 0.02, "alpha_stop": 0.01} | more
    return TrialEvidence.start("flight_delay", "r1", "r2", Task(), **rules)


def varied(count, *, gain=0.0, start=1, devices=1):
    """Pairs whose labels and answers vary; the canary is better by `gain`, give or take."""
    return [
        pair(
            seq,
            old=0.2 + 0.01 * (seq % 7),
            new=0.2 + 0.01 * (seq % 5) + (gain if seq % 4 == 0 else -gain),
            label=float(seq % 4 == 0),
            device=f"device-{seq % devices}",
        )
        for seq in range(start, start + count)
    ]


def test_a_canary_that_is_not_worse_is_found_so_and_harm_is_watched_on():
    trial = new_trial()
    assert trial.examples(varied(4000))
    assert (trial.not_worse, trial.harm, trial.pairs) == (True, "", 4000)
    trial.examples(varied(4000, gain=-0.15, start=5000))
    assert (trial.not_worse, trial.harm) == (True, "quality")
    assert trial.statistics()["verdict"] == "stop"


@pytest.mark.parametrize(
    "stream",
    [
        [],
        [pair(seq, old=0.2 + 0.01 * (seq % 7), new=0.2, label=0.0) for seq in range(1, 5000)],
        [pair(seq, old=0.9, new=0.2 + 0.1 * (seq % 7), label=1.0) for seq in range(1, 5000)],
        [pair(seq, old=0.3, new=0.25, label=float(seq % 4 == 0)) for seq in range(1, 5000)],
        [
            pair(seq, old=0.01 * (seq % 50), new=0.01 * (seq % 50), label=float(seq % 4 == 0))
            for seq in range(1, 5000)
        ],
        [pair(seq, new=math.nan, label=float(seq % 4 == 0)) for seq in range(1, 5000)],
    ],
    ids=["nothing", "labels all 0", "labels all 1", "constant", "identical", "NaN"],
)
def test_streams_that_cannot_tell_one_release_from_the_other_hold(stream):
    trial = new_trial()
    trial.examples(stream)
    assert (trial.not_worse, trial.harm) == (False, "")


def test_what_is_handed_over_twice_counts_once_in_the_whole_evidence_too():
    trial = new_trial()
    assert trial.examples(varied(10))
    assert not trial.examples(varied(10))
    assert (trial.pairs, trial.quality.repeated) == (10, 10)


def test_alpha_is_spent_over_both_tests():
    trial = new_trial(alpha_stop=0.01)
    assert trial.quality.test.alpha_stop + trial.health.failures.alpha == pytest.approx(0.01)


def test_failures_stop_a_release_that_labels_like():
    trial = new_trial()
    trial.examples(varied(4000))
    for number in range(12):
        counts = {"answered": 20 * number, "failed": 2 * number, "stable_answered": 80 * number}
        trial.report(report("EWR", number, **counts))
    assert (trial.not_worse, trial.harm) == (True, "failures")
    assert trial.statistics()["failed"] == 22
    assert (trial.devices, trial.answered) == (1, 220)


def test_the_effect_has_an_interval_for_people():
    trial = new_trial()
    trial.examples(varied(3000, gain=0.05))
    facts = trial.statistics()
    assert facts["difference_low"] < facts["mean_difference"] < facts["difference_high"] < 0


def test_gates_say_what_each_needs_to_act():
    gates = new_trial().gates()
    assert [gate["gate"] for gate in gates] == ["not_worse", "harm", "failures"]
    assert [gate["then"] for gate in gates] == ["advance", "roll back", "roll back"]
    assert all(gate["value"] == pytest.approx(1.0) for gate in gates)
    assert [round(gate["reach"]) for gate in gates] == [50, 1000, 111]


def test_a_trial_that_was_stored_goes_on_where_it_stopped():
    whole, first = new_trial(), new_trial()
    examples = varied(300, devices=60)
    reports = [
        report(f"device-{at % 60}", at // 60, answered=at, failed=at // 70, stable_answered=2 * at)
        for at in range(400)
    ]
    whole.examples(examples)
    first.examples(examples[:100])
    for each in reports:
        whole.report(each)
    for each in reports[:150]:
        first.report(each)
    again = msgspec.json.decode(msgspec.json.encode(first), type=TrialEvidence)
    again.examples(examples[100:])
    for each in reports[150:]:
        again.report(each)
    again.quality.test.look_at = whole.quality.test.look_at
    assert whole.health == again.health
    assert whole.statistics() == again.statistics()
    assert all(isinstance(value, float | int | str) for value in whole.statistics().values())
    msgspec.json.encode(whole.statistics())
