"""One state for each key: what windows keep apart, within bounds on keys and entries.

Why: keys come from the world, and a device must not grow with it.

Invariants: a table never holds more than `KEYS_MAX` keys and `ENTRIES_MAX` entries; what a bound
pushes out, the least recently observed first, is counted.

Knows nothing about what a state is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

KEYS_MAX = 4096
ENTRIES_MAX = 65_536

Key = str | int | float


class State(Protocol):
    """What a table holds for a key: something that entries are added to and that has a size."""

    def add(self, time_s: float, value: Any, /) -> int:
        """Take an entry in; by how many entries the state has grown, negative when it shrank."""

    def drop(self, count: int, /) -> None:
        """Forget the `count` oldest entries."""

    def dump(self) -> list[Any]:
        """All that it holds, as plain values."""

    @property
    def load(self) -> Callable[..., None]:
        """Hold, when new, what `dump` gave. Raises: ValueError when that cannot be."""

    def __len__(self) -> int: ...


S = TypeVar("S", bound=State)


class Table(Generic[S]):
    """One state for each key, made by `new`; a table without a key field has one, under ""."""

    def __init__(
        self, new: Callable[[], S], *, keys_max: int = KEYS_MAX, entries_max: int = ENTRIES_MAX
    ) -> None:
        self.new = new
        self._keys_max = keys_max
        self._entries_max = entries_max
        self._states: dict[Key, S] = {}
        self._entries = 0
        self.keys_evicted = 0
        self.entries_evicted = 0
        self.get = self._states.get

    def add(self, key: Key, time_s: float, value: Any) -> None:
        """Give an entry to the state of `key`."""
        states = self._states
        state = states.pop(key, None)
        if state is None:
            if len(states) >= self._keys_max:
                self._evict_key()
            state = self.new()
        states[key] = state  # the most recently observed key stands last
        grown = state.add(time_s, value)
        if grown:
            self._entries += grown
            while self._entries > self._entries_max:
                self._evict()

    def _evict(self) -> None:
        if len(self._states) > 1:
            self._evict_key()
            return
        [state] = self._states.values()
        gone = self._entries - self._entries_max
        state.drop(gone)
        self._entries -= gone
        self.entries_evicted += gone

    def _evict_key(self) -> None:
        gone = len(self._states.pop(next(iter(self._states))))
        self._entries -= gone
        self.keys_evicted += 1
        self.entries_evicted += gone

    def items(self) -> Iterator[tuple[Key, S]]:
        """Keys with their states, the least recently observed first."""
        return iter(self._states.items())

    def replace(self, states: dict[Key, S]) -> None:
        """Hold `states`, the least recently observed first, and nothing else."""
        self._states.clear()
        self._states.update(states)
        self._entries = sum(map(len, states.values()))

    @property
    def keys(self) -> int:
        """How many keys are held."""
        return len(self._states)

    @property
    def entries(self) -> int:
        """How many entries are held."""
        return self._entries
