"""The rollout agent: makes a device run what its signed plans say, and reports how it goes.

Why: nobody logs in to a device. It asks by itself, proves what it gets, swaps without dropping a
request, and whatever goes wrong leaves the current release serving and shows in the next report.

Invariants: network, disk and model loading happen on the thread `update`, swaps on the event loop.
A release serves before it is remembered for a restart, and that comes before the floor rises to
it: no crash leaves a floor above what a restart, or a roll back, finds on the shelf. A package that
fails on this device, or that was left by a local roll back, is quarantined by its hash and never
tried again: a plan that has nothing else is refused, until a newer one names other packages.

Knows nothing about signatures (the client proves them) nor about how predictions are made.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from edge_runtime.bus.base import Bus, Message
from edge_runtime.errors import HeadwaterError, TransportError
from edge_runtime.inference.slot import Arm
from edge_runtime.rollout.arms import good_packages, load_plan_arm, packages_kept
from edge_runtime.rollout.plan import Plan, PlanArm, Variant, arms_for
from edge_runtime.update.shelf import Shelf
from edge_runtime.update.trust import Freshness
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import FeatureSketch, Mark, Report

REPORT_EVERY_S = 1.0
RETRY_FIRST_S = 0.25

T = TypeVar("T")

log = logging.getLogger("edge_runtime.agent")


class Host(Protocol):
    """What the agent asks of a runtime, on the event loop's thread."""

    @property
    def device(self) -> str: ...

    @property
    def families(self) -> list[str]: ...

    def current(self, family: str) -> Plan | None: ...

    async def adopt(self, family: str, arms: Sequence[Arm], plan: Plan) -> None: ...

    def report(self, refused: dict[str, int]) -> Report: ...


class Updates(Protocol):
    """What the agent asks of an update client, on the thread `update`."""

    @property
    def freshness(self) -> Freshness: ...

    def refresh(self) -> None: ...

    def plan(self, family: str, /) -> Plan: ...

    def fetch(self, arm: PlanArm, package: Variant, shelf: Shelf, /) -> Path: ...

    def lowest_counter(self, family: str, /) -> int: ...

    def confirm(self, plan: Plan, /) -> None: ...


