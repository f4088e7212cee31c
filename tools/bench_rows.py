"""The rows that a bench prints, and what it was measured on.

Invariants: a row is judged by its own direction; one without a number to reach is never judged.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Row:
    """A line of the table; `ok` is None where nothing is to be reached."""

    what: str
    value: float
    unit: str
    reach: float | None = None
    at_least: bool = False

    @property
    def ok(self) -> bool | None:
        """Whether the number to reach was reached."""
        if self.reach is None:
            return None
        return self.value >= self.reach if self.at_least else self.value <= self.reach

    def plain(self) -> dict[str, Any]:
        """The row as `--json` prints it."""
        said = {"what": self.what, "value": round(self.value, 4), "unit": self.unit}
        return {**said, "reach": self.reach, "ok": self.ok}


def machine() -> dict[str, object]:
    """What it was measured on."""
    about = {"cpus": os.cpu_count(), "arch": platform.machine()}
    return {**about, "python": sys.version.split()[0], "load": os.getloadavg()[0]}


def table(rows: Sequence[Row]) -> str:
    """All rows as text."""
    lines = [f"{'what':108} {'value':>12} {'unit':9} {'reach':>10}"]
    for row in rows:
        reach = "" if row.reach is None else f"{row.reach:>10,g}"
        missed = "  missed" if row.ok is False else ""
        value = f"{row.value:,.0f}" if abs(row.value) >= 1000 else f"{row.value:.4g}"
        lines.append(f"{row.what:108} {value:>12} {row.unit:9} {reach}{missed}".rstrip())
    return "\n".join(lines)
