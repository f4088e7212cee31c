"""The prior of sessions is found again from sessions that were drawn from it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cloud_learner.train.prior import PastSession, learn_prior, next_prior
from edge_runtime.errors import RequestError
from edge_runtime.personal.head import Head
from edge_runtime.personal.moments import DEVIATIONS_MAX, SESSIONS_MAX, Moments
from edge_runtime.personal.prior import Prior

WIDTH = 3
MEAN = np.array([0.3, 0.0, -0.2, 0.0])
COVARIANCE = np.diag([0.3, 0.5, 0.02, 0.1]) + 0.1 * np.outer([1, 1, 0, 0], [1, 1, 0, 0])
NOISE = 0.2


def session_of(seed: int, task: str = "regression", labels: int = 25) -> PastSession:
    chance = np.random.default_rng(seed)
    weights = chance.multivariate_normal(MEAN, COVARIANCE)
    rows = chance.normal(0, 1, (labels, WIDTH)).astype(np.float32)
    shifts = weights[0] + rows @ weights[1:]
    if task == "regression":
        bases = chance.normal(3, 1, labels).astype(np.float32)
        told = bases + shifts + chance.normal(0, math.sqrt(NOISE), labels)
    else:
        bases = np.full(labels, 0.5 if task == "binary" else 0.0, np.float32)
        told = chance.logistic(shifts) > 0
    return PastSession(rows, bases, np.asarray(told, np.float32))


def test_the_prior_of_values_is_found_again():
    prior = learn_prior("regression", [session_of(seed) for seed in range(300)], region=5.0)

    np.testing.assert_allclose(prior.mean, MEAN, atol=0.1)
    np.testing.assert_allclose(prior.covariance, COVARIANCE, atol=0.1)
    assert prior.noise == pytest.approx(NOISE, rel=0.1)
    assert prior.patience == pytest.approx(math.log(100))


def drifting(seed: int, labels: int = 25) -> PastSession:
    chance, told = np.random.default_rng(seed), session_of(seed, labels=labels)
    weights, shifts = chance.multivariate_normal(MEAN, COVARIANCE), []
    for row in told.embeddings:
        shifts.append(weights[0] + row @ weights[1:])
        apart = math.sqrt(1 - 0.9**2) * (chance.multivariate_normal(MEAN, COVARIANCE) - MEAN)
        weights = MEAN + 0.9 * (weights - MEAN) + apart
    labels = told.bases + np.array(shifts) + chance.normal(0, math.sqrt(NOISE), labels)
    return PastSession(told.embeddings, told.bases, labels.astype(np.float32))


def test_the_prior_of_tastes_that_drift_is_found_again():
    sessions = [drifting(seed) for seed in range(250)]
    prior = learn_prior("regression", sessions, region=5.0, forgetting=0.1)
    still = learn_prior("regression", sessions, region=5.0)

    assert prior.forgetting == pytest.approx(0.1)
    np.testing.assert_allclose(prior.mean, MEAN, atol=0.15)
    np.testing.assert_allclose(prior.covariance, COVARIANCE, atol=0.15)
    assert abs(prior.noise - NOISE) < abs(still.noise - NOISE) / 3


def test_tastes_that_cancel_out_over_a_session_are_found():
    """Stories of one genre in ten, seldom clicked: no session's mean says much."""
    sessions, width, told = [], 10, 40
    for seed in range(150):
        chance = np.random.default_rng(seed)
        rows = np.eye(width, dtype=np.float32)[chance.integers(width, size=told)]
        clicks = chance.logistic(rows @ chance.normal(0, 1, width) - 2) > 0
        bases = np.full(told, 0.12, np.float32)
        sessions.append(PastSession(rows, bases, clicks.astype(np.float32)))
    prior = learn_prior("binary", sessions, region=5.0)

    assert np.diagonal(prior.covariance)[1:].mean() > 0.3


@pytest.mark.parametrize("task", ["binary", "ranking"])
def test_the_prior_of_odds_is_found_again_if_a_little_narrow(task):
    """One step of linearisation a label makes people seem more alike than they are."""
    sessions = [session_of(seed, task, labels=60) for seed in range(200)]
    prior = learn_prior(task, sessions, region=5.0)

    np.testing.assert_allclose(prior.mean, MEAN, atol=0.12)
    share = np.diagonal(prior.covariance)[:2] / np.diagonal(COVARIANCE)[:2]
    assert (share > 0.55).all()
    assert (share < 1.1).all()
    assert prior.covariance[0, 1] > 0


def test_the_same_sessions_give_the_same_prior():
    first, again = (
        learn_prior("regression", [session_of(seed) for seed in range(20)], region=5.0)
        for _ in range(2)
    )

    assert first.encode() == again.encode()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_sessions_still_give_a_prior(count):
    sessions = [session_of(seed, labels=2) for seed in range(count)]
    sessions.append(session_of(9, labels=0))
    prior = learn_prior("regression", sessions, region=5.0)

    assert np.linalg.eigvalsh(prior.covariance.astype(float))[0] > 0


