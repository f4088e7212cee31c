"""Windows over kept entries: how many, how much and how far apart, of the last seconds or events.

Why: most of what a model can know about the present stands in what happened here lately.

A `Series` keeps the entries of one key, sorted by time, with running totals beside them: a window
of any span is a binary search and a subtraction; windows of different spans share their entries.
Where a statistic asks for it, there are also totals of squares, and the peaks: the entries that no
later one exceeds, in which the extreme of every window that ends now is the first one inside. An
entry that comes out of order is put where it belongs, which costs as much as came after it.

Invariants: reading changes nothing. Totals are integers (fixed point, 2**-32), hence exact: the
answer depends on which entries are present, never on the order in which they came or left. Entries
before `head` are forgotten and only wait for their memory to be taken back, many at once, so that
an entry that comes in order costs constant time, amortised.

Knows nothing about keys, events and specs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import accumulate, pairwise
from operator import sub
from typing import Any

SCALE = 1 << 32
VALUE_MAX = 2.0**62
COMPACT_FROM = 64
ROUNDING_S = 1.0  # kept beyond need, so that rounding of times never decides


class Peaks:
    """Entries of a series that no later one exceeds: positions ascending, units descending.

    With `sign` -1 they are the lows.
    """

    __slots__ = ("positions", "sign", "units")

    def __init__(self, sign: int) -> None:
        self.sign = sign
        self.positions: list[int] = []
        self.units: list[int] = []

    def push(self, position: int, units: int) -> None:
        """Let the newest entry take the place of those that it exceeds or equals."""
        units *= self.sign
        tops, positions = self.units, self.positions
        while tops and tops[-1] <= units:
            tops.pop()
            positions.pop()
        tops.append(units)
        positions.append(position)

    def insert(self, position: int, units: int) -> None:
        """Put an entry in before others; those at `position` and after move up by one."""
        units *= self.sign
        tops, positions = self.units, self.positions
        at = bisect_left(positions, position)
        positions[at:] = [each + 1 for each in positions[at:]]
        if at < len(tops) and tops[at] >= units:
            return
        start = at
        while start and tops[start - 1] <= units:
            start -= 1
        tops[start:at], positions[start:at] = [units], [position]

    def drop_first(self, count: int) -> None:
        """Let positions count from entry `count` on; those before it are gone."""
        gone = bisect_left(self.positions, count)
        self.positions = [position - count for position in self.positions[gone:]]
        del self.units[:gone]


class Series:
    """Entries of one key: `times` ascending; `totals[i]` is the sum of all entries before i.

    Kept are the entries of the last `span_s` seconds and the last `events` entries, each as asked
    up to `lateness_s` behind the newest.
    """

    __slots__ = (
        *("times", "totals", "squares", "highs", "lows", "head"),
        *("_span_s", "_events", "_lateness_s"),
    )

    def __init__(
        self,
        span_s: float,
        *,
        events: int = 0,
        lateness_s: float = 0.0,
        squares: bool = False,
        highs: bool = False,
        lows: bool = False,
    ) -> None:
        self.times: list[float] = []
        self.totals: list[int] = [0]
        self.squares: list[int] | None = [0] if squares else None
        self.highs = Peaks(1) if highs else None
        self.lows = Peaks(-1) if lows else None
        self.head = 0
        self._lateness_s = lateness_s + ROUNDING_S
        self._span_s, self._events = span_s + self._lateness_s, events

    def __len__(self) -> int:
        return len(self.times) - self.head

    def add(self, time_s: float, units: int) -> int:
        """Put an entry in; no effect when it is older than is kept. By how many this has grown."""
        times, totals = self.times, self.totals
        if times and time_s < times[-1]:
            return self._insert(time_s, units)
        times.append(time_s)
        totals.append(totals[-1] + units)
        if self.squares is not None:
            self.squares.append(self.squares[-1] + units * units)
        if self.highs is not None:
            self.highs.push(len(times) - 1, units)
        if self.lows is not None:
            self.lows.push(len(times) - 1, units)
        return 1 if times[self.head] > time_s - self._span_s else 1 - self._forget()

    def _insert(self, time_s: float, units: int) -> int:
        times, totals = self.times, self.totals
        at = bisect_right(times, time_s, self.head)
        times.insert(at, time_s)
        _shift(totals, at, units)
        if self.squares is not None:
            _shift(self.squares, at, units * units)
        for peaks in (self.highs, self.lows):
            if peaks is not None:
                peaks.insert(at, units)
        return 1 - self._forget()

    def _forget(self) -> int:
        """Move `head` past what no question may ask for any more; how many entries that were."""
        times, head = self.times, self.head
        until = len(times) - 1  # the newest stays, even where times are too large to see a span
        if self._events:
            until = bisect_right(times, times[-1] - self._lateness_s, head) - self._events
        kept, horizon_s = head, times[-1] - self._span_s
        while kept < until and times[kept] <= horizon_s:
            kept += 1
        self.head = kept
        if kept > COMPACT_FROM and 2 * kept > len(times):
            self._compact()
        return kept - head

    def drop(self, count: int) -> None:
        """Forget the `count` oldest entries."""
        self.head += count
        if self.head > COMPACT_FROM and 2 * self.head > len(self.times):
            self._compact()

    def _compact(self) -> None:
        head, self.head = self.head, 0
        del self.times[:head]
        del self.totals[:head]
        if self.squares is not None:
            del self.squares[:head]
        for peaks in (self.highs, self.lows):
            if peaks is not None:
                peaks.drop_first(head)

    def dump(self) -> list[Any]:
        """Times and values of the entries that are kept; exact, see `to_units`."""
        totals = pairwise(self.totals[self.head :])
        return [self.times[self.head :], [(after - before) / SCALE for before, after in totals]]

    def load(self, times: list[float], values: list[float]) -> None:
        """Hold, when new, what `dump` gave. Raises: ValueError when it is empty or out of order."""
        check_order(times, values)
        units = [to_units(value) for value in values]
        self.times = list(times)
        self.totals = list(accumulate(units, initial=0))
        if self.squares is not None:
            self.squares = list(accumulate((each * each for each in units), initial=0))
        for peaks in (self.highs, self.lows):
            if peaks is not None:
                for position, each in enumerate(units):
                    peaks.push(position, each)
        self._forget()

    def high(self, start: int, end: int, sign: int = 1) -> int:
        """The greatest units among entries `start` to `end`; with `sign` -1 the least, negated.

        The first peak from `start` on is that of all entries from there on, so unless it comes
        after `end`, it is that of these, too.
        """
        peaks = self.highs if sign > 0 else self.lows
        assert peaks is not None
        first = bisect_left(peaks.positions, start)
        if peaks.positions[first] < end:
            return peaks.units[first]
        values: Iterable[int] = map(sub, self.totals[start + 1 : end + 1], self.totals[start:end])
        return max(values) if sign > 0 else -min(values)


def check_order(times: list[float], values: list[Any]) -> None:
    """Raises: ValueError unless there are times, ascending, and as many values."""
    if not times or len(times) != len(values) or times != sorted(times):
        raise ValueError("its times are not in order, or not as many as its values")


def _shift(totals: list[int], at: int, units: int) -> None:
    """Make room for an entry of `units` at position `at` of running totals."""
    totals[at + 1 :] = [totals[at] + units, *(total + units for total in totals[at + 1 :])]


def to_units(value: float) -> int:
    """`value` in fixed point, clipped to ±2**62; `to_units(v) / SCALE` is exact and maps back."""
    if not -VALUE_MAX <= value <= VALUE_MAX:
        value = min(max(value, -VALUE_MAX), VALUE_MAX)
    return round(value * float(SCALE))
