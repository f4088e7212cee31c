"""The root of the rollout trust domain: offers, examples and reports in, signed plans out.

Why: the campaign is pure; somebody must keep its state over a crash, hand its plans to the
publisher, write its decisions into lineage and say what is going on.

Invariants: one call at a time changes the campaign. Commit point of a change: the rename of the
state file, which carries the plans still to be published; only then are they published, in order,
each with the package that it names. A plan is taken off the file after it was published, so a crash
may publish and record one twice, with the same sequence number, and never skips one. A broker that
is away or a full disk loses nothing: the next call tries again.

Knows nothing about keys, TUF or the broker: `publish` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from cloud_learner.rollout.campaign import Campaign, Offer, Rules, State, Step
from cloud_learner.rollout.evidence import PairEvidence
from cloud_learner.store.examples import Example
from cloud_learner.store.lineage import Lineage
from edge_runtime.clock import Clock
from edge_runtime.errors import CapacityError, ConfigError, TransportError
from edge_runtime.files import write_atomic
from edge_runtime.rollout.plan import Plan
from edge_runtime.wire.messages import Report

Publish = Callable[[Offer | None, Plan | None], Awaitable[None]]

STATE_VERSION = 1
FRESHNESS_MAX = 1000


class Freshness(msgspec.Struct, frozen=True):
    """From the last mature label that a release learned until it served on its first canary."""

    release: str
    device: str
    freshness_s: float


class _Saved(msgspec.Struct):
    """The state file."""

    family: str
    version: int = STATE_VERSION
    state: State = msgspec.field(default_factory=State)
    freshness: list[Freshness] = []


class Controller:
    """Runs the campaign of one family; `start` it first, `close` it last.

    A call raises what `publish` raises, but counts TransportError and CapacityError instead.
    """

    def __init__(
        self, rules: Rules, path: Path, publish: Publish, lineage: Lineage, clock: Clock
    ) -> None:
        """Go on from the state file at `path`, or begin without one. Raises: ConfigError."""
        self._path, self._publish, self._lineage, self._clock = path, publish, lineage, clock
        self._saved = _load(path, rules.family)
        self._campaign = Campaign(rules, self._saved.state)
        self._reports: dict[str, Report] = {}
        self._lock = asyncio.Lock()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="controller")
        self._dirty = False
        self._failures = 0
        self._last_failure = ""

    async def start(self) -> None:
        """Publish what a crash left unpublished."""
        async with self._lock:
            await self._settle(changed=False)

    async def close(self) -> None:
        """Let the change in progress reach the disk."""
        async with self._lock:
            self._disk.shutdown()

    async def offer(self, candidate: Offer) -> None:
        """Take a candidate that passed the offline gate."""
        async with self._lock:
            self._campaign.offer(candidate)
            await self._settle(changed=True)

    async def examples(self, examples: Sequence[Example]) -> None:
        """Take joined examples, in the order in which the joiner released them."""
        async with self._lock:
            await self._settle(changed=self._campaign.examples(examples))

    async def report(self, report: Report) -> None:
        """Take what a device says about itself; what is older than its last report is dropped."""
        async with self._lock:
            last = self._reports.get(report.device)
            if last is None or (report.epoch, report.time_s) >= (last.epoch, last.time_s):
                self._reports[report.device] = report
                await self._settle(changed=self._measure_freshness(report))

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
        state, evidence = self._campaign.state, self._campaign.state.evidence
        return {
            "family": self._campaign.rules.family,
            "stage": self._campaign.stage,
            "plan_seq": state.seq,
            "unpublished": len(state.outbox),
            "failures": self._failures,
            "last_failure": self._last_failure,
            "stable": self._arm_status(state.stable),
            "canary": self._arm_status(state.canary),
            "pending": state.pending.release if state.pending else None,
            "evidence": evidence.statistics() if evidence else {},
            "gates": _gates(evidence, self._campaign.rules) if evidence else [],
            "counts": msgspec.to_builtins(state.counts),
            "decisions": msgspec.to_builtins(state.decisions[-10:]),
            "freshness_s": [sample.freshness_s for sample in self._saved.freshness],
            "devices": {
                name: self._device_status(report) for name, report in sorted(self._reports.items())
            },
        }

    async def _settle(self, *, changed: bool) -> None:
        """Commit the campaign's state, then do the I/O that it owes; what fails stays owed."""
        self._dirty |= changed
        outbox = self._campaign.state.outbox
        try:
            await self._save()
            while outbox:
                await self._publish(outbox[0].release, outbox[0].plan)
                await self._in_thread(self._record, outbox[0])
                self._campaign.published()
                self._dirty = True
                await self._save()
        except (TransportError, CapacityError) as error:
            self._failures += 1
            self._last_failure = str(error)

    async def _save(self) -> None:
        if self._dirty:
            # Encoded here, on the loop: the state does not change under the encoder.
            await self._in_thread(self._write, msgspec.json.encode(self._saved))
            self._dirty = False

    def _write(self, data: bytes) -> None:
        try:
            write_atomic(self._path, data)
        except OSError as error:
            raise CapacityError(
                "disk_failed",
                f"campaign state {self._path} was not written, and no plan is published: {error}",
            ) from error

    async def _in_thread(self, function: Callable[..., None], *args: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._disk, function, *args)

    def _record(self, step: Step) -> None:
        plan = step.plan
        self._lineage.append(
            "decision" if step.evidence else "plan",
            family=plan.family,
            plan_seq=plan.seq,
            reason=plan.reason,
            note=plan.note,
            stable=plan.stable.sha256,
            canary=plan.canary.sha256 if plan.canary else None,
            evidence=step.evidence,
        )

    def _measure_freshness(self, report: Report) -> bool:
        """Take the sample of the live canary from the first device that serves it."""
        canary, samples = self._campaign.state.canary, self._saved.freshness
        if canary is None or any(sample.release == canary.release for sample in samples):
            return False
        since_s = _serving_since_s(report, self._campaign.rules.family, canary.release)
        if since_s is None:
            return False
        samples.append(Freshness(canary.release, report.device, since_s - canary.arrived_s))
        del samples[:-FRESHNESS_MAX]
        return True

    def _arm_status(self, offer: Offer | None) -> dict[str, Any] | None:
        if offer is None:
            return None
        family = self._campaign.rules.family
        serving = [
            name
            for name, report in sorted(self._reports.items())
            if _serving_since_s(report, family, offer.release) is not None
        ]
        facts = {"release": offer.release, "learned_through_s": offer.learned_through_s}
        return {**facts, "devices": serving}

    def _device_status(self, report: Report) -> dict[str, Any]:
        return {
            "plan_seq": report.plan_seq,
            "releases": {arm.arm: arm.release for arm in report.arms},
            "variants": {arm.arm: arm.variant for arm in report.arms},
            "refused": dict(report.refused),
            "counters": dict(report.counters),
            "age_s": self._clock.now_s() - report.time_s,
        }


