"""Failures under tools/bench-rollout: false stops, and how soon harm is seen.

Why: a thousand trials of ten thousand looks each must be right in one percent; the class itself
would take hours over them, so the same formulas run over whole arrays, and a test holds that both
say the same step by step.

How: devices report after each round; a round has Poisson requests with a daily cycle, each answered
by the trial with its share. Rates of failure differ between devices (gamma, by coefficient of
variation), rise and fall over the day and drift. Devices join as the trial ramps up.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from bench_rows import Row

from cloud_learner.rollout.evidence import FAILURES_SHARE
from cloud_learner.stats.counting import RATIOS

ALPHA_STOP = 0.01
REACH = -math.log(ALPHA_STOP * FAILURES_SHARE)
DAY = 1000  # rounds
VARIATIONS = (0.0, 0.5, 1.0, 2.0)
LOG_RATIOS = np.log(RATIOS)


class World(NamedTuple):
    """A trial: shape, the trial's share of the answers, and how often it fails for once else."""

    devices: int = 40
    rounds: int = 10_000
    requests: float = 20.0
    base: float = 0.01
    variation: float = 1.0
    share: float = 0.2
    ratio: float = 1.0


class Counts(NamedTuple):
    """Answers and failures of trial and stable release; each of shape (devices, rounds)."""

    answered: np.ndarray
    failed: np.ndarray
    stable_answered: np.ndarray
    stable_failed: np.ndarray


def counts(rng: np.random.Generator, world: World) -> Counts:
    """What the devices count in each round."""
    shape = (world.devices, world.rounds)
    day = 2 * math.pi * np.arange(world.rounds) / DAY
    drift = np.exp(np.cumsum(rng.normal(0, 0.7 / math.sqrt(world.rounds), world.rounds)))
    rates = base_rates(rng, world)[:, None] * (1 + 0.5 * np.sin(day + 1)) * drift
    rates = np.minimum(rates, 0.9 / max(world.ratio, 1.0))
    requests = rng.poisson(np.broadcast_to(world.requests * (1 + 0.8 * np.sin(day)), shape))
    joined = (
        np.arange(world.rounds)
        >= rng.integers(0, max(world.rounds // 2, 1), world.devices)[:, None]
    )
    requests *= joined | (world.ratio > 1)
    answered = rng.binomial(requests, world.share)
    failed = rng.binomial(answered, rates * world.ratio)
    return Counts(answered, failed, requests - answered, rng.binomial(requests - answered, rates))


def base_rates(rng: np.random.Generator, world: World) -> np.ndarray:
    """One rate of failure a device."""
    if not world.variation:
        return np.full(world.devices, world.base)
    shape = world.variation**-2
    return rng.gamma(shape, world.base / shape, world.devices)


def evidence(counted: Counts) -> tuple[np.ndarray, np.ndarray]:
    """The logarithm of the evidence after each report with a failure; the trial's failures by then.

    As `Health` and `CountingTest` find it in a trial without liars.
    """
    failures = counted.failed + counted.stable_failed
    device, at = np.nonzero(failures)
    trial = np.cumsum(counted.answered, 1)[device, at]
    stable = np.cumsum(counted.stable_answered, 1)[device, at]
    same = np.r_[False, device[1:] == device[:-1]]
    trial_since = trial - np.where(same, np.r_[0, trial[:-1]], 0)
    stable_since = stable - np.where(same, np.r_[0, stable[:-1]], 0)
    share = (trial_since / (trial_since + stable_since))[:, None]
    own, both = counted.failed[device, at], failures[device, at]
    gains = own[:, None] * LOG_RATIOS - both[:, None] * np.log1p(share * (np.array(RATIOS) - 1))
    order = np.lexsort((device, at))
    return log_mean(np.cumsum(gains[order], 0)), np.cumsum(own[order])


def log_mean(logs: np.ndarray) -> np.ndarray:
    top = logs.max(1)
    return top + np.log(np.exp(logs - top[:, None]).mean(1))


def stopped_after(counted: Counts) -> float:
    """The trial's failures when it was stopped; infinity where it never was."""
    logs, failed = evidence(counted)
    hits = np.flatnonzero(logs >= REACH)
    return float(failed[hits[0]]) if len(hits) else math.inf


def false_stops(seeds: int) -> list[Row]:
    """A release that is no worse, looked at ten thousand times."""
    stops = 0
    for seed in range(seeds):
        world = World(variation=VARIATIONS[seed % 4], share=(0.2, 0.5)[seed // 4 % 2])
        stops += stopped_after(counts(np.random.default_rng(seed), world)) < math.inf
    what = "false stops, A/A, 10,000 peeks, device base rates with CV 0-2, drift, daily cycle"
    pooled = [
        Row(f"  the same pooled over unequal devices, CV {variation:g}", value, "share")
        for variation in VARIATIONS
        for value in [pooled_stops(seeds, variation)]
    ]
    return [Row(f"{what}, {seeds} seeds", stops / seeds, "share", ALPHA_STOP), *pooled]


def pooled_stops(seeds: int, variation: float) -> float:
    """1,000 devices, ten of them have the release alone: how often is chance taken for harm?"""
    stops, share, failures = 0, 0.01, 20_000
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        rates = base_rates(rng, World(devices=1000, variation=variation))
        own = rng.random(failures) < rates[:10].sum() / rates.sum()
        gains = own[:, None] * LOG_RATIOS - np.log1p(share * (np.array(RATIOS) - 1))
        stops += bool((log_mean(np.cumsum(gains, 0)) >= REACH).any())
    return stops / seeds


def harm(seeds: int) -> list[Row]:
    """How many failures of the release it takes until it is stopped."""
    rows = []
    for ratio, name, reaches in (
        (2.0, "rate ratio 2 at 1 % base failures", (38, 65)),
        (10.0, "x10 disaster", (8, 15)),
    ):
        for share, reach in zip((0.2, 0.5), reaches, strict=True):
            world = World(rounds=400, share=share, ratio=ratio)
            stops = [
                stopped_after(counts(np.random.default_rng(seed), world)) for seed in range(seeds)
            ]
            what = f"{name}, trial answers {share:.0%} inside the device: stopped after (median)"
            rows.append(Row(what, float(np.median(stops)), "failures", reach))
            rows.append(Row("  never stopped", np.isinf(stops).mean(), "share"))
    return rows
