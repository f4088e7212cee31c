"""The report of a run: its numbers, what each of them must reach, and the file that keeps both.

Why: a run that says "done" proves nothing; the same numbers are printed, written and judged from
one table.

Invariants: the names in the JSON file are the fields of `Report`; a number that was not measured
is null there (NaN in memory) and reaches nothing; the file is replaced whole or not at all.

Knows nothing about terminals, pictures or how the numbers were measured.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from edge_runtime.errors import CapacityError
from edge_runtime.files import write_atomic

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "at least": operator.ge,
    "at most": operator.le,
    "above": operator.gt,
    "exactly": operator.eq,
}


class WorldsAuc(msgspec.Struct, frozen=True):
    """Prequential AUC of each world: every prediction scored once with its true label."""

    static_frozen: float
    static_continual: float
    windows_frozen: float
    windows_continual: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a run measured. `events_answered` is what the client counted, `events_archived` what the
    learner accepted and holds, counted again in its raw envelopes.

    `events_lost_in_linger` of them a SIGKILL took before they were durable. `elapsed_s` is the live
    part alone. `int8_gap_auc` is the float student's AUC minus that of its int8 form. `details`
    holds what else was measured, by name.
    """

    predictions: int
    elapsed_s: float
    auc: WorldsAuc
    events_answered: int
    events_archived: int
    events_lost_in_linger: int
    learned_twice: int
    freshness_p50_s: float
    freshness_p99_s: float
    swap_failures: int
    predict_p50_us: float
    predict_p99_us: float
    int8_gap_auc: float
    candidates: int
    releases: int
    promoted: int
    micro_batches_skipped: int
    offline_gate_stopped: int
    canary_rolled_back: int
    forged_refused: int
    sigkill_recovered: bool
    details: dict[str, Any] = {}


class Goal(msgspec.Struct, frozen=True):
    """What a number must be."""

    comparison: Literal["at least", "at most", "above", "exactly"]
    reach: float


class Number(msgspec.Struct, frozen=True):
    """A number of the report and its goals: the value under `key` less those under `minus`.

    Keys are dotted paths into the report. `default` is the goal of the default run, `full` that of
    the whole year; a run without a goal only shows the value. `form` formats value and goal.
    """

    what: str
    key: str
    default: Goal | None = None
    full: Goal | None = None
    form: str = "{:,.0f}"
    minus: tuple[str, ...] = ()


class Line(msgspec.Struct, frozen=True):
    """A judged number, in words; `goal` is empty and `ok` None where nothing was to be reached."""

    what: str
    value: str
    goal: str
    ok: bool | None


def _least(reach: float) -> Goal:
    return Goal("at least", reach)


def _most(reach: float) -> Goal:
    return Goal("at most", reach)


def _both(what: str, key: str, goal: Goal, form: str = "{:,.0f}", *minus: str) -> Number:
    return Number(what, key, goal, goal, form, minus)


_LIVE = "auc.windows_continual"
_AUC, _GAIN, _S, _US = "{:.4f}", "{:+.4f}", "{:,.2f} s", "{:,.0f} µs"
_NONE = Goal("exactly", 0)
_UNACCOUNTED = ("events_archived", "events_lost_in_linger")

NUMBERS: tuple[Number, ...] = (
    Number("real predictions", "predictions", _least(100_000), _least(336_776)),
    Number("live part", "elapsed_s", _most(120), None, "{:,.1f} s"),
    Number("AUC, windows + continual", _LIVE, _least(0.745), _least(0.773), _AUC),
    Number(
        "  over windows + frozen",
        _LIVE,
        Goal("above", 0),
        _least(0.015),
        _GAIN,
        ("auc.windows_frozen",),
    ),
    Number("  over static + continual", _LIVE, None, None, _GAIN, ("auc.static_continual",)),
    Number("  over static + frozen", _LIVE, None, _least(0.14), _GAIN, ("auc.static_frozen",)),
    Number("events answered, the client's count", "events_answered"),
    Number("  lost to the SIGKILL within the linger", "events_lost_in_linger"),
    _both("  neither archived nor lost", "events_answered", _NONE, "{:,.0f}", *_UNACCOUNTED),
    _both("examples learned twice", "learned_twice", _NONE),
    _both("candidates built and gated", "candidates", _least(60)),
    _both("releases decided on the canary", "releases", _least(8)),
    _both("  promoted", "promoted", _least(5)),
    Number("micro-batches skipped", "micro_batches_skipped"),
    _both("last label to serving on canary, p50", "freshness_p50_s", _most(1.5), _S),
    _both("  p99", "freshness_p99_s", _most(4), _S),
    _both("requests failed in swaps", "swap_failures", _NONE),
    _both("predict in the daemon, p50", "predict_p50_us", _most(150), _US),
    _both("  p99", "predict_p99_us", _most(1000), _US),
    _both("predict as the client sees it, p50", "details.client_p50_us", _most(400), _US),
    _both("  p99", "details.client_p99_us", _most(3000), _US),
    _both("int8 student: AUC lost to its float form", "int8_gap_auc", _most(0.001), _GAIN),
    _both("  to its teacher", "details.teacher_gap_auc", _most(0.005), _GAIN),
    _both("bad candidates stopped by the offline gate", "offline_gate_stopped", _least(1)),
    _both("bad releases rolled back by the canary", "canary_rolled_back", _least(1)),
    _both("forged releases refused", "forged_refused", _least(2)),
    _both("device killed and back, nothing lost", "sigkill_recovered", Goal("exactly", True)),
)


def judge(report: Report, *, full: bool = False) -> list[Line]:
    """The numbers of `report` in the order of NUMBERS, against the goals of this kind of run."""
    values = msgspec.to_builtins(report)
    return [_judge(number, number.full if full else number.default, values) for number in NUMBERS]


def reached(lines: Sequence[Line]) -> bool:
    """Whether no goal was missed."""
    return all(line.ok is not False for line in lines)


def write_report(path: Path, report: Report) -> None:
    """Replace `path` by `report` as JSON. Raises: CapacityError, with `path` unchanged."""
    try:
        write_atomic(path, msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    except OSError as error:
        raise CapacityError("disk_failed", f"report {path} was not written: {error}") from error


def _judge(number: Number, goal: Goal | None, values: Mapping[str, Any]) -> Line:
    value = _look_up(values, number.key)
    for key in number.minus:
        value -= _look_up(values, key)
    text = "not measured" if math.isnan(value) else _say(number.form, value)
    if goal is None:
        return Line(number.what, text, "", None)
    ok = _COMPARE[goal.comparison](value, goal.reach)
    return Line(number.what, text, f"{goal.comparison} {_say(number.form, goal.reach)}", ok)


def _look_up(values: Mapping[str, Any], key: str) -> float:
    """The number under a dotted path; NaN, which passes no comparison, when there is none."""
    found: Any = values
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, int | float) else math.nan


def _say(form: str, value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return form.format(value)
