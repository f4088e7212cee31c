"""The end of a run in the terminal: the numbers with their goals, and where to go from there.

Why: whoever ran it once must see at a glance what held, what did not, and what to try next.

Invariants: "ok" and "MISSED" are words, colour only repeats them; ASCII but for the letter mu, so
that it can be piped anywhere; 80 columns.

Knows nothing about what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cloud_learner.console.report import Line

_MARKS = {True: Text("ok", "green"), False: Text("MISSED", "bold red"), None: Text("")}


def result_table(
    lines: Sequence[Line], *, report: Path, picture: Path, next_steps: Sequence[str]
) -> RenderableType:
    """The table of `lines`, how many goals were missed, the two paths, and commands to try."""
    table = Table("what", box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("goal", no_wrap=True)
    table.add_column("", no_wrap=True)
    for line in lines:
        table.add_row(Text(line.what), Text(line.value), Text(line.goal, "dim"), _MARKS[line.ok])
    rest = [_verdict(lines), "", f"report   {report}", f"picture  {picture}"]
    tries = [f"  {step}" for step in next_steps]
    ending = Text("\n".join([*rest, "", "try next", *tries] if tries else rest), overflow="fold")
    return Group(Text(""), table, Text(""), ending)


def _verdict(lines: Sequence[Line]) -> str:
    goals = [line for line in lines if line.ok is not None]
    missed = sum(not line.ok for line in goals)
    return f"{missed} of {len(goals)} goals MISSED" if missed else f"all {len(goals)} goals reached"
