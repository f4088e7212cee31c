"""What a session's head makes of many candidates at once, with or without exploring.

Why: who is always shown what seems best never learns what else there is; a head knows how unsure
it is of each candidate, and exploring spends that knowledge.

`optimistic` is LinUCB (Li et al. 2010). It begins with the first candidate list: before any label
it explores by the prior.

Invariants: no shift is outside of the trust region, and none is NaN; a session that has fallen for
good explores nothing.

Knows nothing about candidates, events or propensities.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.personal.head import FALLS_MAX, Head
from edge_runtime.personal.prior import Matrix, Prior, Vector


def shifts(head: Head, embeddings: Matrix) -> Vector:
    """The shift of each row of (count, width), of shape (count,)."""
    if not head.labels:
        return np.zeros(len(embeddings), np.float32)
    return _expected(head, embeddings, head.mean)


def optimistic(head: Head, embeddings: Matrix, deviations: float) -> tuple[Vector, Vector]:
    """The shift of each row, and with so many standard deviations on top."""
    expected = shifts(head, embeddings)
    if head.falls >= FALLS_MAX or not deviations:
        return expected, expected
    covariance = head.covariance
    crossed = embeddings @ covariance[1:, 1:]
    crossed *= embeddings
    variances = crossed @ np.ones(len(covariance) - 1, np.float32)
    variances += embeddings @ (2 * covariance[1:, 0])
    variances += covariance[0, 0]
    bonus = np.sqrt(np.maximum(variances, 0, out=variances), out=variances)
    bonus *= deviations
    bonus += expected
    return expected, _within(head.prior, bonus)


def _expected(head: Head, embeddings: Matrix, weights: Vector) -> Vector:
    return _within(head.prior, embeddings @ weights[1:] + weights[0])


def _within(prior: Prior, shift: Vector) -> Vector:
    bounded = np.minimum(np.maximum(shift, -prior.region, out=shift), prior.region, out=shift)
    bounded[np.isnan(bounded)] = 0.0
    return bounded
