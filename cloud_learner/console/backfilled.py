"""What a backfill came to, in lines: by device how far back, how much, and what is missing.

Why: a history with holes must say so to whoever is about to trust it.

Knows nothing about how it was found: it draws plain data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

_COLUMNS = ("device", "from", "to", "predictions", "whole", "partial", "after gap", "lacking")


def table(found: Mapping[str, Any]) -> str:
    """The lines of one backfill; `found` is what its `facts` are."""
    filled, released = found["filled"], found["released"]
    if filled is None:
        return f"{found['family']}: nothing to do"
    rows = [_COLUMNS, *(_row(name, each) for name, each in filled["devices"].items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    for name, each in filled["devices"].items():
        lines += [f"{name}: {text}" for text in _notes(each)]
    return "\n".join([*lines, *_sums(filled, released)])


def _sums(filled: Mapping[str, Any], released: Mapping[str, Any]) -> Iterator[str]:
    unread = f"{filled['unreadable']:,} unreadable, {filled['damaged_bytes']:,} bytes damaged"
    yield f"{filled['envelopes']:,} envelopes read, {unread}"
    parts = f"{released['learned']:,} learned, {released['held_out']:,} held out"
    static = f"{released['static']:,} in the static set"
    yield f"{filled['twins']:,} examples added, {parts}, {static}"
    yield f"release {released['release']} is offered"


def _row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    lacking = sum(found["lacking"].values())
    numbers = (found["predictions"], found["whole"], found["partial"], found["after_gap"], lacking)
    times = (_when(found["first_s"]), _when(found["last_s"]))
    return (name, *times, *(f"{number:,}" for number in numbers))


def _notes(found: Mapping[str, Any]) -> Iterator[str]:
    """What is missing of a device, in words; nothing where nothing is."""
    if found["lost"]:
        yield "missing: " + _counted(found["lost"])
    if found["lacking"]:
        yield "predictions without " + _counted(found["lacking"])
    if found["explained"]:
        share = f"{found['explained']:,} of {found['compared']:,}"
        yield f"{share} differ from what was logged, all after a gap"
    if found["unknown_spec"]:
        yield f"{found['unknown_spec']:,} of a spec that the registry does not know, not compared"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))


def _when(time_s: float | None) -> str:
    return "" if time_s is None else f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M}"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    pairs = list(zip(cells, widths, strict=True))
    left = [cell.ljust(width) for cell, width in pairs[:3]]
    return "  ".join([*left, *(cell.rjust(width) for cell, width in pairs[3:])]).rstrip()
