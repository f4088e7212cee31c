"""Recurring concepts are recalled, not relearned, and only where they fit beyond noise."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from cloud_learner.stats.tasks import Task
from cloud_learner.train.concepts import Concepts, is_better
from cloud_learner.train.dataset import Rows

ROWS, TASK = 200, Task()


def answers(network, features, _task):
    with torch.inference_mode():
        found = torch.sigmoid(network(torch.from_numpy(features)))
    return found.numpy()


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))


class Stream:
    """Two worlds with labels of their own; a network learns each micro-batch after its loss."""

    def __init__(self, count, seed=1):
        torch.set_num_threads(1)
        self.random = np.random.default_rng(seed)
        self.network = network()
        self.concepts = Concepts(count, answers)
        self.adam = torch.optim.Adam(self.network.parameters(), lr=1e-3)

    def rows(self, world):
        x = self.random.normal(size=(ROWS, 6)).astype("f4")
        score = x[:, 0] * x[:, 1] if world == "A" else x[:, 2] - x[:, 3]
        return Rows(x, (score > 0).astype("f4"))

    def losses(self, rows):
        return TASK.losses(rows.labels, answers(self.network, rows.features, TASK))

    def learn(self, rows):
        loss = nn.functional.binary_cross_entropy_with_logits
        x, y = torch.from_numpy(rows.features), torch.from_numpy(rows.labels)[:, None]
        for _ in range(5):
            self.adam.zero_grad()
            loss(self.network(x), y).backward()
            self.adam.step()

    def live(self, world, batches, *, alarmed=False):
        """The mean loss of each micro-batch, before it is learned; an alarm stands if so told."""
        found = []
        for at in range(batches):
            rows = self.rows(world)
            losses = self.losses(rows)
            if alarmed and at == 1:  # the first one showed the change and raised the alarm
                self.concepts.note(self.before, float(at))
            if alarmed and at:
                recalled = self.concepts.recall(rows, TASK, self.network, losses)
                if recalled is not None:
                    self.network.load_state_dict(recalled)
                    self.adam = torch.optim.Adam(self.network.parameters(), lr=1e-3)
                    losses = self.losses(rows)
            found.append(float(losses.mean()))
            if not alarmed or at:
                self.learn(rows)
            self.before = copy.deepcopy(self.network.state_dict())
        return found


def second_return(count):
    """The losses when A comes back for the second time, and what they were when it was left."""
    stream = Stream(count)
    stream.live("A", 60)
    for world in "BAB":
        left = stream.live(world, 50, alarmed=True)[-10:]
        if world == "A":
            known = float(np.mean(left))
    return stream.live("A", 40, alarmed=True), known


def test_a_world_that_returns_is_known_at_once_and_without_recall_after_many_micro_batches():
    (recalled, known), (relearned, _) = second_return(2), second_return(0)
    needed = next((at for at, loss in enumerate(relearned) if loss < 1.2 * known), 40)

    print(f"loss when it was left: {known:.3f}")
    print(f"recalled: {[round(loss, 2) for loss in recalled[:6]]}")
    print(f"relearned: {[round(loss, 2) for loss in relearned[::4]]}; {needed} micro-batches")
    assert recalled[1] < 1.2 * known
    assert needed > 10
    assert relearned[1] > 2 * known


def test_worlds_that_alternate_are_kept_once_each():
    stream = Stream(4)
    stream.live("A", 60)
    for world in "BABABA":
        stream.live(world, 50, alarmed=True)

    found = stream.concepts.statistics()
    assert found["concepts"] == 2
    assert found["concept_recalls"] >= 4


def test_a_state_that_fits_no_better_than_noise_is_not_recalled():
    stream = Stream(4)
    stream.live("A", 60)
    stream.concepts.note(stream.network.state_dict(), 1.0)
    stream.concepts.note(network(9).state_dict(), 2.0)
    rows = stream.rows("A")

    assert stream.concepts.recall(rows, TASK, stream.network, stream.losses(rows)) is None


def test_asking_changes_nothing_and_what_is_given_is_a_copy():
    stream = Stream(4)
    stream.live("B", 60)
    stream.concepts.note(stream.network.state_dict(), 1.0)
    other, rows = network(9), stream.rows("B")
    before, drawn = copy.deepcopy(other.state_dict()), torch.get_rng_state()
    losses = TASK.losses(rows.labels, answers(other, rows.features, TASK))

    recalled = stream.concepts.recall(rows, TASK, other, losses)
    assert recalled is not None
    for tensor in recalled.values():
        tensor.zero_()

    assert all(torch.equal(before[name], each) for name, each in other.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())
    again = stream.concepts.recall(rows, TASK, other, losses)
    assert all(torch.equal(stream.network.state_dict()[name], each) for name, each in again.items())


def test_the_one_noted_longest_ago_makes_room_and_none_are_kept_where_none_may_be():
    concepts, none = Concepts(2, answers), Concepts(0, answers)
    for seed in range(3):
        concepts.note(network(seed).state_dict(), float(seed))
        none.note(network(seed).state_dict(), float(seed))

    assert [each[1] for each in concepts.state()["kept"]] == [1.0, 2.0]
    assert len(none) == 0


def test_restored_concepts_answer_alike_and_share_nothing():
    concepts, other = Concepts(3, answers), Concepts(3, answers)
    for seed in range(2):
        concepts.note(network(seed).state_dict(), float(seed))
    other.restore(concepts.state())
    rows = Stream(0).rows("A")
    rows = Rows(rows.features, answers(network(0), rows.features, TASK)[:, 0].round())
    bad = np.full(ROWS, 9.0)

    first, second = (each.recall(rows, TASK, network(5), bad) for each in (concepts, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("losses", "present", "better"),
    [
        (np.full(100, 0.2), np.full(100, 0.5), True),
        (np.full(100, 0.49), np.full(100, 0.5), False),
        (np.full(100, 0.2), np.full(100, np.nan), True),
        (np.full(100, np.inf), np.full(100, 0.5), False),
        (np.full(100, np.inf), np.full(100, np.nan), False),
        (np.tile([0.0, 3.0], 50), np.tile([1.0, 2.3], 50), False),
    ],
)
def test_better_means_beyond_noise_and_by_a_share(losses, present, better):
    assert is_better(losses, present) is better
