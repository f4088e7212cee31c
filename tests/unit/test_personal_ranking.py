"""Many candidates at once: the same as one by one, and exploring within the region."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.personal import ranking
from edge_runtime.personal.head import FALLS_MAX, Head
from edge_runtime.personal.prior import Prior

WIDTH = 6


def head_of(labels: int, region: float = 2.0) -> Head:
    prior = Prior(
        "ranking",
        np.zeros(WIDTH + 1, np.float32),
        np.eye(WIDTH + 1, dtype=np.float32),
        region,
        norm_max=50.0,
    )
    head = Head(prior)
    for number, row in enumerate(candidates(labels, seed=2)):
        head.adapt(row, 0.0, float(number % 3 == 0))
    return head


def candidates(count: int = 50, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.5, (count, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("labels", [0, 20])
def test_all_at_once_is_one_by_one(labels):
    head, rows = head_of(labels), candidates()

    np.testing.assert_allclose(
        ranking.shifts(head, rows), [head.shift(row) for row in rows], atol=1e-5
    )


def test_optimism_is_shift_and_deviation():
    head, rows = head_of(20, region=100.0), candidates()

    np.testing.assert_allclose(
        ranking.optimistic(head, rows, 1.5)[1],
        [head.shift(row) + 1.5 * head.deviation(row) for row in rows],
        atol=1e-4,
    )


def test_exploring_stays_in_the_region():
    head, rows = head_of(5, region=0.1), candidates()
    rows[3] = np.nan

    for shifts in (
        ranking.optimistic(head, rows, 50.0)[1],
        ranking.shifts(head, rows),
    ):
        assert np.abs(shifts).max() <= np.float32(0.1)


def test_a_new_session_explores_and_a_fallen_one_does_not():
    new, fallen, rows = head_of(0), head_of(0), candidates()
    fallen.falls = FALLS_MAX

    assert ranking.optimistic(new, rows, 1.0)[1].any()
    assert not ranking.optimistic(fallen, rows, 1.0)[1].any()
