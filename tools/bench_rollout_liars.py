"""Liars under tools/bench-rollout: what one device in a hundred can do to a verdict.

Why: counters and labels come from devices, and some may be in other hands. The classes themselves
run here, on forged reports and labels beside the honest ones.

How: two hundred devices, unequally busy; two of them lie and bring ten times as much as others. On
labels they claim the largest difference, for or against the release; in reports they say that it
always fails, or that the other does; they send each report twice, and old ones of others again.
What counts is the verdict beside that of the same honest devices alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import bench_rollout_failures as failures
import bench_rollout_quality as quality
import numpy as np
from bench_rows import Row

from cloud_learner.rollout.health import Health
from cloud_learner.stats.counting import CountingTest
from cloud_learner.stats.sequential import PairedTest
from edge_runtime.wire.messages import ArmReport, Report

DEVICES, LIARS, FLOOD = 200, 2, 10
ROUNDS = 60


def liars(seeds: int) -> list[Row]:
    """Both kinds of lies, in both directions."""
    found: list[tuple[bool, str, str]] = []
    for seed in range(seeds):
        for noise in (quality.NOISE, quality.NOISE_WORSE):
            harmless, honest = noise == quality.NOISE, on_labels(seed, noise, 0.0)
            found += [(harmless, honest, on_labels(seed, noise, lie)) for lie in (1.0, -1.0)]
        for ratio, lie in ((1.0, "fails"), (3.0, "serves")):
            honest, forged = on_reports(seed, ratio, ""), on_reports(seed, ratio, lie)
            found.append((ratio == 1.0, honest, forged))
    what = "forged reports and labels from 1 % of devices: verdict"
    same = np.mean([honest == forged for _, honest, forged in found])
    turned = np.mean([{honest, forged} == {"promote", "stop"} for _, honest, forged in found])
    shouted = np.mean(
        [harmless and honest != forged == "stop" for harmless, honest, forged in found]
    )
    return [
        Row(f"{what} unchanged, {seeds} seeds", float(same), "share", 0.95, at_least=True),
        Row("  turned into the opposite", float(turned), "share", 0.0),
        Row("  a harmless release stopped by lies", float(shouted), "share", 0.0),
    ]


def on_labels(seed: int, noise: float, lie: float) -> str:
    """The verdict of the paired test; with a `lie` the liars claim that difference."""
    rng = np.random.default_rng(seed)
    honest = quality.differences(rng, 1, noise)[0]
    busy = rng.lognormal(0, 0.8, DEVICES)
    busy[:LIARS] = 0
    names = rng.choice(DEVICES, len(honest), p=busy / busy.sum())
    forged = rng.random(len(honest)) < (FLOOD * LIARS / DEVICES if lie else 0)
    test = PairedTest.start(quality.MARGIN, quality.ALPHA_PROMOTE, quality.ALPHA_HARM)
    test.on_trial = DEVICES
    for at, difference in enumerate(honest.tolist()):
        if forged[at]:
            test.add(lie, f"liar-{at % LIARS}")
        if test.add(difference, f"device-{names[at]}") != "hold":
            break
    return test.verdict


def on_reports(seed: int, ratio: float, lie: str) -> str:
    """Whether reports stop the release; with a `lie` those of the liars, told first each time."""
    rng = np.random.default_rng(seed)
    world = failures.World(devices=DEVICES, rounds=ROUNDS, ratio=ratio)
    health = Health(
        family="f",
        stable="old",
        canary="new",
        failures=CountingTest(alpha=failures.ALPHA_STOP * failures.FAILURES_SHARE),
    )
    for report in reports(failures.counts(rng, world), lie):
        health.add(report)
        if health.harmful:
            return "stop"
    return "hold"


def reports(counted: failures.Counts, lie: str) -> Iterator[Report]:
    """What the devices report, round by round; the first only says that they are there."""
    sums = [np.cumsum(each, 1) for each in counted]
    for number in range(counted.answered.shape[1] + 1):
        at = number - 1
        for device in range(DEVICES):
            values = [int(each[device, at]) if number else 0 for each in sums]
            if device < LIARS and lie:
                values = forged(values, lie)
            report = said(device, number, values)
            yield report
            if device < LIARS and lie and number:
                yield report
                yield said(DEVICES - 1 - device, number // 2, [10**6, 10**6, 10**6, 0])


def forged(values: list[int], lie: str) -> list[int]:
    """Ten times the requests, and all of one side failed."""
    answered, _, stable_answered, _ = (FLOOD * value for value in values)
    if lie == "fails":
        return [answered, answered, stable_answered, 0]
    return [answered, 0, stable_answered, stable_answered]


def said(device: int, number: int, values: list[int]) -> Report:
    """A report with these answers and failures of the trial and of the stable release."""
    answered, failed, stable_answered, stable_failed = values
    arms = [
        ArmReport("f", "stable", "old", 0.0, answered=stable_answered, failed=stable_failed),
        ArmReport("f", "canary", "new", 0.0, answered=answered, failed=failed),
    ]
    name = f"device-{device}"
    return Report(1, name, 1, float(number), {}, arms, 1, {}, {}, [], 0, 0, number=number)
