"""A fleet under a rollout: broker, keys, publisher, campaign and hundreds of whole devices.

Why: how long a bad release stays on devices after it was found out is the sum of many small waits,
and hundreds that are told at once wait for each other, too.

Invariants: the product's own rooms, nothing replaced: devices come in by keys of their own, prove
what is signed, and answer requests all the while. Time begins right before the evidence that
decides is handed to the controller, and ends for a device when the old release alone serves there.

Knows nothing about which statistics decide: what it hands over as evidence is beyond doubt.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from cloud_learner.admission import Admissions
from cloud_learner.broker import Broker
from cloud_learner.config import Home
from cloud_learner.controller import Controller
from cloud_learner.floors import Floors
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.release.metadata import ReleaseFile
from cloud_learner.reports import Reports
from cloud_learner.rollout.state import Offer, Rules
from cloud_learner.simulate.crew import Crew, Fact
from cloud_learner.simulate.fleet import DeviceProcess
from cloud_learner.store.examples import Example
from cloud_learner.store.lineage import Lineage
from cloud_learner.streams import make_streams
from edge_runtime.bus.base import Bus, Message
from edge_runtime.bus.nats import connect
from edge_runtime.clock import SystemClock
from edge_runtime.device.words import Event
from edge_runtime.errors import TransportError
from edge_runtime.rollout.plan import Plan, model_path
from edge_runtime.update.approval import Approval
from edge_runtime.wire import subjects
from edge_runtime.wire.messages import Scored

WAIT_S = 300.0
LINGER_MS = 500  # hundreds of logs share one disk
OLD, NEW = "r1", "r2"
PAIRS_EACH = 30


class Site:
    """The cloud of one family, and the devices called `names` in so many `crews`."""

    def __init__(
        self, home: Path, names: Sequence[str], crews: int, event: Event, pace_s: float
    ) -> None:
        self._home, self.names, self._event, self._pace_s = home, names, event, pace_s
        self.cloud = Home(home / "cloud")
        self.crew_of = {name: at * crews // len(names) for at, name in enumerate(names)}
        self.crews: list[Crew] = []
        self.heard: list[Fact] = []
        self.serving: dict[str, Fact] = {}
        self.stopped: set[str] = set()
        self.counts: dict[str, Fact] = {}
        self._news = asyncio.Event()

    @asynccontextmanager
    async def open(self, rules: Rules) -> AsyncIterator[None]:
        """Broker, keys and crews, without a device that runs; in the end all are gone."""
        self._family = rules.family
        keys.create(self.cloud.root, [rules.family])
        admissions = Admissions(self.cloud)
        for name in self.names:
            admissions.admit(name, self._device(name, "").public_key())
        with Broker.start(self.cloud.broker, admissions.rules()) as broker:
            for name in self.names:
                self._device(name, broker.url).configure()
            bus = await connect(broker.url, name="learner", access=admissions.access())
            try:
                self.reports = Reports(admissions.known, Floors(self._home / "floors").is_news)
                await self._furnish(bus, rules)
                await self._man()
                yield
                await self.controller.close()
            finally:
                await asyncio.gather(*(crew.close() for crew in self.crews))
                await bus.close()

    def start(self, devices: Iterable[str]) -> None:
        """Let devices begin; they are there when they serve."""
        for name in devices:
            self.stopped.discard(name)
            self.crews[self.crew_of[name]].order("start", self._home_of(name))

    async def stop(self, devices: Collection[str]) -> None:
        """Let devices end in order."""
        for name in devices:
            self.serving.pop(name, None)
            self.crews[self.crew_of[name]].order("stop", self._home_of(name))
        await self.until(lambda: self.stopped.issuperset(devices), "the end of devices")

    async def cut(self, crew: int) -> list[str]:
        """Kill the devices of a crew and start them again; which they are."""
        gone = [name for name in self.serving if self.crew_of[name] == crew]
        await self.crews[crew].kill()
        for name in gone:
            del self.serving[name]
        await self.crews[crew].start()
        self.start(gone)
        return gone

    async def offer(self, release: str, package: Path) -> None:
        """Offer a package to the campaign, as a gate does that passed it."""
        await self.controller.offer(_offer(self._family, release, package))

    async def serve(self, devices: Iterable[str], *releases: str) -> None:
        """Wait until all serve just these, the stable one first, as the newest plan says."""
        wanted, seq = set(devices), self.controller.status()["plan_seq"]

        def all_do() -> bool:
            found = [self.serving.get(name) for name in wanted]
            return all(f and (f.serving, f.seq) == (list(releases), seq) for f in found)

        await self.until(all_do, f"{' and '.join(releases)} on {len(wanted)} devices")

    async def count(self) -> dict[str, Fact]:
        """Who answered on the devices that run, so far."""
        self.counts.clear()
        for crew in self.crews:
            crew.order("count")
        await self.until(lambda: self.serving.keys() <= self.counts.keys(), "the count of answers")
        return dict(self.counts)

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for what devices say. Raises: TransportError (timeout, device_failed)."""
        try:
            async with asyncio.timeout(WAIT_S):
                while not condition():
                    self._news.clear()
                    await self._news.wait()
                    for fact in self.heard:
                        if fact.what == "failed":
                            raise TransportError("device_failed", f"{fact.device}: {fact.note}")
        except TimeoutError as error:
            raise TransportError("timeout", f"{what} does not come") from error

    def _home_of(self, device: str) -> Path:
        return self._home / "devices" / device

    def _device(self, name: str, url: str) -> DeviceProcess:
        home, root = self._home_of(name), self.cloud.trusted_root
        return DeviceProcess(
            name, home, families=[self._family], nats=url, root=root, linger_ms=LINGER_MS
        )

    async def _furnish(self, bus: Bus, rules: Rules) -> None:
        await make_streams(bus)
        clock, root = SystemClock(), self.cloud.root
        publisher = Publisher(root, bus, keys.load(root), clock)

        async def publish(offer: Offer | None, plan: Plan | None, consent: Approval | None) -> str:
            await publisher.publish(_file(rules.family, offer) if offer else None, plan, consent)
            return publisher.signed("plans")

        lineage = Lineage(self.cloud.lineage)
        self.controller = Controller(rules, root / "campaign.json", publish, lineage, clock)
        await self.controller.start()
        await bus.subscribe(subjects.report("*"), self._on_report)

    async def _on_report(self, message: Message) -> None:
        report = self.reports.believed(message)
        if report is not None:
            await self.controller.report(report)

    async def _man(self) -> None:
        root = self.cloud.trusted_root
        for number in range(max(self.crew_of.values()) + 1):
            log = self._home / f"crew-{number}.log"
            self.crews.append(Crew(root, self._event, self._pace_s, log, self._hear))
            await self.crews[-1].start()

    def _hear(self, fact: Fact) -> None:
        self.heard.append(fact)
        if fact.what == "serves":
            self.serving[fact.device] = fact
        elif fact.what == "counts":
            self.counts[fact.device] = fact
        elif fact.what == "stopped":
            self.stopped.add(fact.device)
        self._news.set()


