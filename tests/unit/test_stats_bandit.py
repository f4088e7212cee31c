"""The bandit: shares follow rewards, never below the floor, and forget."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_learner.stats.bandit import Bandit


def learned(**rewards) -> Bandit:
    bandit = Bandit.start(list(rewards), memory=50.0, floor=0.05)
    for name, (reward_sum, count) in rewards.items():
        bandit.reward(name, reward_sum, count)
    return bandit


def shares(bandit, seed=0):
    return bandit.weights(np.random.default_rng(seed))


def test_before_any_reward_all_arms_get_about_the_same():
    found = shares(learned(a=(0, 0), b=(0, 0)))
    assert found["a"] == pytest.approx(0.5, abs=0.05)


def test_the_best_arm_gets_all_but_the_floors():
    found = shares(learned(a=(60, 1000), b=(30, 1000), c=(20, 1000)))
    assert found == pytest.approx({"a": 0.9, "b": 0.05, "c": 0.05}, abs=0.01)


def test_the_same_generator_gives_the_same_shares():
    bandit = learned(a=(6, 100), b=(5, 100))
    assert shares(bandit, 7) == shares(bandit, 7)
    assert shares(bandit, 7) != shares(bandit, 8)


def test_answers_under_way_settle_doubts_before_their_rewards_come():
    bandit = learned(a=(50, 1000), b=(0, 30))
    doubtful = shares(bandit)["b"]
    bandit.answered("b", 3000)
    assert shares(bandit)["b"] < doubtful / 2
    bandit.reward("b", 100, 3000)
    assert bandit.arms["b"].pending == 0


def test_what_is_older_than_its_memory_hardly_counts():
    bandit = learned(a=(600, 1000), b=(300, 1000))
    for _ in range(500):
        bandit.forget()
    assert shares(bandit)["a"] == pytest.approx(0.5, abs=0.05)


def test_a_stored_bandit_goes_on():
    bandit = learned(a=(6, 100), b=(5, 100))
    again = msgspec.json.decode(msgspec.json.encode(bandit), type=Bandit)
    assert again == bandit
    assert shares(again) == shares(bandit)


amounts = st.integers(0, 10_000)


@given(
    st.lists(st.tuples(amounts, amounts, amounts), min_size=2, max_size=6),
    st.floats(0.001, 0.16),
    st.integers(0, 2**32),
)
def test_shares_sum_to_one_and_none_is_below_the_floor(arms, floor, seed):
    bandit = Bandit.start([str(at) for at in range(len(arms))], memory=10.0, floor=floor)
    for at, (one, other, pending) in enumerate(arms):
        bandit.reward(str(at), min(one, other), max(one, other))
        bandit.answered(str(at), pending)
    found = shares(bandit, seed)
    assert sum(found.values()) == pytest.approx(1.0)
    assert min(found.values()) >= floor - 1e-12


@pytest.mark.parametrize(("reward_sum", "rewards"), [(2.0, 1), (-1.0, 1)])
def test_rewards_out_of_bounds_are_a_broken_invariant(reward_sum, rewards):
    with pytest.raises(AssertionError):
        learned(a=(0, 0)).reward("a", reward_sum, rewards)
