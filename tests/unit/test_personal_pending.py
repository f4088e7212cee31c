"""Answers that wait for their labels: bounded, whatever becomes of them."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest

from edge_runtime.personal.pending import Answered, Pending
from edge_runtime.personal.prior import Prior

BYTES_MAX = 1 << 20


def answer_of(key="ada", floats=8):
    data = np.zeros(floats, "<f4").tobytes()
    return Answered("shop", key, PRIOR, "spec", data, 0.25 + len(key), bytes(bytearray(data)))


PRIOR = Prior("binary", np.zeros(3, np.float32), np.eye(3, dtype=np.float32), 2.0, norm_max=10.0)


def test_the_oldest_go_first():
    pending = Pending(BYTES_MAX)

    for number in range(20_000):
        pending.remember(number, answer_of())

    assert pending.find(0) is None
    assert pending.find(19_999) is not None
    assert 0 < pending.statistics()["pending_bytes"] <= BYTES_MAX


@pytest.mark.parametrize(
    ("key", "keeps"),
    [
        ("ada", lambda number: True),
        ("ada", lambda number: False),
        ("ada", lambda number: not number % 128),
        ("\U0001f9a9", lambda number: True),
    ],
    ids=["all", "none", "one in a block", "long keys"],
)
def test_what_is_kept_takes_no_more_than_it_says(key, keeps):
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    pending = Pending(BYTES_MAX)

    for number in range(30_000):
        pending.remember(number, answer_of("".join([key] * 256)))
        if not keeps(number):
            pending.forget(number)
    took = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()

    told = pending.statistics()["pending_bytes"]
    assert told <= BYTES_MAX
    assert took <= told + 20_000


def test_forgetting_is_of_one_session_or_all():
    pending = Pending(BYTES_MAX)
    for number in range(1000):
        pending.remember(number, answer_of(key=str(number % 2)))

    pending.wipe("shop", "1")
    assert [pending.find(number) is None for number in (0, 1, 998, 999)] == [False, True] * 2
    pending.wipe(None)
    assert pending.statistics() == {"pending": 0, "pending_bytes": 0}
    pending.remember(1000, answer_of())
    assert pending.find(1000) is not None


def test_what_is_too_old_goes_by_marks_and_nothing_younger():
    pending, ttl_s = Pending(BYTES_MAX), 80.0
    for second in range(1, 401):  # two answers in a second, in blocks of 64 seconds
        pending.remember(2 * second, answer_of())
        pending.remember(2 * second + 1, answer_of())
        if not second % 5:
            pending.expire(float(second), ttl_s)

    oldest_s = next(n for n in range(900) if pending.find(n) is not None) // 2
    assert 400 - ttl_s * 9 / 8 - 5 <= oldest_s <= 400 - ttl_s + 1
    assert all(pending.find(number) is not None for number in range(2 * oldest_s, 802))
    assert len(pending._marks) <= 9
    for now_s in (400.0, 500.0, 600.0):
        pending.expire(now_s, ttl_s)
    assert pending.statistics() == {"pending": 0, "pending_bytes": 0}


def test_it_is_told_of_the_first_answer_where_none_was():
    told, pending = [], Pending(BYTES_MAX)
    pending.begun = lambda: told.append(len(pending))

    for number in range(300):
        pending.remember(number, answer_of())
    for number in range(300):
        pending.forget(number)
    pending.expire(0.0, 1.0)
    pending.remember(300, answer_of())

    assert told == [0, 0]
    assert pending.find(300) is not None
