"""Evaluation sets: what is held out, how it is kept and how a package is scored on it."""

from __future__ import annotations

import math
import types

import numpy as np
import pytest

from cloud_learner.evaluate.offline import (
    EvaluationSet,
    HoldOut,
    is_held_out,
    load_set,
    probabilities,
    save_set,
    score,
)
from edge_runtime.inference.runner import Runner


def example(number, label=None, **changes):
    """The parts of an example that a hold-out looks at; `label` as its feature, if not given."""
    parts = {
        "device": "a",
        "time_s": float(number),
        "features": np.array([number, 1], "<f4").tobytes(),
        "label": float(number) if label is None else label,
    }
    return types.SimpleNamespace(**parts | changes)


def held(count):
    """The first examples that are held out."""
    numbers = (n for n in range(100_000) if is_held_out(example(n)))
    return [example(next(numbers)) for _ in range(count)]


@pytest.fixture
def runner(write_package):
    return Runner(write_package()[0])  # answers sigmoid(sum(x) / 1000)


def rows(values, labels, width=5):
    features = np.zeros((len(values), width), np.float32)
    features[:, 0] = values
    return EvaluationSet(features, np.array(labels, np.float32))


def test_one_example_in_ten_is_held_out():
    share = np.mean([is_held_out(example(number)) for number in range(5000)])

    assert 0.09 < share < 0.11


def test_content_alone_decides_what_is_held_out():
    for number in range(200):
        assert is_held_out(example(number)) == is_held_out(example(number, label=7.0))
    differs = [is_held_out(example(n)) != is_held_out(example(n, device="b")) for n in range(200)]
    assert any(differs)


def test_a_hold_out_keeps_the_newest_held_out_examples_only():
    hold_out, examples = HoldOut(5), held(8)
    hold_out.add(examples[:3])
    hold_out.add([example(n) for n in range(50) if not is_held_out(example(n))])
    hold_out.add(examples[3:])

    assert hold_out.rows().labels.tolist() == [e.label for e in examples[3:]]
    assert hold_out.rows().features.shape == (5, 2)


def test_an_empty_hold_out_has_no_rows():
    assert len(HoldOut(5).rows()) == 0


def test_labels_stay_with_their_features_when_more_is_added_in_the_middle():
    hold_out = HoldOut(4)
    examples = held(8)

    class AddsWhenLookedAt(types.SimpleNamespace):
        @property
        def label(self):
            hold_out.add(examples[4:])
            return float(np.frombuffer(self.features, "<f4")[0])

    first = vars(examples[0])
    first.pop("label")
    hold_out.add([AddsWhenLookedAt(**first), *examples[1:4]])

    found = hold_out.rows()

    assert found.features[:, 0].tolist() == found.labels.tolist()


def test_a_score_says_rows_auc_brier_and_calibration(runner):
    values, labels = np.array([-2000.0, -1000.0, 1000.0, 2000.0]), [0, 1, 0, 1]
    answers = 1 / (1 + np.exp(-values / 1000))

    found = score(runner, rows(values, labels))

    assert (found.rows, found.auc) == (4, 0.75)
    assert found.brier == pytest.approx(np.mean((answers - labels) ** 2))
    assert found.calibration == pytest.approx(answers.mean() / 0.5)


def test_scores_without_rows_or_with_one_class_are_undefined(runner):
    empty, negative = score(runner, rows([], [])), score(runner, rows([1.0, 2.0], [0, 0]))

    assert all(map(math.isnan, (empty.auc, empty.brier, empty.calibration)))
    assert math.isnan(negative.auc)
    assert math.isnan(negative.calibration)
    assert math.isnan(score(runner, rows([1.0, 2.0], [1, 1])).auc)


def test_probabilities_are_one_number_a_row(runner):
    assert probabilities(runner, rows([0.0, 1e6], [0, 0]).features).tolist() == [0.5, 1.0]


def test_a_set_comes_back_as_it_was_saved_and_may_be_written_to(tmp_path):
    save_set(tmp_path / "s", rows([1.0, 2.0, 3.0], [0, 1, 1]))

    found = load_set(tmp_path / "s")

    assert np.array_equal(rows([1.0, 2.0, 3.0], [0, 1, 1]).features, found.features)
    assert found.labels.tolist() == [0, 1, 1]
    found.features[0] = 9  # torch warns of arrays that it must not write to
