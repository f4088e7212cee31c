"""Contests under tools/bench-rollout: A/B tests and a bandit as devices live them.

Why: formulas that are right on arrays must stay right once plans, draws by hash, logged
propensities and labels that come an hour late stand between them and the answers.

How: the contest itself and the devices' own plan code, in a world whose truth is known. The base
rate swings by the day. An A/B test is looked at after every answer; it is wrong when it ever names
a winner where there is none, or its interval leaves the true effect out at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
from bench_rows import Row

from cloud_learner.rollout.contest import MEMORY, Contest, Terms
from cloud_learner.simulate.customers import Customers
from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from edge_runtime.rollout.plan import Plan, PlanArm

HOUR_S, STEP_S, DELAY_S = 3600.0, 300.0, 3600.0
BASE, EFFECT = 0.06, 0.02
ANSWERS = 4000
AB = Terms(kind="ab", releases=("r1", "r2"), answers=ANSWERS)
LONG = Terms(kind="ab", releases=("r1", "r2"), answers=20_000)
BANDIT = Terms(kind="bandit", releases=("r1", "r2", "r3"))
CHANGE_S = 12 * HOUR_S
BATCH = 25


def contests(seeds: int) -> list[Row]:
    """A/A and A/B tests, then a bandit."""
    return [
        *without_effect(seeds),
        *with_effect(max(seeds // 10, 2)),
        *regained(max(seeds // 50, 2)),
    ]


def without_effect(seeds: int) -> list[Row]:
    """How often a winner is named where there is none."""
    found, took_s = 0, 0.0
    for seed in range(seeds):
        contest = begun(AB, seed)
        for fresh in answers(contest, lambda _, now_s: swinging(now_s), seed):
            began_s = time.perf_counter()
            won = any(contest.examples([each]) and contest.winner for each in fresh)
            took_s += time.perf_counter() - began_s
            if won:
                found += 1
                break
            if contest.is_over:
                break
    what = f"A/B test, no effect, {ANSWERS:,} answers, {ANSWERS:,} looks: a winner is named"
    return [
        Row(what, 100 * found / seeds, "% of tests", 1.0),
        Row("  a look costs", 1e6 * took_s / (seeds * ANSWERS), "us"),
    ]


def with_effect(seeds: int) -> list[Row]:
    """Two points more on six: how soon it is sure, and whether the interval holds the truth."""
    sure, held = [], 0

    def world(release: str, now_s: float) -> float:
        return swinging(now_s) + EFFECT * (release == "r2")

    for seed in range(seeds):
        contest = begun(LONG, seed)
        first = 0
        for fresh in answers(contest, world, seed):
            contest.examples(fresh)
            if not first and contest.winner == "r2":
                first = contest.ledger.answered
            if contest.is_over:
                break
        assert contest.effect is not None
        low, high = contest.effect.interval
        held += low <= EFFECT <= high
        sure.append(first or float("inf"))
    what = f"A/B test, {100 * EFFECT:g} points more on {100 * BASE:g}: "
    return [
        Row(f"{what}answers of both until it is sure (median)", float(np.median(sure)), "answers"),
        Row(
            f"{what}sure within {LONG.answers:,} answers",
            100 * float(np.mean(np.isfinite(sure))),
            "% of tests",
            90.0,
            at_least=True,
        ),
        Row(f"{what}the interval holds it", 100 * held / seeds, "% of tests", 99.0, at_least=True),
    ]


def regained(seeds: int) -> list[Row]:
    """A bandit of three through plans and devices, its best arm another after half a day."""
    window_s = MEMORY * BANDIT.every_s + DELAY_S
    found, least = [], 1.0

    def world(release: str, now_s: float) -> float:
        best = "r3" if now_s > CHANGE_S else "r2"
        return 0.10 if release == best else 0.05

    for seed in range(seeds):
        contest = begun(BANDIT, seed)
        customers = Customers("ads", 20, world, delay_s=DELAY_S, seed=seed)
        customers.follow(plan_of(contest, 1))
        earned, asked, seq = 0.0, 0, 1
        for now_s in np.arange(STEP_S, CHANGE_S + window_s + 2 * HOUR_S, STEP_S).tolist():
            before = customers.expected
            customers.ask(6 * BATCH, now_s)
            if now_s > CHANGE_S + window_s:
                earned, asked = earned + customers.expected - before, asked + 6 * BATCH
            contest.examples(customers.matured(now_s))
            if contest.is_due(now_s):
                contest.draw(customers.answered(BANDIT.releases), now_s)
                seq, least = seq + 1, min(least, *contest.shares)
                customers.follow(plan_of(contest, seq))
        found.append(earned / asked / 0.10)
    what = "bandit, delay 1 h, best arm changes: regained by plans on devices, within"
    return [
        Row(
            f"{what} {window_s / HOUR_S:g} h (median)",
            float(np.median(found)),
            "share",
            0.9,
            at_least=True,
        ),
        Row("  the least share of any release in any plan", least, "share", 0.05, at_least=True),
    ]


def swinging(now_s: float) -> float:
    """A base rate that follows the hour."""
    return BASE * (1 + 0.5 * float(np.sin(2 * np.pi * now_s / (24 * HOUR_S))))


def begun(terms: Terms, seed: int) -> Contest:
    """A contest whose draws are those of the seed."""
    return Contest.begin(terms, "ads", "reward", Task(), -float(seed))


def answers(
    contest: Contest, world: Callable[[str, float], float], seed: int
) -> Iterator[list[Example]]:
    """What matures, step by step, under the one plan of an A/B test."""
    customers = Customers("ads", 20, world, delay_s=DELAY_S, seed=seed)
    customers.follow(plan_of(contest, 1))
    now_s = 0.0
    while True:
        now_s += STEP_S
        customers.ask(4 * BATCH, now_s)
        yield customers.matured(now_s)


def plan_of(contest: Contest, seq: int) -> Plan:
    """The plan that devices have."""
    rows = zip(contest.terms.releases, contest.shares, strict=True)
    stable, canary, *others = (
        PlanArm(name, f"m/ads/{name}.onnx", "ab" * 32, number, share)
        for number, (name, share) in enumerate(rows)
    )
    return Plan(
        family="ads",
        seq=seq,
        stable=stable,
        canary=canary,
        others=tuple(others),
        salt=contest.salt,
    )
