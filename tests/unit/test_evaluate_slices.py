"""Slices: by device, by declared field, and by keys that the bootstrap never saw."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cloud_learner.evaluate.offline import EvaluationSet, ScoredSet, Words
from cloud_learner.evaluate.slices import Keys, largest_drop, score_slices, slices
from cloud_learner.stats.tasks import Task


def rows(indices, devices="aaaa", carriers="xxyy"):
    features = np.array([[index, 0.5] for index in indices], np.float32)
    return EvaluationSet(
        features,
        np.array([0, 1, 0, 1], np.float32),
        devices=Words.of(devices),
        fields={"carrier": Words.of(carriers)},
    )


def found(parts):
    return {(part.sort, part.value): part.where.tolist() for part in parts.large}


def test_rows_are_cut_by_device_field_and_keys():
    keys = Keys.of([0], rows([1, 2, 3, 1]))
    new = rows([1, 2, 4, 0], devices="abab", carriers="xyyx")

    assert found(slices(new, ("carrier",), keys, 1)) == {
        ("device", "a"): [True, False, True, False],
        ("device", "b"): [False, True, False, True],
        ("carrier", "x"): [True, False, False, True],
        ("carrier", "y"): [False, True, True, False],
        ("keys", "known"): [True, True, False, False],
        ("keys", "new"): [False, False, True, True],
    }


def test_a_word_of_a_declared_field_that_was_never_seen_is_a_new_key():
    keys = Keys.of([], rows([1, 1, 1, 1]))

    assert keys.is_new(rows([1, 1, 1, 1], carriers="xyzx")).tolist() == [False, False, True, False]


def test_without_keys_of_the_bootstrap_nothing_is_called_new():
    assert {part.sort for part in slices(rows([1, 2, 3, 4]), (), None, 1).large} == {"device"}


def test_slices_of_too_few_rows_are_counted_only():
    parts = slices(rows([1, 2, 3, 4], devices="aaab"), ("carrier",), None, 3)

    assert list(found(parts)) == [("device", "a")]
    assert parts.small == {"device": 1, "carrier": 2}


def test_an_empty_set_has_no_slices():
    empty = EvaluationSet(np.zeros((0, 0), np.float32), np.zeros(0, np.float32))

    assert slices(empty, ("carrier",), None, 1).large == []


def test_an_empty_set_has_no_new_keys_whatever_the_bootstrap_saw():
    empty = EvaluationSet(np.empty((0, 0), "f4"), np.empty(0, "f4"))

    assert slices(empty, ("carrier",), Keys({0: [1, 2]}, {}), 1).small["keys"] == 0


def test_each_slice_is_scored_alone():
    answers = np.array([[0.1], [0.9], [0.9], [0.1]], np.float32)
    parts = slices(rows([0] * 4), ("carrier",), None, 1)

    scored = score_slices(Task(), rows([0] * 4), answers, parts.large)

    qualities = {value: each.quality for value, each in scored["carrier"].items()}
    assert qualities == {"x": 1.0, "y": 0.0}


def test_the_largest_drop_is_of_slices_that_both_were_judged_on():
    def sets(**qualities):
        return {value: ScoredSet(300, quality, 0, 1) for value, quality in qualities.items()}

    before = sets(a=0.8, b=0.7, gone=0.9, undefined=math.nan)
    now = sets(a=0.75, b=0.71, fresh=0.1, undefined=0.2)

    assert largest_drop(before, now) == ("a", pytest.approx(0.05), 2)
    value, drop, judged = largest_drop({}, now)
    assert (value, judged) == ("", 0)
    assert math.isnan(drop)


def test_keys_come_back_as_they_were_saved(tmp_path):
    keys = Keys.of([0], rows([1, 2, 3, 1]))
    keys.save(tmp_path / "keys")

    assert Keys.load(tmp_path / "keys") == keys
    assert Keys.load(tmp_path / "absent") is None
