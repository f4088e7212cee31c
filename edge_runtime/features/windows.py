"""Bounded time windows: how many, and how much, in the last so many seconds.

Why: most of what a model can know about the present stands in what happened here lately.

A `Table` holds one `Series` for each key. A series keeps its entries sorted by time, with running
totals beside them, so a window of any span is two binary searches and one subtraction, and windows
of different spans share their entries. An entry that comes out of order is put where it belongs.

Invariants: reading changes nothing. Totals are integers (fixed point, 2**-32), hence exact: the
answer depends on which entries are present, never on the order in which they came or left. A window
at `now` covers (now - span, now]. A table never holds more than `KEYS_MAX` keys and `ENTRIES_MAX`
entries; what a bound pushes out, the least recently observed first, is counted.

Knows nothing about events and specs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise

KEYS_MAX = 4096
ENTRIES_MAX = 65_536
SCALE = 1 << 32
VALUE_MAX = 2.0**62

Key = str | int | float


class Series:
    """Entries of one key: `times` ascending; `totals[i]` is the sum of all entries before i."""

    __slots__ = ("times", "totals")

    def __init__(self) -> None:
        self.times: list[float] = []
        self.totals: list[int] = [0]

    def insert(self, time_s: float, units: int) -> None:
        """Add an entry where its time belongs."""
        times, totals = self.times, self.totals
        if not times or time_s >= times[-1]:
            times.append(time_s)
            totals.append(totals[-1] + units)
            return
        at = bisect_right(times, time_s)
        times.insert(at, time_s)
        totals.insert(at, totals[at])
        for index in range(at + 1, len(totals)):
            totals[index] += units

    def drop_until(self, horizon_s: float) -> int:
        """Forget the entries at or before `horizon_s`; how many they were."""
        gone = bisect_right(self.times, horizon_s)
        self.drop_first(gone)
        return gone

    def drop_first(self, count: int) -> None:
        """Forget the `count` oldest entries."""
        del self.times[:count]
        del self.totals[:count]

    def values(self) -> list[float]:
        """The values of the entries; exact, see `to_units`."""
        return [(after - before) / SCALE for before, after in pairwise(self.totals)]


class Table:
    """One series for each key, all kept for `retention_s` behind their newest entry."""

    def __init__(
        self, retention_s: float, *, keys_max: int = KEYS_MAX, entries_max: int = ENTRIES_MAX
    ) -> None:
        assert retention_s > 0
        assert keys_max > 0
        assert entries_max > 0
        self.retention_s = retention_s
        self._keys_max = keys_max
        self._entries_max = entries_max
        self._series: dict[Key, Series] = {}
        self._entries = 0
        self.keys_evicted = 0
        self.entries_evicted = 0
        self.get = self._series.get

    def add(self, key: Key, time_s: float, units: int) -> None:
        """Put an entry into the series of `key`; no effect when it is older than is kept."""
        series = self._series.pop(key, None) or Series()
        self._series[key] = series  # the most recently observed key stands last
        times = series.times
        if times and time_s <= times[-1] - self.retention_s:
            return
        series.insert(time_s, units)
        self._entries += 1
        horizon_s = times[-1] - self.retention_s
        if times[0] <= horizon_s:
            self._entries -= series.drop_until(horizon_s)
        if self._entries > self._entries_max or len(self._series) > self._keys_max:
            self._evict()

    def _evict(self) -> None:
        oldest = next(iter(self._series))
        if len(self._series) > 1:
            gone = len(self._series.pop(oldest).times)
            self.keys_evicted += 1
        else:
            gone = self._entries - self._entries_max
            self._series[oldest].drop_first(gone)
        self._entries -= gone
        self.entries_evicted += gone

    def items(self) -> Iterator[tuple[Key, Series]]:
        """Keys with their series, the least recently observed first."""
        return iter(self._series.items())

    def load(self, key: Key, times: list[float], values: list[float]) -> None:
        """Append a key with what its series held, `times` ascending, as `items` gave it."""
        series = self._series[key] = Series()
        for time_s, value in zip(times, values, strict=True):
            series.insert(time_s, to_units(value))
        self._entries += len(times)

    @property
    def keys(self) -> int:
        """How many keys are held."""
        return len(self._series)

    @property
    def entries(self) -> int:
        """How many entries are held."""
        return self._entries


def to_units(value: float) -> int:
    """`value` in fixed point, clipped to ±2**62; `to_units(v) / SCALE` is exact and maps back."""
    return round(float(min(max(value, -VALUE_MAX), VALUE_MAX)) * SCALE)
