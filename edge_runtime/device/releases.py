"""Releases on a device: how new ones take over and how the last one is left again.

Why: a swap must be noticed by nobody, neither in the answers nor in what the windows know; and an
operator must be able to go back at once, without a network.

Invariants: windows that a release adds are rebuilt from the log before it serves. What was rolled
back is in quarantine first, so no update brings the same package back.

Knows nothing about brokers and signatures; a plan was proven by whoever brings it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import msgspec

from edge_runtime.device.family import Family
from edge_runtime.errors import CapacityError, RequestError, TrustError
from edge_runtime.events.journal import Journal
from edge_runtime.events.log import EventLog
from edge_runtime.features.engine import Engine
from edge_runtime.inference import history
from edge_runtime.inference.package import PackageInfo
from edge_runtime.inference.slot import Arm
from edge_runtime.rollout.arms import load_plan_arm
from edge_runtime.rollout.plan import Plan, PlanArm
from edge_runtime.update.shelf import Shelf
from edge_runtime.wire import codec
from edge_runtime.wire.messages import LabelRecord

CATCH_UP_MAX = 256
DURABLE_S = 10.0

log = logging.getLogger("edge_runtime")

Position = tuple[int, int]


class Releases:
    """What `members` serve, changed; `turn` keeps requests out for the moment of a change."""

    def __init__(
        self, members: Mapping[str, Family], journal: Journal, shelf: Shelf, turn: Lock
    ) -> None:
        self._members, self._journal, self._shelf, self._turn = members, journal, shelf, turn

    def swap(self, member: Family, arms: Sequence[Arm], plan: Plan | None) -> None:
        """See `Runtime.swap`."""
        if brings_new_windows(member, arms):  # the log must be durable first: as `adopt` waits
            with ThreadPoolExecutor(1, thread_name_prefix="adopt") as thread:
                thread.submit(asyncio.run, self.adopt(member, arms, plan)).result()
            return
        with self._turn:
            self._check_not_left(arms)
            member.follow(arms, plan)
            self._journal.hasten_snapshot()

    async def adopt(self, member: Family, arms: Sequence[Arm], plan: Plan | None) -> None:
        """See `Runtime.adopt`."""
        if not brings_new_windows(member, arms):
            self.swap(member, arms, plan)
            return
        log, missed = self._journal.log, list[history.Seen]()
        with self._turn:
            member.pipeline.gathering.append(missed)
            until = log.epoch, log.handed_out("event")
        try:
            await _durable(log, until[1])
            engines = await asyncio.to_thread(rebuilt, log, member, arms, until)
            while len(missed) > CATCH_UP_MAX:  # off the turn, as long as there is much of it
                await asyncio.to_thread(catch_up, engines, missed)
            with self._turn:
                self._check_not_left(arms)
                catch_up(engines, missed)
                member.follow(arms, plan, engines)
                self._journal.hasten_snapshot()
        finally:
            with self._turn:  # by identity: two empty lists are equal
                others = [each for each in member.pipeline.gathering if each is not missed]
                member.pipeline.gathering = others

    def _check_not_left(self, arms: Sequence[Arm]) -> None:
        """A roll back while the log was read must not be undone by what began before it."""
        for arm in arms:
            if arm.sha256 in self._shelf.quarantined():
                raise TrustError("release_quarantined", f"{arm.release} was left meanwhile")

    def roll_back(self, member: Family, reason: str) -> str:
        """See `Runtime.rollback`."""
        back = way_back(member, self._shelf)
        leave(self._shelf, back, reason)
        self.swap(member, back.arms, back.plan)
        return back.plan.stable.release

    async def roll_back_async(self, member: Family, reason: str) -> str:
        """See `Runtime.rollback_async`."""
        back = await asyncio.to_thread(way_back, member, self._shelf)
        await asyncio.to_thread(leave, self._shelf, back, reason)
        await self.adopt(member, back.arms, back.plan)
        return back.plan.stable.release


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
    return bool(_new_windows(family, arms))


def rebuilt(
    events: EventLog, family: Family, arms: Sequence[Arm], until: Position
) -> dict[str, Engine]:
    """Engines for those of `arms` that bring new windows, having seen the log up to `until`."""
    return history.rebuild(_new_windows(family, arms), seen(events, family.name, until=until))


def catch_up(engines: Mapping[str, Engine], missed: list[history.Seen]) -> None:
    """Let rebuilt `engines` see what happened while they were rebuilt, and empty `missed` of it."""
    taken = len(missed)
    for kind, time_s, fields in missed[:taken]:
        for engine in engines.values():
            history.see(engine, kind, time_s, fields)
    del missed[:taken]


async def _durable(log: EventLog, seq: int) -> None:
    try:
        async with asyncio.timeout(DURABLE_S):
            await log.wait_durable("event", seq)
    except TimeoutError as error:
        raise CapacityError(
            "log_not_durable",
            "the disk does not take what the new windows are to be rebuilt from; what serves is "
            "unchanged",
            f"see what the disk of {log.directory} is doing",
        ) from error


def _new_windows(family: Family, arms: Sequence[Arm]) -> dict[str, PackageInfo]:
    infos = [arm.info for arm in arms if arm.info is not None]
    return history.with_new_windows(infos, family.pipeline.engines.values())


@dataclass(frozen=True)
class WayBack:
    """A roll back that can be done: what it leaves, and what serves after it."""

    leaving: PlanArm
    plan: Plan
    arms: list[Arm]


def way_back(member: Family, shelf: Shelf) -> WayBack:
    """From what `member` serves to the same without its canary or, where there is none here, to
    what served before.

    Raises: RequestError `nothing_to_roll_back`, PackageError for a package that does not load.
    """
    plan = member.plan
    tries_canary = len(member.pipeline.slot.arms) > 1
    if plan is not None and plan.canary is not None and tries_canary:
        leaving, before = plan.canary, alone(plan)
    else:
        previous = None if plan is None else _before(plan, shelf)
        if plan is None or previous is None:
            raise RequestError(
                "nothing_to_roll_back",
                "no earlier release is kept here; what serves is unchanged",
                "roll back in the fleet, by a new plan",
            )
        leaving, before = plan.stable, alone(previous)
    return WayBack(leaving, before, load(shelf, before))


def _before(plan: Plan, shelf: Shelf) -> Plan | None:
    """What served before `plan`: until that is settled, what the shelf still calls current."""
    left = shelf.quarantined()
    for load in (shelf.load_current, shelf.load_previous):
        before = load(plan.family)
        if before is None or before.stable.sha256 == plan.stable.sha256:
            continue
        if not all(each.sha256 in left for each in before.stable.packages):
            return before
    return None


def load(shelf: Shelf, plan: Plan) -> list[Arm]:
    """The stable arm of `plan`, from the shelf. Raises: PackageError."""
    return [load_plan_arm(shelf, "stable", plan.stable)]


def leave(shelf: Shelf, back: WayBack, reason: str) -> None:
    """Never run what `back` leaves again on this device, nor after a restart.

    Raises: CapacityError, with what serves unchanged.
    """
    for package in back.leaving.packages:
        shelf.quarantine(package.sha256, "rolled_back")
    shelf.save_current(back.plan)
    log.warning("%s is left and in quarantine: %.200r", back.leaving.release, reason)


def alone(plan: Plan) -> Plan:
    """`plan` as it is followed after a roll back: its stable release and nothing beside it."""
    stable = msgspec.structs.replace(plan.stable, weight=1.0)
    return msgspec.structs.replace(
        plan, stable=stable, canary=None, others=(), selector={}, pins={}
    )
