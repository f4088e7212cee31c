"""What each family waits for before it obeys its newest plan, told and timed.

Why: a device that does not follow a plan yet must say so, or it looks broken; and it must wake up
by itself when a wait, or a trial, ends.

Invariants: an end wakes once: what is still in the way after it waits for the next poll.

Knows nothing about why one waits: `placement` says it.
"""

from __future__ import annotations

import math
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from edge_runtime.rollout.placement import Placement

WAKE_S = 0.01
"""The least pause before the next look, for clocks that go unevenly."""


class Waits:
    """The placements of the families of a device."""

    def __init__(self) -> None:
        self._places: dict[str, Placement] = {}
        self._looked_s = -math.inf

    def look(self, now_s: float) -> None:
        """All that ends up to now is being looked at."""
        self._looked_s = now_s

    def place(self, family: str, placement: Placement) -> None:
        """Remember how a family is placed."""
        self._places[family] = placement

    def of(self, family: str) -> Placement | None:
        """How a family is placed; None before its first plan, and while one is refused."""
        return self._places.get(family)

    def forget(self, family: str) -> None:
        """A family's newest plan is refused: it waits for another one."""
        self._places.pop(family, None)

    def pause_s(self, now_s: float) -> float:
        """How long it is until something has to be looked at; infinite where nothing ends."""
        ends = [each.until_s for each in self._places.values() if each.until_s > self._looked_s]
        return max(WAKE_S, min(ends, default=math.inf) - now_s)

    def counts(self) -> dict[str, int]:
        """How many families wait, by what for; those for which none does are left out."""
        return Counter(f"waiting_{each.waits}" for each in self._places.values() if each.waits)

    def told(self) -> dict[str, Any]:
        """What each family waits for, and until when, for people."""
        return {
            family: {"for": place.waits, "until": _date(place.until_s)}
            for family, place in self._places.items()
            if place.waits
        }


def _date(until_s: float) -> str:
    if not until_s < 253_402_300_800:  # the end of year 9999
        return ""
    return f"{datetime.fromtimestamp(until_s, UTC):%Y-%m-%dT%H:%M:%SZ}"
