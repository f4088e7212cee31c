"""Moments of the first version are read, and written, as they were."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import RequestError
from edge_runtime.personal.head import Head
from edge_runtime.personal.moments import DEVIATIONS_MAX, SESSIONS_MIN, Moments
from edge_runtime.personal.prior import Prior

FROZEN = json.loads((Path(__file__).parents[1] / "fixtures" / "moments-v1.json").read_text())
PRIOR, TOLD = (base64.b64decode(FROZEN[name]) for name in ("prior_b64", "moments_b64"))


def test_frozen_moments_of_a_frozen_prior_say_what_they_said():
    prior = Prior.decode(PRIOR)
    moments = Moments.decode(TOLD, prior)

    assert prior.forgetting == 0.0625
    assert moments.sessions == FROZEN["sessions"]
    np.testing.assert_allclose(moments.first, FROZEN["first"], atol=1e-5)
    np.testing.assert_allclose(moments.second, FROZEN["second"], atol=1e-5)


def test_they_are_written_as_they_were_read():
    prior = Prior.decode(PRIOR)

    assert prior.encode() == PRIOR
    assert Moments.decode(TOLD, prior).encode() == TOLD


def narrow(width: int = 32) -> Prior:
    """People differ in two directions, and hardly in any other."""
    chance = np.random.default_rng(5)
    root = chance.normal(0, 1, (width + 1, 2))
    covariance = root @ root.T
    covariance += 1e-5 * np.linalg.eigvalsh(covariance)[-1] * np.eye(width + 1)
    covariance = ((covariance + covariance.T) / 2).astype(np.float32)
    return Prior("regression", covariance[0] * 0, covariance, region=9.0, norm_max=100.0)


def session_of(prior: Prior, seed: int, labels: int) -> Head:
    chance, head = np.random.default_rng(seed), Head(prior)
    tastes = chance.multivariate_normal(prior.mean, prior.covariance)
    for row in chance.normal(0, 0.3, (labels, prior.width)).astype(np.float32):
        head.adapt(row, 0.0, float(tastes[0] + row @ tastes[1:] + chance.normal()))
    return head


def test_honest_sessions_are_taken_however_long_and_alike_they_are():
    prior = narrow()
    moments = Moments.none(prior)
    for seed in range(20):
        moments.add(session_of(prior, seed, labels=500))

    assert Moments.decode(moments.encode(), prior).sessions == 20


def test_a_session_counts_as_no_farther_than_is_clipped_in_any_direction():
    prior = narrow()
    chance, head = np.random.default_rng(1), session_of(prior, 1, labels=1)
    for _ in range(20):
        head.mean[:] = chance.normal(0, 10.0 ** chance.integers(-4, 4), len(head.mean))
        moments = Moments.none(prior)
        moments.add(head)
        far = np.linalg.norm(prior.whitener @ moments.first)
        moments.merge(moments, SESSIONS_MIN - 1)

        assert far <= 1.0001 * DEVIATIONS_MAX
        Moments.decode(moments.encode(), prior)


def test_what_is_small_in_each_weight_and_far_in_a_narrow_direction_is_refused():
    prior = narrow()
    moments = Moments.none(prior)
    for seed in range(SESSIONS_MIN):
        moments.add(session_of(prior, seed, labels=3))
    narrowest = np.linalg.eigh(prior.covariance.astype(np.float64))[1][:, 0]
    moments.first = 2.0 * narrowest
    assert (np.abs(moments.first) < np.sqrt(np.diagonal(prior.covariance))).all()

    with pytest.raises(RequestError, match="their mean is beyond"):
        Moments.decode(moments.encode(), prior)