class Outcome(msgspec.Struct):
    """What became of a release that was found out, in seconds from the decision.

    `back_s` is of devices that were online all the time, `killed_s` of those that were killed right
    after the decision and started again, `woken_s` of those that were away all through the trial,
    from their start on; `woken_tried` of these ran the bad release. After `answered_s` it answered
    nobody on a device of the first kind. `out_s` is how long it took onto all of them.
    """

    out_s: float
    back_s: list[float]
    killed_s: list[float]
    woken_s: list[float]
    woken_tried: int
    answered_s: float
    requests: int
    failed: int
    rss_mb: float


async def roll_back(
    site: Site, old: Path, new: Path, *, asleep: int, dwell_s: float = 3.0
) -> Outcome:
    """A release goes out to all devices but those `asleep`, and back; of the last crew, killed."""
    sleepers, kept = site.names[:asleep], site.names[asleep:]
    await site.offer(OLD, old)
    site.start(site.names)
    await site.serve(site.names, OLD)
    await site.stop(sleepers)
    began_s = time.monotonic()
    await site.offer(NEW, new)
    await site.serve(kept, OLD, NEW)
    out_s = time.monotonic() - began_s
    await asyncio.sleep(dwell_s)
    decided_s = time.monotonic()
    await site.controller.examples(_bad(kept, site.controller.rules.family))
    killed = await site.cut(len(site.crews) - 1) if len(site.crews) > 1 else []
    await site.serve(kept, OLD)
    woken_s = time.monotonic()
    site.start(sleepers)
    await site.serve(site.names, OLD)
    counts = await site.count()
    online = set(kept) - set(killed)
    back = {name: _last(site.heard, name) for name in site.names}
    return Outcome(
        out_s=out_s,
        back_s=[back[name] - decided_s for name in sorted(online)],
        killed_s=[back[name] - decided_s for name in killed],
        woken_s=[back[name] - woken_s for name in sleepers],
        woken_tried=sum(NEW in f.serving for f in site.heard if f.device in sleepers),
        answered_s=max(counts[name].last_s.get(NEW, decided_s) for name in online) - decided_s,
        requests=sum(sum(fact.answered.values()) for fact in counts.values()),
        failed=sum(fact.failed for fact in counts.values()),
        rss_mb=sum(crew.rss_mb() for crew in site.crews) / len(site.names),
    )


def _last(heard: Sequence[Fact], device: str) -> float:
    """When a device last began to serve something else."""
    return max(fact.at_s for fact in heard if fact.device == device and fact.what == "serves")


def _offer(family: str, release: str, package: Path) -> Offer:
    sha256 = hashlib.sha256(package.read_bytes()).hexdigest()
    return Offer(
        release=release,
        path=model_path(family, release),
        sha256=sha256,
        counter=int(release.removeprefix("r")),
        file=str(package),
        learned_through_s=0.0,
        arrived_s=time.time(),
        verdict={"outcome": "pass", "rules": [], "sha256": sha256},
    )


def _file(family: str, offer: Offer) -> ReleaseFile:
    data = Path(offer.file).read_bytes()
    return ReleaseFile(family, offer.release, offer.counter, data, offer.verdict)


def _bad(devices: Sequence[str], family: str) -> list[Example]:
    """Evidence beyond doubt: on every device the release on trial is sure of the opposite."""
    facts = dict.fromkeys(("label_time_s", "arrived_s", "matured_s"), 0.0)
    answers = [
        [Scored(OLD, "stable", [at]), Scored(NEW, "canary", [1 - at])] for at in (0.01, 0.99)
    ]
    return [
        Example(
            device=name,
            epoch=1,
            seq=seq,
            family=family,
            time_s=float(seq),
            features=b"",
            spec="",
            label=float(seq % 2),
            propensity=0.8,
            scored=answers[seq % 2],
            **facts,  # type: ignore[arg-type] # floats
        )
        for seq in range(1, PAIRS_EACH + 1)
        for name in devices
    ]
