"""Releases on a device: how new ones take over and how the last one is left again.

Why: a swap must be noticed by nobody, neither in the answers nor in what the windows know; and an
operator must be able to go back at once, without a network.

Invariants: windows that a release adds are rebuilt from the log before it serves. What was rolled
back is in quarantine first, so no update brings the same package back.

Knows nothing about brokers and signatures; a plan was proven by whoever brings it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from edge_runtime.errors import RequestError
from edge_runtime.events.log import EventLog
from edge_runtime.family import Family
from edge_runtime.features.engine import Engine
from edge_runtime.inference import history
from edge_runtime.inference.package import PackageInfo
from edge_runtime.inference.slot import Arm
from edge_runtime.rollout.arms import load_plan_arm
from edge_runtime.rollout.plan import Plan, PlanArm
from edge_runtime.update.shelf import Shelf
from edge_runtime.wire import codec
from edge_runtime.wire.messages import LabelRecord

log = logging.getLogger("edge_runtime")

Position = tuple[int, int]


def seen(
    events: EventLog, family: str, after: Position = (0, 0), until: Position | None = None
) -> Iterator[history.Seen]:
    """The durable records of a family that move windows, after one position and up to another."""
    for epoch, seq, data in events.tail("event", *after):
        if until is not None and (epoch, seq) > until:
            return
        record = codec.decode_record(data)
        assert not isinstance(record, LabelRecord), "labels have a class of their own"
        if record.family == family:
            yield record.kind, record.time_s, record.fields


def brings_new_windows(family: Family, arms: Sequence[Arm]) -> bool:
    """Whether `arms` have windows that must be rebuilt from the log before they serve."""
    return bool(family.pipeline.engines) and bool(_new_windows(family, arms))


def rebuilt(
    events: EventLog, family: Family, arms: Sequence[Arm], until: Position
) -> dict[str, Engine]:
    """Engines for those of `arms` that bring new windows, having seen the log up to `until`."""
    if not brings_new_windows(family, arms):
        return {}
    return history.rebuild(_new_windows(family, arms), seen(events, family.name, until=until))


def catch_up(engines: Mapping[str, Engine], missed: Iterable[history.Seen]) -> None:
    """Let rebuilt `engines` see what happened while they were rebuilt."""
    for kind, time_s, fields in missed:
        for engine in engines.values():
            history.see(engine, kind, time_s, fields)


def _new_windows(family: Family, arms: Sequence[Arm]) -> dict[str, PackageInfo]:
    infos = [arm.info for arm in arms if arm.info is not None]
    return history.with_new_windows(infos, family.pipeline.engines.values())


def left_by(plan: Plan | None, shelf: Shelf) -> tuple[PlanArm, Plan]:
    """What a roll back leaves, and the plan that it goes back to: without the canary where there
    is one, else what served before.

    Raises: RequestError `nothing_to_roll_back`.
    """
    if plan is not None and plan.canary is not None:
        return plan.canary, alone(plan)
    previous = None if plan is None else shelf.load_previous(plan.family)
    if plan is None or previous is None:
        raise RequestError(
            "nothing_to_roll_back",
            "no earlier release is kept here; what serves is unchanged",
            "roll back in the fleet, by a new plan",
        )
    return plan.stable, alone(previous)


def load(shelf: Shelf, plan: Plan) -> list[Arm]:
    """The stable arm of `plan`, from the shelf. Raises: PackageError."""
    return [load_plan_arm(shelf, "stable", plan.stable)]


def leave(shelf: Shelf, arm: PlanArm, reason: str) -> None:
    """Never run the packages of `arm` again on this device. Raises: CapacityError."""
    for package in arm.packages:
        shelf.quarantine(package.sha256, "rolled_back")
    log.warning("%s is left and in quarantine: %s", arm.release, reason)


def alone(plan: Plan) -> Plan:
    """`plan` as it is followed after a roll back: its stable release and nothing beside it."""
    stable = msgspec.structs.replace(plan.stable, weight=1.0)
    return msgspec.structs.replace(plan, stable=stable, canary=None, selector={})
