"""Replicas together: repeatable, weighed before they learn; one that hurts is not heard."""

from __future__ import annotations

import copy

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from cloud_learner.stats.tasks import Task
from cloud_learner.train.dataset import Rows
from cloud_learner.train.declaration import Fast, Learning, Scratch, Stable
from cloud_learner.train.distill import Student
from cloud_learner.train.ensemble import Replicas
from cloud_learner.train.replica import answers_of

TASK = Task()
LEARNING = Learning(reservoir_rows=300, fast=Fast(window_rows=200), stable=Stable(replay_rows=100))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))


def rows(count, seed=0, flip=False):
    random = np.random.default_rng(seed)
    features = random.normal(size=(count, 2)).astype(np.float32)
    labels = (features[:, 0] > 0) != flip
    return Rows(features, labels.astype(np.float32))


def replicas(**changed):
    return Replicas(network(), TASK, msgspec.structs.replace(LEARNING, **changed), 2)


def learn(each, some, random):
    each.weigh(some)
    each.learn_fast(some, random)
    each.learn_stable(some, random)
    each.keep(some, some)


def spoil(replica, value):
    """Let a replica answer one extreme, whatever it is asked."""
    with torch.no_grad():
        for each in (replica.network, replica.average):
            each[-1].weight.zero_()
            each[-1].bias.fill_(value)


@pytest.mark.parametrize(("bad", "good"), [("fast", "stable"), ("stable", "fast")])
def test_a_replica_that_hurts_gets_weight_zero_and_is_not_heard(bad, good):
    both = replicas()
    for number in range(4):
        spoil(both.all[bad], 20.0)
        both.weigh(rows(100, seed=number))

    features = rows(20, seed=9).features
    assert both.weights == {bad: 0.0, good: 1.0}
    assert np.array_equal(both.all[good].answers(features), both.answers(features))


def test_a_row_without_a_number_is_the_largest_loss_and_spoils_no_weight():
    both = replicas()
    with torch.no_grad():
        both.stable.average[0].weight.fill_(1e38)
    wild = Rows(np.full((1, 2), 3e38, np.float32), np.ones(1, np.float32))
    assert not np.isfinite(both.stable.answers(wild.features)).all()

    both.weigh(wild)

    assert all(np.isfinite(weight) for weight in both.weights.values())
    assert np.isfinite(both.answers(rows(10).features)).all()


def test_of_rankings_the_better_order_is_heard_whatever_the_level_of_its_scores():
    task, some = Task(kind="ranking", group="query"), rows(100)
    some = msgspec.structs.replace(some, groups=np.arange(100) // 10)
    both = Replicas(nn.Linear(2, 1), task, LEARNING, 2)
    for name, slope, level in (("fast", 1.0, 50.0), ("stable", -0.1, 0.5)):
        replica = both.all[name]
        with torch.no_grad():
            for each in (replica.network, replica.average):
                each.weight.copy_(torch.tensor([[slope, 0.0]]))
                each.bias.fill_(level)

    both.weigh(some)

    assert both.weights["fast"] > both.weights["stable"]


def test_a_replica_that_recovers_gets_its_weight_back():
    both = replicas()
    kept = copy.deepcopy(both.fast.network.state_dict())
    for number in range(4):
        spoil(both.fast, 20.0)
        both.weigh(rows(100, seed=number))
    both.fast.network.load_state_dict(kept)
    for number in range(120):
        both.weigh(rows(100, seed=number))

    assert both.weights["fast"] > 0.3


def test_equal_replicas_weigh_the_same_and_answer_as_either_does():
    both = replicas()
    features = rows(20).features

    assert both.weights == {"fast": 0.5, "stable": 0.5}
    assert np.allclose(both.fast.answers(features), both.answers(features), atol=1e-6)


def test_learning_makes_both_replicas_better():
    both, random, test = replicas(), np.random.default_rng(0), rows(500, seed=99)

    def brier(replica):
        return np.mean((replica.answers(test.features)[:, 0] - test.labels) ** 2)

    fast, stable = brier(both.fast), brier(both.stable)
    for number in range(300):
        learn(both, rows(200, seed=number), random)

    assert brier(both.fast) < 0.98 * fast
    assert brier(both.stable) < 0.5 * stable


@pytest.mark.parametrize(
    "changed",
    [{}, {"fast": Fast(on=False)}, {"stable": Stable(on=False)}, {"scratch": Scratch(on=True)}],
    ids=["both", "stable alone", "fast alone", "with scratch"],
)
def test_the_same_rows_and_seed_give_the_same_bits_also_after_a_restore(changed):
    def learned(restored_at=None):
        torch.manual_seed(4)
        some, random = replicas(**changed), np.random.default_rng(0)
        for number in range(4):
            if number == restored_at:
                torch_state = torch.get_rng_state()
                state, other = some.state(), replicas(**changed)
                other.restore(state)
                torch.set_rng_state(torch_state)
                some = other
            learn(some, rows(150, seed=number), random)
            if number == 1 and "scratch" in changed:
                some.learn_from_scratch(rows(150, seed=50), random)
        return some.answers(rows(50, seed=7).features), some.weights

    torch.manual_seed(0)
    first, again, restored = learned(), learned(), learned(restored_at=2)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[0], restored[0])
    assert first[1] == again[1] == restored[1]


def test_a_replica_that_is_switched_off_is_not_there():
    alone = replicas(stable=Stable(on=False))
    learn(alone, rows(150), np.random.default_rng(0))

    assert alone.weights == {"fast": 1.0}
    assert len(alone.reservoir) == 150


def test_a_family_without_any_replica_is_refused():
    with pytest.raises(ValueError, match=r"learning\.fast\.on"):
        Learning(fast=Fast(on=False), stable=Stable(on=False))


def test_scratch_that_is_better_is_heard_at_once_and_one_that_is_worse_is_not():
    for flipped, heard in ((True, True), (False, False)):
        three, random = replicas(scratch=Scratch(on=True, passes=30)), np.random.default_rng(1)
        three.pretrain(rows(500, seed=1, flip=flipped), 40, random)  # a world that was, or is
        three.keep(rows(0), rows(400, seed=2, flip=not heard))

        three.learn_from_scratch(rows(200, seed=3), random)

        assert (three.weights["scratch"] > 0.5) is heard


def test_pretraining_lets_both_replicas_start_from_the_same_network():
    both = replicas()
    both.pretrain(rows(400), 3, np.random.default_rng(0))
    features = rows(30, seed=5).features

    assert np.array_equal(both.fast.answers(features), both.stable.answers(features))
    assert len(both.reservoir) == 300


def test_a_student_answers_as_its_teachers_do_and_never_sees_a_label():
    def student_of(labels_flipped):
        both = replicas()
        spoil(both.fast, 2.0)
        spoil(both.stable, 2.0)
        torch.manual_seed(3)
        student, random = Student(network(5), TASK, LEARNING), np.random.default_rng(0)
        for number in range(40):
            student.follow(both, rows(200, seed=number, flip=labels_flipped), random)
        return student.answers(rows(50, seed=77).features)

    answers = student_of(labels_flipped=False)
    assert np.array_equal(answers, student_of(labels_flipped=True))
    untaught = answers_of(network(5), rows(50, seed=77).features, TASK)
    assert answers.mean() > untaught.mean() + 0.01
