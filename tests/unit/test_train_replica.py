"""A replica: what one step does, for every task, and what it can never do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cloud_learner.stats.tasks import Task
from cloud_learner.train.dataset import Rows
from cloud_learner.train.declaration import Steps
from cloud_learner.train.hidden import embeddings_of
from cloud_learner.train.losses import hard_loss
from cloud_learner.train.replica import AVERAGE_KEEP, Replica

TASKS = {
    "binary": Task(),
    "multiclass": Task(kind="multiclass", classes=3),
    "regression": Task(kind="regression", scale=2.0),
    "ranking": Task(kind="ranking", group="query"),
}


def network(outputs=1, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, outputs))


def rows(count, kind="binary", seed=0):
    """Labels that two features tell; of ranking, within groups of five."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(count, 2)).astype(np.float32)
    groups = np.arange(count) // 5
    truth = {
        "binary": features[:, 0] > 0,
        "multiclass": np.digitize(features[:, 0], [-0.5, 0.5]),
        "regression": 3 * features[:, 0] - features[:, 1],
        "ranking": np.digitize(features[:, 0] + groups % 7 * 0.0, [0.0, 1.0]),
    }
    return Rows(features, truth[kind].astype(np.float32), groups=groups.astype(np.int64))


def values(parameters):
    return [p.detach().clone() for p in parameters]


def moved(replica, start):
    return sum(
        float((p - s).abs().sum()) for p, s in zip(values(replica.parameters()), start, strict=True)
    )


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_is_learned(kind):
    task, random = TASKS[kind], np.random.default_rng(0)
    replica = Replica(network(task.outputs), task, 1e-2)
    test = rows(500, kind, seed=9)
    before = task.quality(test.labels, replica.answers(test.features), test.groups)

    for number in range(30):
        replica.train(rows(500, kind, seed=number), random)

    after = task.quality(test.labels, replica.answers(test.features), test.groups)
    assert after > max(before, 0.85), (before, after)


@pytest.mark.parametrize("kind", TASKS)
def test_a_replica_follows_the_answers_of_another(kind):
    task, random = TASKS[kind], np.random.default_rng(0)
    teacher = Replica(network(task.outputs, seed=4), task, 1e-2)
    student = Replica(network(task.outputs, seed=5), task, 1e-2)
    for number in range(40):
        features = rows(500, kind, seed=number).features
        student.follow(features, teacher.answers(features), random)

    test = rows(200, kind, seed=99).features
    assert np.abs(student.answers(test) - teacher.answers(test)).mean() < 0.03


def test_a_row_of_weight_zero_teaches_nothing_and_a_larger_weight_more():
    some = rows(100)

    def gradient(weights):
        torch.manual_seed(0)
        replica = Replica(network(), TASKS["binary"], 1e-3)
        replica.step(Rows(some.features, some.labels, np.array(weights, np.float32)))
        return replica.network[0].weight.grad

    half = [1.0] * 50 + [0.0] * 50
    other = some.take(np.arange(50))
    torch.manual_seed(0)
    alone = Replica(network(), TASKS["binary"], 1e-3)
    alone.step(other)

    assert torch.allclose(2 * gradient(half), alone.network[0].weight.grad, atol=1e-6)
    assert torch.allclose(3 * gradient([1.0] * 100), gradient([3.0] * 100), atol=1e-6)


def test_a_row_of_weight_zero_pulls_in_no_task_neither_from_above_nor_from_below():
    for kind, task in TASKS.items():
        some = rows(100, kind)
        weights = torch.tensor([1.0, 0.0] * 50)
        logits = torch.zeros((100, task.outputs), requires_grad=True)

        labels, groups = torch.from_numpy(some.labels), torch.from_numpy(some.groups)
        hard_loss(task, logits, labels, weights, groups).backward()

        assert not logits.grad[1::2].any(), kind
        assert logits.grad[::2].any(), kind


def test_rows_without_an_anchor_are_pulled_by_their_label_alone():
    some = rows(100)
    unknown = np.full((100, 1), np.nan, np.float32)

    def after(anchors, keep):
        torch.manual_seed(0)
        replica = Replica(network(), TASKS["binary"], 1e-3)
        replica.step(some, anchors, keep)
        return replica.answers(some.features)

    assert np.array_equal(after(None, 0.0), after(unknown, 1.0))
    assert not np.array_equal(after(None, 0.0), after(np.zeros_like(unknown), 1.0))


def test_a_gradient_is_clipped_before_it_moves_anything():
    wild = Rows(rows(50).features * 1e6, rows(50).labels)
    replica = Replica(network(), TASKS["binary"], 1e-3, gradient_norm_max=1.0)

    replica.step(wild)

    norms = [float(p.grad.norm()) ** 2 for p in replica.network.parameters()]
    assert sum(norms) ** 0.5 <= 1.0 + 1e-5


