"""Replicas and student: repeatable, weighed before they learn; one that hurts is not heard."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cloud_learner.train.dataset import Reservoir, Rows
from cloud_learner.train.distill import Student
from cloud_learner.train.replica import CHUNK_ROWS, Replica, Replicas, chunks, probabilities


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))


def rows(count, seed=0, flip=False):
    random = np.random.default_rng(seed)
    features = random.normal(size=(count, 2)).astype(np.float32)
    labels = (features[:, 0] > 0) != flip
    return Rows(features, labels.astype(np.float32))


def replicas(recent_rows=200):
    return Replicas(network(), Reservoir(300, 2, 1), replay_rows=100, recent_rows=recent_rows)


def spoil(replica, value):
    """Let a replica answer one extreme, whatever it is asked."""
    with torch.no_grad():
        for each in (replica.network, replica.average):
            each[-1].weight.zero_()
            each[-1].bias.fill_(value)


def values(parameters):
    return [p.detach().clone() for p in parameters]


def test_every_row_is_in_exactly_one_chunk():
    found = chunks(2 * CHUNK_ROWS + 7, np.random.default_rng(0))

    assert [len(each) for each in found] == [CHUNK_ROWS, CHUNK_ROWS, 7]
    assert sorted(np.concatenate(found)) == list(range(2 * CHUNK_ROWS + 7))


@pytest.mark.parametrize(("bad", "weights"), [("fast", (0.0, 1.0)), ("stable", (1.0, 0.0))])
def test_a_replica_that_hurts_gets_weight_zero_and_is_not_heard(bad, weights):
    both = replicas()
    for number in range(4):
        spoil(getattr(both, bad), 20.0)
        both._weigh(rows(100, seed=number))

    good = both.stable if bad == "fast" else both.fast
    features = rows(20, seed=9).features
    assert both.weights == weights
    assert np.array_equal(good.answers(features), both.answers(features))


def test_a_replica_that_recovers_gets_its_weight_back():
    both = replicas()
    kept = both.fast.state()["network"]
    kept = {name: value.clone() for name, value in kept.items()}
    for number in range(4):
        spoil(both.fast, 20.0)
        both._weigh(rows(100, seed=number))
    both.fast.network.load_state_dict(kept)
    for number in range(120):
        both._weigh(rows(100, seed=number))

    assert both.weights[0] > 0.3


def test_equal_replicas_weigh_the_same_and_answer_as_either_does():
    both = replicas()
    features = rows(20).features

    assert both.weights == (0.5, 0.5)
    assert np.allclose(both.fast.answers(features), both.answers(features), atol=1e-6)


def test_rows_are_weighed_on_before_they_are_learned():
    both, weighed_only = replicas(), replicas()
    spoil(both.fast, 1.0)
    spoil(weighed_only.fast, 1.0)
    weighed_only._weigh(rows(200))

    both.learn(rows(200), np.random.default_rng(0))

    assert weighed_only.weights == both.weights


def test_learning_makes_both_replicas_better():
    both, random, test = replicas(), np.random.default_rng(0), rows(500, seed=99)

    def brier(replica):
        return np.mean((replica.answers(test.features) - test.labels) ** 2)

    fast, stable = brier(both.fast), brier(both.stable)
    for number in range(300):
        both.learn(rows(200, seed=number), random)

    assert brier(both.fast) < 0.98 * fast
    assert brier(both.stable) < 0.5 * stable


def test_the_same_rows_and_seed_give_the_same_bits_also_after_a_restore():
    def learned(restored_at=None):
        torch.manual_seed(4)
        both, random = replicas(), np.random.default_rng(0)
        for number in range(4):
            if number == restored_at:
                torch_state = torch.get_rng_state()
                state, other = both.state(), replicas()
                other.restore(state)
                torch.set_rng_state(torch_state)
                both = other
            both.learn(rows(150, seed=number), random)
        return both.answers(rows(50, seed=7).features), both.weights

    torch.manual_seed(0)
    first, again, restored = learned(), learned(), learned(restored_at=2)
    assert np.array_equal(first[0], again[0])
    assert first[1] == again[1] == restored[1]


def test_the_moving_average_follows_buffers_too():
    torch.manual_seed(0)
    replica = Replica(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)), 1e-3, averaged=True)
    some = rows(100)
    replica.step(torch.from_numpy(some.features) + 5, torch.from_numpy(some.labels))

    assert torch.equal(replica.network[0].running_mean, replica.average[0].running_mean)


def test_an_average_moves_less_than_its_network():
    torch.manual_seed(0)
    replica = Replica(network(), 1e-2, averaged=True)
    start, some = values(replica.network.parameters()), rows(100)
    replica.step(torch.from_numpy(some.features), torch.from_numpy(some.labels))

    moved = [
        sum(
            float((p - s).abs().sum())
            for p, s in zip(values(each.parameters()), start, strict=True)
        )
        for each in (replica.network, replica.average)
    ]
    assert 0 < moved[1] < 0.1 * moved[0]


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
        student, random = Student(network(5)), np.random.default_rng(0)
        for number in range(40):
            student.follow(both, rows(200, seed=number, flip=labels_flipped), 0, random)
        return probabilities(student.network, rows(50, seed=77).features)

    answers = student_of(labels_flipped=False)
    assert np.array_equal(answers, student_of(labels_flipped=True))
    assert answers.mean() > probabilities(network(5), rows(50, seed=77).features).mean() + 0.01
