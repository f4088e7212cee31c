"""The sequencer: from envelopes that come twice, overlap or overtake to each record once, in order.

Why: the broker may redeliver and a device sends again whatever it was not told is held; only the
sequence numbers say what is new.

Invariants: a lane (device, epoch, class) moves forward without a gap: its mark is the highest
number up to which everything was accepted, or is known to be lost. An envelope says what is lost
right before its records; only what lies above the mark is counted. What lies beyond a gap is kept
aside, bounded for each lane and for all; what is above the bound, or forgotten in a crash, the
device sends again from the watermark. So it is acknowledged all the same: else a gap that is never
filled would keep the broker from letting go of anything. No I/O; the marks count only when what was
accepted has been committed.

Knows nothing about what a record means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sized
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from cloud_learner.store.ingest_state import Lane

ASIDE_MAX = 256  # envelopes, of all devices together
ASIDE_LANE_MAX = 32
ASIDE_BYTES_MAX = 32 << 20

T = TypeVar("T")


class Arrival(msgspec.Struct, Generic[T]):
    """`count` consecutive records of a lane from `base_seq` on, and what is lost before them.

    `token` is what the caller acknowledges; `size` is what it weighs while it waits.
    """

    lane: Lane
    base_seq: int
    count: int
    skipped: int
    token: Any
    size: int
    what: T

    @property
    def first_seq(self) -> int:
        """The first number that it speaks of."""
        return self.base_seq - self.skipped

    @property
    def last_seq(self) -> int:
        """The last number that it speaks of; below `first_seq` when it speaks of none."""
        return self.base_seq + self.count - 1


class Accepted(NamedTuple, Generic[T]):
    """What is new of an arrival: `lost` numbers, then the records from index `cut` on."""

    arrival: Arrival[T]
    lost: int
    cut: int


class Sequencer(Generic[T]):
    """Accepts each record of each lane once, after `marks`."""

    def __init__(self, marks: Mapping[Lane, int]) -> None:
        self.marks = dict(marks)
        self.counters: Counter[str] = Counter()
        self._aside: dict[Lane, dict[int, Arrival[T]]] = {}
        self._aside_count = self._aside_bytes = 0
        self._done: list[Any] = []

    def accept(self, arrival: Arrival[T]) -> list[Accepted[T]]:
        """What is new and has no gap before it: of `arrival`, and of what had waited for it."""
        lane = arrival.lane
        if arrival.first_seq > self.marks.get(lane, 0) + 1:
            self._put_aside(arrival)
            return []
        self._done.append(arrival.token)
        accepted = [self._take(arrival)]
        waiting = self._aside.get(lane, {})
        while waiting and (first := min(waiting)) <= self.marks.get(lane, 0) + 1:
            accepted.append(self._take(self._taken_back(waiting, first)))
        return [part for part in accepted if part.lost or part.cut < part.arrival.count]

    def skip(self, token: Any) -> None:
        """An envelope that holds nothing to accept may be acknowledged as well."""
        self._done.append(token)

    def done(self) -> list[Any]:
        """Tokens of the envelopes that may be acknowledged once the marks are committed."""
        done, self._done = self._done, []
        return done

    def statistics(self) -> dict[str, int]:
        """Counters, and how many envelopes lie beyond a gap."""
        return {**self.counters, "beyond_gap": self._aside_count}

    def _take(self, arrival: Arrival[T]) -> Accepted[T]:
        """Cut off what is held already, and move the mark."""
        mark = self.marks.get(arrival.lane, 0)
        lost = max(0, arrival.base_seq - 1 - mark) if arrival.skipped else 0
        mark += lost
        cut = min(arrival.count, mark + 1 - arrival.base_seq)
        self.counters["duplicates"] += cut
        moved = max(mark, arrival.last_seq)
        if moved:
            self.marks[arrival.lane] = moved
        return Accepted(arrival, lost, cut)

    def _put_aside(self, arrival: Arrival[T]) -> None:
        """Keep what lies beyond a gap, as far as there is room; either way it may be acknowledged,
        for the device sends again what it is not told to be held.
        """
        self.counters["gaps"] += 1
        self._done.append(arrival.token)
        waiting = self._aside.setdefault(arrival.lane, {})
        known = waiting.get(arrival.first_seq)
        if known is not None:
            longer = max(known, arrival, key=lambda each: each.last_seq)
            self._aside_bytes += longer.size - known.size
            waiting[arrival.first_seq] = longer
        elif self._has_room(waiting):
            waiting[arrival.first_seq] = arrival
            self._aside_count += 1
            self._aside_bytes += arrival.size
        else:
            self.counters["given_up_beyond_gap"] += 1

    def _has_room(self, waiting: Sized) -> bool:
        fits = self._aside_count < ASIDE_MAX and self._aside_bytes < ASIDE_BYTES_MAX
        return fits and len(waiting) < ASIDE_LANE_MAX

    def _taken_back(self, waiting: dict[int, Arrival[T]], first: int) -> Arrival[T]:
        arrival = waiting.pop(first)
        self._aside_count -= 1
        self._aside_bytes -= arrival.size
        return arrival
