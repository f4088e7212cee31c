"""The prior of sessions, learned from sessions that are over, and from what devices say of theirs.

Why: how people differ, and in which directions of the embedding together, is known before one of
them comes; a device that starts from it needs two labels where it would need twenty.

The method is empirical Bayes by expectation maximisation: the device's own head learns each past
session, and the next prior has the mean and the covariance of what the heads believe (Dempster,
Laird and Rubin 1977, for random effects). The first prior comes of moments: how much of the
residuals' variance lies between sessions, shared out evenly over the embedding's directions. That
is far too little where tastes point in many directions and cancel out over a session, and each
round mends little of it; so it is widened for as long as heads that start from it foresee labels
better. It stays in the sum as `STRENGTH` sessions of its own, so that few sessions still give a
covariance with positive eigenvalues.

Invariants: learning uses the code that serves; the same sessions in the same order give the same
prior. No device counts for more than `cap` sessions, and what a device says is checked before.

Knows nothing about packages or files, and needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edge_runtime.personal.head import Head
from edge_runtime.personal.moments import Moments
from edge_runtime.personal.odds import loss_of, odds_of, probability
from edge_runtime.personal.prior import NORM_MAX, PATIENCE, Matrix, Prior, Task, Vector

Floats = npt.NDArray[np.float64]

ROUNDS = 12
STRENGTH = 10.0
WIDENINGS_MAX, WIDER = 6, 4.0
_VARIANCE_MIN = 1e-4  # of the noise: a direction in which no two sessions ever differed
_CERTAIN = 1e-5  # of the largest eigenvalue; float32 keeps it apart from 0
_NOISE_MIN = 1e-6
_NORM_ROOM = 2.0  # to the longest embedding that was seen


@dataclass(frozen=True)
class PastSession:
    """What a session was told, in its order: embeddings (count, width), bases, labels (count,)."""

    embeddings: Matrix
    bases: Vector
    labels: Vector


def learn_prior(
    task: Task,
    sessions: Sequence[PastSession],
    region: float,
    *,
    forgetting: float = 0.0,
    rounds: int = ROUNDS,
    start: Prior | None = None,
    others: tuple[Prior, float] | None = None,
) -> Prior:
    """The prior that makes `sessions` likely; a family declares `region` and `forgetting`.

    Sessions without labels say nothing; there must be one with some. `start` is a prior of the same
    embedding to go on from, where one is known. `others` is a prior of sessions that are not here,
    and how many they are.
    """
    told = [session for session in sessions if len(session.labels)]
    first = replace(_first(task, told, region), patience=math.inf, forgetting=forgetting)
    first = _widened(first, told) if start is None else _as_wide(first, start)
    prior = first if start is None else _from(start, first)
    anchor = (first, STRENGTH) if others is None else (others[0], STRENGTH + others[1])
    for _ in range(rounds):
        learned = _learned(prior, told)
        prior = replace(_next(learned.moments, *anchor), noise=learned.noise)
    return replace(prior, patience=PATIENCE)


def next_prior(
    prior: Prior, told: Iterable[Moments], cap: float, strength: float = STRENGTH
) -> Prior:
    """The prior after what devices say of their sessions, a device's moments each.

    A device of more than `cap` sessions counts for `cap`; the prior itself counts for `strength`
    sessions.
    """
    moments = Moments.none(prior)
    for own in told:
        moments.merge(own, min(1.0, cap / own.sessions))
    return _next(moments, prior, strength)


def _from(start: Prior, first: Prior) -> Prior:
    """`first` with what `start` knows already."""
    return replace(first, mean=start.mean, covariance=start.covariance, noise=start.noise)


def _first(task: Task, sessions: Sequence[PastSession], region: float) -> Prior:
    """Residuals by their moments: half of the spread between sessions is the bias's."""
    residuals = [_residuals(task, session, region) for session in sessions]
    embeddings = np.concatenate([session.embeddings for session in sessions])
    lengths = np.square(embeddings, dtype=np.float64).sum(axis=1)
    means = np.array([each.mean() for each in residuals])
    noise = max(float(np.mean(np.square(np.concatenate(residuals)))), _NOISE_MIN)
    spread = max(float(means.var()), _VARIANCE_MIN * noise)
    size = 1 + embeddings.shape[1]
    variances = np.full(size, spread / 2 / max(float(lengths.mean()), _NOISE_MIN))
    variances[0] = spread / 2
    return Prior(
        task,
        np.zeros(size, np.float32),
        np.diag(variances).astype(np.float32),
        region,
        norm_max=room_of(embeddings),
        noise=noise,
    )


