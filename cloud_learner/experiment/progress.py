"""Progress of long work, in words: how much is done, and how long the rest takes at this pace.

Why: whoever waits wants to know whether to wait.

Knows nothing about what is done.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_runtime.clock import Clock, SystemClock

TELL_S = 5.0


class Progress:
    """Tells of `what`, of which there is `total`, no more often than once in TELL_S."""

    def __init__(
        self, what: str, total: int, tell: Callable[[str], None], clock: Clock | None = None
    ) -> None:
        self._what, self._total, self._tell = what, total, tell
        self._clock = clock or SystemClock()
        self._started_s = self._told_s = self._clock.monotonic_s()
        self.done = 0

    def step(self, amount: int = 1) -> None:
        """So much more is done."""
        self.done += amount
        now_s = self._clock.monotonic_s()
        if now_s - self._told_s < TELL_S or not self._total or not self.done:
            return
        self._told_s = now_s
        share = min(1.0, self.done / self._total)
        left_s = (now_s - self._started_s) * (1 - share) / share
        self._tell(f"{self._what}: {share:.0%}, about {_said(left_s)} left")


def _said(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
