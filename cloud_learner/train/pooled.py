"""What devices tell of their sessions on one release, pooled into the prior that follows from it.

Why: where events do not say whose they are, only devices know how people differ. What they tell
moves the prior that their sessions began with.

Invariants: no device counts for more than `CAP` sessions, nor for more than the device in the
middle, whatever it tells and however often. What is no moments, or of another prior, changes
nothing. At most `bytes_max` are kept; the device heard longest ago goes first. The same words in
the same order give the same prior.

Knows nothing about reports and releases, and not whether a device is who it says.
"""

from __future__ import annotations

from collections.abc import Collection

from cloud_learner.train.prior import next_prior
from edge_runtime.errors import PackageError
from edge_runtime.personal.moments import SESSIONS_MAX, Moments
from edge_runtime.personal.prior import Prior

CAP = 50.0
BYTES_MAX = 32 << 20


class Pooled:
    """Moments by device, all of `prior`."""

    def __init__(self, prior: Prior, bytes_max: int = BYTES_MAX) -> None:
        self.prior, self._bytes_max = prior, bytes_max
        self._told: dict[str, bytes] = {}
        self._sessions: dict[str, float] = {}

    def take(self, device: str, data: bytes) -> None:
        """Add what a device tells to what it told before. Raises: RequestError `bad_moments`."""
        moments = Moments.decode(data, self.prior)
        before = self._told.pop(device, None)
        if before is not None:
            moments.merge(Moments.decode(before, self.prior))
        self._told[device] = moments.encode()
        self._sessions[device] = min(moments.sessions, SESSIONS_MAX)
        while len(self._told) * len(self._told[device]) > self._bytes_max:
            oldest = next(iter(self._told))
            del self._told[oldest], self._sessions[oldest]

    def next(self, left_out: Collection[str] = ()) -> tuple[Prior, float]:
        """The prior that follows, and for how many sessions it stands; the old one for as many as
        `STRENGTH`. `left_out` are devices that do not count.
        """
        told = {name: data for name, data in self._told.items() if name not in left_out}
        if not told:
            return self.prior, 0.0
        counts = sorted(self._sessions[name] for name in told)
        cap = min(CAP, counts[(len(counts) - 1) // 2])
        try:
            prior, _ = next_prior(self.prior, told, cap)
        except PackageError:  # beyond the numbers that any prior may have
            return self.prior, 0.0
        return prior, sum(min(each, cap) for each in counts)

    def statistics(self) -> dict[str, int]:
        """Devices that are heard, and the sessions that they tell of."""
        return {
            "moments_devices": len(self._told),
            "moments_sessions": int(sum(self._sessions.values())),
        }
