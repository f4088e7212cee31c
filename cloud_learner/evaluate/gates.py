"""The offline gate's rules: evidence in, verdicts out, each with its reason.

Invariants: no data is never a pass: an undefined score holds. A candidate passes only if every
rule passes for every form that it ships, since any device may choose any of them; one that fails
outweighs any that hold. Pure.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from cloud_learner.evaluate.offline import ScoredSet

Outcome = Literal["pass", "fail", "hold"]


class Limits(msgspec.Struct, frozen=True):
    """Limits of one family; AUC differences are candidate against the release that serves.

    `variants` are the forms that a release ships, the default one first.
    """

    static_drop_max: float
    recent_drop_max: float
    quality_min: float
    int8_gap_max: float
    calibration_min: float
    calibration_max: float
    recent_rows_min: int
    variants: tuple[str, ...] = ("int8", "float32")


class Evidence(msgspec.Struct, frozen=True):
    """What the gate measured itself. `serving_*` is None before the first release.

    `recent` is None when there cannot be any yet: at the bootstrap, before the stream. What ends
    in `_float` is of the form float32, `static` and `recent` are of int8.
    """

    static: ScoredSet
    static_float: ScoredSet
    recent: ScoredSet | None
    serving_static: ScoredSet | None
    serving_recent: ScoredSet | None
    recent_float: ScoredSet | None = None


class Verdict(msgspec.Struct, frozen=True):
    """One rule's judgement: what was found, what it must reach, in words."""

    rule: str
    outcome: Outcome
    found: float
    reach: float
    reason: str


def judge(evidence: Evidence, limits: Limits) -> list[Verdict]:
    """All verdicts, in order; a rule over another form than the default one is named after it."""
    verdicts = []
    for variant in limits.variants:
        found = _judge_form(variant, evidence, limits)
        if variant != limits.variants[0]:
            found = [msgspec.structs.replace(each, rule=f"{variant}_{each.rule}") for each in found]
        verdicts += found
    return verdicts


def outcome(verdicts: list[Verdict]) -> Outcome:
    """The outcome of all rules together."""
    for wanted in ("fail", "hold"):
        if any(verdict.outcome == wanted for verdict in verdicts):
            return wanted
    return "pass" if verdicts else "hold"


def _judge_form(variant: str, evidence: Evidence, limits: Limits) -> list[Verdict]:
    is_int8, verdicts = variant == "int8", []
    static = evidence.static if is_int8 else evidence.static_float
    recent = evidence.recent if is_int8 else evidence.recent_float
    verdicts.append(
        _at_least("static_auc", static.auc, limits.quality_min, "AUC on the static set")
    )
    if evidence.serving_static is not None:
        reach = evidence.serving_static.auc - limits.static_drop_max
        verdicts.append(_at_least("static_drop", static.auc, reach, "AUC on the static set"))
    if is_int8:
        gap = abs(evidence.static_float.auc - static.auc)
        verdicts.append(_at_most("int8_gap", gap, limits.int8_gap_max, "AUC lost to int8"))
    if recent is not None:
        verdicts += _judge_recent(recent, evidence.serving_recent, limits)
    return verdicts


def _judge_recent(recent: ScoredSet, serving: ScoredSet | None, limits: Limits) -> list[Verdict]:
    if recent.rows < limits.recent_rows_min:
        why = f"recent hold-out has {recent.rows} rows, {limits.recent_rows_min} are needed"
        return [Verdict("recent_rows", "hold", recent.rows, limits.recent_rows_min, why)]
    verdicts = []
    if serving is not None:
        reach = serving.auc - limits.recent_drop_max
        verdicts.append(_at_least("recent_drop", recent.auc, reach, "AUC on the recent hold-out"))
    ratio, text = recent.calibration, "mean prediction over base rate"
    verdicts.append(_at_least("calibration_low", ratio, limits.calibration_min, text))
    verdicts.append(_at_most("calibration_high", ratio, limits.calibration_max, text))
    return verdicts


def _at_least(rule: str, found: float, reach: float, what: str) -> Verdict:
    return _verdict(rule, found, reach, what, "at least", passed=found >= reach)


def _at_most(rule: str, found: float, reach: float, what: str) -> Verdict:
    return _verdict(rule, found, reach, what, "at most", passed=found <= reach)


def _verdict(
    rule: str, found: float, reach: float, what: str, bound: str, *, passed: bool
) -> Verdict:
    if math.isnan(found) or math.isnan(reach):
        return Verdict(rule, "hold", found, reach, f"{what} is undefined: too few rows")
    reason = f"{what} is {found:.4f}, must be {bound} {reach:.4f}"
    return Verdict(rule, "pass" if passed else "fail", found, reach, reason)
