"""Counting failures: seldom wrong at any look, soon right, deaf to the few that shout."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_learner.stats.counting import RATIOS, CountingTest
from cloud_learner.stats.trimming import liars, without_loudest

ALPHA = 0.01
FEW = pytest.param(50, id="50")
FULL = pytest.param(1000, id="1000", marks=pytest.mark.slow)


def run(seed, ratio, share, *, failures=1000, devices=20) -> CountingTest:
    """One failure after the other, on some device, until the test says harm."""
    rng = np.random.default_rng(seed)
    test = CountingTest(alpha=ALPHA)
    chance = share * ratio / (share * ratio + 1 - share)
    for own, name in zip(
        (rng.random(failures) < chance).tolist(),
        rng.integers(0, devices, failures).tolist(),
        strict=True,
    ):
        if test.add(int(own), 1, share, str(name), devices):
            break
    return test


@pytest.mark.parametrize("seeds", [FEW, FULL])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_a_trial_that_fails_no_more_often_is_seldom_called_harmful_at_any_look(seeds, share):
    stops = sum(run(seed, 1.0, share).harmful for seed in range(seeds))
    assert stops <= ALPHA * seeds + 3 * (ALPHA * seeds) ** 0.5


@pytest.mark.parametrize(
    ("ratio", "share", "most"), [(2.0, 0.2, 38), (2.0, 0.5, 65), (10.0, 0.2, 8), (10.0, 0.5, 15)]
)
def test_harm_is_seen_after_few_failures_of_the_trial(ratio, share, most):
    tests = [run(seed, ratio, share) for seed in range(60)]
    assert all(test.harmful for test in tests)
    assert np.median([test.trial for test in tests]) <= most


def test_the_share_may_change_from_one_failure_to_the_next():
    test = CountingTest(alpha=ALPHA)
    test.add(1, 1, 0.2, "a", 1)
    test.add(0, 2, 0.5, "b", 1)
    for ratio, gain in zip(RATIOS, test.gains, strict=True):
        likely = ratio / (0.2 * ratio + 0.8) * (1 / (0.5 * ratio + 0.5)) ** 2
        assert gain == pytest.approx(math.log(likely))


@pytest.mark.parametrize(("trial", "share"), [(0, 0.0), (3, 1.0)])
def test_where_only_one_of_them_answers_failures_say_nothing(trial, share):
    test = CountingTest(alpha=ALPHA)
    test.add(trial, 3, share, "a", 1)
    assert test.gains == pytest.approx([0.0] * len(RATIOS))
    assert test.evidence(1) == pytest.approx(1.0)


def test_without_failures_nothing_is_known():
    test = CountingTest(alpha=ALPHA)
    assert not test.add(0, 0, 0.2, "a", 1)
    assert (test.evidence(1), test.interval()) == (1.0, (0.0, math.inf))


def test_a_stored_test_goes_on_as_if_it_had_not_been_stored():
    whole, first = CountingTest(alpha=ALPHA), CountingTest(alpha=ALPHA)
    rng = np.random.default_rng(5)
    steps = [(int(rng.random() < 0.3), 1, 0.3, str(rng.integers(70)), 70) for _ in range(200)]
    for step in steps:
        whole.add(*step)
    for step in steps[:80]:
        first.add(*step)
    again = msgspec.json.decode(msgspec.json.encode(first), type=CountingTest)
    for step in steps[80:]:
        again.add(*step)
    assert whole == again


@pytest.mark.parametrize(("ratio", "share"), [(1.0, 0.2), (2.0, 0.5), (0.5, 0.3)])
def test_the_interval_holds_the_ratio_at_all_times_and_narrows(ratio, share):
    missed = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        test = CountingTest(alpha=1e-300)
        chance = share * ratio / (share * ratio + 1 - share)
        held = True
        for own in (rng.random(600) < chance).tolist():
            test.add(int(own), 1, share, "a", 1)
            low, high = test.interval()
            held &= low <= ratio <= high
        missed += not held
        assert high / low < 3
    assert missed <= 4


@pytest.mark.parametrize("forged", [(50, 50), (1, 1)])
def test_the_failures_of_one_device_in_a_hundred_stop_nothing(forged):
    assert not shouted_at(forged, devices=200).harmful
    assert shouted_at(forged, devices=2).harmful


def shouted_at(forged, devices) -> CountingTest:
    """Two liars, and others that fail no more often under the trial than without."""
    test = CountingTest(alpha=ALPHA)
    rng = np.random.default_rng(1)
    for _ in range(40):
        for liar in ("liar-1", "liar-2"):
            test.add(*forged, 0.2, liar, devices)
        for _ in range(5):
            test.add(int(rng.random() < 0.2), 1, 0.2, str(rng.integers(198)), devices)
    return test


def test_a_device_that_claims_failures_of_the_other_hides_no_harm():
    test = CountingTest(alpha=ALPHA)
    rng = np.random.default_rng(1)
    for _ in range(400):
        test.add(0, 500, 0.2, "liar", 100)
        if test.add(int(rng.random() < 0.43), 1, 0.2, str(rng.integers(99)), 100):
            break
    assert test.harmful


@given(st.lists(st.floats(-5, 5), max_size=30), st.integers(0, 5))
def test_what_is_left_is_the_least_that_any_others_could_leave(parts, count):
    total = sum(parts)
    left = without_loudest(parts, count, total)
    loudest = sorted(parts)[len(parts) - min(count, len(parts)) :]
    assert left <= total
    assert left == pytest.approx(total - sum(part for part in loudest if part > 0))


def test_one_percent_may_lie_and_by_chance_some_more_and_nobody_in_a_small_trial():
    assert [liars(n) for n in (0, 1, 49, 50, 149, 150, 10_000)] == [0, 0, 0, 2, 4, 4, 120]
