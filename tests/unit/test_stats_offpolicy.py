"""Off-policy estimates: what another choice would have earned, and how sure that is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cloud_learner.stats.offpolicy import dr, ips, snips

RATES = np.array([0.1, 0.3])
CHANCE = np.array([0.3, 0.7])
TRUTH = float(RATES @ CHANCE)
FEW = pytest.param(200, id="200")
FULL = pytest.param(2000, id="2000", marks=pytest.mark.slow)


def logs(seed, rows=2000):
    """Rewards, the chance that the other choice gives the arm that answered, its propensity."""
    rng = np.random.default_rng(seed)
    likely = rng.choice([0.1, 0.4, 0.8], rows)
    arms = (rng.random(rows) < likely).astype(int)
    logged = np.where(arms == 1, likely, 1 - likely)
    return (rng.random(rows) < RATES[arms]).astype(float), CHANCE[arms], logged, RATES[arms]


def estimates(seed):
    rewards, chance, logged, believed = logs(seed)
    wrong = 0.5 * believed
    expected = np.full(len(rewards), 0.5 * TRUTH)
    return {
        "ips": ips(rewards, chance, logged),
        "snips": snips(rewards, chance, logged),
        "dr": dr(rewards, chance, logged, wrong, expected),
    }


@pytest.mark.parametrize("seeds", [FEW, FULL])
@pytest.mark.parametrize("name", ["ips", "snips", "dr"])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds, name):
    found = [estimates(seed)[name] for seed in range(seeds)]
    covered = np.mean([each.low <= TRUTH <= each.high for each in found])
    assert covered == pytest.approx(0.95, abs=0.02 + 2 * (0.0475 / seeds) ** 0.5)
    assert np.mean([each.value for each in found]) == pytest.approx(TRUTH, abs=0.01)


def test_of_the_choice_that_was_made_the_estimate_is_the_mean():
    rewards, _, logged, _ = logs(1)
    for found in (ips(rewards, logged, logged), snips(rewards, logged, logged)):
        assert found.value == pytest.approx(rewards.mean())
        assert found.effective_rows == pytest.approx(len(rewards))


def test_a_right_model_of_rewards_makes_the_interval_narrower():
    rewards, chance, logged, believed = logs(1)
    model = dr(rewards, chance, logged, believed, np.full(len(rewards), TRUTH))
    plain = ips(rewards, chance, logged)
    assert model.high - model.low < 0.95 * (plain.high - plain.low)


@pytest.mark.parametrize("estimate", [ips, snips])
def test_without_rows_nothing_is_known(estimate):
    none = np.empty(0)
    found = estimate(none, none, none)
    assert math.isnan(found.value)
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_where_the_other_choice_never_answers_alike_nothing_is_known():
    some = np.ones(10)
    assert math.isnan(snips(some, 0 * some, some).value)
