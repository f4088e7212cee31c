"""The last commits of a class, in memory: what is sent at once is not read from disk again.

Invariants: RECENT_BYTES_MAX at most, no number missing between two that are held. The commit thread
alone remembers, under its stream's lock; anybody may read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

RECENT_BYTES_MAX = 256 << 10
LENGTH_BYTES = 4
"""What a record takes beside its own bytes, on disk and in every bound."""


class Recent:
    """Groups of durable records, the newest last."""

    def __init__(self) -> None:
        self._groups: deque[tuple[int, list[bytes]]] = deque()
        self._bytes = 0

    def remember(self, base_seq: int, records: list[bytes], size: int) -> None:
        """Take in a group that was just made durable; `size` counts LENGTH_BYTES of each record."""
        if self._groups and self._groups[-1][0] + len(self._groups[-1][1]) != base_seq:
            self._groups.clear()
            self._bytes = 0
        self._groups.append((base_seq, records))
        self._bytes += size
        while self._bytes > RECENT_BYTES_MAX:
            _, gone = self._groups.popleft()
            self._bytes -= sum(map(len, gone)) + LENGTH_BYTES * len(gone)

    def after(self, after_seq: int) -> Iterator[tuple[int, bytes]] | None:
        """(seq, record) of this epoch above `after_seq`; None when not all are in memory."""
        held = self._groups.copy()
        if not held or held[0][0] > after_seq + 1:
            return None
        return (
            (seq, data)
            for base_seq, group in held
            if base_seq + len(group) > after_seq + 1
            for seq, data in enumerate(group, base_seq)
            if seq > after_seq
        )


def within(
    records: Iterable[tuple[int, bytes]], max_bytes: int, max_records: int
) -> list[tuple[int, bytes]]:
    """The first of `records` that keep to both bounds; at least one if there is."""
    found: list[tuple[int, bytes]] = []
    for seq, data in records:
        max_bytes -= len(data)
        if found and (max_bytes < 0 or len(found) >= max_records):
            break
        found.append((seq, data))
    return found
