"""The plan: which tables the windows of a spec need, and what each has to keep.

Why: windows that count the same entries share one table, so an event is put away once for all of
them; and a table that two specs name alike is carried from the one to the other.

Invariants: the identity of a table says what its entries are, not how long they are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from edge_runtime.features.feature import Feature, Window
from edge_runtime.features.keyed import Table
from edge_runtime.features.sketches import Decayed, Distinct
from edge_runtime.features.windows import Series


class TableId(NamedTuple):
    """What goes into a table: `value` of events of kind `over`, apart for each value of `key`.

    `how` is "" for kept entries, "distinct" or "distinct events" for values last seen, counted in
    seconds or events, and "decayed SECONDS" for a decayed mean.
    """

    over: str
    key: str
    value: str
    how: str = ""


AnyTable = Table[Series] | Table[Distinct] | Table[Decayed]


def table_id(window: Window) -> TableId:
    """The table that a window is read from."""
    how = ""
    if window.statistic == "distinct":
        how = "distinct" if window.span_events is None else "distinct events"
    elif window.half_life_s is not None:
        how = f"decayed {window.half_life_s!r}"
    return TableId(window.over, window.key or "", window.value or "", how)


def windows_by_table(features: Iterable[Feature]) -> dict[TableId, list[Window]]:
    """The tables of a spec, in the order in which its features first name them."""
    tables: dict[TableId, list[Window]] = {}
    for feature in features:
        if feature.window is not None:
            tables.setdefault(table_id(feature.window), []).append(feature.window)
    return tables


def new_table(windows: list[Window], lateness_s: float) -> AnyTable:
    """An empty table that keeps what `windows`, all of one table, may be asked for."""
    span_s = max(window.span_s or 0.0 for window in windows)
    events = max(window.span_events or 0 for window in windows)
    statistics = {window.statistic for window in windows}
    half_life_s = windows[0].half_life_s
    if half_life_s is not None:
        return Table(lambda: Decayed(half_life_s))
    if "distinct" in statistics:
        return Table(lambda: Distinct(span_s + lateness_s, events=events))
    return Table(
        lambda: Series(
            span_s,
            events=events,
            lateness_s=lateness_s,
            squares="std" in statistics,
            highs="max" in statistics,
            lows="min" in statistics,
        )
    )
