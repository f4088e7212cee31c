"""The promises S1 to S7 of staged rollout: what evidence may never do, and how soon it must act.

Each runs with few seeds here and with all of them in `make slow`; the arrays of tools/bench-rollout
say what the classes say (`tests/unit/test_tools_bench_rollout.py`).
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from cloud_learner.rollout.evidence import TrialEvidence
from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from edge_runtime.wire.messages import Scored

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("HEADWATER_DATA", ROOT / ".." / "shared" / "data"))


def seeds(few, full):
    slow = pytest.param(full, id=str(full), marks=pytest.mark.slow)
    return pytest.mark.parametrize("seeds", [pytest.param(few, id=str(few)), slow])


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def failures(tool):
    return tool("bench_rollout_failures")


def most(alpha, count):
    """Three standard deviations above what `alpha` allows on average."""
    return alpha * count + 3 * (alpha * count) ** 0.5


@seeds(8, 1000)
def test_s1_a_release_that_is_no_worse_is_stopped_in_one_percent_of_all_trials(failures, seeds):
    (row, *_) = failures.false_stops(seeds)
    assert row.value * seeds <= most(failures.ALPHA_STOP, seeds)


@seeds(20, 500)
def test_s1_what_a_pool_of_unequal_devices_takes_for_harm_is_chance(failures, seeds):
    assert failures.pooled_stops(seeds, 2.0) > 10 * failures.ALPHA_STOP
    assert failures.pooled_stops(seeds, 0.0) * seeds <= most(failures.ALPHA_STOP, seeds)


@seeds(40, 1000)
@pytest.mark.parametrize(("share", "reach"), [(0.2, 38), (0.5, 65)])
def test_s2_twice_the_failures_are_seen_in_time(failures, seeds, share, reach):
    stops = [stopped(failures, seed, share, ratio=2.0) for seed in range(seeds)]
    assert max(stops) < math.inf
    assert np.median(stops) <= reach + 3 * 25 / math.sqrt(seeds)


@seeds(40, 1000)
@pytest.mark.parametrize(("share", "reach"), [(0.2, 8), (0.5, 15)])
def test_s3_a_disaster_is_stopped_at_once(failures, seeds, share, reach):
    stops = [stopped(failures, seed, share, ratio=10.0) for seed in range(seeds)]
    assert np.median(stops) <= reach + 3 * 4 / math.sqrt(seeds)


def stopped(failures, seed, share, ratio):
    world = failures.World(rounds=400, share=share, ratio=ratio)
    return failures.stopped_after(failures.counts(np.random.default_rng(seed), world))


@pytest.mark.parametrize("stream", ["nothing", "NaN", "one label", "one answer", "identical"])
def test_s4_where_nothing_can_be_told_the_trial_holds(stream):
    trial = TrialEvidence.start(
        "f", "old", "new", Task(), margin=0.0025, alpha_promote=0.02, alpha_stop=0.01
    )
    rng = np.random.default_rng(0)
    trial.examples(example(seq, stream, rng) for seq in range(1, 9000) if stream != "nothing")
    assert (trial.not_worse, trial.harm) == (False, "")


def example(seq, stream, rng) -> Example:
    label = 1.0 if stream == "one label" else float(rng.random() < 0.25)
    old = float(rng.uniform(0.2, 0.3))
    new = {"NaN": math.nan, "one answer": 0.25, "identical": old}.get(stream, old + 0.05)
    scored = [Scored("old", "stable", [old]), Scored("new", "canary", [new])]
    return Example("a", 1, seq, "f", float(seq), 0.0, b"", "", label, 0.5, scored, 0.0, 0.0)


@seeds(10, 300)
def test_s5_a_ramp_while_failures_rise_for_all_is_not_taken_for_harm(failures, seeds):
    stops = naive = 0
    for seed in range(seeds):
        counted = ramp(failures, np.random.default_rng(seed))
        stops += failures.stopped_after(counted) < math.inf
        naive += pooled(failures, counted) >= failures.REACH
    assert stops <= most(failures.ALPHA_STOP, seeds)
    assert naive > seeds / 2


def ramp(failures, rng, devices=100, rounds=400):
    """From 1 to 50 % of the devices while the rate of failure grows threefold for everybody."""
    percent = np.repeat([1, 5, 20, 50], rounds // 4)
    tried = np.arange(devices)[:, None] < percent * devices / 100
    rates = np.broadcast_to(np.linspace(0.01, 0.03, rounds), (devices, rounds))
    answered = rng.binomial(20, np.where(tried, 0.5, 0.0))
    failed = rng.binomial(answered, rates)
    return failures.Counts(answered, failed, 20 - answered, rng.binomial(20 - answered, rates))


def pooled(failures, counted):
    """The evidence of one look at the sums over all devices and stages."""
    answered, failed, stable_answered, stable_failed = (each.sum() for each in counted)
    share = answered / (answered + stable_answered)
    both = failed + stable_failed
    gains = failed * failures.LOG_RATIOS - both * np.log1p(share * (np.array([1.5, 2.0, 10.0]) - 1))
    return failures.log_mean(gains[None, :])[0]


@seeds(1, 50)
def test_s6_one_device_in_a_hundred_changes_no_verdict(tool, seeds):
    unchanged, turned, shouted = tool("bench_rollout_liars").liars(seeds)
    assert unchanged.value >= 0.95
    assert (turned.value, shouted.value) == (0, 0)


@seeds(4, 200)
def test_s7_a_bandit_finds_the_best_arm_again_and_none_falls_below_the_floor(tool, seeds):
    bandit = tool("bench_rollout_bandit")
    regained, worst = bandit.regained(seeds)
    assert regained.ok
    assert worst.value > 0.85
    for seed in range(min(seeds, 4)):
        assert min(shares.min() for shares, *_ in bandit.played(seed)) >= bandit.FLOOR


@seeds(20, 1000)
def test_s7_logged_propensities_tell_what_other_shares_would_have_earned(tool, seeds):
    for row in tool("bench_rollout_bandit").covered(seeds):
        assert row.value <= 2.0 + 300 * (0.0475 / seeds) ** 0.5, row.what


@pytest.mark.skipif(
    len([*(DATA / "openbandit").glob("*/*/*men.csv")]) < 4,
    reason="$HEADWATER_DATA has no openbandit",
)
def test_s7_on_real_logs_the_interval_covers_the_rate_that_was_really_had(tool):
    (row, *_) = tool("bench_rollout_bandit").open_bandit()
    assert row.ok
