"""The picture that the live view draws on a terminal: one renderable for one state.

Why: devices, learner, rollout, faults and decisions on one screen of 80 x 24.

Invariants: what is drawn fits the height, long lines are cut, not wrapped; a state is told by a
word, colour only repeats it. Pure.

Knows nothing about when it is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from cloud_learner.console import rollout
from cloud_learner.console.rollout import line
from cloud_learner.console.state import (
    DeviceRow,
    DeviceState,
    FaultRow,
    LearnerRow,
    ViewState,
    duration,
    moment,
)

_DEVICES_MAX = 6

_STATES: dict[DeviceState, Text] = {
    "up": Text("● up", "green"),
    "killed": Text("× killed", "bold red"),
    "recovered": Text("● recovered", "cyan"),
}
_FAULTS = {True: Text("ok  ", "green"), False: Text("BAD ", "bold red"), None: Text("..  ", "dim")}


def render(state: ViewState, height: int = 24) -> RenderableType:
    """The picture of `state`, at most `height` - 1 lines; decisions fill what the rest leaves."""
    devices, tree, faults = (
        _devices(state.devices),
        rollout.tree(state.rollout),
        _faults(state.faults),
    )
    used = 4 + devices.row_count + _size(tree) + len(state.faults)
    decisions = state.rollout.get("decisions", [])
    room = min(max(height - 1 - used, 1), 5)
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(style="bold", width=7)
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_row("devices", devices)
    grid.add_row("learner", _learner(state.learner))
    grid.add_row("rollout", tree)
    if state.faults:
        grid.add_row("faults", faults)
    if decisions:
        grid.add_row("decided", _decisions(decisions[-room:]))
    return Group(_header(state), grid)


def _header(state: ViewState) -> Text:
    facts = (state.broker_url, duration(state.elapsed_s), moment(state.event_time_s))
    return line((f"Headwater {state.version}", "bold"), *(f"  {fact}" for fact in facts))


def _devices(rows: Sequence[DeviceRow]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, expand=True, header_style="dim")
    for name in ("name", "state", "arms"):
        table.add_column(name, no_wrap=True, ratio=1 if name == "arms" else None)
    for name in ("p50", "p99", "log"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows[:_DEVICES_MAX]:
        arms = Text(", ".join(f"{arm} {release}" for arm, release in row.arms.items()) or "-")
        latency = (f"{row.p50_us:,.0f} µs", f"{row.p99_us:,.0f} µs")
        table.add_row(Text(row.name), _STATES[row.state], arms, *latency, f"{row.log_pending:,}")
    if (more := len(rows) - _DEVICES_MAX) > 0:
        table.add_row("...", f"{more} more")
    return table


def _learner(row: LearnerRow) -> Text:
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in row.weights.items())
    first = f"{row.events_per_s:,.0f} events/s, {row.archived:,} archived, cycle {row.cycle:,}"
    if row.freshness_p50_s is None or row.freshness_p99_s is None:
        fresh = "no canary yet"
    else:
        fresh = f"{row.freshness_p50_s:.2f} s p50, {row.freshness_p99_s:.2f} s p99"
    second = f"label to canary {fresh}" + (f"; replicas {weights}" if weights else "")
    return line(f"{first}\n{second}")


def _faults(rows: Sequence[FaultRow]) -> Text:
    lines = [Text.assemble(_FAULTS[row.ok], f"{row.name}: {row.state}") for row in rows]
    return _one(lines)


def _decisions(rows: Sequence[Mapping[str, Any]]) -> Text:
    good = {"promoted": "green"}
    return _one(
        [
            Text.assemble((f"{row['reason']:<10}", good.get(row["reason"], "yellow")), row["note"])
            for row in rows
        ]
    )


def _one(lines: Sequence[Text]) -> Text:
    joined = Text("\n", no_wrap=True, overflow="ellipsis").join(lines)
    joined.no_wrap, joined.overflow = True, "ellipsis"
    return joined


def _size(tree: Tree) -> int:
    return 1 + sum(_size(child) for child in tree.children)
