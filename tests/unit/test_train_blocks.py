"""Building blocks of networks: any spec will do, and a number that goes astray is bounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cloud_learner.train.blocks import Inputs, Network
from edge_runtime.features.spec import Spec

WORD = '[[features]]\nname = "side"\nfield = "side"\nvocabulary = ["left", "right"]\n'
PLACE = '[[features]]\nname = "place"\nfield = "place"\nhash = 16\n'
NUMBERS = "".join(f'[[features]]\nname = "{name}"\nfield = "{name}"\n' for name in "xyz")
SPECS = {"words": WORD + PLACE, "numbers": NUMBERS, "both": WORD + NUMBERS + PLACE}


def made(kind: str, count: int = 300):
    """The spec and its rows: x in thousands, y in thousandths, z always 7."""
    spec = Spec.from_toml("version = 1\n" + SPECS[kind])
    chance = np.random.default_rng(5)
    values = {
        "side": chance.integers(0, 3, count),
        "place": chance.integers(0, 16, count),
        "x": chance.normal(0, 5000, count),
        "y": chance.normal(0.004, 0.001, count),
        "z": np.full(count, 7.0),
    }
    return spec, np.stack([values[name] for name in spec.names], 1).astype(np.float32)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("count", [1, 2, 300])
def test_any_spec_gives_finite_logits_of_the_shape_that_was_asked_for(kind, count):
    spec, rows = made(kind, count)
    network = Network(spec, rows, hidden=(8,), outputs=3)

    logits = network(torch.tensor(rows))

    assert logits.shape == (count, 3)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(("kind", "nodes"), [("words", 11), ("numbers", 12), ("both", 18)])
def test_any_spec_can_be_exported_its_weights_swapped_and_costs_few_nodes(kind, nodes):
    from cloud_learner.package.build import Graph

    spec, rows = made(kind)

    graph = Graph(Network(spec, rows, hidden=(8, 8)), rows)  # compares answers of swapped weights

    assert len(graph._model.graph.node) == nodes  # each of them is time on a device


def test_numbers_of_any_unit_are_told_apart_alike():
    spec, rows = made("numbers")

    x, y, z = Inputs(spec, rows)(torch.tensor(rows)).std(0).tolist()

    assert x == pytest.approx(1.0, rel=0.05)
    assert y == pytest.approx(1.0, rel=0.05)
    assert z == 0.0


@pytest.mark.parametrize("value", [0.0, 7.1, 1e9, -1e9, 3e38])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_number_that_vanishes_or_explodes_is_bounded(at, value):
    spec, rows = made("numbers")
    inputs = Inputs(spec, rows)
    rows[:, at] = value

    assert float(inputs(torch.tensor(rows)).abs().max()) <= 4.0


def test_a_column_that_never_changed_says_nothing_until_it_does():
    spec, rows = made("numbers")
    inputs = Inputs(spec, rows)

    same, other = inputs(torch.tensor([[0.0, 0.0, 7.0], [0.0, 0.0, 9.0]]))[:, 2].tolist()

    assert same == pytest.approx(0.0, abs=1e-5)
    assert 0.05 < other < 4.0


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e6])
def test_a_column_that_begins_to_change_counts_by_how_much_whatever_its_unit(size):
    spec, rows = made("numbers")
    rows[:, 2] = size
    inputs = Inputs(spec, rows)

    told = inputs(torch.tensor([[0.0, 0.0, 2 * size], [0.0, 0.0, 0.5 * size]]))[:, 2].tolist()

    assert told == pytest.approx([0.562, -0.400], abs=0.001)


def test_equal_words_of_different_columns_have_vectors_of_their_own():
    spec, rows = made("words")
    side, place = Inputs(spec, rows, word_width=4)(torch.ones(1, 2)).reshape(2, 4)

    assert not torch.equal(side, place)


def test_dropout_leaves_no_trace_in_answers():
    spec, rows = made("both")
    network = Network(spec, rows, hidden=(8, 8), dropout=0.5).eval()

    assert torch.equal(network(torch.tensor(rows)), network(torch.tensor(rows)))


def test_a_perceptron_without_hidden_layers_is_linear():
    spec, rows = made("numbers")
    network = Network(spec, rows, hidden=())

    assert [name for name, _ in network.named_parameters()] == ["body.0.weight", "body.0.bias"]
