"""The offline gate's rules: evidence in, verdicts out, each with its reason.

Invariants: no data is never a pass: an undefined score holds. A candidate passes only if every
rule that decides passes for every form that it ships, since any device may choose any of them; one
that fails outweighs any that hold. A verdict with `decides` false is said and weighs nothing: a
part of the data that is too small to judge, a number without a limit. Pure.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from cloud_learner.evaluate.offline import ScoredSet
from cloud_learner.evaluate.slices import largest_drop
from cloud_learner.stats.tasks import Task

Outcome = Literal["pass", "fail", "hold"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one family; drops of quality are against the release that serves.

    `variants` are the forms that a release ships, the default one first; `tighten` is the share of
    the drops that is allowed while an alarm stands, `device_share` what one device may have of the
    recent hold-out. The others are those of `[gates]`.
    """

    static_drop_max: float
    recent_drop_max: float
    quality_min: float
    int8_gap_max: float
    calibration_min: float
    calibration_max: float
    recent_rows_min: int
    slices: tuple[str, ...] = ()
    slice_drop_max: float = 0.05
    slice_rows_min: int = 200
    persistence_min: float | None = None
    size_bytes_max: int = 8_000_000
    latency_us_max: float = 5000.0
    variants: tuple[str, ...] = ("int8", "float32")
    task: Task = Task()
    tighten: float = 0.5
    device_share: float = 0.5


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one package.

    `broken_rows` were answered with what is no number. `recent` is None when there cannot be any
    yet: at the bootstrap, before the stream. `slices` are by sort and value; `ages` are the groups
    by the label age that was to be expected, soonest first, `label_ages` those by the age itself.
    """

    size_bytes: int
    latency_us: float
    broken_rows: int
    static: ScoredSet
    recent: ScoredSet | None = None
    slices: dict[str, dict[str, ScoredSet]] = {}
    ages: list[ScoredSet] = []
    label_ages: list[ScoredSet] = []
    over_persistence: float = math.nan


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate measured itself, by form. `serving` is None before the first release.

    `small_slices` says by sort how many were too small to be scored, `largest_share` what the
    device with most rows has of the recent hold-out.
    """

    forms: dict[str, Measured]
    serving: Measured | None = None
    small_slices: dict[str, int] = {}
    largest_share: float = math.nan


class Verdict(msgspec.Struct, frozen=True):
    """One rule's judgement: what was found, what it must reach, in words."""

    rule: str
    outcome: Outcome
    found: float
    reach: float
    reason: str
    decides: bool = True


def judge(evidence: Evidence, limits: Limits, *, alarmed: bool = False) -> list[Verdict]:
    """All verdicts, in order; a rule over another form than the default one is named after it.

    While an alarm stands (`alarmed`), the allowed drops are smaller.
    """
    verdicts = []
    for variant in limits.variants:
        found = _Form(variant, evidence, limits, alarmed=alarmed).verdicts()
        if variant != limits.variants[0]:
            found = [msgspec.structs.replace(each, rule=f"{variant}_{each.rule}") for each in found]
        verdicts += found
    if evidence.forms[limits.variants[0]].recent is not None:
        verdicts.append(_trust(evidence.largest_share, limits.device_share))
    return verdicts


def outcome(verdicts: list[Verdict]) -> Outcome:
    """The outcome of all rules together."""
    outcomes = [verdict.outcome for verdict in verdicts if verdict.decides]
    for wanted in ("fail", "hold"):
        if wanted in outcomes:
            return wanted
    return "pass" if outcomes else "hold"


