"""Parts: each row in one, texts of like length together, competing rows whole."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from cloud_learner.train.dataset import Rows
from cloud_learner.train.parts import chunks, chunks_of, lengths_of, looked_at


class Sum(nn.Module):
    """Rows end where zeros begin; notes how many columns it was given of each part."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def lengths(self, features):
        return (features != 0).sum(1)

    def forward(self, features):
        self.seen.append(int(self.lengths(features).max()))
        return features.sum(1, keepdim=True)


def texts(count, seed=0):
    random = np.random.default_rng(seed)
    features = random.integers(1, 9, (count, 40)).astype(np.float32)
    features[np.arange(40) >= random.integers(1, 41, (count, 1))] = 0
    return features


def test_every_row_is_in_exactly_one_part():
    found = chunks(507, 250, np.random.default_rng(0))

    assert max(len(each) for each in found) <= 250
    assert max(len(each) for each in found) - min(len(each) for each in found) <= 1
    assert sorted(np.concatenate(found)) == list(range(507))


def test_rows_of_like_length_are_learned_together_and_parts_in_random_order():
    lengths = lengths_of(Sum(), texts(3000))
    found = chunks(3000, 32, np.random.default_rng(0), lengths)

    assert sorted(np.concatenate(found)) == list(range(3000))
    assert max(len(each) for each in found) <= 32
    longest = np.array([lengths[each].max() for each in found])
    assert sum(lengths[each].max() * len(each) for each in found) < 1.1 * lengths.sum()
    assert np.abs(np.diff(longest)).mean() > 5


def test_no_group_is_torn_apart():
    groups = np.arange(1004, dtype=np.int64) // 5
    some = Rows(np.zeros((1004, 2), np.float32), np.zeros(1004, np.float32), groups=groups)
    found = chunks_of(some, 250, np.random.default_rng(0))

    assert sorted(np.concatenate(found)) == list(range(1004))
    assert len(found) > 2
    homes = [set(groups[each].tolist()) for each in found]
    assert sum(map(len, homes)) == len(set(groups.tolist()))


def test_a_look_gives_each_row_its_own_answer_from_short_parts():
    features, network = texts(1000), Sum()

    assert np.array_equal(features.sum(1), looked_at(network, features, network)[:, 0].numpy())
    assert network.seen == sorted(network.seen)
    assert network.seen[0] < 10


def test_a_network_without_lengths_sees_all_rows_at_once():
    network, parts = nn.Linear(40, 2), []

    looked_at(network, texts(1000), lambda part: parts.append(len(part)) or network(part))

    assert (parts, lengths_of(network, texts(3))) == ([1000], None)


def test_no_rows_are_no_parts():
    network = Sum()

    assert chunks(0, 32, np.random.default_rng(0)) == []
    assert lengths_of(network, texts(0)) is None
    assert looked_at(nn.Linear(40, 2), texts(0), nn.Linear(40, 2)).shape == (0, 2)
    assert torch.is_tensor(looked_at(nn.Linear(40, 2), texts(5), nn.Linear(40, 2)))
