"""All four trust domains in one process: learner, gate, publisher and controller, for a laptop.

Why: on a fleet each root runs as a process of its own; on one machine one process may host them,
with the same code and the same keys.

Invariants: a candidate becomes an offer only by the gate's own judgement; the publisher signs for
the gate only what the gate passed; plans come from the controller alone. What this process says
about itself (`hw.status.learner`) is for people and for a replay that waits; nothing is decided
by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cloud_learner.config import Home
from cloud_learner.controller import Controller
from cloud_learner.cycle import Candidate
from cloud_learner.evaluate.holdout import HoldOut
from cloud_learner.evaluate.offline import load_set
from cloud_learner.evaluate.slices import Keys
from cloud_learner.gate import Gate, Judgement
from cloud_learner.learner import Learner
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.release.metadata import ReleaseFile
from cloud_learner.rollout.campaign import Offer
from cloud_learner.rules import campaign_rules, check_spec, gate_limits, recent_hold_out
from cloud_learner.store.examples import Example
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.registry import Registry
from cloud_learner.streams import make_streams
from cloud_learner.train.family import Family
from edge_runtime.bus.base import Bus, Message
from edge_runtime.clock import Clock
from edge_runtime.errors import (
    CapacityError,
    HeadwaterError,
    RequestError,
    TransportError,
)
from edge_runtime.rollout.plan import Plan, Variant, model_path
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import WIRE_VERSION, LearnerStatus

log = logging.getLogger("cloud_learner")

HOLD_OUT_JUDGEMENTS = 10  # after so many it is kept; what a kill loses comes again from the stream
STATUS_S = 0.05
STATUS_KEPT_S = 1.0
MAINTAIN_S = 3600.0
MEND_S = 1.0


class Releases:
    """Candidates that passed, named, numbered and kept, on their way to the controller."""

    def __init__(self, family: str, registry: Registry, lineage: Lineage) -> None:
        self._family, self._registry, self._lineage = family, registry, lineage
        self._counter = max((entry["counter"] for entry in lineage.read("release")), default=0)

    def register(self, candidate: Candidate, judgement: Judgement) -> Offer:
        """Keep the packages that were judged and give them the next release counter."""
        for data in (candidate.package, candidate.float_package):
            if hashlib.sha256(data).hexdigest() in judgement.variants.values():
                self._registry.put(data)
        sha256 = judgement.sha256
        self._counter += 1
        release = f"r{self._counter:05d}-{sha256[:8]}"
        offer = Offer(
            release=release,
            path=model_path(self._family, release),
            sha256=sha256,
            counter=self._counter,
            file=str(self._registry.path(sha256)),
            learned_through_s=candidate.learned_through_s,
            arrived_s=candidate.arrived_s,
            variants=self._variants(release, judgement.variants),
        )
        self._lineage.append(
            "release",
            release=release,
            counter=self._counter,
            sha256=sha256,
            variants=judgement.variants,
            batch=candidate.number,
            weights=candidate.weights,
            learned_through_s=candidate.learned_through_s,
            rules=[verdict.rule for verdict in judgement.verdicts],
        )
        return offer

    def publishing(
        self, publisher: Publisher
    ) -> Callable[[Offer | None, Plan | None], Awaitable[None]]:
        """What the controller calls to bring an offer and a plan to the devices."""

        async def publish(offer: Offer | None, plan: Plan | None) -> None:
            await publisher.publish(self._file(offer) if offer else None, plan)

        return publish

    def _variants(self, release: str, found: Mapping[str, str]) -> tuple[Variant, ...]:
        """The variants of a plan's arm; none for a release of one package."""
        names = ["", *list(found)[1:]]  # the default one's path names no variant
        paths = [model_path(self._family, release, name) for name in names]
        variants = tuple(
            Variant(name, path, sha256)
            for (name, sha256), path in zip(found.items(), paths, strict=True)
        )
        return variants if len(variants) > 1 else ()

    def _file(self, offer: Offer) -> ReleaseFile:
        data = Path(offer.file).read_bytes()
        others = {
            each.name: self._registry.path(each.sha256).read_bytes() for each in offer.variants[1:]
        }
        return ReleaseFile(self._family, offer.release, offer.counter, data, variants=others)


