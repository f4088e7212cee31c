"""Cadences: how often devices get what was learned, and which model that means at any moment.

Why: one training trajectory serves all cadences, so that they differ by staleness alone.

A version is the number of micro-batches that a model has learned; version 0 is that of the warm-up.
A sync at a moment ships the version that stands then: of what was released strictly before it.

Invariants: pure; a prediction is never answered by a version that was ready at its time or later.

Knows nothing about how versions come about. Method: Liu et al., "Monolith", 2022, algorithm 1.
"""

from __future__ import annotations

import math
import re

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.errors import ConfigError

Floats = npt.NDArray[np.float64]
Versions = npt.NDArray[np.int32]

NEVER = "never"
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


class Cadence(msgspec.Struct, frozen=True):
    """A sync every `every_s` of event time; infinite for `never`."""

    name: str
    every_s: float

    def versions(self, times_s: Floats, ready_s: Floats, start_s: float, phase: float) -> Versions:
        """The version that answers at each of `times_s`, int32 of the same shape.

        `ready_s` is when versions 1, 2, ... were ready, ascending; the first sync is `phase` of an
        interval after `start_s`.
        """
        if math.isinf(self.every_s):
            return np.zeros(len(times_s), np.int32)
        first_s = start_s + phase * self.every_s
        syncs = np.floor((times_s - first_s) / self.every_s)
        versions = np.searchsorted(ready_s, first_s + syncs * self.every_s, side="left")
        return np.where(syncs < 0, 0, versions).astype(np.int32)

    def phases(self, offsets: int) -> list[float]:
        """Where in an interval the first sync lies, evenly spaced; only one for `never`."""
        count = 1 if math.isinf(self.every_s) else offsets
        return [number / count for number in range(count)]


def cadences_of(text: str) -> list[Cadence]:
    """`never,30d,7d,1d,1h` as cadences, the slowest first. Raises: ConfigError `bad_cadence`."""
    names = [name.strip() for name in text.split(",")]
    found = [
        Cadence(name, math.inf if name == NEVER else span_s(name, "bad_cadence")) for name in names
    ]
    found.sort(key=lambda cadence: -cadence.every_s)
    if len(found) < 2 or len({cadence.every_s for cadence in found}) < len(found):
        raise ConfigError(
            "bad_cadence",
            f"--cadence {text} does not name two or more different cadences",
            "for example --cadence never,7d,1d",
        )
    return found


def span_s(text: str, code: str) -> float:
    """`30d`, `12h`, `5m` or `10s` in seconds. Raises: ConfigError `code`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not found or float(found[1]) == 0:
        raise ConfigError(code, f"{text!r} is no span of time", "write 30d, 12h, 5m or 10s")
    return float(found[1]) * _UNITS_S[found[2]]
