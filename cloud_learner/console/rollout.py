"""The rollout of a family as a tree: releases, stages, gates.

Why: where a release stands and what it still needs is one picture, in the live view and in the
command.

Invariants: it draws what `Controller.status` says; a state is told by a word, colour only repeats
it. Pure.

Knows nothing about when it is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.text import Text
from rich.tree import Tree

_BAR = 8
_STAGES = {"passed": "green", "now": "cyan", "ahead": "dim"}
_DEVICES_MAX = 8


def tree(status: Mapping[str, Any], *, full: bool = False) -> Tree:
    """The picture; a `full` one has decisions and devices that are held back, too."""
    if not status:
        return Tree("nothing released yet")
    counts = status["counts"]
    found = Tree(
        line(
            f"{status['family']}: {status['stage']}{_held_back(status)}, plan"
            f" {status['plan_seq']}; {counts['promoted']} promoted, {counts['rolled_back']} rolled"
            f" back, {counts['superseded']} superseded"
        ),
        guide_style="dim",
    )
    for arm in ("stable", "canary"):
        if status[arm] is not None:
            branch = found.add(
                line(arm, " ", (status[arm]["release"], "bold"), _where(status[arm]))
            )
            for each in _course(status) if arm == "canary" else ():
                branch.add(each)
    for each in _contest(status["contest"]) if status["contest"] else ():
        found.add(each)
    if status["pending"]:
        found.add(line(f"waiting {status['pending']}"))
    for each in _rest(status) if full else ():
        found.add(each)
    return found


def line(*parts: str | tuple[str, str]) -> Text:
    """A line that is cut where it is too long."""
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _contest(contest: Mapping[str, Any]) -> Iterator[Text]:
    """A line for each release of a contest, and how it stands."""
    for arm in contest["arms"]:
        mean = "" if arm["mean"] is None else f", {100 * arm['mean']:.2f} points each"
        full = round(_BAR * arm["share"])
        bar = (("━" * full, "cyan"), ("╌" * (_BAR - full), "dim"))
        told = f" {arm['share']:>4.0%} of answers, {arm['answered']:,} count{mean}"
        yield line((arm["release"], "bold"), " ", *bar, told, _where(arm))
    yield Text(f"{contest['kind']}: {contest['verdict']}")
    yield line(f"ends in {_span(contest['ends_in_s'])} at the latest")


def _held_back(status: Mapping[str, Any]) -> str:
    waits = {"resume": ", paused", "approve": ", waits to be approved"}
    return waits.get(status["waits"], "")


def _where(arm: Mapping[str, Any]) -> str:
    names = arm["devices"]
    more = f" and {len(names) - _DEVICES_MAX:,} more" if len(names) > _DEVICES_MAX else ""
    return f" on {' '.join(names[:_DEVICES_MAX]) or 'no device yet'}{more}"


def _course(status: Mapping[str, Any]) -> Iterator[Text]:
    """The stages, where there are several, and the gates of the present one."""
    for stage in status["stages"] if len(status["stages"]) > 1 else ():
        state = stage["state"]
        yield line(f"{stage['stage']:<7}", (f"{state:<7}", _STAGES[state]), _facts(stage))
    for gate in status["gates"]:
        yield _gate(gate)


def _facts(stage: Mapping[str, Any]) -> str:
    if stage["state"] != "now":
        return ""
    devices = f"{stage['devices'] - stage['silent']:,} of {stage['devices']:,} devices"
    ends = f"ends in {_span(stage['ends_in_s'])}"
    return f"{devices} have shown it, {stage['labels']:,} labels, {ends}"


def _gate(gate: Mapping[str, Any]) -> Text:
    full = round(_BAR * min(max(gate["value"] / gate["reach"], 0.0), 1.0))
    numbers = f"{gate['value']:>7,.4g} of {gate['reach']:<5,.4g}"
    bar = (("━" * full, "cyan"), ("╌" * (_BAR - full), "dim"))
    return line(f"{gate['gate'].replace('_', ' '):<13} ", *bar, f" {numbers} {gate['then']}")


def _rest(status: Mapping[str, Any]) -> Iterator[Text]:
    if status["hold"]:
        yield line(f"held: {' '.join(status['hold'])}")
    if status["pins"]:
        pins = " ".join(f"{name}={release}" for name, release in status["pins"].items())
        yield line(f"pinned: {pins}")
    if status["unpublished"]:
        yield line(("not published yet: ", "yellow"), status["last_failure"])
    for each in status["decisions"][-5:]:
        colour = "green" if each["reason"] == "promoted" else "yellow"
        yield line((f"{each['reason']:<10}", colour), each["note"])


def _span(seconds: float) -> str:
    """A time in the unit that fits it."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
