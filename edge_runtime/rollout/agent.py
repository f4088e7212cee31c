"""The rollout agent: makes a device run what its signed plans say, and reports how it goes.

Why: nobody logs in to a device. It asks by itself, proves what it gets, swaps without dropping a
request, and whatever goes wrong leaves the current release serving and shows in the next report.

Invariants: network, disk and model loading happen on the thread `update`, swaps on the event loop.
A release serves before it is remembered for a restart, and that comes before the floor rises to
it: no crash leaves a floor above what a restart, or a roll back, finds on the shelf. A package that
fails on this device, or that was left by a local roll back, is quarantined by its hash and never
tried again: a stable release that has no other is refused, until a newer plan names one. A trial
that fails, cannot be fetched or does not go with the stable release keeps nothing else from being
served: the plan is followed without it, the failure is counted, and it is tried again unless it is
in quarantine. A trial ends at its time also without a network.

Knows nothing about signatures (the client proves them), about when a plan is obeyed (`placement`
says it) nor about how predictions are made.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from edge_runtime.bus.base import Bus, Message
from edge_runtime.clock import Clock, SystemClock
from edge_runtime.errors import HeadwaterError, TransportError
from edge_runtime.inference.slot import Arm
from edge_runtime.rollout.arms import good_packages
from edge_runtime.rollout.installer import Installer, Updates
from edge_runtime.rollout.placement import Here, due, meanwhile, placed
from edge_runtime.rollout.plan import Plan
from edge_runtime.rollout.waits import Waits
from edge_runtime.update.shelf import Shelf
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

    def resident(self, family: str) -> Sequence[Arm]: ...

    async def adopt(self, family: str, arms: Sequence[Arm], plan: Plan) -> None: ...

    def report(self, refused: dict[str, int]) -> Report: ...


class Agent:
    """Follows the plans of `host`'s families; asks when nudged and every `poll_s` seconds.

    `attributes` decide whether this device is one of a plan's canaries; on `hold` it changes
    nothing. `prove` tries a package where it can do no harm, before it is loaded here; it raises
    PackageError. For the report, `durable` tells where the log ends, and `sketches`, on a thread,
    what models were given lately; `sign`, on a thread, signs it, or gives None where there is no
    key to do so.
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
        hold: bool = False,
        clock: Clock | None = None,
        prove: Callable[[Path], None] | None = None,
        durable: Callable[[], list[Mark]] | None = None,
        sketches: Callable[[], list[FeatureSketch]] | None = None,
        sign: Callable[[bytes], bytes | None] | None = None,
    ) -> None:
        self._host, self._client, self._shelf, self._bus = host, client, shelf, bus
        self._here, self._clock = Here(host.device, attributes, hold), clock or SystemClock()
        self._poll_s, self._installer = poll_s, Installer(client, shelf, self._here, prove)
        self._durable, self._sketches = durable or list, sketches or list
        self._sign = sign or (lambda _data: None)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="update")
        self._nudged, self._changed = asyncio.Event(), asyncio.Event()
        self._settled: dict[str, Plan] = {}
        self.waits = Waits()
        self._failures = 0
        self._counts = Counter(
            checks=0, nudges=0, applied=0, trials_ended=0, unreachable=0, reports=0
        )
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
        self.waits.look(self._now_s())
        for family in self._host.families:
            await self._end_trials(family)
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
            | self.waits.counts()
            | {f"refused_{code}": n for code, n in self._refused.items()}
        )

    async def _follow(self) -> None:
        while True:
            self._nudged.clear()
            await self.check()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nudged.wait(), self._pause_s())

    def _pause_s(self) -> float:
        """The poll, or after failures of the network a shorter pause that doubles; jittered. A wait
        that ends earlier ends it.
        """
        pause_s = self._poll_s
        if self._failures:
            pause_s = min(pause_s, RETRY_FIRST_S * 2 ** min(self._failures, 16))
        pause_s *= random.uniform(0.8, 1.2)  # noqa: S311 - jitter is no secret
        return min(pause_s, self.waits.pause_s(self._now_s()))

    def _now_s(self) -> float:
        """The wall time, which is never before what was signed already."""
        return max(self._clock.now_s(), self._client.freshness.issued_s)

    async def _end_trials(self, family: str) -> None:
        """Of what runs already, end what is over: also without a network."""
        runs = self._host.current(family)
        if runs is None:
            return
        place = placed(runs, runs, self._here, self._now_s())
        if self.waits.of(family) is None:
            self.waits.place(family, place)
        if place.plan == runs:
            return
        try:
            await self._apply(family, place.plan, runs, fetch=False)
            await self._in_thread(self._shelf.save_current, place.plan)
        except HeadwaterError as error:
            self._note(family, error)
        else:
            self._counts["trials_ended"] += 1

    async def _check_family(self, family: str) -> None:
        try:
            plan, lowest = await self._in_thread(self._installer.newest, family)
            await self._obey(family, plan, lowest)
            runs = self._host.current(family)
            if runs is not None and runs != self._settled.get(family):
                current = {each: self._host.current(each) for each in self._host.families}
                await self._in_thread(self._installer.settle, runs, current)
                self._settled[family] = runs
            for arm in self._here.arms(plan):
                good_packages(self._shelf, arm)  # what of the plan is left out here is told
        except HeadwaterError as error:
            self._note(family, error)

    async def _obey(self, family: str, plan: Plan, lowest_counter: int) -> None:
        """Bring about as much of `plan` as may come now."""
        runs, left, now_s = self._host.current(family), self._shelf.quarantined(), self._now_s()
        if runs is not None and plan != runs:
            self.waits.forget(family)
            shall, has = self._here.arms(due(plan, now_s, left)), self._here.arms(runs)
            await self._in_thread(self._client.check_course, plan, runs, shall, has)
        place = placed(plan, runs, self._here, now_s, left=left, lowest_counter=lowest_counter)
        self.waits.place(family, place)
        try:
            await self._apply(family, place.plan, runs)
        except HeadwaterError:
            await self._withdraw(family, place.plan)
            raise

    async def _withdraw(self, family: str, plan: Plan) -> None:
        """Leave what `plan` has withdrawn, though its stable release cannot be served."""
        runs = self._host.current(family)
        missing = {each.sha256 for each in self._here.arms(plan)[0].packages}
        if runs is not None:
            rest = meanwhile(plan, runs, self._here, missing)
            await self._apply(family, rest, runs, fetch=False)

    async def _apply(
        self, family: str, plan: Plan, runs: Plan | None, *, fetch: bool = True
    ) -> None:
        """Serve `plan` in the place of `runs`; without `fetch`, of what is on the shelf."""
        if plan == runs:
            return
        resident = self._host.resident(family)
        loaded = await self._in_thread(self._installer.load, plan, runs, fetch, resident)
        for failure in loaded.failures:
            self._note(family, failure)
        if loaded.plan == runs:
            return
        await self._host.adopt(family, loaded.arms, loaded.plan)
        self._counts["applied"] += 1
        self._changed.set()
        log.info("%s follows plan %d: %s", family, loaded.plan.seq, _described(loaded.arms))

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
                counters=told.counters | {"metadata_stale": int(fresh.stale)} | self.waits.counts(),
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
