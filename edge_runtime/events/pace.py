"""How long the uplink waits: after a failure, and before it tries again what is held.

Why: a fleet that lost its broker must not come back all at once, nor ask a full one in a loop.

Invariants: what is waited after a failure doubles up to a bound, by chance up to a half less; a
drain that ran well for a while begins anew.

Knows nothing about what failed, nor about what is held.
"""

from __future__ import annotations

import random

from edge_runtime.clock import Clock

_BACKOFF_S, _BACKOFF_MAX_S, _CALM_S = 0.05, 2.0, 10.0


class Pace:
    """The waits of one uplink."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures = 0
        self._probe_s = 0.0

    def after_failure(self, ran_s: float) -> float:
        """Seconds to rest after a drain that failed when it had run for `ran_s`."""
        self._failures = 1 if ran_s > _CALM_S else self._failures + 1
        ceiling = min(_BACKOFF_MAX_S, _BACKOFF_S * 2.0 ** min(self._failures, 16))
        return ceiling * _jitter(0.5, 1.0)

    def hold(self, seconds: float) -> None:
        """Let nothing that is held be tried for `seconds`, or up to a half longer."""
        self._probe_s = self._clock.monotonic_s() + seconds * _jitter(1.0, 1.5)

    def left_s(self) -> float:
        """Seconds until something that is held may be tried; 0 when it may be now."""
        return max(0.0, self._probe_s - self._clock.monotonic_s())


def _jitter(low: float, high: float) -> float:
    return random.uniform(low, high)  # noqa: S311 - no secret
