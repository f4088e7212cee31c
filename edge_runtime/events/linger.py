"""When the log's thread goes to work: who rings for it, and how long it lets records gather.

Why: a commit costs a wakeup, a disk write and a pause in the answers however few records it holds.
At a hundred records a second, each alone, the log would cost more than the answers. But records
that come alone gain nothing from waiting, and those that come fast fill a group soon: neither
should wait for long.

Invariants: whoever rings after putting something down knows that a commit which begins later takes
it. The linger is never below the floor nor above the ceiling; it settles where a commit takes
GROUP to 2 * GROUP records, at the ceiling when they come too slowly for that, and at the floor when
they come further apart than the ceiling.

Knows nothing about records.
"""

from __future__ import annotations

import contextlib
import queue
import time

GROUP = 1024
"""Each commit holds up one or two answers for as long as its group takes to be encoded: with groups
of this size that is well below one answer in a hundred, however fast they come."""

_STEP_S = 0.001


class Linger:
    """The wait, `seconds`, between `floor_s` and `ceiling_s`; begins at the floor.

    A ceiling below the floor is the floor: the wait never changes.
    """

    def __init__(self, floor_s: float, ceiling_s: float) -> None:
        self._floor_s, self._ceiling_s = floor_s, max(floor_s, ceiling_s)
        self._alone_s = 0.0
        self.seconds = floor_s

    def took(self, records: int) -> None:
        """A commit after a whole wait took so many records."""
        self._alone_s = self.seconds if records == 1 else 0.0
        if records < GROUP:
            self.seconds = min(self._ceiling_s, max(2 * self.seconds, _STEP_S))
        elif records >= 2 * GROUP:
            self.seconds = max(self._floor_s, self.seconds / 2)

    def was_idle(self, idle_s: float) -> None:
        """No record came for `idle_s` after the last commit."""
        if self._alone_s + idle_s > self._ceiling_s:
            self.seconds = self._floor_s


class Doorbell:
    """Rung from any thread; one thread waits for it. A ring while nobody waits is kept."""

    def __init__(self) -> None:
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ring(self) -> None:
        """Wake who waits, or who waits next."""
        self._rings.put(None)

    def wait(self) -> float:
        """Wait for a ring; returns how long that took, in seconds."""
        since_s = time.monotonic()
        self._rings.get()
        return time.monotonic() - since_s

    def pause(self, seconds: float) -> bool:
        """Wait so long, or less when rung; returns whether it was. All rings so far are heard."""
        try:
            self._rings.get(timeout=seconds)
        except queue.Empty:
            return False
        with contextlib.suppress(queue.Empty):
            while True:
                self._rings.get_nowait()
        return True
