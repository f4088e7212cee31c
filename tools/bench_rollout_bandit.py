"""Bandit and estimates under tools/bench-rollout: the best arm found again, the truth covered.

Why: shares that follow rewards must notice when another release becomes the best one, though
rewards are an hour late; and what such shares would have earned must be known from logs.

How: three releases whose answers earn a click or not; a plan every quarter of an hour, rewards an
hour later. In the middle the best arm and the worst change places. The Open Bandit data (ZOZO, ten
thousand impressions of a shop front a campaign and policy) has logs of two policies with their
propensities: from those of the one the click rate of the other is estimated, and compared with the
rate that the other really had.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bench_rows import Row

from cloud_learner.stats.bandit import Bandit
from cloud_learner.stats.offpolicy import Estimate, dr, ips, snips

DATA = Path(os.environ.get("HEADWATER_DATA", Path(__file__).parents[1] / "../shared/data"))
RATES = np.array([0.06, 0.04, 0.03])
BATCHES, CHANGE, DELAY = 192, 96, 4  # of a quarter of an hour: a day and a day
ANSWERS, LOGGED = 1000, 200  # a batch: where the bandit is measured, where its logs are
MEMORY, FLOOR = 16.0, 0.05
NAMES = ["a", "b", "c"]


class Log(NamedTuple):
    """Answers in order: the arm, its propensity, the reward, and the rates of all arms then."""

    arms: np.ndarray
    logged: np.ndarray
    rewards: np.ndarray
    rates: np.ndarray


def played(
    seed: int, count: int = ANSWERS
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Batch by batch: shares, the rates of that time, answers and rewards of each arm."""
    rng = np.random.default_rng(seed)
    bandit = Bandit.start(NAMES, MEMORY, FLOOR)
    under_way: list[tuple[np.ndarray, np.ndarray]] = []
    for batch in range(BATCHES):
        rates = RATES if batch < CHANGE else RATES[::-1]
        shares = np.array(list(bandit.weights(rng).values()))
        answers = rng.multinomial(count, shares)
        rewards = rng.binomial(answers, rates)
        under_way.append((answers, rewards))
        for name, given in zip(NAMES, answers.tolist(), strict=True):
            bandit.answered(name, given)
        if len(under_way) > DELAY:
            for name, given, reward in zip(NAMES, *under_way.pop(0), strict=True):
                bandit.reward(name, float(reward), int(given))
        bandit.forget()
        yield shares, rates, answers, rewards


def regained(seeds: int) -> list[Row]:
    """What it earns at the end of the day after the change, as a share of the best arm's rate."""
    last = []
    for seed in range(seeds):
        earned = [float(shares @ rates) / rates.max() for shares, rates, _, _ in played(seed)]
        last.append(np.mean(earned[-8:]))
    what = "bandit, delay 1 h, best arm changes: regains of the best arm's reward within the window"
    return [
        Row(f"{what} of 24 h (median)", float(np.median(last)), "share", 0.9, at_least=True),
        Row("  the worst of twenty seeds", float(np.quantile(last, 0.05)), "share"),
    ]


def log_of(seed: int) -> Log:
    """The answers one by one, as devices log them."""
    rng = np.random.default_rng(seed)
    parts = []
    for shares, rates, answers, rewards in played(seed, LOGGED):
        arms = np.repeat(np.arange(3), answers)
        clicks = np.concatenate(
            [rng.permutation(np.arange(n) < k) for n, k in zip(answers, rewards, strict=True)]
        )
        parts.append((arms, shares[arms], clicks.astype(float), np.tile(rates, (len(arms), 1))))
    return Log(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def covered(seeds: int) -> list[Row]:
    """How often the intervals hold what a policy of equal shares would have earned."""
    hits = {"IPS": 0, "SNIPS": 0, "DR": 0}
    for seed in range(seeds):
        log = log_of(seed)
        truth = float(log.rates.mean())
        for name, found in estimates(log).items():
            hits[name] += found.low <= truth <= found.high
    return [
        Row(
            f"{name} intervals cover the truth in 93-97 % of seeds: away from 95 %",
            off,
            "points",
            reach,
        )
        for name, hit in hits.items()
        for off, reach in [(abs(100 * hit / seeds - 95), None if name == "IPS" else 2.0)]
    ]


def estimates(log: Log) -> dict[str, Estimate]:
    """Of equal shares; the model behind DR is that the clicks are those before the change."""
    chance = np.full(len(log.arms), 1 / 3)
    believed = RATES[log.arms]
    expected = np.full(len(log.arms), RATES.mean())
    return {
        "IPS": ips(log.rewards, chance, log.logged),
        "SNIPS": snips(log.rewards, chance, log.logged),
        "DR": dr(log.rewards, chance, log.logged, believed, expected),
    }


class Shown(NamedTuple):
    """Impressions: item and place, whether clicked, how likely it was shown."""

    where: list[tuple[str, str]]
    clicks: np.ndarray
    logged: np.ndarray


EFFECTIVE_MIN = 100.0


def open_bandit() -> list[Row]:
    """From the logs of either policy the click rate of the other, where they overlap enough."""
    rows, inside, asked = [], 0, 0
    for campaign in ("men", "women"):
        random, thompson = shown("random", campaign), shown("bts", campaign)
        for name, of, target in (
            ("random logs, Thompson's rate", random, thompson),
            ("Thompson's logs, random rate", thompson, random),
        ):
            found = snips(of.clicks, chances(of, target), of.logged)
            rate = float(target.clicks.mean())
            text = f"  {campaign}, {name}: {100 * found.value:.2f} ({100 * found.low:.2f} to "
            text += f"{100 * found.high:.2f}) % for {100 * rate:.2f} %; rows that weigh"
            rows.append(Row(text, found.effective_rows, "rows"))
            if found.effective_rows >= EFFECTIVE_MIN:
                asked += 1
                inside += found.low <= rate <= found.high
    what = "on the Open Bandit data the interval covers the on-policy click rate, where rows weigh"
    return [Row(what, inside / asked, "share", 1.0, at_least=True), *rows]


def shown(policy: str, campaign: str) -> Shown:
    """One log. Raises: FileNotFoundError."""
    with (DATA / "openbandit" / policy / campaign / f"{campaign}.csv").open() as lines:
        found = list(csv.DictReader(lines))
    return Shown(
        [(row["item_id"], row["position"]) for row in found],
        np.array([float(row["click"]) for row in found]),
        np.array([float(row["propensity_score"]) for row in found]),
    )


def chances(of: Shown, target: Shown) -> np.ndarray:
    """How likely `target`'s policy shows what `of` showed: how often it did, place by place.

    A uniform policy logs the same propensity everywhere, and is taken at its word.
    """
    if np.ptp(target.logged) < 1e-9:
        return np.full(len(of.where), target.logged[0])
    times: dict[tuple[str, str], int] = {}
    places: dict[str, int] = {}
    for item, place in target.where:
        times[item, place] = times.get((item, place), 0) + 1
        places[place] = places.get(place, 0) + 1
    return np.array([times.get(where, 0) / places[where[1]] for where in of.where])
