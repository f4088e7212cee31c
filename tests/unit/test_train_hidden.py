"""Embeddings: what a network gives to its last layer, and nothing of it changes by looking."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from cloud_learner.train.hidden import embeddings_of


class Crossed(nn.Module):
    """Its last layer to run was the first to be declared."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.body = nn.Linear(8, 1), nn.Linear(3, 8)

    def forward(self, x):
        return self.out(torch.relu(self.body(x)))


ROWS = np.random.default_rng(1).normal(size=(20, 3)).astype("f4")


def test_they_are_what_the_layer_that_runs_last_is_given():
    network = Crossed()
    expected = torch.relu(network.body(torch.from_numpy(ROWS))).detach().numpy()

    assert np.array_equal(embeddings_of(network, ROWS), expected)


class Telling(Crossed):
    """It says itself what its embedding is."""

    def embed(self, x):
        return torch.tanh(self.body(x))[:, :3]


class Calling(nn.Module):
    """A layer of it is called `embed`, as in many a network."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.out(torch.relu(self.embed(x)))


def test_a_network_may_say_itself_what_they_are():
    network = Telling()
    expected = torch.tanh(network.body(torch.from_numpy(ROWS))).detach().numpy()[:, :3]

    assert np.array_equal(embeddings_of(network, ROWS), expected)


def test_a_layer_that_is_called_so_says_nothing():
    network = Calling()
    expected = torch.relu(network.embed(torch.from_numpy(ROWS))).detach().numpy()

    assert np.array_equal(embeddings_of(network, ROWS), expected)


def test_looking_leaves_the_network_as_it_was_and_drops_nothing_out():
    network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    drawn = torch.get_rng_state()

    assert np.array_equal(embeddings_of(network, ROWS), embeddings_of(network, ROWS))
    assert network.training
    assert not network[2]._forward_pre_hooks
    assert torch.equal(drawn, torch.get_rng_state())


def test_a_network_without_a_linear_layer_has_none():
    assert embeddings_of(nn.Sequential(nn.Tanh()), ROWS) is None