def room_of(embeddings: Matrix) -> float:
    """How long an embedding may be, where these (rows, width) are usual."""
    longest = float(np.linalg.norm(embeddings.astype(np.float64), axis=1).max())
    return min(_NORM_ROOM * longest, NORM_MAX) or 1.0


def _residuals(task: Task, session: PastSession, region: float) -> Floats:
    """On the scale of the shift; of log odds one Newton step from the base."""
    bases, labels = session.bases.astype(np.float64), session.labels.astype(np.float64)
    if task == "regression":
        return np.asarray(np.clip(labels - bases, -region, region))
    odds = [odds_of(base) for base in bases] if task == "binary" else list(bases)
    chances = np.array([probability(each) for each in odds])
    slope = (chances * (1 - chances)).mean() or 1.0
    return np.asarray(np.clip((labels - chances) / slope, -region, region))


def _widened(prior: Prior, sessions: Sequence[PastSession]) -> Prior:
    """The prior with the variances of all weights but the bias raised as long as that helps."""
    surprise = _learned(prior, sessions).surprise
    for _ in range(WIDENINGS_MAX):
        wider = _wider(prior, WIDER)
        if (found := _learned(wider, sessions).surprise) >= surprise:
            break
        prior, surprise = wider, found
    return prior


def _as_wide(prior: Prior, other: Prior) -> Prior:
    """The prior with weights that vary as much, all together, as those of the other."""
    own, others = (np.trace(each.covariance[1:, 1:]) for each in (prior, other))
    return _wider(prior, float(others / own))


def _wider(prior: Prior, times: float) -> Prior:
    covariance = prior.covariance.copy()
    covariance[1:, 1:] *= times
    return replace(prior, covariance=covariance)


@dataclass(frozen=True)
class _Learned:
    """What past sessions' heads believe at their ends, and how badly they foresaw their labels.

    `noise` is what is left of a value right after it was learned, with what its head is unsure of
    there: on average the noise of labels, also where a head has forgotten that one at its end.
    """

    moments: Moments
    surprise: float
    noise: float


def _learned(prior: Prior, sessions: Sequence[PastSession]) -> _Learned:
    moments, surprise, left = Moments.none(prior), 0.0, [prior.noise]
    for session in sessions:
        head = Head(prior)
        told = zip(session.bases.tolist(), session.labels.tolist(), strict=True)
        for embedding, (base, label) in zip(session.embeddings, told, strict=True):
            surprise += _surprise(head, embedding, base, label)
            head.adapt(embedding, base, label)
            if prior.task == "regression":
                unsure = head.deviation(embedding) ** 2
                left.append(_left(head, embedding, base, label) ** 2 + unsure)
        moments.add(head)
    return _Learned(moments, surprise, max(float(np.mean(left)), _NOISE_MIN))


def _surprise(head: Head, embedding: Vector, base: float, label: float) -> float:
    """How little the head foresees the label: minus the log of its density or probability."""
    if head.prior.task == "regression":
        variance = head.deviation(embedding) ** 2 + head.prior.noise
        return (math.log(variance) + _left(head, embedding, base, label) ** 2 / variance) / 2
    odds = odds_of(base) if head.prior.task == "binary" else base
    return loss_of(odds + head.shift(embedding), label)


def _left(head: Head, embedding: Vector, base: float, label: float) -> float:
    """What the head does not explain of a value."""
    region = head.prior.region
    return max(-region, min(region, label - base)) - head.shift(embedding)


def _next(moments: Moments, anchor: Prior, strength: float) -> Prior:
    """The prior of these moments, with `anchor` as so many sessions more."""
    total = moments.sessions + strength
    mean = moments.prior.mean.astype(np.float64)
    apart = anchor.mean.astype(np.float64) - mean
    moved = (moments.first + strength * apart) / total
    square = moments.second + strength * (anchor.covariance + np.outer(apart, apart))
    covariance = square / total - np.outer(moved, moved)
    return replace(
        moments.prior,
        mean=(mean + moved).astype(np.float32),
        covariance=positive(covariance).astype(np.float32),
    )


def positive(covariance: Floats) -> Floats:
    """The nearest matrix in which no direction is taken for certain."""
    values, vectors = np.linalg.eigh(covariance)
    floored = np.maximum(values, _CERTAIN * values[-1])
    whole = (vectors * floored) @ vectors.T
    return np.asarray((whole + whole.T) / 2)
