"""Rows in memory: arrays that stay together."""

from __future__ import annotations

import numpy as np

from cloud_learner.train.dataset import Rows, concatenate, groups_of


def rows(start, count, width=2):
    numbers = np.arange(start, start + count, dtype=np.float32)
    return Rows(np.tile(numbers[:, None], width), numbers)


def test_rows_are_taken_and_joined_in_order():
    joined = concatenate([rows(0, 3), rows(5, 2)])

    assert joined.take(np.array([4, 0])).labels.tolist() == [6.0, 0.0]
    assert len(joined) == 5


def test_weights_are_one_and_groups_none_where_they_are_not_given():
    joined = concatenate([Rows(np.zeros((2, 1), "f4"), np.zeros(2, "f4"), np.array([3, 4], "f4"))])

    assert rows(0, 3).weights.tolist() == [1, 1, 1]
    assert rows(0, 3).groups.tolist() == [0, 0, 0]
    assert joined.take(np.array([1])).weights.tolist() == [4]


def test_rows_of_one_value_of_a_field_are_one_group():
    fields = [{"query": "a"}, {"query": "b"}, {"query": "a"}, {"query": 7}, {}]
    groups = groups_of(fields, "query").tolist()

    assert groups[0] == groups[2]
    assert len(set(groups)) == 4
