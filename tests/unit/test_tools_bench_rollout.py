"""tools/bench-rollout: its arrays say what the classes say step by step; absent data is told."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cloud_learner.rollout.health import Health
from cloud_learner.stats.counting import CountingTest
from cloud_learner.stats.sequential import PairedTest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(TOOLS))


@pytest.mark.parametrize(("ratio", "share"), [(1.0, 0.5), (2.0, 0.2), (10.0, 0.5)])
def test_evidence_over_arrays_is_that_of_reports_one_by_one(tool, ratio, share):
    failures, liars = tool("bench_rollout_failures"), tool("bench_rollout_liars")
    world = failures.World(devices=12, rounds=30, share=share, ratio=ratio)
    counted = failures.counts(np.random.default_rng(4), world)
    sums = [np.cumsum(each, 1) for each in counted]
    alpha = failures.ALPHA_STOP * failures.FAILURES_SHARE
    health = Health(family="f", stable="old", canary="new", failures=CountingTest(alpha=alpha))
    logs, stops = [], []
    for number in range(world.rounds + 1):
        for device in range(world.devices):
            values = [int(each[device, number - 1]) if number else 0 for each in sums]
            before = health.failures.failures
            health.add(liars.said(device, number, values))
            if health.failures.failures > before:
                logs.append(np.log(health.failures.evidence(world.devices)))
                stops.append(health.harmful)

    found, failed = failures.evidence(counted)

    np.testing.assert_allclose(found, logs, atol=1e-9)
    assert failed[-1] == health.failures.trial == counted.failed.sum()
    expected = float(failed[stops.index(True)]) if any(stops) else np.inf
    assert failures.stopped_after(counted) == expected


def test_capital_over_arrays_is_that_of_differences_one_by_one(tool):
    quality = tool("bench_rollout_quality")
    found = quality.differences(np.random.default_rng(1), 2, quality.NOISE_WORSE)[0, :1500]
    test = PairedTest.start(quality.MARGIN, quality.ALPHA_PROMOTE, quality.ALPHA_HARM)
    safe, bad = [], []
    for difference in found.tolist():
        test.add(difference)
        safe.append(test.noninferior.log_capital)
        bad.append(test.harm.log_capital)

    harm = quality.MARGIN * quality.HARM_SHARE
    np.testing.assert_allclose(quality.capital(quality.MARGIN - found, quality.MARGIN), safe)
    np.testing.assert_allclose(quality.capital(found - harm, None), bad, atol=1e-9)


def test_the_log_of_a_bandit_holds_what_it_played(tool):
    bandit = tool("bench_rollout_bandit")
    batches = list(bandit.played(3, bandit.LOGGED))
    log = bandit.log_of(3)

    assert len(log.arms) == bandit.BATCHES * bandit.LOGGED
    assert log.rewards.sum() == sum(rewards.sum() for *_, rewards in batches)
    assert log.logged.min() >= bandit.FLOOR
    assert set(np.unique(log.rewards)) <= {0.0, 1.0}


def test_a_part_prints_rows_and_says_whether_all_was_reached():
    command = [
        sys.executable,
        TOOLS / "bench-rollout",
        "--json",
        "--seeds",
        "3",
        "--only",
        "bandit",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    rows = json.loads(done.stdout)["rows"]
    assert rows[0]["what"].startswith("bandit, delay 1 h, best arm changes")
    assert rows[0]["ok"]


def test_a_part_whose_data_is_not_here_is_skipped_and_says_so(tmp_path):
    command = [sys.executable, TOOLS / "bench-rollout", "--json", "--only", "open-bandit"]
    env = {**os.environ, "HEADWATER_DATA": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)

    assert json.loads(done.stdout)["rows"] == []
    assert "open-bandit is skipped" in done.stderr
    assert str(tmp_path) in done.stderr
