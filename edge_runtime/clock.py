"""Time as a parameter: the seam through which every room reads a clock.

Why: tests never sleep and never patch; event time orders learning, wall time is for people.

Invariants: `now_s` is seconds since the epoch, UTC, and may jump; `monotonic_s` never goes back.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What a room may ask of time."""

    def now_s(self) -> float: ...

    def monotonic_s(self) -> float: ...


class SystemClock:
    """The machine's clocks."""

    now_s, monotonic_s = staticmethod(time.time), staticmethod(time.monotonic)


class ManualClock:
    """A clock that moves only when told to; the fake that tests use."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        return self._now_s

    def monotonic_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds`, which must not be negative."""
        assert seconds >= 0
        self._now_s += seconds
