"""The sequencer: from envelopes that come twice, overlap or overtake to each record once, in order.

Why: the broker may redeliver and a device sends again whatever it was not told is held; only the
sequence numbers say what is new.

Invariants: a lane (device, epoch, class) moves forward without a gap: its mark is the highest
number up to which all records were accepted. What lies beyond a gap is kept aside, unacknowledged
and bounded; when the bound is reached the newcomer is given up, for the device sends it again from
the watermark. No I/O; the marks count only when what was accepted has been committed.

Knows nothing about what a record means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec

from cloud_learner.store.ingest_state import Lane

ASIDE_MAX = 256  # envelopes, of all devices together


class Arrival(msgspec.Struct):
    """Consecutive records of a lane; record i has the number `base_seq + i`.

    `token` is what the caller acknowledges, `arrived_s` the wall time of the arrival.
    """

    lane: Lane
    base_seq: int
    records: list[msgspec.Raw]
    token: Any
    arrived_s: float

    @property
    def last_seq(self) -> int:
        """The number of the last record; below `base_seq` when there are none."""
        return self.base_seq + len(self.records) - 1


class Sequencer:
    """Accepts each record of each lane once, after `marks`."""

    def __init__(self, marks: Mapping[Lane, int]) -> None:
        self.marks: dict[Lane, int] = {}
        self._lanes: dict[str, list[Lane]] = {}
        for lane, seq in sorted(marks.items()):
            self._move(lane, seq)
        self.counters: Counter[str] = Counter()
        self._aside: dict[Lane, dict[int, Arrival]] = {}
        self._aside_count = 0
        self._done: list[Any] = []

    def accept(self, arrival: Arrival) -> list[Arrival]:
        """What is new and has no gap before it: part of `arrival`, and what had waited for it."""
        if arrival.base_seq > self.marks.get(arrival.lane, 0) + 1:
            self._put_aside(arrival)
            return []
        accepted = [self._take(arrival)]
        waiting = self._aside.get(arrival.lane, {})
        while waiting and (first := min(waiting)) <= self.marks.get(arrival.lane, 0) + 1:
            accepted.append(self._take(waiting.pop(first)))
            self._aside_count -= 1
        return [part for part in accepted if part.records]

    def skip(self, token: Any) -> None:
        """An envelope that holds nothing to accept may be acknowledged as well."""
        self._done.append(token)

    def lanes(self, device: str) -> list[Lane]:
        """The lanes of a device, those that came last at the end."""
        return self._lanes.get(device, [])

    def devices(self) -> list[str]:
        """All devices that sent anything that was accepted."""
        return sorted(self._lanes)

    def done(self) -> list[Any]:
        """Tokens of the envelopes that may be acknowledged once the marks are committed."""
        done, self._done = self._done, []
        return done

    def statistics(self) -> dict[str, int]:
        """Counters, and how many envelopes lie beyond a gap."""
        return {**self.counters, "beyond_gap": self._aside_count}

    def _take(self, arrival: Arrival) -> Arrival:
        """Cut off what is held already, and move the mark."""
        mark = self.marks.get(arrival.lane, 0)
        repeated = min(len(arrival.records), mark + 1 - arrival.base_seq)
        self.counters["duplicates"] += repeated
        self._done.append(arrival.token)
        records = arrival.records[repeated:]
        if records:
            self._move(arrival.lane, arrival.last_seq)
        return Arrival(
            arrival.lane, arrival.base_seq + repeated, records, arrival.token, arrival.arrived_s
        )

    def _move(self, lane: Lane, seq: int) -> None:
        if lane not in self.marks:
            self._lanes.setdefault(lane[0], []).append(lane)
        self.marks[lane] = seq

    def _put_aside(self, arrival: Arrival) -> None:
        self.counters["gaps"] += 1
        waiting = self._aside.setdefault(arrival.lane, {})
        if arrival.base_seq in waiting:
            # A redelivery, most often: its token is the one that still counts.
            known = waiting[arrival.base_seq]
            longer = max(known, arrival, key=lambda each: len(each.records))
            waiting[arrival.base_seq] = msgspec.structs.replace(longer, token=arrival.token)
        elif self._aside_count < ASIDE_MAX:
            waiting[arrival.base_seq] = arrival
            self._aside_count += 1
        else:
            self.counters["given_up_beyond_gap"] += 1
            self._done.append(arrival.token)
