"""A part of a database: the tables of one family, spoken of as if they were all.

Why: what waits for one family must not meet what waits for another, and whoever keeps it should not
have to think of that.

Invariants: a part has the tables named `name/...` and no others; what it says in a transaction is
committed with all the rest of it, or not at all.

Knows nothing about what keys and values mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cloud_learner.store.rocks import Rocks, Transaction


class Part:
    """The tables `name/...` of a database, by the rest of their names."""

    def __init__(self, rocks: Rocks, name: str) -> None:
        self._rocks, self.name = rocks, name

    def begin(self) -> Transaction:
        """An empty transaction of this part."""
        return self.within(self._rocks.begin())

    def within(self, change: Transaction) -> Transaction:
        """What a transaction of the whole database says of this part."""
        return change.within(f"{self.name}/")

    def get(self, table: str, key: bytes) -> bytes | None:
        """A committed value."""
        return self._rocks.get(f"{self.name}/{table}", key)

    def get_many(self, table: str, keys: Sequence[bytes]) -> list[bytes | None]:
        """Committed values, in the order of the keys; fastest when those are sorted."""
        return self._rocks.get_many(f"{self.name}/{table}", keys)

    def scan(self, table: str, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Committed entries from `start` up to, not including, `end`."""
        return self._rocks.scan(f"{self.name}/{table}", start, end)
