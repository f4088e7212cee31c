"""The trust domains in one process: learner, publisher, controllers, on a laptop the gates, too.

Why: on one machine one process may host them all, with the same code and the same keys. A home
without the gate's key has its gate apart (`gatehouse`), and asks it over the bus.

Invariants: all families share one ingest and one publisher; each has a gate, a campaign and a place
in the trainer's turns of its own. The publisher signs for a gate only what that gate passed; plans
come from the controllers alone. What this process says about itself (`hw.status.learner`) is for
people and for a replay that waits; nothing is decided by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from cloud_learner.admission import Admissions
from cloud_learner.asking import Answerer, Asker
from cloud_learner.config import Home
from cloud_learner.consents import Consents
from cloud_learner.cycle import Candidate
from cloud_learner.evaluate.holdout import HoldOut
from cloud_learner.floors import Floors
from cloud_learner.gate import Judgement
from cloud_learner.gate_signing import ApartSigner
from cloud_learner.helm import Helm
from cloud_learner.ingest.intake import Released
from cloud_learner.judging import ApartGate, GateDoor, OwnGate
from cloud_learner.learner import Learner
from cloud_learner.publisher import Publisher
from cloud_learner.release.shown import shown_instead
from cloud_learner.releasing import Releasing, release_signers
from cloud_learner.reports import Reports
from cloud_learner.rollout.journal import Signed
from cloud_learner.store.lineage import Lineage
from cloud_learner.streams import keep_place, make_streams
from cloud_learner.submissions import Submissions
from cloud_learner.timekeeper import Timekeeper
from cloud_learner.train.family import Family
from edge_runtime.bus.base import Bus, Message
from edge_runtime.clock import Clock
from edge_runtime.errors import CapacityError, HeadwaterError, TransportError
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import WIRE_VERSION, LearnerStatus

log = logging.getLogger("cloud_learner")

STATUS_S = 0.05
STATUS_KEPT_S = 1.0
MAINTAIN_S = 3600.0
MEND_S = 1.0
LOOK_S = 60.0


class Host:
    """The cloud side of some families over one bus."""

    def __init__(
        self,
        home: Home,
        families: Sequence[Family],
        bus: Bus,
        clock: Clock,
        *,
        hold_outs: Mapping[str, HoldOut] = {},
    ) -> None:
        self.home, self._bus, self._clock = home, bus, clock
        lineage = self.lineage = Lineage(home.lineage)
        self._asker = Asker(bus)
        self.is_gate_here = home.key("gate").exists()
        apart = None if self.is_gate_here else ApartSigner(self._asker)
        signers = release_signers(home, self._verdict, apart)
        self.publisher = Publisher(home.root, bus, signers, clock)
        self.releasing: dict[str, Releasing] = {}
        for family in families:
            part, hold_out = lineage.of(family.name), hold_outs.get(family.name)
            door = self._door(family, part, hold_out)
            self.releasing[family.name] = Releasing(
                home, family, part, self.publisher, door, clock=clock
            )
        self.learner = Learner(
            home,
            families,
            lineage,
            bus,
            clock,
            submit=self._hand_in,
            on_released=self._on_released,
            serving=lambda name: self.releasing[name].served,
        )
        self._timekeeper = Timekeeper(home.root, bus, clock)
        self._floors = Floors(home.root / "floors.json")
        self._believed = Reports(Admissions(home).known, self._floors.is_news)
        self._reconnects = 0

    async def run(self) -> None:
        """Serve until cancelled."""
        await self._furnish()
        for releasing in self.releasing.values():
            await releasing.controller.start()
        await self._tell_verdicts()
        desk = Submissions(self._bus, self.releasing, self.learner.thread, self._clock)
        answerer = Answerer(self._bus, desk.work)
        doors = {name: releasing.door for name, releasing in self.releasing.items()}
        consents = Answerer(self._bus, Consents(self.publisher, doors).work)
        steered = Answerer(self._bus, Helm(self.releasing).work)
        heard = [
            await self._bus.subscribe(subjects.report("*"), self._on_report),
            await self._bus.subscribe(subjects.approve("*"), consents.hear),
            await self._bus.subscribe(subjects.submit("*"), answerer.hear),
            await self._bus.subscribe(subjects.ROLLOUT, steered.hear),
            await self._timekeeper.start(),
        ]
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.learner.run())
                group.create_task(self._say())
                group.create_task(self._maintain())
                group.create_task(self._mend())
                group.create_task(self._look())
                for releasing in self.releasing.values():
                    group.create_task(releasing.run(self.learner.thread))
                    group.create_task(releasing.controller.run())
        finally:
            with contextlib.suppress(OSError):
                self._floors.save()
            for subscription in heard:
                await subscription.close()
            await self._asker.close()
            for releasing in self.releasing.values():
                await releasing.close()

    async def submit(self, family: str, candidate: Candidate) -> Judgement:
        """Let a family's gate judge a candidate, and offer it if it passed."""
        return await self.releasing[family].submit(candidate, self.learner.thread)

    async def _hand_in(self, family: str, candidate: Candidate) -> None:
        await self.releasing[family].hand_in(candidate, self.learner.thread)

    async def look(self) -> None:
        """Look at what unlabelled answers are worth, of every family."""
        for name, releasing in self.releasing.items():
            await releasing.look(self.learner.courses[name].number)

    def status(self) -> LearnerStatus:
        """What is going on, for the live view."""
        found = {name: self._family(name) for name in self.releasing}
        counters = Counter(self.learner.statistics())
        for releasing in self.releasing.values():
            counters.update(releasing.counts())
        counters["alarms_standing"] = sum(len(each["alarms"]) for each in found.values())
        rollouts = {name: each["rollout"] for name, each in found.items()}
        many = len(found) > 1
        stages = [f"{name} {r['stage']}" if many else r["stage"] for name, r in rollouts.items()]
        return LearnerStatus(
            version=WIRE_VERSION,
            time_s=self._clock.now_s(),
            clock_s=self.learner.clock_s,
            events_archived=self.learner.archived,
            counters={
                **counters,
                **self._timekeeper.statistics(),
                **self._believed.statistics(),
            },
            freshness_s=[sample for r in rollouts.values() for sample in r["freshness_s"]],
            stage=", ".join(stages),
            gates=[
                f"{name} {gate['text']}" if many else gate["text"]
                for name, rollout in rollouts.items()
                for gate in rollout["gates"]
            ],
            detail=json.dumps(
                {
                    "families": found,
                    "duplicate_identities": self.learner.ingest.duplicates,
                    "restored_devices": self._floors.restored(),
                    "paused": self.learner.ingest.paused,
                }
            ),
        )

    def _door(self, family: Family, part: Lineage, hold_out: HoldOut | None) -> GateDoor:
        if self.is_gate_here:
            return OwnGate(self.home, family, part, hold_out)
        return ApartGate(family.name, self._bus, self._asker, part)

    def _verdict(self, family: str, sha256: str) -> Mapping[str, Any] | None:
        return self.releasing[family].door.verdict(sha256) if family in self.releasing else None

    def _family(self, name: str) -> dict[str, Any]:
        """What is going on with one family."""
        course, releasing = self.learner.courses[name], self.releasing[name]
        alarms = course.cycle.watch.standing + releasing.standing(course.number)
        return {
            "clock_s": course.clock_s if math.isfinite(course.clock_s) else None,
            "failure": course.failure,
            "weights": course.cycle.replicas.weights,
            "rollout": releasing.controller.status(),
            "gate": releasing.door.status(),
            "alarms": msgspec.to_builtins(alarms),
            "expected": releasing.expectation.facts(),
            "certificate": msgspec.to_builtins(course.certificate),
            "moments_refused": course.pooling.refused,
            "counters": {
                **self.learner.statistics_of(name),
                **releasing.counts(),
                "alarms_standing": len(alarms),
            },
        }

    async def _on_released(self, family: str, released: Released) -> None:
        await self.releasing[family].take(released)

    async def _on_report(self, message: Message) -> None:
        report = self._believed.believed(message)
        if report is None:
            return
        self.learner.hear(report)
        self._floors.hear(report, self._clock.now_s())
        signature = codec.signature_in(message.headers)
        signed = None if signature is None else Signed(message.data, signature)
        for name, releasing in self.releasing.items():
            await releasing.report(report, self.learner.courses[name].number, signed)

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
                if not self.is_gate_here:  # from now on the stream keeps what the gate has to read
                    await keep_place(self._bus)
                await self.publisher.publish()
            except (TransportError, CapacityError) as error:
                log.warning("the broker is not ready yet: %s", error)
                await asyncio.sleep(MEND_S)
            else:
                return

    async def _mend(self) -> None:
        """A broker that comes back may have lost its store; others may have written over it."""
        before: bytes | None = None
        while True:
            await asyncio.sleep(MEND_S)
            instead = await shown_instead(self._bus, self.publisher.signed("timestamp"))
            lost = self._bus.statistics()["reconnects"] != self._reconnects
            if lost or (instead is not None and instead == before):
                await self._furnish()
            before = instead

    async def _look(self) -> None:
        """Also while no candidate is judged: labels may be far away."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()
            with contextlib.suppress(OSError):  # the disk is full: tried again
                await asyncio.to_thread(self._floors.save)

    async def _tell_verdicts(self) -> None:
        """Devices take no release without its verdict, nor the plan that names it."""
        for releasing in self.releasing.values():
            for release in releasing.untold():
                try:
                    await self.publisher.publish(release)
                except HeadwaterError as error:
                    log.warning("%s goes without its verdict: %s", release.release, error)

    async def _maintain(self) -> None:
        while True:
            await asyncio.sleep(MAINTAIN_S)
            with contextlib.suppress(TransportError, CapacityError):  # tried again in an hour
                await self.publisher.maintain()
