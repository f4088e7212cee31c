"""Past sessions: whose rows belong together, and which go when there are too many."""

from __future__ import annotations

import numpy as np
import pytest

from cloud_learner.train.dataset import Rows
from cloud_learner.train.declaration import Personal
from cloud_learner.train.past import ROWS_MAX, PastSessions


def told(past, *rows):
    """Each row is (device, name, time_s); its first feature and its label say which it is."""
    devices, names, times_s = zip(*rows, strict=True)
    numbers = np.array(times_s, np.float32)
    features = np.stack([numbers, numbers + 0.5], axis=1)
    past.add(Rows(features, numbers), devices, names, times_s)
    return past


def labels(past, rows_max=10_000):
    return [each.labels.tolist() for each in past.newest(rows_max)]


def named(memory=10) -> PastSessions:
    return PastSessions(Personal(region=1.0, group="visit", memory=memory))


def unnamed(memory=10) -> PastSessions:
    return PastSessions(Personal(region=1.0, pause_s=100.0, memory=memory))


def test_a_session_is_what_one_device_says_under_one_name():
    past = told(named(), ("a", "x", 1), ("b", "x", 2), ("a", "y", 3), ("a", "x", 4))

    assert labels(past) == [[1, 4], [3], [2]]
    assert past.newest(9)[0].features.tolist() == [[1, 1.5], [4, 4.5]]


def test_without_a_group_silence_parts_the_sessions_of_a_device():
    past = told(unnamed(), ("a", "", 0), ("a", "", 90), ("b", "", 120), ("a", "", 191))

    assert labels(past) == [[191], [120], [0, 90]]


def test_rows_that_come_late_find_their_place():
    past = told(unnamed(), ("a", "", 50), ("a", "", 500))
    told(past, ("a", "", 20), ("a", "", 450))

    assert labels(past) == [[450, 500], [20, 50]]


def test_a_long_session_keeps_its_newest_rows():
    past = told(named(), *(("a", "x", time_s) for time_s in range(100)))

    assert labels(past) == [list(range(100 - ROWS_MAX, 100))]


def test_who_floods_pushes_out_its_own_sessions():
    past = told(named(4), ("a", "x", 1), ("b", "y", 2))
    told(past, *(("loud", f"{n}", 10 + n) for n in range(50)))

    assert labels(past) == [[59], [58], [2], [1]]


def test_the_longest_untold_goes_first():
    past = told(named(2), ("a", "x", 1), ("a", "y", 2), ("a", "x", 3), ("a", "z", 4))

    assert labels(past) == [[4], [1, 3]]


def test_no_more_rows_come_out_than_were_asked_for():
    past = told(named(), ("a", "x", 1), ("a", "x", 2), ("a", "y", 3), ("a", "z", 4))

    assert labels(past, rows_max=3) == [[4], [3]]


@pytest.mark.parametrize("make", [named, unnamed])
def test_what_was_kept_goes_on_as_if_nothing_had_happened(make):
    rows = [("ab"[n % 2], f"{n // 7}", 60.0 * n) for n in range(60)]
    straight, first, again = told(make(), *rows), told(make(), *rows[:30]), make()
    again.restore(first.state())
    told(again, *rows[30:])

    assert labels(again) == labels(straight)
    assert len(again) == len(straight) == 10


def test_a_smaller_memory_takes_what_it_can_of_a_larger_one():
    past = told(named(), *(("a", f"{n}", n) for n in range(8)))
    smaller = named(3)
    smaller.restore(past.state())

    assert labels(smaller) == [[7], [6], [5]]


def test_what_is_added_is_copied():
    features = np.zeros((1, 2), np.float32)
    past = named()
    past.add(Rows(features, np.ones(1, np.float32)), ["a"], ["x"], [1.0])
    features += 7

    assert not past.newest(9)[0].features.any()