def test_the_moving_average_follows_buffers_too():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    replica = Replica(layers, TASKS["binary"], 1e-3, averaged=True)
    some = rows(100)
    replica.step(Rows(some.features + 5, some.labels))

    assert torch.equal(replica.network[0].running_mean, replica.average[0].running_mean)


def test_an_average_follows_closely_at_first_and_moves_less_later():
    def share_of_a_step(after):
        replica = Replica(network(), TASKS["binary"], 1e-2, averaged=True)
        for seed in range(after):
            replica.step(rows(100, seed=seed))
        replica.start_from(replica.network.state_dict())
        start = values(replica.network.parameters())
        replica.step(rows(100, seed=999))
        return moved(replica.average, start) / moved(replica.network, start)

    assert share_of_a_step(0) > 0.5
    assert share_of_a_step(400) == pytest.approx(1 - AVERAGE_KEEP, rel=0.01)


def test_a_fork_goes_its_own_way():
    replica = Replica(network(), TASKS["binary"], 1e-2)
    replica.step(rows(100))
    start = values(replica.network.parameters())
    fork = replica.fork()
    fork.step(rows(100, seed=1))

    assert moved(replica.network, start) == 0 < moved(fork.network, start)


def test_every_row_of_every_pass_is_counted():
    replica, random = Replica(network(), TASKS["binary"], 1e-2), np.random.default_rng(0)
    replica.train(rows(Steps().rows + 7), random)
    replica.follow(rows(30).features, replica.answers(rows(30).features), random)

    assert replica.sample_passes == Steps().rows + 37


def test_a_weight_that_is_no_number_is_seen():
    replica = Replica(network(), TASKS["binary"], 1e-2)
    assert replica.is_finite
    with torch.no_grad():
        replica.network[0].bias[3] = float("nan")

    assert not replica.is_finite


class Parts(nn.Module):
    """A body and a head that learns ten times as fast."""

    rates = {"head": 10.0}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(2, 8), nn.Linear(8, 1)

    def forward(self, features):
        return self.head(torch.relu(self.body(features)))


def largest_move(part, start):
    now = values(part.parameters())
    return max(float((n - s).abs().max()) for n, s in zip(now, start, strict=True))


def test_a_part_learns_at_a_rate_of_its_own():
    replica = Replica(Parts(), TASKS["binary"], 1e-3)
    body, head = (values(part.parameters()) for part in replica.network.children())
    replica.step(rows(100))

    assert largest_move(replica.network.body, body) == pytest.approx(1e-3, rel=0.1)
    assert largest_move(replica.network.head, head) == pytest.approx(1e-2, rel=0.1)


def test_first_steps_grow_to_the_full_rate():
    replica, moves = Replica(network(), TASKS["binary"], 1e-3, steps=Steps(warmup=3)), []
    for number in range(6):
        start = values(replica.network.parameters())
        replica.step(rows(200, seed=number))
        moves.append(largest_move(replica.network, start))

    assert moves[0] == pytest.approx(0.25e-3, rel=0.1)
    assert moves[0] < moves[1] < moves[2] < moves[3]
    assert moves[3] < 1.2e-3


def test_a_fork_is_as_warm_as_what_it_was_forked_from():
    replica = Replica(network(), TASKS["binary"], 1e-3, steps=Steps(warmup=3))
    for number in range(5):
        replica.step(rows(200, seed=number))
    fork = replica.fork()
    for each in (replica, fork):
        each.step(rows(200, seed=9))

    same = zip(replica.network.parameters(), fork.network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in same)


class Misnamed(nn.Module):
    """A network whose layers are called as what a class may say of itself."""

    def __init__(self):
        super().__init__()
        self.rates, self.lengths = nn.Linear(2, 8), nn.Linear(8, 1)

    def forward(self, features):
        return self.lengths(torch.relu(self.rates(features)))


def test_layers_may_have_any_names():
    replica = Replica(Misnamed(), TASKS["binary"], 1e-3)
    replica.train(rows(100), np.random.default_rng(0))

    assert replica.answers(rows(5).features).shape == (5, 1)


def test_one_look_gives_answers_and_embeddings():
    replica = Replica(network(), TASKS["binary"], 1e-3, averaged=True)
    replica.step(rows(100))
    features = rows(150, seed=2).features
    answers, embeddings = replica.look(features)

    assert np.array_equal(answers, replica.answers(features))
    assert np.array_equal(embeddings, embeddings_of(replica.average, features))


def test_a_replica_follows_an_embedding_as_well():
    task, random = TASKS["binary"], np.random.default_rng(0)
    features = rows(400).features
    gaps = {}
    for pull in (0.0, 5.0):
        leader, follower = (
            Replica(network(seed=4), task, 1e-2),
            Replica(network(seed=5), task, 1e-2),
        )
        wanted = embeddings_of(leader.network, features)
        for _ in range(60):
            follower.follow(features, leader.answers(features), random, wanted, pull)
        gaps[pull] = float(np.abs(embeddings_of(follower.network, features) - wanted).mean())

    assert gaps[5.0] < 0.5 * gaps[0.0]
