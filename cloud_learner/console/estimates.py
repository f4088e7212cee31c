"""Estimates of what other shares would have earned, as a table.

Why: three methods that agree say more than one; their intervals say how much.

Invariants: points are hundredths of the full reward; an interval holds the truth in 95 of 100
tables. Pure.

Knows nothing about how they come about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HEAD = ("would have earned, in points", "rows", "IPS", "SNIPS", "DR")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each choice of releases."""
    cells = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    methods = (_interval(row[name]) for name in ("ips", "snips", "dr"))
    return (row["name"], f"{row['rows']:,}", *methods)


def _interval(found: dict[str, float | None]) -> str:
    if found["value"] is None:
        return "nothing known"
    value, low, high = (100 * (found[name] or 0.0) for name in ("value", "low", "high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