class _Form:
    """The rules over one form of a candidate."""

    def __init__(self, variant: str, evidence: Evidence, limits: Limits, *, alarmed: bool) -> None:
        self._variant, self._limits, self._evidence = variant, limits, evidence
        self._mine, self._serving = evidence.forms[variant], evidence.serving
        self._tighten = limits.tighten if alarmed else 1.0
        self._alarm = f"; an alarm stands: x{limits.tighten:g}" if alarmed else ""
        self._measure = limits.task.measure

    def verdicts(self) -> list[Verdict]:
        return [*self._package(), *self._static(), *self._recent()]

    def _package(self) -> list[Verdict]:
        mine, limits = self._mine, self._limits
        return [
            _at_most("finite_answers", mine.broken_rows, 0, "rows answered with no number"),
            _at_most("size", mine.size_bytes, limits.size_bytes_max, "size in bytes"),
            _at_most("latency", mine.latency_us, limits.latency_us_max, "µs for one row"),
        ]

    def _static(self) -> list[Verdict]:
        found, limits = self._mine.static.quality, self._limits
        what = f"{self._measure} on the static set"
        verdicts = [_at_least("static_quality", found, limits.quality_min, what)]
        if self._serving is not None:
            before, drop = self._serving.static.quality, limits.static_drop_max
            verdicts.append(self._no_drop("static_drop", found, before, drop, what))
        if self._variant == "int8":
            gap = self._evidence.forms["float32"].static.quality - found
            lost = f"{self._measure} lost to int8"
            verdicts.append(_at_most("int8_gap", gap, limits.int8_gap_max, lost))
        return verdicts

    def _recent(self) -> list[Verdict]:
        recent, serving, limits = self._mine.recent, self._serving, self._limits
        if recent is None:
            return []
        if recent.rows < limits.recent_rows_min:
            why = f"recent hold-out has {recent.rows} rows, {limits.recent_rows_min} are needed"
            return [Verdict("recent_rows", "hold", recent.rows, limits.recent_rows_min, why)]
        verdicts = []
        if serving is not None and serving.recent is not None:
            what, before = f"{self._measure} on the recent hold-out", serving.recent.quality
            drop = limits.recent_drop_max
            verdicts.append(self._no_drop("recent_drop", recent.quality, before, drop, what))
            verdicts += [self._slice(sort, serving) for sort in self._evidence.small_slices]
        if limits.task.kind != "ranking":  # its scores only order
            verdicts += [*self._calibration(recent), self._calibration_by_age()]
            verdicts.append(self._persistence())
        return verdicts

    def _no_drop(self, rule: str, found: float, before: float, drop: float, what: str) -> Verdict:
        verdict = _at_least(rule, found, before - drop * self._tighten, what)
        return msgspec.structs.replace(verdict, reason=verdict.reason + self._alarm)

    def _slice(self, sort: str, serving: Measured) -> Verdict:
        """The slice of this sort that lost most; a sort without one that could be judged is said.

        It holds nothing: a rare value would stop all releases.
        """
        rule, reach = f"slice_{sort}", self._limits.slice_drop_max * self._tighten
        before, now = serving.slices.get(sort, {}), self._mine.slices.get(sort, {})
        value, drop, judged = largest_drop(before, now)
        small = self._evidence.small_slices[sort] + len(now) - judged
        if not judged:
            least = self._limits.slice_rows_min
            why = f"none of {small} slices by {sort} has {least} rows and a defined {self._measure}"
            return Verdict(rule, "hold", math.nan, reach, why, decides=False)
        reason = (
            f"{self._measure} lost at {sort}={value} is {drop:.4f}, must be at most {reach:.4f}"
        )
        reason += f" ({judged} judged, {small} too small){self._alarm}"
        return Verdict(rule, "pass" if drop <= reach else "fail", drop, reach, reason)

    def _calibration(self, recent: ScoredSet) -> list[Verdict]:
        """Where there are many classes, it takes long until one has rows enough to be judged."""
        ratio, what, limits = recent.calibration, "mean answer over mean label", self._limits
        verdicts = [
            _at_least("calibration_low", ratio, limits.calibration_min, what),
            _at_most("calibration_high", ratio, limits.calibration_max, what),
        ]
        decides = limits.task.kind != "multiclass" or not math.isnan(ratio)
        return [msgspec.structs.replace(each, decides=decides) for each in verdicts]

    def _calibration_by_age(self) -> Verdict:
        """The group whose ratio is farthest out; what serves being farther out there excuses it."""
        rule, limits = "calibration_by_age", self._limits
        groups = [
            (self._excess(group), at, group.calibration)
            for at, group in enumerate(self._mine.ages)
            if group.rows >= limits.slice_rows_min and math.isfinite(group.calibration)
        ]
        if not groups:
            why = "no rows whose labels come alike soon are enough: not judged"
            return Verdict(rule, "hold", math.nan, math.nan, why, decides=False)
        excess, at, ratio = max(groups)
        reach = limits.calibration_min if ratio < 1 else limits.calibration_max
        shown = ", ".join(f"{group.calibration:.2f}" for group in self._mine.ages)
        reason = f"mean answer over mean label, from rows whose labels come soon to late: {shown}; "
        reason += f"must be {limits.calibration_min:g} to {limits.calibration_max:g}"
        excused = excess > 0 and self._is_worse(at, excess)
        if excused:
            reason += "; what serves is no nearer"
        passed = excess <= 0 or excused
        return Verdict(rule, "pass" if passed else "fail", ratio, reach, reason)

    def _is_worse(self, at: int, excess: float) -> bool:
        """Whether what serves is at least so far out in the same group."""
        groups = self._serving.ages if self._serving is not None else []
        return at < len(groups) and self._excess(groups[at]) >= excess

    def _excess(self, group: ScoredSet) -> float:
        """How far the ratio is outside the limits; below 0 where it is within."""
        ratio, limits = group.calibration, self._limits
        return max(limits.calibration_min - ratio, ratio - limits.calibration_max)

    def _persistence(self) -> Verdict:
        found, limit = self._mine.over_persistence, self._limits.persistence_min
        what = "kappa over persistence"
        verdict = _at_least("persistence", found, 0.0 if limit is None else limit, what)
        if limit is not None:
            return verdict
        reason = verdict.reason if math.isnan(found) else f"{what} is {found:.4f}, 0 is no better"
        return msgspec.structs.replace(verdict, reason=f"{reason}; no limit is set", decides=False)


def _trust(share: float, reach: float) -> Verdict:
    """What one device may have is a matter of quotas; where others bring too little, it is said."""
    what = "the largest share of the recent hold-out that one device has"
    return msgspec.structs.replace(
        _at_most("recent_devices", share, reach + 1e-9, what), decides=False
    )


def _at_least(rule: str, found: float, reach: float, what: str) -> Verdict:
    return _verdict(rule, found, reach, what, "at least", passed=found >= reach)


def _at_most(rule: str, found: float, reach: float, what: str) -> Verdict:
    return _verdict(rule, found, reach, what, "at most", passed=found <= reach)


def _verdict(
    rule: str, found: float, reach: float, what: str, bound: str, *, passed: bool
) -> Verdict:
    if math.isnan(found) or math.isnan(reach):
        why = f"{what} is undefined: too few rows, or all their labels are alike"
        return Verdict(rule, "hold", found, reach, why)
    reason = f"{what} is {_number(found)}, must be {bound} {_number(reach)}"
    return Verdict(rule, "pass" if passed else "fail", found, reach, reason)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 and value % 1 else f"{value:,.0f}"
