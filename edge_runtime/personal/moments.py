"""What a device's sessions say together about the next prior, and of no session by itself.

Why: the sum of sessions' A and b, from which a pooled regression follows, says nothing of how
people differ. What the next prior needs are the moments of their weights: one step of expectation
maximisation is the mean of what each session believes, and the mean of its square.

Counted are differences from the prior's mean, each clipped to `DEVIATIONS_MAX` of the prior's own
deviations in whichever direction, so that one session moves the next prior by a bounded amount.
Were each weight clipped by itself, directions in which people hardly differ would stand open.

Invariants: moments of one prior add up; bytes that are read count `SESSIONS_MIN` sessions or more,
and `SESSIONS_MAX` at most; what no clipped sessions can have is refused with `bad_moments`.

Knows nothing about who may export them, or how. Formats: `MOMENTS_VERSION`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.errors import RequestError
from edge_runtime.personal.head import Head
from edge_runtime.personal.prior import Prior, packed, unpacked

Floats = npt.NDArray[np.float64]

MOMENTS_VERSION: Final = 1
SESSIONS_MIN, SESSIONS_MAX = 10, 1000
"""Ten is the strict end of what statistical offices ask of a cell before they publish it."""

DEVIATIONS_MAX = 3.0
_ROUNDING = 1.01  # what float32 may add, where a direction is narrow


class _Stored(msgspec.Struct, array_like=True, frozen=True):
    version: Literal[1]
    prior: bytes
    sessions: float
    first: bytes
    second: bytes


_decoder = msgspec.msgpack.Decoder(_Stored)


@dataclass(eq=False)
class Moments:
    """Sums over `sessions`: `first` (1 + width,) of differences, `second` of their squares."""

    prior: Prior
    sessions: float
    first: Floats
    second: Floats

    @classmethod
    def none(cls, prior: Prior) -> Moments:
        """Of no session."""
        size = len(prior.mean)
        return cls(prior, 0.0, np.zeros(size), np.zeros((size, size)))

    def add(self, head: Head) -> None:
        """Count a session that is over; one without labels says nothing."""
        assert head.prior is self.prior
        if not head.labels:
            return
        moved = head.mean.astype(np.float64) - self.prior.mean
        far = float(np.linalg.norm(self.prior.whitener @ moved))
        moved *= min(1.0, DEVIATIONS_MAX / max(far, 1.0))
        self.sessions += 1
        self.first += moved
        self.second += head.covariance + np.outer(moved, moved)

    def merge(self, other: Moments, weight: float = 1.0) -> None:
        """Count all sessions of `other`, each as `weight` of one."""
        assert other.prior.digest == self.prior.digest
        self.sessions += weight * other.sessions
        self.first += weight * other.first
        self.second += weight * other.second

    def fade(self) -> None:
        """More than `SESSIONS_MAX` sessions weigh as much as so many, from now on."""
        share = min(1.0, SESSIONS_MAX / max(self.sessions, 1.0))
        self.sessions *= share
        self.first *= share
        self.second *= share

    @property
    def nbytes(self) -> int:
        """What its arrays take."""
        return self.first.nbytes + self.second.nbytes

    def encode(self) -> bytes:
        """The moments, faded, as bytes."""
        self.fade()
        first = self.first.astype("<f4").tobytes()
        second = packed(self.second.astype(np.float32))
        return msgspec.msgpack.encode(
            _Stored(MOMENTS_VERSION, self.prior.digest, self.sessions, first, second)
        )

    @classmethod
    def decode(cls, data: bytes, prior: Prior) -> Moments:
        """The moments that a device has exported. Raises: RequestError `bad_moments`."""
        try:
            return cls._fit(_decoder.decode(data), prior)
        except (msgspec.MsgspecError, ValueError) as error:
            raise RequestError(
                "bad_moments",
                f"moments of sessions cannot be used: {error}; nothing of them was counted",
                "export them again; if this returns, look at what the device is",
            ) from None

    @classmethod
    def _fit(cls, stored: _Stored, prior: Prior) -> Moments:
        first = np.frombuffer(stored.first, "<f4")
        second = unpacked(stored.second, len(prior.mean))
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            raise ValueError("numbers that are not finite")
        sums = first.astype(np.float64), second.astype(np.float64)
        moments = cls(prior, stored.sessions, *sums)
        why = moments._why_unfit() if stored.prior == prior.digest else "they are of another prior"
        if why:
            raise ValueError(why)
        return moments

    def _why_unfit(self) -> str:
        """Why no clipped sessions have these."""
        if self.first.shape != self.prior.mean.shape:
            return f"{len(self.first)} weights"
        if not SESSIONS_MIN <= self.sessions <= SESSIONS_MAX:
            return f"{self.sessions} sessions"
        whitener, most = self.prior.whitener, self.sessions * _ROUNDING
        first, second = whitener @ self.first, whitener @ self.second @ whitener.T
        if not np.linalg.norm(first) <= most * DEVIATIONS_MAX:
            return "their mean is beyond what is clipped"
        total, farthest = np.trace(second), DEVIATIONS_MAX**2
        if not total <= most * (len(first) + farthest):
            return "their square is beyond what is clipped"
        unit = np.eye(len(first))
        if not _is_positive(second - np.outer(first, first) / self.sessions + 1e-3 * total * unit):
            return "their covariance has a negative eigenvalue"
        if not _is_positive(most * (1 + farthest) * unit - second):
            return "their square is beyond what is clipped in one direction"
        return ""


def _is_positive(matrix: Floats) -> bool:
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True
