"""Reading: the lines of source that turn the state of a table into the statistics of its windows.

Why: of all that a prediction costs, most is here; windows of one table share the look-up of their
key, and each search for where a window starts ends where the next shorter one starts.

Invariants: what is read of kept entries is exact for any time that the table keeps entries for.

Knows of tables only what a `Series`, a `Distinct` and a `Decayed` can be asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from edge_runtime.features.feature import FLOAT32_MAX, Feature, Window
from edge_runtime.features.windows import SCALE

UNITS = repr(float(SCALE))
_EMPTY_IS_ZERO = ("count", "sum", "rate", "distinct")


class Read(NamedTuple):
    """A window of `feature` that goes into the variable `x`."""

    x: str
    feature: Feature
    window: Window


def read_table(reads: list[Read]) -> list[str]:
    """The lines that set the variables of `reads`, all of one table, from the variable `state`."""
    inside = _read_series(reads) if _keeps_entries(reads[0].window) else _read_sketch(reads)
    return ["if state is None:", *indented(_empty(reads)), "else:", *indented(inside)]


def _keeps_entries(window: Window) -> bool:
    return window.half_life_s is None and window.statistic != "distinct"


def _read_sketch(reads: list[Read]) -> list[str]:
    lines = []
    for x, _, window in reads:
        if window.half_life_s is not None:
            lines.append(f"{x} = state.total / state.weight")
        elif window.span_s is not None:
            lines.append(f"{x} = state.count(time_s - {window.span_s!r})")
        else:
            lines.append(f"{x} = state.count_events({window.span_events})")
    return lines


def _read_series(reads: list[Read]) -> list[str]:
    used = {read.window.statistic for read in reads}
    lines = ["times, head = state.times, state.head"]
    if used & {"sum", "mean", "std", "last"}:
        lines.append("totals = state.totals")
    if "std" in used:
        lines.append("squares = state.squares")
    lines += [
        "size = end = start = len(times)",
        "if times[-1] > time_s:",
        "    end = start = bisect_right(times, time_s)",
    ]
    extents = dict.fromkeys((read.window.span_s, read.window.span_events) for read in reads)
    for extent in sorted(extents, key=lambda each: (each[0] or math.inf, each[1] or 0)):
        span_s, events = extent
        inside = [r for r in reads if (r.window.span_s, r.window.span_events) == extent]
        if span_s is None:
            lines.append(f"start = end - {events} if end - {events} > head else head")
        else:
            lines.append(f"start = bisect_right(times, time_s - {span_s!r}, head, start)")
        lines += ["count = end - start", "if count > 0:", *indented(_statistics(inside))]
        lines += ["else:", *indented(_empty(inside))]
    return lines


def _statistics(reads: list[Read]) -> list[str]:
    lines = []
    if {read.window.statistic for read in reads} & {"sum", "mean", "std"}:
        lines.append("total = totals[end] - totals[start]")
    return lines + [f"{x} = {_statistic(window)}" for x, _, window in reads]


def _statistic(window: Window) -> str:
    """The expression of a statistic over entries `start` to `end`, of which there are some."""
    peak = (
        "(state.{0}.units[bisect_left(state.{0}.positions, start)] "
        "if end == size else state.high(start, end, {1}))"
    )
    deviation = "sqrt(count * (squares[end] - squares[start]) - total * total)"
    return {
        "count": "count",
        "sum": f"total / {UNITS}",
        "mean": f"total / (count * {SCALE})",
        "std": f"{deviation} / (count * {UNITS})",
        "max": f"{peak.format('highs', 1)} / {UNITS}",
        "min": f"-{peak.format('lows', -1)} / {UNITS}",
        "last": f"(totals[end] - totals[end - 1]) / {UNITS}",
        "rate": f"count / {window.span_s!r}",
        "time_since_last": "time_s - times[end - 1]",
    }[window.statistic]


def _empty(reads: list[Read]) -> list[str]:
    """The lines for a window with nothing in it: nothing is 0, what cannot be said is the fill."""
    return [
        f"{x} = {0.0 if window.statistic in _EMPTY_IS_ZERO else fill_of(feature)!r}"
        for x, feature, window in reads
    ]


def fill_of(feature: Feature) -> float:
    """The fill, as far as float32 goes."""
    return min(max(feature.fill, -FLOAT32_MAX), FLOAT32_MAX)


def indented(lines: Iterable[str]) -> list[str]:
    """`lines` one level further in."""
    return [f"    {line}" for line in lines]
