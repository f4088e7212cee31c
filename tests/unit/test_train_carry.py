"""A prior carried to another embedding means what it meant before."""

from __future__ import annotations

import numpy as np
import pytest

from cloud_learner.train.carry import carried
from edge_runtime.personal.prior import Prior

WIDTH, ROWS = 6, 400
CHANCE = np.random.default_rng(2)
OLD = CHANCE.normal(0.3, 1.0, (ROWS, WIDTH)).astype(np.float32)


def prior_of(width: int = WIDTH) -> Prior:
    root = CHANCE.normal(0, 0.3, (width + 1, width + 1))
    covariance = (root @ root.T + 0.05 * np.eye(width + 1)).astype(np.float32)
    covariance = (covariance + covariance.T) / 2
    mean = CHANCE.normal(0, 0.5, width + 1).astype(np.float32)
    return Prior("binary", mean, covariance, 3.0, 20.0, forgetting=0.1)


def shifts(prior: Prior, embeddings):
    """Mean and deviation of the shift of each row, before any label."""
    features = np.hstack([np.ones((len(embeddings), 1)), embeddings])
    variance = np.einsum("ij,jk,ik->i", features, prior.covariance.astype(float), features)
    return features @ prior.mean, np.sqrt(variance)


def test_an_embedding_that_stands_still_leaves_the_prior_as_it_is():
    prior = prior_of()

    assert carried(prior, OLD, OLD.copy()).encode() == prior.encode()


@pytest.mark.parametrize("seed", range(3))
def test_a_turned_and_moved_embedding_gives_the_same_shifts(seed):
    chance, prior = np.random.default_rng(seed), prior_of()
    turn = 1.5 * np.linalg.qr(chance.normal(0, 1, (WIDTH, WIDTH)))[0]
    new = (OLD @ turn + chance.normal(0, 1, WIDTH)).astype(np.float32)
    after = carried(prior, OLD, new)

    for before, now in zip(shifts(prior, OLD), shifts(after, new), strict=True):
        np.testing.assert_allclose(now, before, atol=0.03 * np.abs(before).max())
    assert (after.region, after.norm_max, after.forgetting) == (3.0, 20.0, 0.1)


def test_an_embedding_that_moves_a_little_moves_the_shifts_a_little():
    prior = prior_of()
    new = (OLD + 0.01 * CHANCE.normal(0, 1, OLD.shape)).astype(np.float32)
    mean, deviation = shifts(carried(prior, OLD, new), new)
    before = shifts(prior, OLD)

    assert np.abs(mean - before[0]).max() < 0.1
    assert np.abs(deviation - before[1]).max() < 0.1


def test_a_feature_that_is_dead_keeps_what_was_known_of_it():
    """As one behind a ReLU that no row excites, before and after."""
    prior, old = prior_of(), OLD.copy()
    old[:, 2] = 0
    new = np.roll(old[:, [0, 1, 3, 4, 5]], 1, axis=1)
    new = np.insert(new, 2, 0.0, axis=1)
    after = carried(prior, old, new)

    assert after.mean[3] == pytest.approx(prior.mean[3])
    assert after.covariance[3, 3] == pytest.approx(prior.covariance[3, 3], rel=1e-3)


def test_a_feature_that_dies_takes_its_share_with_it_and_leaves_a_prior():
    prior, new = prior_of(), OLD.copy()
    new[:, 4] = 0
    after = carried(prior, OLD, new)

    assert np.linalg.eigvalsh(after.covariance.astype(float))[0] > 0
    assert np.isfinite(shifts(after, new)[1]).all()
