"""Exporting: what sessions that are over say together, for the learner, where the owner allows it.

Why: how people differ, the cloud can learn without hearing of any of them: the next prior needs
sums over sessions, and no session.

Invariants: a sum of fewer than `SESSIONS_MIN` sessions is never told. A session is counted once,
when it ends, and told at most once: what was told is counted no more, whether or not it arrives.
There is one sum for each family, of the release whose session ended last; sessions of another begin
a new one, and what was not told of the one before is lost, which is counted. Sums are told once a
minute, of each family one, `BYTES_MAX` together; what has no room waits for the next time. Nothing
of this outlives the process.

Knows nothing about whose sessions they are, about reports and the network. Any thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from threading import Lock

from edge_runtime.clock import Clock
from edge_runtime.device.sketching import EVERY_S
from edge_runtime.personal.head import Head
from edge_runtime.personal.moments import SESSIONS_MIN, Moments
from edge_runtime.wire.messages import SessionMoments

BYTES_MAX = 600_000
"""Of a report; a broker takes a megabyte. The widest embedding's moments are 526 kB."""


class Exporting:
    """Sums up the sessions that end from now on."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._lock = clock, Lock()
        self._sums: dict[str, tuple[str, Moments]] = {}
        self._due_s = clock.monotonic_s() + EVERY_S
        self._counts = Counter(export_counted=0, export_told=0, export_lost=0)

    def ended(self, family: str, release: str, head: Head) -> None:
        """A session of `release` is over; one without labels says nothing."""
        if not head.labels:
            return
        with self._lock:
            known = self._sums.get(family)
            if known is None or known[0] != release or known[1].prior is not head.prior:
                self._drop(family)
                known = self._sums[family] = release, Moments.none(head.prior)
            known[1].add(head)
            self._counts["export_counted"] += 1

    def forget(self, family: str | None = None) -> None:
        """What is counted and not yet told goes, of one family or of all."""
        with self._lock:
            for name in list(self._sums) if family is None else [family]:
                self._drop(name)

    def told(self) -> list[SessionMoments]:
        """Once a minute the sums of sessions enough; their counting begins anew."""
        with self._lock:
            now_s = self._clock.monotonic_s()
            if now_s < self._due_s:
                return []
            self._due_s = now_s + EVERY_S
            full = [name for name, (_, sums) in self._sums.items() if sums.sessions >= SESSIONS_MIN]
            return list(self._fitting(full))

    def statistics(self) -> dict[str, int]:
        """Sessions that were counted, told, and lost before they could be."""
        return dict(self._counts)

    def _fitting(self, families: list[str]) -> Iterator[SessionMoments]:
        room = BYTES_MAX
        for family in families:
            release, moments = self._sums[family]
            data = moments.encode()
            if len(data) <= room:
                room -= len(data)
                del self._sums[family]
                self._counts["export_told"] += int(moments.sessions)
                yield SessionMoments(family, release, data)

    def _drop(self, family: str) -> None:
        known = self._sums.pop(family, None)
        if known is not None:
            self._counts["export_lost"] += int(known[1].sessions)
