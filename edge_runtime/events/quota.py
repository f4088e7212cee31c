"""A day's bytes, family by family: who may still send, and what was decided for what is sent again.

Why: a quota that a restart forgets is none, and a record that was kept back once must not count
as sent when it is asked for again.

Invariants: a family that reached its limit sends nothing until the day, UTC by the wall clock,
is another. Positions (epoch, seq) that were decided keep their decision; of the newest
_SPANS_MAX stretches that were over, the older ones are forgotten.

Knows nothing about records, nor who writes the file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from edge_runtime.clock import Clock

Position = tuple[int, int]

_VERSION = 1
_DAY_S = 86_400
_SAVES_A_DAY = 16
_SPANS_MAX = 32

log = logging.getLogger("edge_runtime")


class _Family(msgspec.Struct):
    """What a family sent today, and the stretches, first to last position, that were over."""

    bytes: int = 0
    over: list[tuple[Position, Position]] = []


class _Counts(msgspec.Struct):
    """What the file holds; `upto` is the last position that was decided."""

    version: int
    day: int
    upto: Position = (0, 0)
    families: dict[str, _Family] = {}


class Quotas:
    """The `limits` by family, in bytes; what is used of them is read from the file at `path`.

    `unsaved` tells that a crash now would forget a sixteenth of a quota, or that one was reached.
    """

    def __init__(self, limits: Mapping[str, int], path: Path, clock: Clock, epoch: int) -> None:
        self._limits, self._clock = dict(limits), clock
        self._counts = (_load(path, epoch) if limits else None) or _Counts(_VERSION, self._today())
        for family in limits:
            self._counts.families.setdefault(family, _Family())
        self.unsaved = self._is_changed = False
        self._is_over: set[str] = set()
        self._since_saved = 0.0
        self._turn_day()

    @property
    def upto(self) -> Position:
        """The last position that was decided."""
        return self._counts.upto

    def decided(self, position: Position) -> None:
        """All up to `position` is decided."""
        self._counts.upto, self._is_changed = position, True

    def allows(self, family: str, position: Position, size: int, *, is_new: bool) -> bool:
        """Whether `size` bytes at `position` may go; what is new is decided, and counted."""
        if family not in self._limits:
            return True
        counts = self._counts.families[family]
        if not is_new:
            return not any(first <= position <= last for first, last in counts.over)
        self._turn_day()
        if family not in self._is_over and counts.bytes + size <= self._limits[family]:
            counts.bytes += size
            self._since_saved += size / self._limits[family]
            self.unsaved |= self._since_saved >= 1.0 / _SAVES_A_DAY
            return True
        if family in self._is_over:
            counts.over[-1] = counts.over[-1][0], position
        else:
            self._is_over.add(family)
            self.unsaved = True
            counts.over = [*counts.over[1 - _SPANS_MAX :], (position, position)]
        return False

    def bytes_today(self) -> dict[str, int]:
        """What each family with a limit sent today."""
        self._turn_day()
        return {family: self._counts.families[family].bytes for family in self._limits}

    def to_save(self) -> bytes | None:
        """What the file should hold; None when nothing changed since the last time."""
        if not self._limits or not (self._is_changed or self.unsaved):
            return None
        self.unsaved, self._is_changed, self._since_saved = False, False, 0.0
        return msgspec.json.encode(self._counts)

    def not_saved(self) -> None:
        """What `to_save` gave could not be written: the next time it goes into the file."""
        self._is_changed = True

    def _turn_day(self) -> None:
        if (today := self._today()) != self._counts.day:
            self._counts.day, self.unsaved = today, True
            self._is_over.clear()
            for family in self._counts.families.values():
                family.bytes = 0

    def _today(self) -> int:
        return int(self._clock.now_s() // _DAY_S)


def _load(path: Path, epoch: int) -> _Counts | None:
    try:
        counts = msgspec.json.decode(path.read_bytes(), type=_Counts)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        log.warning("%s: the day's bytes are counted from nothing: %s", path, error)
        return None
    if counts.version != _VERSION or counts.upto[0] > epoch:
        log.warning("%s is of another log or release; the day's bytes are counted anew", path)
        return None
    return counts