class Agent:
    """Follows the plans of `host`'s families; asks when nudged and every `poll_s` seconds.

    `attributes` decide whether this device is one of a plan's canaries. `prove` tries a package
    where it can do no harm, before it is loaded here; it raises PackageError. For the report,
    `durable` tells where the log ends, and `sketches`, on a thread, what models were given lately;
    `sign`, on a thread, signs it, or gives None where there is no key to do so.
    """

    def __init__(
        self,
        host: Host,
        client: Updates,
        shelf: Shelf,
        bus: Bus,
        *,
        attributes: dict[str, str],
        poll_s: float,
        prove: Callable[[Path], None] | None = None,
        durable: Callable[[], list[Mark]] | None = None,
        sketches: Callable[[], list[FeatureSketch]] | None = None,
        sign: Callable[[bytes], bytes | None] | None = None,
    ) -> None:
        self._host, self._client, self._shelf, self._bus = host, client, shelf, bus
        self._attributes, self._poll_s, self._prove = attributes, poll_s, prove
        self._durable, self._sketches = durable or list, sketches or list
        self._sign = sign or (lambda _data: None)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="update")
        self._nudged, self._changed = asyncio.Event(), asyncio.Event()
        self._settled: dict[str, Plan] = {}
        self._failures = 0
        self._counts = Counter(checks=0, nudges=0, applied=0, unreachable=0, reports=0)
        self._refused: Counter[str] = Counter()

    async def run(self) -> None:
        """Follow and report until cancelled."""
        subscription = await self._bus.subscribe(subjects.REFRESH, self._on_refresh)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow(), name="agent-follow")
                group.create_task(self._report(), name="agent-report")
        finally:
            await subscription.close()
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def check(self) -> None:
        """Ask once and bring about what the plans say; what fails is counted, never raised."""
        self._counts["checks"] += 1
        before = self._failures
        try:
            await self._in_thread(self._client.refresh)
        except HeadwaterError as error:
            self._note("metadata", error)
        else:
            for family in self._host.families:
                await self._check_family(family)
        if self._failures == before:
            self._failures = 0

    def nudge(self) -> None:
        """Check soon; many nudges before that are one."""
        self._nudged.set()

    def statistics(self) -> dict[str, int]:
        """Counts since the start; refused updates as `refused_<error code>`."""
        fresh = self._client.freshness
        return (
            dict(self._counts)
            | {"metadata_issued_s": int(fresh.issued_s), "metadata_stale": int(fresh.stale)}
            | {f"refused_{code}": n for code, n in self._refused.items()}
        )

    async def _follow(self) -> None:
        while True:
            self._nudged.clear()
            await self.check()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nudged.wait(), self._pause_s())

    def _pause_s(self) -> float:
        """The poll, or after failures of the network a shorter pause that doubles; jittered."""
        pause_s = self._poll_s
        if self._failures:
            pause_s = min(pause_s, RETRY_FIRST_S * 2 ** min(self._failures, 16))
        return pause_s * random.uniform(0.8, 1.2)  # noqa: S311 - jitter is no secret

    async def _check_family(self, family: str) -> None:
        try:
            plan = await self._in_thread(self._client.plan, family)
            if plan != self._host.current(family):
                await self._apply(family, plan)
            if plan != self._settled.get(family):
                current = [self._host.current(each) for each in self._host.families]
                await self._in_thread(self._settle, plan, [each for each in current if each])
                self._settled[family] = plan
        except HeadwaterError as error:
            self._note(family, error)

    async def _apply(self, family: str, plan: Plan) -> None:
        arms = await self._in_thread(self._load_arms, plan)
        await self._host.adopt(family, arms, plan)
        self._counts["applied"] += 1
        self._changed.set()
        log.info("%s follows plan %d: %s", family, plan.seq, _described(arms))

    def _load_arms(self, plan: Plan) -> list[Arm]:
        arms = arms_for(plan, self._host.device, self._attributes)
        for _name, arm in arms:
            good_packages(self._shelf, arm)  # before the first of them costs a load
        return [self._load(name, arm) for name, arm in arms]

    def _load(self, name: str, arm: PlanArm) -> Arm:
        obtain = partial(self._obtain, arm)
        return load_plan_arm(self._shelf, name, arm, obtain, self._prove)

    def _obtain(self, arm: PlanArm, package: Variant) -> Path:
        return self._client.fetch(arm, package, self._shelf)

    def _settle(self, plan: Plan, current: Sequence[Plan]) -> None:
        """Remember and confirm `plan`; keep the packages that run, and those to go back to."""
        self._shelf.save_current(plan, self._client.lowest_counter(plan.family))
        self._client.confirm(plan)
        families = self._host.families
        stored = [self._shelf.load_current(family) for family in families]
        previous = [self._shelf.load_previous(family) for family in families]
        arms = [arm for each in (*current, *stored) if each for arm in each.arms]
        arms += [each.stable for each in previous if each is not None]
        self._shelf.prune(set().union(*(packages_kept(self._shelf, arm) for arm in arms)))

    async def _on_refresh(self, _message: Message) -> None:
        self._counts["nudges"] += 1
        self.nudge()

    def _note(self, what: str, error: HeadwaterError) -> None:
        if isinstance(error, TransportError):
            self._failures += 1
            self._counts["unreachable"] += 1
            log.debug("%s: %s", what, error)
            if error.code != "too_slow":  # somebody may be holding updates back
                return
        self._refused[error.code] += 1
        self._changed.set()
        log.warning("%s: update refused, what runs is unchanged: %s", what, error)

    async def _in_thread(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

    async def _report(self) -> None:
        subject = subjects.report(self._host.device)
        while True:
            self._changed.clear()
            sketches = await asyncio.to_thread(self._sketches)
            told, fresh = self._host.report(dict(self._refused)), self._client.freshness
            told = msgspec.structs.replace(
                told,
                counters=told.counters | {"metadata_stale": int(fresh.stale)},
                durable=self._durable(),
                sketches=sketches,
                floor=list(fresh.floor),
                issued_s=fresh.issued_s,
            )
            try:
                await self._publish(subject, codec.encode(told))
                self._counts["reports"] += 1
            except HeadwaterError as error:
                log.debug("report not sent: %s", error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), REPORT_EVERY_S)

    async def _publish(self, subject: str, data: bytes) -> None:
        signature = await asyncio.to_thread(self._sign, codec.signed_report(subject, data))
        headers = codec.signature_headers(signature)
        await self._bus.publish(subject, data, headers=headers)


def _described(arms: Sequence[Arm]) -> str:
    return ", ".join(
        f"{arm.name} {arm.release} {arm.variant}".rstrip() + f" ({arm.weight:g})" for arm in arms
    )