def _load(path: Path, family: str) -> _Saved:
    try:
        saved = msgspec.json.decode(path.read_bytes(), type=_Saved)
    except FileNotFoundError:
        return _Saved(family=family)
    except (OSError, msgspec.DecodeError) as error:
        raise _unreadable(path, str(error)) from error
    if saved.version != STATE_VERSION or saved.family != family:
        found = f"version {saved.version} of {saved.family!r}"
        raise _unreadable(path, f"it is {found}, not {STATE_VERSION} of {family!r}")
    return saved


def _unreadable(path: Path, why: str) -> ConfigError:
    return ConfigError(
        "bad_controller_state",
        f"campaign state {path} cannot be read, and nothing was changed: {why}",
        "restore the file from a backup; without it the next plan would be older than the fleet's",
    )


def _serving_since_s(report: Report, family: str, release: str) -> float | None:
    return next(
        (
            arm.serving_since_s
            for arm in report.arms
            if arm.family == family and arm.release == release
        ),
        None,
    )


def _gates(evidence: PairEvidence, rules: Rules) -> list[dict[str, Any]]:
    """The rules over the evidence, each with its value and what it must reach to act."""
    test = evidence.test
    rows = (
        ("not_worse", test.noninferior.evidence, 1 / test.alpha_promote, "promote"),
        ("harm", test.harm.evidence, 1 / test.alpha_stop, "roll back"),
        ("paired_labels", float(evidence.pairs), float(rules.pairs_max), "roll back, undecided"),
    )
    return [
        {
            "gate": gate,
            "value": value,
            "reach": reach,
            "then": then,
            "text": f"{gate} {value:,.4g}/{reach:,.4g}",
        }
        for gate, value, reach, then in rows
    ]
