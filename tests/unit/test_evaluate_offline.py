"""Evaluation sets: what is held out, how a set is kept and how a package is scored on it."""

from __future__ import annotations

import math
import types

import msgspec
import numpy as np
import pytest

from cloud_learner.evaluate.offline import (
    EvaluationSet,
    Words,
    is_held_out,
    load_set,
    probabilities,
    row_us,
    save_set,
    score,
)
from cloud_learner.stats.tasks import Task
from edge_runtime.errors import ConfigError
from edge_runtime.inference.runner import Runner

BINARY = Task()


def example(number, **changes):
    """The parts of an example that decide whether it is held out."""
    parts = {
        "device": "a",
        "time_s": float(number),
        "features": np.array([number, 1], "<f4").tobytes(),
        "label": 0.0,
        "fields": {},
    }
    return types.SimpleNamespace(**parts | changes)


@pytest.fixture
def runner(write_package):
    return Runner(write_package()[0])  # answers sigmoid(sum(x) / 1000)


def rows(values, labels, width=5, **more):
    features = np.zeros((len(values), width), np.float32)
    features[:, 0] = values
    return EvaluationSet(features, np.array(labels, np.float32), **more)


def outputs(*values):
    return np.array(values, np.float32).reshape(len(values), -1)


def test_one_example_in_ten_is_held_out():
    share = np.mean([is_held_out(example(number)) for number in range(5000)])

    assert 0.09 < share < 0.11


def test_content_alone_decides_what_is_held_out():
    for number in range(200):
        assert is_held_out(example(number)) == is_held_out(example(number, label=7.0))
    differs = [is_held_out(example(n)) != is_held_out(example(n, device="b")) for n in range(200)]
    assert any(differs)


def test_rows_that_compete_are_held_out_together():
    def in_query(number, query):
        return is_held_out(example(number, fields={"query": query}), "query")

    queries = {q: {in_query(number, q) for number in range(20)} for q in range(300)}

    assert all(len(outcomes) == 1 for outcomes in queries.values())
    assert 0.05 < np.mean([True in outcomes for outcomes in queries.values()]) < 0.16


def test_a_score_says_rows_quality_loss_and_calibration(runner):
    values, labels = np.array([-2000.0, -1000.0, 1000.0, 2000.0]), [0, 1, 0, 1]
    chosen = rows(values, labels)
    answers = 1 / (1 + np.exp(-values / 1000))

    found = score(BINARY, chosen, probabilities(runner, chosen.features).reshape(-1, 1))

    assert (found.rows, found.quality) == (4, 0.75)
    said = np.where(labels, answers, 1 - answers)
    assert found.loss == pytest.approx(-np.log(said).mean())
    assert found.calibration == pytest.approx(answers.mean() / 0.5)


@pytest.mark.parametrize(
    ("task", "labels", "answers", "quality"),
    [
        (Task(kind="multiclass", classes=3), [0, 1, 2, 2], np.eye(3)[[0, 1, 2, 1]], 0.75),
        (Task(kind="regression", scale=2.0), [1, 2, 3], outputs(1, 2, 3), 1.0),
        (Task(kind="ranking", group="query"), [1, 0, 0, 1], outputs(2, 1, 1, 2), 1.0),
    ],
)
def test_each_task_is_scored_by_its_own_measure(task, labels, answers, quality):
    chosen = rows(labels, labels, groups=np.array([0, 0, 1, 1])[: len(labels)])

    assert score(task, chosen, answers.astype(np.float32)).quality == pytest.approx(quality)


def test_a_part_of_a_set_is_scored_alone():
    chosen, answers = rows([0] * 4, [0, 1, 0, 1]), outputs(0.1, 0.9, 0.9, 0.1)

    assert score(BINARY, chosen, answers).quality == 0.5
    assert score(BINARY, chosen, answers, np.array([1, 1, 0, 0], bool)).quality == 1.0


