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
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import msgspec

from cloud_learner.config import Home
from cloud_learner.controller import Controller, Publish
from cloud_learner.cycle import Candidate
from cloud_learner.evaluate.alarms import Alarm
from cloud_learner.evaluate.expectation import Expectation
from cloud_learner.evaluate.hearing import Hearing
from cloud_learner.evaluate.offline import load_set
from cloud_learner.gate import Judgement
from cloud_learner.gate_signing import JudgedSigner, VerdictOf
from cloud_learner.ingest.intake import Released
from cloud_learner.judging import Case, GateDoor
from cloud_learner.orders import Wish, selector_of
from cloud_learner.pooling import NOTHING, Served
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.release.collecting import Asks
from cloud_learner.release.metadata import ReleaseFile
from cloud_learner.rollout.journal import Signed
from cloud_learner.rollout.state import Offer
from cloud_learner.rules import campaign_rules, check_spec
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.registry import Registry
from cloud_learner.submitted import Submitted
from cloud_learner.train.family import Family
from edge_runtime.clock import Clock
from edge_runtime.errors import CapacityError, RequestError, TransportError
from edge_runtime.rollout.plan import Plan, Variant, model_path
from edge_runtime.update.approval import Approval
from edge_runtime.update.trust import PLANS_ROLE
from edge_runtime.wire.messages import Report

log = logging.getLogger("cloud_learner")

AGAIN_S = 1.0


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
            verdict=judgement.signed,
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

    def publishing(self, publisher: Publisher) -> Publish:
        """What the controller calls to bring an offer and a plan to the devices."""

        async def publish(offer: Offer | None, plan: Plan | None, approval: Approval | None) -> str:
            await publisher.publish(self.file(offer) if offer else None, plan, approval)
            return publisher.signed(PLANS_ROLE)

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

    def file(self, offer: Offer) -> ReleaseFile:
        """An offer as it is published."""
        data = Path(offer.file).read_bytes()
        others = {
            each.name: self._registry.path(each.sha256).read_bytes() for each in offer.variants[1:]
        }
        name, counter, verdict = offer.release, offer.counter, offer.verdict
        return ReleaseFile(self._family, name, counter, data, verdict, variants=others)


class Releasing:
    """Gate and campaign of one family; `start` it first, `close` it last."""

    def __init__(
        self,
        home: Home,
        family: Family,
        lineage: Lineage,
        publisher: Publisher,
        door: GateDoor,
        *,
        clock: Clock,
    ) -> None:
        """`lineage` is the family's own part, `door` leads to its gate."""
        check_spec(home, family)
        self.family, own, self.door = family, home.of(family.name), door
        self.releases = Releases(family.name, Registry(home.registry), lineage)
        publish, rules = self.releases.publishing(publisher), campaign_rules(family)
        self.controller = Controller(rules, own.campaign, publish, lineage, clock)
        self._lineage, self._clock, config = lineage, clock, family.config
        reference = load_set(own.reference).features
        self.hearing = Hearing(family.name, family.spec, config.drift, reference)
        self.expectation = Expectation(config.drift, config.task)
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="hearing")
        self._own = own
        self._submitted = Submitted.load(own.submitted)
        self._waiting: Candidate | None = None
        self._news = asyncio.Event()

    async def hand_in(self, candidate: Candidate, thread: Executor) -> None:
        """As `submit`; for a gate apart, which takes its time, the newest waits for `run`."""
        if self._is_kept_out():
            return
        if not self.door.is_apart:
            await self.submit(candidate, thread)
            return
        self._waiting = candidate
        self._news.set()

    async def run(self, thread: Executor) -> None:
        """Bring the newest candidate that waits to a gate apart, until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            candidate, self._waiting = self._waiting, None
            if candidate is None or self._is_kept_out():
                continue
            try:
                await self.submit(candidate, thread)
            except (TransportError, RequestError) as error:
                log.warning("%s: a candidate waits for the gate: %s", self.family.name, error)
                await asyncio.sleep(AGAIN_S)
                self._waiting = self._waiting or candidate
                self._news.set()

    async def submitted(
        self, candidate: Candidate, judgement: Judgement, wish: Wish, operator: str
    ) -> str:
        """Offer what an operator handed in and the gate passed; the release's name.

        Raises: RequestError `campaign_refused`.
        """
        offer, before = self.releases.register(candidate, judgement), self._submitted
        self._submitted = Submitted(offer.release, wish.then).note(self._own.submitted)
        mine = msgspec.structs.replace(
            offer, by=operator, stages=wish.stages, selector=selector_of(wish)
        )
        if why := await self.controller.offer(mine):
            self._submitted = before.note(self._own.submitted)
            raise RequestError("campaign_refused", f"the campaign does not take it: {why}")
        return offer.release

    def _is_kept_out(self) -> bool:
        """Whether the learner's candidates stand back for what an operator handed in."""
        known = self._submitted
        return known.then == "hold" or self.controller.is_undecided(known.release)

    async def close(self) -> None:
        """Let what is under way reach the disk."""
        await self.controller.close()
        self._aside.shutdown()
        self.door.close()

    @property
    def served(self) -> Served:
        """What serves."""
        stable = self.controller.stable
        return Served(stable.release, Path(stable.file)) if stable else NOTHING

    async def submit(self, candidate: Candidate, thread: Executor) -> Judgement:
        """Let the gate judge a candidate, here in `thread`, and offer it if it passed."""
        await self.look(candidate.number)
        alarmed = candidate.alarmed or bool(self.standing(candidate.number))
        case = Case(candidate.package, candidate.float_package, self.served.package, alarmed)
        judgement = await self.door.judge(case, thread)
        if judgement.outcome == "pass":
            await self.controller.offer(self.releases.register(candidate, judgement))
        return judgement

    async def take(self, released: Released) -> None:
        """Take joined examples as evidence, and into the hold-out; and answers without labels."""
        examples = released.examples
        self.expectation.take(examples, released.answers, released.clock_s)
        if examples:
            spec = self.family.spec.hash
            self.door.take([example for example in examples if example.spec == spec])
            await self.controller.examples(examples)

    async def report(self, report: Report, batch: int, signed: Signed | None = None) -> None:
        """Take what a device says, when micro-batch `batch` is the newest that was learned."""
        await self.controller.report(report, signed)
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

    def untold(self) -> list[ReleaseFile]:
        """What runs since before releases carried verdicts, with what this gate said of it then."""
        found = [(each, self.door.verdict(each.sha256)) for each in self.controller.live]
        return [
            self.releases.file(msgspec.structs.replace(offer, verdict=dict(verdict)))
            for offer, verdict in found
            if verdict is not None and not offer.verdict
        ]

    def counts(self) -> dict[str, int]:
        """Verdicts of the gate and what became of offers."""
        rollout = self.controller.status()["counts"]
        return {
            **{f"gate_{name}": count for name, count in self.door.counts.items()},
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


def release_signers(home: Home, verdict_of: VerdictOf, apart: Asks | None = None) -> keys.Signers:
    """The signers of one process that hosts all domains; `apart` where the gate is not here.

    `verdict_of(family, sha256)` is what the gate of that family said of a package that it passed.
    """
    here = {name: keys.load_signer(home.root, name) for name in keys.ONLINE_KEYS if name != "gate"}
    if apart is not None:
        return keys.Signers(gate=apart, **here)
    return keys.Signers(gate=JudgedSigner(keys.load_signer(home.root, "gate"), verdict_of), **here)
