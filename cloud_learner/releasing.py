"""The releasing of one family: candidate, gate, registry, campaign.

Why: several families share a publisher and its keys, and each is judged and rolled out by itself.
What says that the world has changed before labels do comes by wall time, so it stays away from
training and is heard here: what devices tell, and what unlabelled answers are worth.

Invariants: a candidate becomes an offer only by its gate's own judgement. Release counters rise
with each release of the family, over all starts. An alarm makes the gate stricter, and does nothing
else; it is entered in lineage once. Hearing and expectation belong to one thread of their own.

Knows nothing about how candidates come about.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from cloud_learner.config import Home
from cloud_learner.controller import Controller
from cloud_learner.cycle import Candidate
from cloud_learner.evaluate.alarms import Alarm
from cloud_learner.evaluate.expectation import Expectation
from cloud_learner.evaluate.hearing import Hearing
from cloud_learner.evaluate.holdout import HoldOut
from cloud_learner.evaluate.offline import load_set
from cloud_learner.evaluate.slices import Keys
from cloud_learner.gate import Gate, Judgement
from cloud_learner.ingest.intake import Released
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.release.metadata import ReleaseFile
from cloud_learner.rollout.campaign import Offer
from cloud_learner.rules import campaign_rules, check_spec, gate_limits, recent_hold_out
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.registry import Registry
from cloud_learner.train.family import Family
from edge_runtime.clock import Clock
from edge_runtime.errors import CapacityError
from edge_runtime.rollout.plan import Plan, Variant, model_path
from edge_runtime.wire.messages import Report

log = logging.getLogger("cloud_learner")

HOLD_OUT_JUDGEMENTS = 10  # after so many it is kept; what a kill loses comes again from the stream


class Releases:
    """Candidates that passed, named, numbered and kept, on their way to the controller."""

    def __init__(self, family: str, registry: Registry, lineage: Lineage) -> None:
        """`lineage` is the family's own part."""
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


class Releasing:
    """Gate and campaign of one family; `start` it first, `close` it last."""

    def __init__(
        self,
        home: Home,
        family: Family,
        lineage: Lineage,
        publisher: Publisher,
        *,
        hold_out: HoldOut | None,
        clock: Clock,
    ) -> None:
        """`lineage` is the family's own part; the gate trusts what it passed in earlier lives."""
        check_spec(home, family)
        self.family, own = family, home.of(family.name)
        self._kept = own.hold_out
        self.hold_out = recent_hold_out(family) if hold_out is None else hold_out
        if self._kept.exists():
            self.hold_out.load(self._kept)
        static, known = load_set(own.static), Keys.load(own.known)
        self.gate = Gate(gate_limits(family), static, self.hold_out, lineage, known)
        for sha256 in passed_before(lineage):
            self.gate.trust(sha256)
        self.releases = Releases(family.name, Registry(home.registry), lineage)
        publish, rules = self.releases.publishing(publisher), campaign_rules(family)
        self.controller = Controller(rules, own.campaign, publish, lineage, clock)
        self._lineage, self._clock, config = lineage, clock, family.config
        reference = load_set(own.reference).features
        self.hearing = Hearing(family.name, family.spec, config.drift, reference)
        self.expectation = Expectation(config.drift, config.task)
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="hearing")

    async def submit(self, candidate: Candidate, thread: Executor) -> Judgement:
        """Let the gate judge a candidate in `thread`, and offer it if it passed."""
        await self.look(candidate.number)
        loop = asyncio.get_running_loop()
        judgement = await loop.run_in_executor(thread, self._judge, candidate)
        if judgement.outcome == "pass":
            await self.controller.offer(self.releases.register(candidate, judgement))
        return judgement

    async def close(self) -> None:
        """Let what is under way reach the disk, and keep the hold-out."""
        await self.controller.close()
        self._aside.shutdown()
        self.hold_out.save(self._kept)

    def _judge(self, candidate: Candidate) -> Judgement:
        stable = self.controller.stable
        judgement = self.gate.judge(
            candidate.package,
            candidate.float_package,
            Path(stable.file) if stable else None,
            alarmed=candidate.alarmed or bool(self.standing(candidate.number)),
        )
        if self.gate.counts["judged"] % HOLD_OUT_JUDGEMENTS == 0:
            self.hold_out.save(self._kept)
        return judgement

    async def take(self, released: Released) -> None:
        """Take joined examples as evidence, and into the hold-out; and answers without labels."""
        examples = released.examples
        self.expectation.take(examples, released.answers, released.clock_s)
        if examples:
            spec = self.family.spec.hash
            self.hold_out.add([example for example in examples if example.spec == spec])
            await self.controller.examples(examples)

    async def report(self, report: Report, batch: int) -> None:
        """Take what a device says, when micro-batch `batch` is the newest that was learned."""
        await self.controller.report(report)
        if report.sketches:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._aside, self._hear, report, batch)

    async def look(self, batch: int) -> None:
        """Look at what unlabelled answers are worth."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._aside, self._look, batch)

    def standing(self, batch: int) -> list[Alarm]:
        """The alarms that stand beside those of the stream; any thread may ask."""
        return self.hearing.standing(batch) + self.expectation.standing(batch)

    def counts(self) -> dict[str, int]:
        """Verdicts of the gate and what became of offers."""
        rollout = self.controller.status()["counts"]
        return {
            **{f"gate_{name}": count for name, count in self.gate.counts.items()},
            **{f"rollout_{name}": count for name, count in rollout.items()},
            **self.hearing.statistics(),
        }

    def _hear(self, report: Report, batch: int) -> None:
        now_s = self._clock.monotonic_s()
        told = self.hearing.hear(report.device, report.sketches, now_s=now_s, batch=batch)
        self._enter(told)

    def _look(self, batch: int) -> None:
        self._enter(self.expectation.look(batch), **self.expectation.facts())

    def _enter(self, alarms: list[Alarm], **facts: object) -> None:
        for alarm in alarms:
            log.warning("%s: alarm: %s %s", self.family.name, alarm.source, alarm.name)
            try:
                self._lineage.append("alarm", **alarm.facts(), **facts)
            except CapacityError as full:  # it stands all the same
                log.warning("%s", full)


def passed_before(lineage: Lineage) -> set[str]:
    """The hashes of all packages that a family's gate has passed, as its lineage says."""
    return {
        sha256
        for entry in lineage.read("verdict")
        if entry["outcome"] == "pass"
        for sha256 in (entry["sha256"], *entry.get("variants", {}).values())
    }


def release_signers(home: Home, passed: Callable[[str, str], bool]) -> keys.Signers:
    """The signers of one process that hosts all domains; the gates' looks at what it signs.

    `passed(family, sha256)` says whether the gate of that family passed a package.
    """
    signers = keys.load(home.root)
    gate = keys.GateSigner(signers.gate, lambda path, sha256: passed(path.split("/")[1], sha256))
    return replace(signers, gate=gate)
