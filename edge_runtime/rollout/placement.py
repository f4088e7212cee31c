"""Placement: what a device runs now under a plan, and what it waits for before it obeys the rest.

Why: a plan says what the fleet shall come to; a device takes its time for what is new to it, and
none for what is withdrawn. Each device decides alone, from the plan, its name and the time, so a
restart, or a network that is gone, changes no decision.

Rules, the first that fits: who runs nothing, or something below the signed floor, obeys at once.
A device on hold, by the plan or by its own configuration, changes nothing; a trial then outlives
its end, too. What a device shall leave it leaves at once: a trial that the plan no longer names,
that is over, or that shall answer no more, and a stable release for an older one. What is new to it
(a trial, a newer stable release, a shadow that shall answer) waits for the window and the jitter.
Meanwhile all else that runs goes on. A trial that failed here is left out of the plan; a stable
release that did is not waited for, but missed (`quarantine`), until a plan names another.

The share of the jitter is a draw over salt and device, counted from the opening of the window at or
after the moment when the plan's last stage began: a restart begins no wait anew, and a device that
comes late waits no more.

Invariants: pure. What is placed is a plan whose `arms_for` here is what shall run now; placed again
over what it gave, a plan gives the same, or more once a wait is over.

Knows nothing about signatures, disks or models, nor about how time is known.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import msgspec

from edge_runtime.rollout.plan import Plan, PlanArm, Window, arms_for, bucket

Wait = Literal["", "hold", "window", "jitter", "quarantine"]

_DAY_S = 86_400.0


class Here(msgspec.Struct, frozen=True):
    """The device that is spoken of; `hold` is by its own configuration."""

    device: str
    attributes: Mapping[str, str] = {}
    hold: bool = False

    def arms(self, plan: Plan) -> list[PlanArm]:
        """What runs here under `plan`, the stable one first; alone it has all of the weight."""
        arms = [arm for _, arm in arms_for(plan, self.device, self.attributes)]
        return arms if len(arms) > 1 else [msgspec.structs.replace(arms[0], weight=1.0)]


class Placement(msgspec.Struct, frozen=True):
    """The plan that a device follows now and, where that is not the newest, what it waits for.

    `until_s` is the wall time at which it has to be looked at again; infinite: with the next plan.
    """

    plan: Plan
    waits: Wait = ""
    until_s: float = math.inf


def placed(
    plan: Plan,
    runs: Plan | None,
    here: Here,
    now_s: float,
    *,
    left: Collection[str] = (),
    lowest_counter: int = 0,
) -> Placement:
    """What `here` follows of `plan` at wall time `now_s`, when it runs what `runs` says.

    `left` are the packages in quarantine here, `lowest_counter` is the signed floor of releases.
    """
    shall = due(plan, now_s, left)
    if here.arms(shall) == here.arms(plan):
        shall = plan
    running = [] if runs is None else here.arms(runs)
    is_banned = any(arm.counter < lowest_counter for arm in running)
    if runs is None or is_banned or here.arms(shall) == running:
        return _going(shall, now_s)
    if here.hold or here.device in plan.hold:
        return Placement(runs, "hold")
    waits, until_s = _wait(plan, here, now_s)
    if not waits and _is_left(here.arms(shall)[0], left):
        waits, until_s = "quarantine", math.inf
    now = meanwhile(shall, runs, here, left) if waits else shall
    if now == shall:
        return _going(shall, now_s)
    now = runs if here.arms(now) == running else now
    return Placement(now, waits, min(until_s, _end_s(now)))


def due(plan: Plan, now_s: float, left: Collection[str] = ()) -> Plan:
    """`plan` without the trials that failed here, and without any once their time is over."""
    if now_s >= _end_s(plan):
        return with_trials(plan, [])
    kept = [arm for arm in plan.trials if not _is_left(arm, left)]
    return plan if kept == plan.trials else with_trials(plan, kept)


def meanwhile(shall: Plan, runs: Plan, here: Here, left: Collection[str] = ()) -> Plan:
    """What goes on while what is new in `shall` has to wait: what runs, without what is withdrawn.

    Where the stable release is one of those that wait, it is a part of `runs`, else of `shall`.
    """
    wanted, running = here.arms(shall), here.arms(runs)
    stays = _is_newer(wanted[0], running[0]) or _is_left(wanted[0], left)
    base, arms, others = (runs, running, wanted) if stays else (shall, wanted, running)
    found = {arm.sha256: arm for arm in others}
    kept = [_careful(arm, found[arm.sha256]) for arm in arms[1:] if arm.sha256 in found]
    return base if kept == arms[1:] else with_trials(base, kept)


def with_trials(plan: Plan, arms: Sequence[PlanArm]) -> Plan:
    """`plan` with `arms` on trial in place of its own."""
    canary, others = (arms[0], tuple(arms[1:])) if arms else (None, ())
    return msgspec.structs.replace(plan, canary=canary, others=others)


def _going(plan: Plan, now_s: float) -> Placement:
    end_s = _end_s(plan)
    return Placement(plan, until_s=end_s if end_s > now_s else math.inf)


def _end_s(plan: Plan) -> float:
    """When the trials of a plan are over."""
    return plan.not_after_s if plan.trials and plan.not_after_s else math.inf


def _is_left(arm: PlanArm, left: Collection[str]) -> bool:
    return all(each.sha256 in left for each in arm.packages)


def _is_newer(wanted: PlanArm, running: PlanArm) -> bool:
    return wanted.sha256 != running.sha256 and wanted.counter >= running.counter


def _careful(arm: PlanArm, other: PlanArm) -> PlanArm:
    """An arm that is a shadow before or after is one meanwhile."""
    return msgspec.structs.replace(arm, mode="shadow") if other.mode == "shadow" else arm


def _wait(plan: Plan, here: Here, now_s: float) -> tuple[Wait, float]:
    """What something new has to wait for, and until when; nothing where it may come now."""
    due_s = now_s
    if plan.jitter_s and plan.stages:
        share_s = plan.jitter_s * bucket(f"{plan.salt}|jitter", here.device)
        due_s = max(now_s, _opens_s(plan.window, plan.stages[-1].began_s) + share_s)
    open_s = _opens_s(plan.window, due_s)
    if open_s <= now_s:
        return "", now_s
    return ("window" if open_s > due_s else "jitter"), open_s


def _opens_s(window: Window | None, from_s: float) -> float:
    """The first moment at or after `from_s` at which the window is open."""
    if window is None or window.from_min == window.to_min:
        return from_s
    start_s, end_s = window.from_min * 60.0, window.to_min * 60.0
    length_s = (end_s - start_s) % _DAY_S
    into_s = (from_s - start_s) % _DAY_S  # how long ago it opened last
    return from_s if into_s < length_s else from_s + _DAY_S - into_s
