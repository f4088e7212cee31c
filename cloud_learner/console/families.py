"""What the learner says of each family, as a table for people.

Why: with several families in one home, whoever operates it must see which one stands still, and
why.

Invariants: it shows what the learner said last, and nothing else; a failure, an alarm that stands,
the certificate of the last micro-batch and what answers without labels are worth are lines of their
own.

Knows nothing about how the learner found it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cloud_learner.console.state import moment

_COLUMNS = ("family", "stage", "serves", "on trial", "learned to", "batches", "waiting", "failed")

_SOURCES = {
    "loss": ("the loss", "rose"),
    "score": ("answers", "changed"),
    "feature": ("feature", "changed"),
    "embedding": ("what the network makes of rows", "changed"),
    "sketch": ("by what devices tell, feature", "changed"),
    "estimate": ("the quality to be expected", "fell"),
}
_CHANGES = {"sudden": "suddenly", "gradual": "bit by bit", "cyclic": "as it did before"}


def text(said: Mapping[str, Any]) -> str:
    """All that the learner said: the table, then a line for each number over all families."""
    rest = [f"{name:>24}  {value}" for name, value in said.items() if name != "families"]
    return "\n".join([table(said["families"]), *rest])


def table(families: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each family below a heading, then one for each thing to be known of it."""
    rows = [_COLUMNS, *(_row(name, said) for name, said in sorted(families.items()))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    notes = [f"{name}: {note}" for name, said in sorted(families.items()) for note in _notes(said)]
    return "\n".join(lines + notes)


def _notes(said: Mapping[str, Any]) -> Iterator[str]:
    if said["failure"]:
        yield said["failure"]
    if waits := said.get("gate", {}).get("waits"):
        yield f"gate: {waits}"
    if said["rollout"].get("unpublished"):
        yield f"not published yet: {said['rollout']['last_failure']}"
    yield from (f"alarm: {_alarm(each)}" for each in said.get("alarms", ()))
    if said.get("certificate"):
        yield _certificate(said["certificate"])
    expected = said.get("expected", {})
    if expected.get("expected") is not None:
        numbers = f"{expected['expected']:.3f} without labels, {expected['reached']:.3f} reached"
        yield f"expected {expected['measure']} {numbers}"


def _certificate(said: Mapping[str, Any]) -> str:
    """How much of the last micro-batch one device had, and could have had."""
    whose = f"{said['size']} examples of {said['devices']} devices"
    bound = f"one has {said['largest_share']:.1%} of them, {said['bound_per_device']:.1%} at most"
    return f"micro-batch {said['batch']}: {whose}; {bound}"


def _alarm(alarm: Mapping[str, Any]) -> str:
    """What changed, how, and by how much: `feature x changed suddenly, 0.41 beyond 0.25, since ...`

    An undefined number is null.
    """
    what, verb = _SOURCES.get(alarm["source"], (alarm["source"], "changed"))
    how = _CHANGES.get(alarm["kind"], alarm["kind"])
    numbers = " beyond ".join(f"{alarm[key] or 0.0:.3g}" for key in ("found", "reach"))
    name = f" {alarm['name']}" if alarm["name"] else ""
    return f"{what}{name} {verb} {how}, {numbers}, since {moment(alarm['time_s'])}"


def _row(name: str, said: Mapping[str, Any]) -> tuple[str, ...]:
    rollout, counters = said["rollout"], said["counters"]
    stage = "rests" if counters["resting"] else rollout["stage"]
    arms = [(rollout[arm] or {}).get("release", "-") for arm in ("stable", "canary")]
    numbers = [counters[key] for key in ("cycles", "batches_waiting", "micro_batches_failed")]
    return (name, stage, *arms, moment(said["clock_s"]), *(f"{number:,}" for number in numbers))
