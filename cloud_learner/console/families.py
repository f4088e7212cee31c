"""What the learner says of each family, as a table for people.

Why: with several families in one home, whoever operates it must see which one stands still, and
why.

Invariants: it shows what the learner said last, and nothing else; a failure is a line of its own.

Knows nothing about how the learner found it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloud_learner.console.state import moment

_COLUMNS = ("family", "stage", "serves", "on trial", "learned to", "batches", "waiting", "failed")


def text(said: Mapping[str, Any]) -> str:
    """All that the learner said: the table, then a line for each number over all families."""
    rest = [f"{name:>24}  {value}" for name, value in said.items() if name != "families"]
    return "\n".join([table(said["families"]), *rest])


def table(families: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each family below a heading, and one for each failure."""
    rows = [_COLUMNS, *(_row(name, said) for name, said in sorted(families.items()))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    failures = [
        f"{name}: {said['failure']}" for name, said in sorted(families.items()) if said["failure"]
    ]
    return "\n".join(lines + failures)


def _row(name: str, said: Mapping[str, Any]) -> tuple[str, ...]:
    rollout, counters = said["rollout"], said["counters"]
    stage = "rests" if counters["resting"] else rollout["stage"]
    arms = [(rollout[arm] or {}).get("release", "-") for arm in ("stable", "canary")]
    numbers = [counters[key] for key in ("cycles", "batches_waiting", "micro_batches_failed")]
    return (name, stage, *arms, moment(said["clock_s"]), *(f"{number:,}" for number in numbers))
