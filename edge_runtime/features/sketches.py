"""Windows that keep no entries: distinct values by when they were last seen, and a decayed mean.

Why: a device meets more values than it can remember; these states stay small and say how well they
know.

`Distinct` follows the waves of Gibbons and Tirthapura (Distributed streams algorithms for sliding
windows, 2002): level 0 holds the values that were seen last, level k those among them whose hash
ends in k zero bits, each at most `EXACT_MAX` of them. A window is counted on level 0 as far as that
reaches, and for what is older on the levels below it, where one value stands for 2**k. So the
answer is exact while a window holds at most `EXACT_MAX` values, and a few per cent off beyond.

Invariants: reading changes nothing; states restored are states that never stopped, bit for bit.
The exact answer does not depend on the order in which values came; that of the deeper levels and
the decayed mean may, in what rounding or chance decides. A question behind the newest entry is
answered as of that entry: what was seen after the time that is asked about counts too.

Knows nothing about events and specs.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from typing import Any
from zlib import crc32

from edge_runtime.features.keyed import Key
from edge_runtime.features.windows import ROUNDING_S, VALUE_MAX, check_order

EXACT_MAX = 1024


class Level:
    """Values with the time each was last seen: `values` in the order of `times`, ascending."""

    __slots__ = ("last", "times", "values")

    def __init__(self) -> None:
        self.last: dict[Key, float] = {}
        self.times: list[float] = []
        self.values: list[Key] = []

    def see(self, value: Key, time_s: float) -> int:
        """Note that `value` was seen; how many values that adds: 0 or 1."""
        times, values = self.times, self.values
        known_s = self.last.get(value)
        if known_s is not None:
            if time_s <= known_s:
                return 0
            at = bisect_left(times, known_s)
            if values[at] != value:  # several were last seen then
                at = values.index(value, at)
            del times[at], values[at]
        self.last[value] = time_s
        if not times or time_s >= times[-1]:
            times.append(time_s)
            values.append(value)
        else:
            at = bisect_right(times, time_s)
            times.insert(at, time_s)
            values.insert(at, value)
        return known_s is None

    def drop(self, count: int) -> None:
        """Forget the `count` values that were not seen for longest."""
        for value in self.values[:count]:
            del self.last[value]
        del self.times[:count], self.values[:count]


class Distinct:
    """The distinct values of one key over the last `span_s` seconds, or the last `events` events.

    Events are counted as they came: `seen` of them so far.
    """

    __slots__ = ("_events", "_exact_max", "_span_s", "levels", "seen")

    def __init__(self, span_s: float, *, events: int = 0, exact_max: int = EXACT_MAX) -> None:
        self._span_s = float(events) if events else span_s + ROUNDING_S
        self._events, self._exact_max = events, exact_max
        self.seen = 0
        self.levels = [Level()]

    def __len__(self) -> int:
        return sum(len(level.times) for level in self.levels)

    def add(self, time_s: float, value: Key) -> int:
        """Note that `value` was seen; by how many entries this has grown."""
        self.seen += 1
        if self._events:
            time_s = float(self.seen)
        levels = self.levels
        grown = levels[0].see(value, time_s)
        if len(levels) > 1:
            for level in levels[1 : depth_of(value) + 1]:
                grown += level.see(value, time_s)
        oldest = levels[-1].times
        if oldest and oldest[0] <= time_s - self._span_s:
            grown -= self._expire(time_s - self._span_s)
        if len(levels[0].times) > self._exact_max:
            grown += self._overflow()
        return grown

    def count(self, start_s: float) -> int:
        """How many values were seen after `start_s`."""
        total, reached_s = 0, math.inf
        for depth, level in enumerate(self.levels):
            times = level.times
            inside = bisect_left(times, reached_s) - bisect_right(times, start_s)
            total += max(0, inside) << depth
            if len(times) < self._exact_max or times[0] <= start_s:
                break
            reached_s = times[0]
        return total

    def count_events(self, events: int) -> int:
        """How many values were among the last `events` events."""
        return self.count(float(self.seen - events))

    def drop(self, count: int) -> None:
        """Forget the `count` values that were not seen for longest, the deepest level first."""
        for level in reversed(self.levels):
            gone = min(count, len(level.times))
            level.drop(gone)
            count -= gone

    def dump(self) -> list[Any]:
        """How many events were seen, and times and values of each level."""
        return [self.seen, [[level.times, level.values] for level in self.levels]]

    def load(self, seen: int, levels: list[tuple[list[float], list[Key]]]) -> None:
        """Hold, when new, what `dump` gave. Raises: ValueError when it is out of order."""
        self.seen, self.levels = seen, []
        for times, values in levels:
            level = Level()
            if times or values:
                check_order(times, values)
            level.times, level.values = list(times), list(values)
            level.last = dict(zip(values, times, strict=True))
            self.levels.append(level)
        if not self.levels:
            raise ValueError("it has no level")

    def _expire(self, horizon_s: float) -> int:
        before = len(self)
        for level in self.levels:
            level.drop(bisect_right(level.times, horizon_s))
        # A level that is not full has lost values to age alone: it needs none below it.
        whole = (i for i, level in enumerate(self.levels, 1) if len(level.times) < self._exact_max)
        del self.levels[next(whole, len(self.levels)) :]
        return before - len(self)

    def _overflow(self) -> int:
        grown = 0
        for depth, level in enumerate(self.levels, start=1):
            if len(level.times) <= self._exact_max:
                break
            if depth == len(self.levels):
                self.levels.append(deeper(level, depth))
                grown += len(self.levels[-1].times)
            level.drop(1)
            grown -= 1
        return grown


def deeper(level: Level, depth: int) -> Level:
    """The values of `level`, which is whole, that belong to level `depth` as well."""
    sample = Level()
    for time_s, value in zip(level.times, level.values, strict=True):
        if depth_of(value) >= depth:
            sample.see(value, time_s)
    return sample


def depth_of(value: Key) -> int:
    """The deepest level that a value belongs to, the same on every machine."""
    text = value if isinstance(value, str) else repr(float(value))
    # A checksum tells values apart, the multiplication by 2**64 / φ spreads what it tells.
    bits = (crc32(text.encode(), 1) * 0x9E3779B97F4A7C15 >> 32) & 0xFFFFFFFF
    return (bits & -bits).bit_length() - 1 if bits else 32


class Decayed:
    """A mean in which an entry weighs half as much with every `half_life_s` that pass after it.

    `total` and `weight` are as of `time_s`, the newest entry; their ratio is the mean at any later
    time too.
    """

    __slots__ = ("_half_life_s", "time_s", "total", "weight")

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self.time_s = self.total = self.weight = 0.0

    def __len__(self) -> int:
        return 1

    def add(self, time_s: float, value: float) -> int:
        """Put an entry in; 1 if it is the first."""
        if not -VALUE_MAX <= value <= VALUE_MAX:
            value = min(max(value, -VALUE_MAX), VALUE_MAX)
        if not self.weight:
            self.time_s, self.total, self.weight = time_s, float(value), 1.0
            return 1
        if time_s >= self.time_s:
            fade = 0.5 ** ((time_s - self.time_s) / self._half_life_s)
            self.time_s = time_s
            self.total, self.weight = self.total * fade + value, self.weight * fade + 1.0
        else:
            share = 0.5 ** ((self.time_s - time_s) / self._half_life_s)
            self.total, self.weight = self.total + value * share, self.weight + share
        return 0

    def drop(self, count: int) -> None:
        """Nothing: a mean is one entry."""

    def dump(self) -> list[float]:
        """The newest time, the total and the weight."""
        return [self.time_s, self.total, self.weight]

    def load(self, time_s: float, total: float, weight: float) -> None:
        """Hold, when new, what `dump` gave. Raises: ValueError when there is no weight."""
        if not weight > 0:
            raise ValueError("it has no weight")
        self.time_s, self.total, self.weight = time_s, total, weight
