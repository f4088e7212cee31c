"""A prior carried from one embedding to another.

Why: every student has an embedding of its own, in which the weights of the one before mean nothing.
Learning the prior anew takes dozens of rounds; what was known goes along instead, and few rounds
mend what the way has cost.

How: on the same rows each old feature is written as a combination of new ones (ridge regression),
so that a head on the old embedding shifts an answer as one on the new does; mean and covariance go
the same way. The ridge pulls towards each feature being itself: of what the rows do not show, the
prior stays as it was.

Invariants: an embedding that stands still leaves the prior as it is, bit for bit.

Knows nothing about sessions and networks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cloud_learner.train.prior import positive
from edge_runtime.personal.prior import Matrix, Prior

Floats = npt.NDArray[np.float64]

_RIDGE = 1e-4  # of the mean square of a new feature


def carried(prior: Prior, old: Matrix, new: Matrix) -> Prior:
    """What `prior`, of the embeddings `old` (rows, width), says of the embeddings `new` of the same
    rows; both of the prior's width.
    """
    assert old.shape == new.shape == (len(new), prior.width)
    if (old == new).all():
        return prior
    way = _way(_features(old), _features(new))
    covariance = positive(way @ prior.covariance.astype(np.float64) @ way.T)
    return replace(
        prior,
        mean=(way @ prior.mean.astype(np.float64)).astype(np.float32),
        covariance=covariance.astype(np.float32),
    )


def _way(old: Floats, new: Floats) -> Floats:
    """The matrix of (size, size) with `new @ way` nearest to `old`."""
    size = new.shape[1]
    square = new.T @ new
    ridge = _RIDGE * np.trace(square) / size * np.eye(size)
    return np.asarray(np.eye(size) + np.linalg.solve(square + ridge, new.T @ (old - new)))


def _features(embeddings: Matrix) -> Floats:
    ones = np.ones((len(embeddings), 1))
    return np.hstack([ones, embeddings.astype(np.float64)])
