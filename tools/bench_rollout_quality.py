"""Labelled quality under tools/bench-rollout: a worse model is stopped, an equal one promoted.

Why: both wagers of the paired test over many seeds; a test holds that the arrays say what the class
says.

How: labels are drawn from a true probability that both models see through noise of their own, so
that Brier score and AUC are those of flight delays; the worse one has so much more noise that it
loses two points of AUC. Equal models wander: over weeks the one or the other is better for a while,
so that without a margin one trial of ten would be stopped. Labels come in the order in which they
become known, most within a day, some after many.
"""

from __future__ import annotations

import math

import numpy as np
from bench_rows import Row

from cloud_learner.rollout.evidence import FAILURES_SHARE
from cloud_learner.stats.scores import auc
from cloud_learner.stats.sequential import _BET_MAX, _PRIOR_PAYOFFS, _PRIOR_SQUARE, HARM_SHARE

MARGIN, ALPHA_PROMOTE = 0.0025, 0.02
ALPHA_HARM = 0.01 * (1 - FAILURES_SHARE)
LABELS = 12_000
NOISE, NOISE_WORSE = 0.2, 0.556
WANDER, WANDER_LABELS = 0.001, 3000
CHUNK = 50


def answers(
    rng: np.random.Generator, shape: tuple[int, ...], noise: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, and what the stable and the new model say."""
    truth = rng.normal(-1.5, 1.15, shape)
    labels = (rng.random(shape) < sigmoid(truth)).astype(float)
    seen = truth + rng.normal(0, 0.3, shape)
    old = sigmoid(seen + rng.normal(0, NOISE, shape))
    return labels, old, sigmoid(seen + rng.normal(0, noise, shape))


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def differences(rng: np.random.Generator, trials: int, noise: float) -> np.ndarray:
    """Differences of the losses in the order in which labels come; (trials, LABELS)."""
    labels, old, new = answers(rng, (trials, LABELS), noise)
    found = (new - labels) ** 2 - (old - labels) ** 2 + wander(rng, trials)
    known = np.arange(LABELS) + rng.lognormal(5, 1.5, (trials, LABELS))
    return np.take_along_axis(found, np.argsort(known, 1), 1)


def wander(rng: np.random.Generator, trials: int) -> np.ndarray:
    """A mean that comes and goes (Ornstein-Uhlenbeck), with deviation WANDER."""
    steps = 60
    keep = math.exp(-LABELS / steps / WANDER_LABELS)
    path = np.empty((trials, steps))
    path[:, 0] = rng.normal(0, WANDER, trials)
    for at in range(1, steps):
        noise = rng.normal(0, WANDER * math.sqrt(1 - keep * keep), trials)
        path[:, at] = keep * path[:, at - 1] + noise
    return np.repeat(path, LABELS // steps, 1)


def capital(payoffs: np.ndarray, effect: float | None) -> np.ndarray:
    """The logarithmic capital of a `Wager` after each payoff, along the last axis."""
    before = np.arange(payoffs.shape[-1]) + _PRIOR_PAYOFFS
    squares = np.cumsum(payoffs**2, -1) - payoffs**2 + _PRIOR_SQUARE * _PRIOR_PAYOFFS
    means = (np.cumsum(payoffs, -1) - payoffs) / before if effect is None else effect
    return np.cumsum(np.log1p(np.clip(means / (squares / before), 0, _BET_MAX) * payoffs), -1)


def first(logs: np.ndarray, alpha: float) -> np.ndarray:
    """After how many labels the hypothesis is rejected; infinity: never."""
    hit = logs >= -math.log(alpha)
    return np.where(hit.any(-1), hit.argmax(-1) + 1.0, math.inf)


def verdicts(noise: float, seeds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """When each trial was found not worse, when harmful, when harmful if there were no margin."""
    safe, bad, bare = [], [], []
    for seed in range(0, seeds, CHUNK):
        found = differences(np.random.default_rng(seed), min(CHUNK, seeds - seed), noise)
        safe.append(first(capital(MARGIN - found, MARGIN), ALPHA_PROMOTE))
        bad.append(first(capital(found - MARGIN * HARM_SHARE, None), ALPHA_HARM))
        bare.append(first(capital(found, None), 0.01))
    return np.concatenate(safe), np.concatenate(bad), np.concatenate(bare)


def quality(seeds: int) -> list[Row]:
    """The worse model, and the equal one."""
    labels, old, new = answers(np.random.default_rng(0), (200_000,), NOISE_WORSE)
    lost = auc(labels, old) - auc(labels, new)
    safe, bad, _ = verdicts(NOISE_WORSE, seeds)
    worse = "model that is 2 points AUC worse, labels delayed"
    rows = [
        Row("  AUC that the worse model loses, in points", 100 * lost, "points"),
        Row(
            f"{worse}: stopped within 12,000 paired labels",
            np.isfinite(bad).mean(),
            "share",
            0.95,
            at_least=True,
        ),
        Row("  labels until it is stopped (median)", float(np.median(bad)), "labels"),
        Row("  found not worse before it was stopped", (safe < bad).mean(), "share", ALPHA_PROMOTE),
    ]
    safe, bad, bare = verdicts(NOISE, seeds)
    promoted = np.isfinite(safe) & (safe < bad)
    return [
        *rows,
        Row("the equal model is promoted", promoted.mean(), "share", 0.95, at_least=True),
        Row("  labels until it is promoted (median)", float(np.median(safe)), "labels", 4300),
        Row(
            "the equal model is stopped, to the 12,000th label",
            np.isfinite(bad).mean(),
            "share",
            0.03,
        ),
        Row("  the same if the margin were nought", np.isfinite(bare).mean(), "share"),
    ]
