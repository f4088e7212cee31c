"""The paired test: how soon it decides, and how seldom it is wrong, over seeded simulated years.

Each simulated campaign draws labels from a true probability and two models that see it through
noise, so that the Brier score is about 0.15 and equal models differ by a standard deviation of
0.04; a shift of every difference by the margin makes a model exactly as bad as must not pass, by
half of it one that is not stopped yet.
"""

from __future__ import annotations

import statistics

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_learner.stats.sequential import PairedTest, Wager

MARGIN, ALPHA_PROMOTE, ALPHA_STOP = 0.0025, 0.02, 0.01
FEW = pytest.param(120, 2500, id="120")
FULL = pytest.param(600, 8000, id="600", marks=pytest.mark.slow)


def new_test() -> PairedTest:
    return PairedTest.start(MARGIN, ALPHA_PROMOTE, ALPHA_STOP)


def differences(seed, count, *, bias=0.0, flipped=False, noise=0.2):
    rng = np.random.default_rng(seed)
    truth = rng.normal(-1.5, 1.15, count)
    label = (rng.random(count) < sigmoid(truth)).astype(float)
    seen = truth + rng.normal(0, 0.3, count)
    old = sigmoid(seen + rng.normal(0, noise, count))
    new = sigmoid(seen + rng.normal(0, noise, count) + bias)
    new = 1 - new if flipped else new
    return (new - label) ** 2 - (old - label) ** 2


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def skewed(seed, count):
    """Mostly a little better, rarely much worse; worse by the margin on average."""
    rng = np.random.default_rng(seed)
    worse = 0.01
    better = (MARGIN - worse * 0.6) / (1 - worse)
    return np.where(rng.random(count) < worse, 0.6, better)


def run(stream) -> PairedTest:
    test = new_test()
    for difference in stream.tolist():
        if test.add(difference) != "hold":
            break
    return test


def watched(stream) -> PairedTest:
    """The test after all of the stream, whatever it says in between."""
    test = new_test()
    for difference in stream.tolist():
        test.add(difference)
    return test


def most_false_alarms(alpha, campaigns):
    """Three standard deviations above what `alpha` allows on average."""
    return alpha * campaigns + 3 * (alpha * campaigns) ** 0.5


@pytest.mark.parametrize(("campaigns", "labels"), [FEW, FULL])
def test_a_model_worse_by_the_margin_is_seldom_promoted_at_any_look(campaigns, labels):
    verdicts = [
        run(np.clip(differences(seed, labels) + MARGIN, -1, 1)).verdict for seed in range(campaigns)
    ]
    assert verdicts.count("promote") <= most_false_alarms(ALPHA_PROMOTE, campaigns), verdicts


@pytest.mark.parametrize(("campaigns", "labels"), [FEW, FULL])
def test_a_model_worse_by_half_the_margin_is_seldom_stopped_at_any_look(campaigns, labels):
    stopped = [
        watched(np.clip(differences(seed, labels) + MARGIN / 2, -1, 1)).harmful
        for seed in range(campaigns)
    ]
    assert stopped.count(True) <= most_false_alarms(ALPHA_STOP, campaigns)


@pytest.mark.parametrize(("campaigns", "labels"), [FEW, FULL])
def test_rare_large_losses_do_not_get_a_model_promoted_before_they_show(campaigns, labels):
    verdicts = [run(skewed(seed, labels)).verdict for seed in range(campaigns)]
    assert verdicts.count("promote") <= most_false_alarms(ALPHA_PROMOTE, campaigns), verdicts


@pytest.mark.parametrize(("campaigns", "labels"), [FEW, FULL])
def test_an_equal_model_is_promoted_and_not_stopped(campaigns, labels):
    tests = [run(differences(seed, 8000)) for seed in range(campaigns)]
    verdicts = [test.verdict for test in tests]
    assert verdicts.count("promote") >= 0.95 * campaigns, verdicts
    assert verdicts.count("stop") <= most_false_alarms(ALPHA_STOP, campaigns), verdicts
    assert 1500 <= statistics.median(test.pairs for test in tests) <= 4300


@pytest.mark.parametrize(
    ("kind", "labels_max"),
    [({"flipped": True}, 60), ({"bias": 2.0}, 200), ({"bias": 1.0}, 1000)],
    ids=["flipped", "far too high", "too high"],
)
def test_a_broken_model_is_stopped_soon(kind, labels_max):
    for seed in range(20):
        test = run(differences(seed, labels_max, **kind))
        assert test.verdict == "stop", f"seed {seed}: {test.pairs} labels, mean {test.mean}"


def test_a_better_model_is_promoted_sooner_than_an_equal_one():
    equal = [run(differences(seed, 8000)).pairs for seed in range(20)]
    better = [run(differences(seed, 8000) - 0.002).pairs for seed in range(20)]
    assert statistics.median(better) < 0.6 * statistics.median(equal)