def test_a_learned_prior_helps_more_than_a_flat_one():
    learned = learn_prior("regression", [session_of(seed) for seed in range(100)], region=5.0)
    eye = np.eye(WIDTH + 1, dtype=np.float32)
    flat = Prior("regression", eye[0] * 0, eye, 5.0, learned.norm_max, noise=NOISE)

    assert error_after_two(learned) < 0.9 * error_after_two(flat)


def error_after_two(prior: Prior) -> float:
    lost = []
    for seed in range(1000, 1300):
        head, past = Head(prior), session_of(seed, labels=3)
        told = list(zip(past.embeddings, past.bases.tolist(), past.labels.tolist(), strict=True))
        for each in told[:2]:
            head.adapt(*each)
        lost.append((head.answer(*told[2][:2]) - told[2][2]) ** 2)
    return float(np.mean(lost))


def start() -> Prior:
    eye = np.eye(WIDTH + 1, dtype=np.float32)
    return Prior("regression", eye[0] * 0, eye / 2, 5.0, norm_max=10.0, noise=NOISE)


def moments_of(prior: Prior, seeds: range) -> Moments:
    moments = Moments.none(prior)
    for seed in seeds:
        head, past = Head(prior), session_of(seed)
        for row, base, label in zip(past.embeddings, past.bases, past.labels, strict=True):
            head.adapt(row, float(base), float(label))
        moments.add(head)
    return moments


def test_what_devices_say_moves_the_prior_towards_their_people():
    prior = start()
    told = [moments_of(prior, range(20 * n, 20 * n + 20)) for n in range(10)]
    after = next_prior(prior, told, cap=50)

    assert np.abs(after.mean - MEAN).max() < 0.1
    assert np.abs(after.covariance - COVARIANCE).max() < 0.15


def test_a_device_counts_for_no_more_than_its_cap():
    prior = start()
    honest = [moments_of(prior, range(10 * n, 10 * n + 10)) for n in range(10)]
    loud = Moments.none(prior)
    loud.sessions = 900.0
    loud.first = 900.0 * DEVIATIONS_MAX / 2 * np.sqrt(np.diagonal(prior.covariance).astype(float))
    loud.second = np.outer(loud.first, loud.first) / 900.0
    loud = Moments.decode(loud.encode(), prior)
    before = next_prior(prior, honest, cap=10)
    after = next_prior(prior, [*honest, loud], cap=10)

    most = DEVIATIONS_MAX * np.sqrt(np.diagonal(prior.covariance))
    assert (np.abs(after.mean - before.mean) <= 10 / 110 * (most + np.abs(before.mean))).all()


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("beyond what is clipped", {"first": np.full(WIDTH + 1, 1e9)}),
        ("not finite", {"first": np.full(WIDTH + 1, np.nan)}),
        ("beyond what is clipped", {"second": 1e9 * np.eye(WIDTH + 1)}),
        ("negative eigenvalue", {"second": -np.eye(WIDTH + 1)}),
        ("sessions", {"sessions": -1.0}),
        ("sessions", {"sessions": 9.0}),
        ("sessions", {"sessions": float("nan")}),
    ],
)
def test_moments_that_nobody_can_have_are_refused(why, change):
    prior = start()
    moments = moments_of(prior, range(10))
    for name, value in change.items():
        setattr(moments, name, value)

    with pytest.raises(RequestError, match=why):
        Moments.decode(moments.encode(), prior)


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[:-4], lambda data: b"\x93"])
def test_bytes_that_are_no_moments_are_refused(spoil):
    prior = start()

    with pytest.raises(RequestError) as caught:
        Moments.decode(spoil(moments_of(prior, range(10)).encode()), prior)

    assert caught.value.code == "bad_moments"


def test_moments_of_another_prior_are_refused():
    told = moments_of(start(), range(10)).encode()
    other = learn_prior("regression", [session_of(1)], region=5.0)

    with pytest.raises(RequestError, match="another prior"):
        Moments.decode(told, other)


def test_moments_add_up_and_bytes_count_no_more_than_their_cap():
    prior = start()
    whole, part = moments_of(prior, range(8)), moments_of(prior, range(4))
    part.merge(moments_of(prior, range(4, 8)))

    np.testing.assert_allclose(part.second, whole.second)
    whole.merge(whole, weight=1e6)
    assert Moments.decode(whole.encode(), prior).sessions == pytest.approx(SESSIONS_MAX)


def test_a_session_without_labels_says_nothing():
    moments = Moments.none(start())
    moments.add(Head(moments.prior))

    assert moments.sessions == 0
