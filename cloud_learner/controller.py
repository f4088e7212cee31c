"""The root of the rollout trust domain: offers, examples and reports in, signed plans out.

Why: the campaign is pure; somebody must keep its state over a crash, hand its plans to the
publisher, write its decisions into lineage and say what is going on.

Invariants: one call at a time changes the campaign. Commit point of a change: the rename of the
state file, which carries the plans still to be published; only then are they published, in order,
each with the package that it names. A plan is taken off the file after it was published, so a crash
may publish and record one twice, with the same sequence number, and never skips one. A broker that
is away or a full disk loses nothing: the next call tries again. What reports only add up is
committed with the next other change, or by `tick`.

Knows nothing about keys, TUF or the broker: `publish` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from cloud_learner.rollout import status
from cloud_learner.rollout.control import Control
from cloud_learner.rollout.journal import Signed
from cloud_learner.rollout.kept import Freshness, Kept
from cloud_learner.rollout.matches import Matches
from cloud_learner.rollout.state import Offer, Rules, Step
from cloud_learner.store.examples import Example
from cloud_learner.store.lineage import Lineage
from edge_runtime.clock import Clock
from edge_runtime.errors import CapacityError, HeadwaterError, TransportError
from edge_runtime.rollout.plan import Plan, encode_plan
from edge_runtime.update.approval import Approval
from edge_runtime.wire.messages import Report

log = logging.getLogger("cloud_learner")

Publish = Callable[[Offer | None, Plan | None, Approval | None], Awaitable[str | None]]
"""Brings all to the devices; returns the signed document that lists the plan."""

Approve = Callable[[bytes], Awaitable[Approval]]

FRESHNESS_MAX = 1000
TICK_S = 1.0
COMMIT_S = 10.0
"""How long what reports only add up may wait: the state is written as a whole."""


class Controller:
    """Runs the campaign of one family; `start` it first, `close` it last.

    A call raises what `publish` raises, but counts TransportError and CapacityError instead.
    """

    def __init__(
        self, rules: Rules, path: Path, publish: Publish, lineage: Lineage, clock: Clock
    ) -> None:
        """Go on from the state file at `path`, or begin without one. Raises: ConfigError."""
        self._publish, self._lineage, self._clock = publish, lineage, clock
        self._kept = Kept(path)
        self._saved = self._kept.load(rules, clock.now_s())
        self._campaign = Matches(rules, self._saved.state)
        self._reports: dict[str, Report] = {}
        self._lock = asyncio.Lock()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="controller")
        self._dirty, self._kept_s = False, clock.now_s()
        self._failures = 0
        self._last_failure = ""

    async def start(self) -> None:
        """Publish what a crash left unpublished."""
        async with self._lock:
            await self._settle(changed=False)

    async def close(self) -> None:
        """Let the change in progress reach the disk."""
        async with self._lock:
            with contextlib.suppress(CapacityError):
                await self._save()
            self._disk.shutdown()

    async def offer(self, candidate: Offer) -> str:
        """Take a candidate that passed the offline gate; returns why it was refused, or nothing."""
        async with self._lock:
            why = self._campaign.offer(candidate, self._clock.now_s())
            await self._settle(changed=True)
            return why

    async def examples(self, examples: Sequence[Example]) -> None:
        """Take joined examples, in the order in which the joiner released them."""
        async with self._lock:
            await self._settle(changed=self._campaign.examples(examples, self._clock.now_s()))

    async def report(self, report: Report, signed: Signed | None = None) -> None:
        """Take what a device says about itself; what is older than its last report is dropped.

        `signed` is the report as it came, where its signature proved to be the device's.
        """
        async with self._lock:
            last = self._reports.get(report.device)
            if last is None or (report.epoch, report.time_s) >= (last.epoch, last.time_s):
                self._reports[report.device] = report
                self._dirty |= self._campaign.report(report, self._clock.now_s(), signed)
                is_measured = self._measure_freshness(report)
                if is_measured or self._campaign.state.outbox:
                    await self._settle(changed=is_measured)

    async def tick(self) -> None:
        """Let time pass; call it every second or so."""
        async with self._lock:
            now_s = self._clock.now_s()
            is_over = self._campaign.tick(now_s)
            if is_over or self._campaign.state.outbox or not 0 <= now_s - self._kept_s < COMMIT_S:
                await self._settle(changed=is_over)

    async def run(self) -> None:
        """Let time pass until cancelled: stages end whether or not anybody says anything."""
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self.tick()
            except HeadwaterError as error:  # tried again in a moment
                log.warning("%s: %s", self.rules.family, error)

    async def control(self, told: Control, approve: Approve | None = None) -> None:
        """Do what a person says; `approve` gets the gate's approval for the plan that follows.

        Raises: RequestError, and what `approve` raises, with nothing changed.
        """
        async with self._lock:
            now_s = self._clock.now_s()
            if approve is not None:
                told = await self._approved(told, approve, now_s)
            self._campaign.control(told, now_s)
            await self._settle(changed=True)

    async def _approved(self, told: Control, approve: Approve, now_s: float) -> Control:
        plan = self._campaign.foreseen(told, now_s)
        if plan is None:
            return told
        return msgspec.structs.replace(told, approval=await approve(encode_plan(plan)))

    @property
    def rules(self) -> Rules:
        """How the campaign decides."""
        return self._campaign.rules

    def is_undecided(self, release: str) -> bool:
        """Whether a release is on trial or waits for it."""
        waiting = (self._campaign.state.canary, self._campaign.state.pending)
        return any(each is not None and each.release == release for each in waiting)

    @property
    def stable(self) -> Offer | None:
        """The release that serves; None before the first."""
        return self._campaign.state.stable

    @property
    def live(self) -> list[Offer]:
        """The offers that the newest plan is about, the stable one first."""
        state = self._campaign.state
        return [each for each in (state.stable, state.canary) if each is not None]

    def status(self) -> dict[str, Any]:
        """Stages, gates with their numbers, counts and freshness, for the live view; plain data."""
        return {
            **status.status(self._campaign, self._reports, self._clock.now_s()),
            "failures": self._failures,
            "last_failure": self._last_failure,
            "freshness_s": [sample.freshness_s for sample in self._saved.freshness],
        }

    async def _settle(self, *, changed: bool) -> None:
        """Commit the campaign's state, then do the I/O that it owes; what fails stays owed."""
        self._dirty |= changed
        outbox = self._campaign.state.outbox
        try:
            await self._save()
            while outbox:
                step = outbox[0]
                plan = step.plan
                if plan is not None:
                    signed = await self._publish(step.release, plan, step.approval)
                else:
                    signed = None
                await self._in_thread(self._record, step, signed)
                self._campaign.published()
                self._dirty = True
                await self._save()
        except (TransportError, CapacityError) as error:
            self._failures += 1
            self._last_failure = str(error)

    async def _save(self) -> None:
        if self._dirty:
            # Encoded here, on the loop: the state does not change under the encoder.
            lines = list(self._campaign.fed)
            await self._in_thread(self._kept.save, msgspec.json.encode(self._saved), lines)
            del self._campaign.fed[: len(lines)]
            self._dirty, self._kept_s = False, self._clock.now_s()

    async def _in_thread(self, function: Callable[..., None], *args: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._disk, function, *args)

    def _record(self, step: Step, signed: str | None) -> None:
        plan = step.plan
        facts: dict[str, Any] = {"reason": step.reason, "note": step.note}
        if plan is not None:
            facts = {"plan_seq": plan.seq, "reason": plan.reason, "note": plan.note}
            facts["stable"] = plan.stable.sha256
            facts["canary"] = plan.canary.sha256 if plan.canary else None
            if step.journal and signed is not None:
                line = {"plan": encode_plan(plan).decode(), "signed": signed}
                self._kept.keep_signed(step.journal, msgspec.json.encode(line))
        kind = "decision" if step.evidence else "plan" if plan else "control"
        self._lineage.append(
            kind, family=self._campaign.rules.family, **facts, evidence=step.evidence
        )

    def _measure_freshness(self, report: Report) -> bool:
        """Take the sample of the live canary from the first device that serves it."""
        canary, samples = self._campaign.state.canary, self._saved.freshness
        if canary is None or any(sample.release == canary.release for sample in samples):
            return False
        since_s = status.serving_since_s(report, self._campaign.rules.family, canary.release)
        if since_s is None:
            return False
        samples.append(Freshness(canary.release, report.device, since_s - canary.arrived_s))
        del samples[:-FRESHNESS_MAX]
        return True