def test_scores_without_rows_or_with_one_class_are_undefined():
    empty = score(BINARY, rows([], []), np.zeros((0, 1), np.float32))
    negative = score(BINARY, rows([1.0, 2.0], [0, 0]), outputs(0.1, 0.2))

    assert all(map(math.isnan, (empty.quality, empty.loss, empty.calibration)))
    assert math.isnan(negative.quality)
    assert math.isnan(negative.calibration)


def test_answers_that_are_no_numbers_have_no_score():
    found = score(BINARY, rows([1.0, 2.0], [0, 1]), outputs(0.1, math.nan))

    assert found.rows == 2
    assert all(map(math.isnan, (found.quality, found.loss, found.calibration)))


def test_constant_answers_rank_nothing():
    assert score(BINARY, rows([1.0, 2.0, 3.0], [0, 1, 1]), outputs(0.3, 0.3, 0.3)).quality == 0.5


def test_probabilities_are_one_number_a_row(runner):
    assert probabilities(runner, rows([0.0, 1e6], [0, 0]).features).tolist() == [0.5, 1.0]


def test_a_row_costs_some_time_and_none_without_rows(runner):
    assert 0 < row_us(runner, rows([0.0] * 3, [0] * 3)) < 1e6
    assert math.isnan(row_us(runner, rows([], [])))


def full_set():
    return rows(
        [1.0, 2.0, 3.0],
        [0, 1, 1],
        groups=np.array([7, 7, -1]),
        times_s=np.array([1.0, 2.0, 3.5]),
        ages_s=np.array([10.0, 20.0, math.nan]),
        before=np.array([math.nan, 0, 1], np.float32),
        devices=Words.of(["EWR", "JFK", "EWR"]),
        fields={"carrier": Words.of(["UA", "", "UA"])},
    )


def plain(found):
    words = {name: [each.names[c] for c in each.codes] for name, each in found.fields.items()}
    devices = [found.devices.names[code] for code in found.devices.codes]
    arrays = [
        np.nan_to_num(getattr(found, name), nan=-99).tolist()
        for name in ("features", "labels", "groups", "times_s", "ages_s", "before")
    ]
    return arrays, devices, words


def test_a_set_comes_back_as_it_was_saved_and_may_be_written_to(tmp_path):
    save_set(tmp_path / "s", full_set())

    found = load_set(tmp_path / "s")

    assert plain(full_set()) == plain(found)
    found.features[0] = 9  # torch warns of arrays that it must not write to


def test_rows_are_taken_with_all_that_is_known_of_them():
    arrays, devices, words = plain(full_set().take(np.array([2, 0])))

    assert (arrays[1], arrays[2], arrays[3]) == ([1, 0], [-1, 7], [3.5, 1.0])
    assert (devices, words) == (["EWR", "EWR"], {"carrier": ["UA", "UA"]})


def test_a_set_without_labels_keeps_its_features(tmp_path):
    save_set(tmp_path / "s", EvaluationSet(np.ones((4, 2), np.float32), np.zeros(0, np.float32)))

    assert load_set(tmp_path / "s").features.shape == (4, 2)


def test_a_set_of_an_earlier_release_can_be_read(tmp_path):
    features, labels = np.arange(6, dtype="<f4"), np.array([0, 1], "<f4")
    (tmp_path / "s").write_bytes(msgspec.msgpack.encode((features.tobytes(), labels.tobytes(), 3)))

    found = load_set(tmp_path / "s")

    assert found.features.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found.labels.tolist() == [0, 1]
    assert np.isnan(found.ages_s).all()


def test_a_set_of_a_later_release_is_refused(tmp_path):
    save_set(tmp_path / "s", full_set())
    later = msgspec.msgpack.decode((tmp_path / "s").read_bytes()) | {"version": 3}
    (tmp_path / "s").write_bytes(msgspec.msgpack.encode(later))

    with pytest.raises(ConfigError, match="version 3"):
        load_set(tmp_path / "s")