class Host:
    """The cloud side of one family over one bus."""

    def __init__(
        self,
        home: Home,
        family: Family,
        bus: Bus,
        clock: Clock,
        *,
        hold_out: HoldOut | None = None,
    ) -> None:
        self.home, self.family, self._bus, self._clock = home, family, bus, clock
        check_spec(home, family)
        lineage = self.lineage = Lineage(home.lineage)
        self.hold_out = recent_hold_out(family) if hold_out is None else hold_out
        if home.hold_out.exists():
            self.hold_out.load(home.hold_out)
        static, known = load_set(home.static), Keys.load(home.known)
        self.gate = Gate(gate_limits(family), static, self.hold_out, lineage, known)
        for entry in lineage.read("verdict"):
            if entry["outcome"] == "pass":
                for sha256 in {entry["sha256"], *entry.get("variants", {}).values()}:
                    self.gate.trust(sha256)
        self._releases = Releases(family.name, Registry(home.registry), lineage)
        self.publisher = Publisher(home.root, bus, release_signers(home, self.gate), clock)
        publish = self._releases.publishing(self.publisher)
        self.controller = Controller(campaign_rules(family), home.campaign, publish, lineage, clock)
        self.learner = Learner(
            home, family, bus, clock, submit=self.submit, on_examples=self._on_examples
        )
        self._quarantined_reports = self._reconnects = 0

    async def run(self) -> None:
        """Serve until cancelled."""
        await self._furnish()
        await self.controller.start()
        reports = await self._bus.subscribe(subjects.report("*"), self._on_report)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.learner.run())
                group.create_task(self._say())
                group.create_task(self._maintain())
                group.create_task(self._mend())
        finally:
            await reports.close()
            await self.controller.close()
            self.hold_out.save(self.home.hold_out)

    async def submit(self, candidate: Candidate) -> Judgement:
        """Let the gate judge a candidate, and offer it if it passed."""
        loop = asyncio.get_running_loop()
        judgement = await loop.run_in_executor(self.learner.thread, self._judge, candidate)
        if judgement.outcome == "pass":
            await self.controller.offer(self._releases.register(candidate, judgement))
        return judgement

    def _judge(self, candidate: Candidate) -> Judgement:
        stable = self.controller.stable
        judgement = self.gate.judge(
            candidate.package, candidate.float_package, Path(stable.file) if stable else None
        )
        if self.gate.counts["judged"] % HOLD_OUT_JUDGEMENTS == 0:
            self.hold_out.save(self.home.hold_out)
        return judgement

    def status(self) -> LearnerStatus:
        """What is going on, for the live view."""
        rollout = self.controller.status()
        learner = self.learner
        return LearnerStatus(
            version=WIRE_VERSION,
            time_s=self._clock.now_s(),
            clock_s=learner.clock_s,
            events_archived=learner.archived,
            counters={
                **learner.statistics(),
                **{f"gate_{name}": count for name, count in self.gate.counts.items()},
                **{f"rollout_{name}": count for name, count in rollout["counts"].items()},
                "bad_reports": self._quarantined_reports,
            },
            freshness_s=rollout["freshness_s"],
            stage=rollout["stage"],
            gates=[gate["text"] for gate in rollout["gates"]],
            detail=json.dumps(self._detail(rollout)),
        )

    def _detail(self, rollout: dict[str, Any]) -> dict[str, Any]:
        return {
            "rollout": rollout,
            "weights": self.learner.cycle.replicas.weights,
            "duplicate_identities": self.learner.ingest.duplicates,
            "paused": self.learner.ingest.paused,
        }

    async def _on_examples(self, examples: list[Example]) -> None:
        if examples:
            spec = self.family.spec.hash
            self.hold_out.add([example for example in examples if example.spec == spec])
            await self.controller.examples(examples)

    async def _on_report(self, message: Message) -> None:
        try:
            report = codec.decode_report(message.data)
        except RequestError:
            self._quarantined_reports += 1
            return
        if report.device != subjects.device_of(message.subject):
            self._quarantined_reports += 1
            return
        self.learner.ingest.hear(report)
        await self.controller.report(report)

    async def _say(self) -> None:
        """Speak at every step, and leave a word on the broker once a second."""
        kept_s = float("-inf")
        while True:
            self.learner.progress.clear()
            status = codec.encode(self.status())
            now_s = self._clock.monotonic_s()
            with contextlib.suppress(HeadwaterError):  # said again in a moment
                if now_s - kept_s >= STATUS_KEPT_S:
                    kept_s = now_s
                    await self._bus.publish(subjects.LEARNER_STATUS, status)
                else:
                    await self._bus.send(subjects.LEARNER_STATUS, status)
            await asyncio.sleep(STATUS_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.learner.progress.wait(), STATUS_KEPT_S)

    async def _furnish(self) -> None:
        """Give the broker its streams and all that is signed; one that is away is waited for."""
        while True:
            self._reconnects = self._bus.statistics()["reconnects"]
            try:
                await make_streams(self._bus)
                await self.publisher.publish()
            except (TransportError, CapacityError) as error:
                log.warning("the broker is not ready yet: %s", error)
                await asyncio.sleep(MEND_S)
            else:
                return

    async def _mend(self) -> None:
        """A broker that comes back may have lost its store."""
        while True:
            await asyncio.sleep(MEND_S)
            if self._bus.statistics()["reconnects"] != self._reconnects:
                await self._furnish()

    async def _maintain(self) -> None:
        while True:
            await asyncio.sleep(MAINTAIN_S)
            with contextlib.suppress(TransportError, CapacityError):  # tried again in an hour
                await self.publisher.maintain()


def release_signers(home: Home, gate: Gate) -> keys.Signers:
    """The signers of one process that hosts all domains; the gate's looks at what it signs."""
    signers = keys.load(home.root)
    return replace(signers, gate=keys.GateSigner(signers.gate, gate.passed))