def test_two_identical_models_are_promoted_by_the_margin_alone():
    test = run(np.zeros(8000))
    assert test.verdict == "promote"
    assert test.mean == 0


def test_without_data_there_is_no_verdict():
    test = new_test()
    assert test.verdict == "hold"
    assert test.mean != test.mean
    assert test.noninferior.evidence == test.harm.evidence == 1


def test_harm_is_watched_on_after_a_release_was_found_not_worse():
    good, broken = differences(1, 6000), differences(2, 300, flipped=True)
    test = watched(good)
    assert (test.not_worse, test.harmful, test.verdict) == (True, False, "promote")
    for difference in broken.tolist():
        test.add(difference)
    assert (test.not_worse, test.harmful, test.verdict) == (True, True, "stop")


def test_a_flag_that_was_set_stays_and_pairs_are_counted_on():
    test = run(differences(1, 100, flipped=True))
    before = test.pairs
    assert test.add(-1.0) == "stop"
    assert (test.harmful, test.pairs) == (True, before + 1)


def test_a_stored_test_goes_on_as_if_it_had_not_been_stored():
    stream = differences(7, 1000).tolist()
    whole, first = new_test(), new_test()
    for difference in stream:
        whole.add(difference)
    for difference in stream[:300]:
        first.add(difference)
    again = msgspec.json.decode(msgspec.json.encode(first), type=PairedTest)
    for difference in stream[300:]:
        again.add(difference)
    assert whole == again


@pytest.mark.parametrize("difference", [1.01, -1.01, float("nan")])
def test_a_difference_out_of_bounds_is_a_broken_invariant(difference):
    with pytest.raises(AssertionError):
        new_test().add(difference)


@given(st.lists(st.floats(-1.05, 1.05), max_size=60), st.none() | st.floats(0, 1))
def test_capital_stays_positive_and_a_bet_never_exceeds_its_bound(payoffs, effect):
    wager = Wager(effect=effect)
    for payoff in payoffs:
        assert 0 <= wager.bet() <= 0.95
        wager.add(payoff)
        assert wager.evidence > 0


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.floats(-1, 1), st.floats(-1, 1))
def test_a_bet_depends_on_earlier_payoffs_only(payoffs, left, right):
    one, other = Wager(effect=None), Wager(effect=None)
    for payoff in payoffs:
        one.add(payoff)
        other.add(payoff)
    before = one.log_capital
    stakes = one.bet(), other.bet()
    one.add(left)
    other.add(right)
    assert stakes[0] == stakes[1]
    assert one.log_capital == pytest.approx(before + np.log1p(stakes[0] * left))


def campaign(seed, lie, *, bias=0.0, devices=200, flood=10, labels=12_000) -> PairedTest:
    """A trial on `devices`, of which one in a hundred claims the difference `lie` all the time."""
    rng = np.random.default_rng(seed)
    test, liars = new_test(), devices // 100
    test.on_trial = devices
    for difference in differences(seed, labels, bias=bias).tolist():
        if lie and rng.random() < flood * liars / devices:
            test.add(lie, f"liar-{rng.integers(liars)}")
        if test.add(difference, f"device-{rng.integers(devices)}") != "hold":
            break
    return test


@pytest.mark.parametrize("lie", [1.0, 0.1, -1.0, -0.1])
def test_one_device_in_a_hundred_changes_no_verdict_whatever_it_says_and_how_often(lie):
    for seed in range(3):
        equal, broken = campaign(seed, lie), campaign(seed, lie, bias=0.5)
        assert (equal.verdict, broken.verdict) == ("promote", "stop"), f"seed {seed}"
        assert equal.unheard > 0


def test_without_the_loudest_devices_evidence_is_never_more_than_that_of_the_honest():
    rng = np.random.default_rng(3)
    lying, honest = Wager(effect=None), Wager(effect=None)
    for payoff in rng.normal(0, 0.05, 4000).tolist():
        name = int(rng.integers(200))
        lying.add(1.0 if name < 2 else payoff, str(name))
    for name, part in lying.parts.items():
        honest.log_capital += part if int(name) >= 2 else 0.0
    assert lying.evidence > 1e9
    assert lying.standing(2) <= honest.evidence * (1 + 1e-9)


def test_in_a_small_trial_every_device_is_heard_in_full():
    test = new_test()
    for at in range(49):
        test.add(0.9, f"device-{at}")
    assert (test.may_lie, test.difference_sum) == (0, pytest.approx(0.9 * 49))
    test.add(0.9, "device-49")
    assert (test.may_lie, test.difference_sum) == (2, pytest.approx(0.9 * 49 + 0.25))
