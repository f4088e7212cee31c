"""What stays of evidence when the few devices that speak loudest for it are left out.

Why: a device can lie about its failures and its labels. Of a large trial one percent may, and the
verdict shall be that of the others.

Method: total evidence is a sum of logarithms, one part a device. The smallest sum that is left when
any `liars` devices are left out is at most the sum of the honest ones, so lies cannot bring a
verdict about that the honest devices would not; and it is at most the total, so the error rate
stays what it was. It costs what the loudest honest devices said.

Invariants: nothing is left out where one percent is less than half a device.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

LIARS_SHARE = 0.01

DEVIATIONS = 2.0
"""A trial is on some of a fleet: of a hundred devices by chance two may be liars, or three."""


def liars(devices: int) -> int:
    """How many of `devices` may lie where one percent of all do, but for one trial in fifty."""
    expected = devices * LIARS_SHARE
    return int(expected + DEVIATIONS * math.sqrt(expected) + 0.5) if expected >= 0.5 else 0


def without_loudest(parts: Iterable[float], count: int, total: float) -> float:
    """`total` without the `count` largest of its `parts`, where these speak for it at all."""
    return total - sum(part for part in heapq.nlargest(count, parts) if part > 0)
