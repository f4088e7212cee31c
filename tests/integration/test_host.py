"""The cloud side as a whole: envelopes in, learned once each, gated, signed and planned; through
restarts, kills and failures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cloud_learner.bootstrap import bootstrap
from cloud_learner.broker import Broker
from cloud_learner.config import Home
from cloud_learner.evaluate.offline import is_held_out, load_set
from cloud_learner.floors import Floors
from cloud_learner.host import Host
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.release.metadata import ReleaseFile
from cloud_learner.releasing import Releases
from cloud_learner.rollout.campaign import Offer
from cloud_learner.simulate.faults import forge_learner_alone
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.registry import Registry
from cloud_learner.streams import EVENTS_PER_SUBJECT
from cloud_learner.train import checkpoint
from cloud_learner.train.family import Family
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.bus.nats import connect
from edge_runtime.clock import SystemClock
from edge_runtime.errors import ConfigError
from edge_runtime.features.histogram import Histograms
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import (
    WIRE_VERSION,
    Envelope,
    FeatureSketch,
    LabelRecord,
    Mark,
    ObservationRecord,
    PredictionRecord,
    Report,
    Scored,
    TimeQuestion,
)

WAIT_S = 30.0
SYSTEM = SystemClock()
EVENTS = 800
ENVELOPE_RECORDS = 40


@pytest.fixture(scope="module")
def bootstrapped(coin, tmp_path_factory):
    var = tmp_path_factory.mktemp("host")
    folder = coin.write_family(var / "coin")
    data = coin.write_csv(var / "data.csv", coin.stream(600))
    bootstrap(folder, data, Home(var / "home"), lambda _text: None)
    return var / "home"


@pytest.fixture
def home(bootstrapped, tmp_path):
    shutil.copytree(bootstrapped, tmp_path / "home")
    return Home(tmp_path / "home")


@pytest.fixture
def family(home):
    return Family.load(Path(home.of("coin").origin().folder))


@pytest.fixture
def envelopes(coin, family):
    """What the devices a and b would send of the stream after the bootstrap, in order."""
    return packed(coin.stream(EVENTS, seed=3, start_s=2000.0), family.spec.hash)


def packed(events, spec, width=3, answer=lambda _fields: 0.5):
    lanes: dict = {}
    for time_s, kind, device, fields, heads, label_time_s in events:
        lane = lanes.setdefault((device, "event"), [])
        if heads is None:
            lane.append(ObservationRecord("coin", kind, time_s, fields))
            continue
        row = np.zeros(width, "<f4")
        row[1] = fields["x"]
        scored = [Scored("r00001", "stable", [answer(fields)])]
        lane.append(
            PredictionRecord("coin", kind, time_s, fields, spec, row.tobytes(), 1.0, scored)
        )
        label = LabelRecord("coin", 1, len(lane), heads, label_time_s)
        lanes.setdefault((device, "label"), []).append(label)
    parts = []
    for (device, event_class), records in lanes.items():
        for start in range(0, len(records), ENVELOPE_RECORDS):
            raws = [msgspec.Raw(codec.encode(r)) for r in records[start : start + ENVELOPE_RECORDS]]
            envelope = Envelope(WIRE_VERSION, device, 1, event_class, start + 1, raws)
            parts.append((records[start].time_s, subjects.events(device, event_class), envelope))
    parts.sort(key=lambda part: part[0])
    return [(subject, codec.encode(envelope)) for _, subject, envelope in parts]


class Cloud:
    """A bus beside a running host, and what the host says."""

    def __init__(self, bus) -> None:
        self.bus, self.status, self._heard = bus, None, asyncio.Event()
        self.nudged = asyncio.Event()

    async def listen(self) -> None:
        await self.bus.subscribe(subjects.LEARNER_STATUS, self._hear)

    async def _hear(self, message) -> None:
        self.status = codec.decode_status(message.data)
        self._heard.set()

    async def refreshed(self, _message) -> None:
        self.nudged.set()

    async def send(self, envelopes) -> None:
        for subject, data in envelopes:
            await self.bus.publish(subject, data)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds, looked at whenever the host speaks."""
        async with asyncio.timeout(WAIT_S):
            while self.status is None or not condition():
                self._heard.clear()
                await self._heard.wait()

    async def until_learned(self, batches) -> None:
        await self.until(
            lambda: self.count("cycles") >= batches and not self.count("batches_waiting")
        )

    def count(self, name) -> int:
        return self.status.counters.get(name, 0)


@contextlib.asynccontextmanager
async def hosted(home, family, broker, clock=SYSTEM):
    """A host that runs over a memory broker, a cloud beside it, and the task that runs it."""
    host = Host(home, [family], await broker.connect(name="learner"), clock)
    cloud = Cloud(await broker.connect(name="test"))
    await cloud.listen()
    running = asyncio.create_task(host.run())
    try:
        yield host, cloud, running
    finally:
        running.cancel()
        await asyncio.wait([running])


class Moved(SystemClock):
    """The machine's clocks, put forward."""

    ahead_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.ahead_s

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.ahead_s


def batched(home):
    """All committed batches, read from the ingest database of a learner that has ended."""
    db = IngestDb(home.ingest_db)
    try:
        return list(db.batches_after("coin", 0))
    finally:
        db.close()


def check_ledger(home, batches) -> None:
    """The trainer's own ledger: every example of every batch once, but for what is held out."""
    state = checkpoint.load(home.of("coin").checkpoint)
    due = [e.id for b in batched(home) for e in b.examples if not is_held_out(e)]

    assert state["number"] == batches
    assert len(due) == len(set(due))
    assert sorted(state["ledger"]["mature"]) == sorted(due)
    assert state["ledger"]["learned_twice"] == 0


def test_envelopes_become_a_release_that_is_gated_signed_and_planned(home, family, envelopes):
    async def scenario():
        async with hosted(home, family, MemoryBroker()) as (host, cloud, _running):
            await cloud.send(envelopes)
            await cloud.until_learned(10)
            await cloud.until(lambda: host.publisher.plan("coin").canary is not None)
            plan = host.publisher.plan("coin")
            canary = plan.canary
            assert plan.stable.release == home.of("coin").origin().release
            assert plan.selector == {"site": "a"}
            assert host.releasing["coin"].door.gate.passed(canary.path, canary.sha256)
            assert cloud.count("gate_pass") >= 1
            assert cloud.count("learned_twice") == 0
            assert cloud.status.events_archived == EVENTS + EVENTS * 3 // 4
            assert await cloud.bus.last(subjects.TRUST_STREAM, subjects.metadata("timestamp"))
            return canary

    canary = asyncio.run(scenario())
    lineage = list(Lineage(home.lineage).read())
    by_kind = {kind: [e for e in lineage if e["kind"] == kind] for kind in ("verdict", "release")}
    passed = {e["sha256"] for e in by_kind["verdict"] if e["outcome"] == "pass"}
    assert canary.sha256 in passed
    assert {e["sha256"] for e in by_kind["release"]} <= passed
    counters = [e["counter"] for e in by_kind["release"]]
    assert counters == list(range(1, len(counters) + 1))
    assert any(e["kind"] == "plan" for e in lineage)
    check_ledger(home, len(batched(home)))


def test_what_serves_since_before_releases_carried_verdicts_gets_its_own(home, family):
    """Devices of today take no release without one, and so no plan that names it."""
    saved = home.of("coin").campaign
    stable = json.loads(saved.read_text())["state"]["stable"]
    given = json.dumps(stable["verdict"], separators=(",", ":"))
    saved.write_text(saved.read_text().replace(given, "{}"))

    def told(publisher):
        role = json.loads(publisher._state.roles["m-coin"].text)
        return role["signed"]["targets"][stable["path"]]["custom"].get("verdict")

    async def scenario():
        broker = MemoryBroker()
        bus = await broker.connect(name="an older learner")
        old = Publisher(home.root, bus, keys.load(home.root), SYSTEM)
        offer = msgspec.convert({**stable, "verdict": {}}, Offer)
        releases = Releases("coin", Registry(home.registry), Lineage(home.lineage).of("coin"))
        await old.publish(releases.file(offer))
        assert told(old) is None
        async with hosted(home, family, broker) as (host, cloud, _running):
            await cloud.until_learned(0)
            return told(host.publisher)

    assert asyncio.run(scenario()) == stable["verdict"]


def test_what_is_ingested_makes_room_at_the_broker(home, family, envelopes):
    broker = MemoryBroker()

    async def scenario():
        async with hosted(home, family, broker) as (_host, cloud, _running):
            await cloud.send(envelopes)
            await cloud.until(lambda: not broker.streams[subjects.EVENTS_STREAM].messages)
            assert broker.streams[subjects.EVENTS_STREAM].limits.per_subject == EVENTS_PER_SUBJECT

    asyncio.run(scenario())


def test_a_broker_that_comes_back_without_its_store_is_furnished_again(home, family, envelopes):
    broker = MemoryBroker()

    async def scenario():
        async with hosted(home, family, broker) as (_host, cloud, _running):
            broker.down()
            broker.streams.clear()
            broker.up()
            await cloud.until(lambda: subjects.TRUST_STREAM in broker.streams)
            await cloud.until(
                lambda: broker.streams[subjects.TRUST_STREAM].last(subjects.metadata("timestamp"))
            )
            await cloud.send(envelopes)
            await cloud.until_learned(4)

    asyncio.run(scenario())


def test_a_restarted_learner_goes_on_from_its_checkpoint(home, family, envelopes):
    broker = MemoryBroker()
    half = len(envelopes) // 2

    async def scenario():
        async with hosted(home, family, broker) as (host, cloud, _running):
            await cloud.send(envelopes[:half])
            await cloud.until_learned(4)
            archived, clock_s = cloud.status.events_archived, cloud.status.clock_s
            number = host.learner.courses["coin"].cycle.number
        async with hosted(home, family, broker) as (host, cloud, _running):
            assert host.learner.courses["coin"].cycle.number >= number
            assert host.status().events_archived >= archived
            assert host.status().clock_s >= clock_s
            await cloud.send(envelopes)  # a device that was told nothing sends all of it again
            await cloud.until_learned(10)
            assert cloud.count("learned_twice") == 0
            assert cloud.status.events_archived == EVENTS + EVENTS * 3 // 4
            releases = [e["counter"] for e in host.lineage.read("release")]
            assert releases == list(range(1, len(releases) + 1))

    asyncio.run(scenario())
    check_ledger(home, len(batched(home)))


def test_a_restarted_host_claims_the_time_that_it_had_reached_before_anything_comes(
    home, family, envelopes
):
    async def scenario():
        async with hosted(home, family, MemoryBroker()) as (host, cloud, _running):
            await cloud.send(envelopes)
            await cloud.until_learned(10)
            before, held = host.status(), host.releasing["coin"].door.hold_out.rows()
        async with hosted(home, family, MemoryBroker()) as (host, cloud, _running):
            await cloud.until(lambda: True)
            assert (
                host.releasing["coin"].door.hold_out.rows().times_s.tolist()
                == held.times_s.tolist()
            )
            assert len(held) > 20
            assert cloud.status.clock_s >= before.clock_s > 2000.0
            assert cloud.status.events_archived == before.events_archived > 0

    asyncio.run(scenario())


def test_a_device_with_a_feature_spec_of_its_own_stops_nobody(home, family, envelopes, coin):
    strange = coin.stream(EVENTS, seed=9, start_s=2000.0)
    strange = [(t, kind, "c", *rest) for t, kind, _, *rest in strange]

    async def scenario():
        async with hosted(home, family, MemoryBroker()) as (host, cloud, _running):
            await cloud.send(packed(strange, "another-spec", width=7))
            await cloud.send(envelopes)
            await cloud.until_learned(15)
            assert cloud.count("other_spec") > 200
            await cloud.until(lambda: cloud.count("gate_judged") >= 1)
            assert host.releasing["coin"].door.hold_out.rows().features.shape[1] == 3

    asyncio.run(scenario())


def test_a_home_of_an_earlier_release_is_refused_and_left_as_it_is(home, family):
    home.root.joinpath("ingest.sqlite").write_bytes(b"an earlier release")

    async def scenario():
        Host(home, [family], await MemoryBroker().connect(name="learner"), SystemClock())

    with pytest.raises(ConfigError) as caught:
        asyncio.run(scenario())
    assert caught.value.code == "bad_version"
    assert not home.ingest_db.exists()


def test_what_a_device_reports_is_in_the_accounts(home, family):
    async def scenario():
        async with hosted(home, family, MemoryBroker()) as (_, cloud, _running):
            await cloud.until(lambda: True)
            report = Report(
                *(WIRE_VERSION, "a", 1, 0.0, {}, [], 0, {}, {}, [], 0, 0, [Mark(1, "event", 9)])
            )
            await cloud.bus.publish(subjects.report("a"), codec.encode(report))
            await cloud.until(lambda: cloud.count("under_way") == 9)
            assert cloud.count("balanced") == 1

    asyncio.run(scenario())


def test_f3_a_device_whose_floor_went_back_is_named_and_the_time_is_told(home, family):
    def report(number, *floor):
        bare = Report(WIRE_VERSION, "a", 1, 0.0, {}, [], 0, {}, {}, [], 0, 0)
        told = msgspec.structs.replace(bare, floor=list(floor), number=number)
        return subjects.report("a"), codec.encode(told)

    async def scenario():
        async with hosted(home, family, MemoryBroker()) as (_host, cloud, _running):
            await cloud.until(lambda: True)
            await cloud.send([report(1, 1, 9), report(2, 1, 3)])
            await cloud.until(lambda: bool(json.loads(cloud.status.detail)["restored_devices"]))
            named = json.loads(cloud.status.detail)["restored_devices"]
            assert named["a"]["times"] == named["a"]["below"] == 1
            question = codec.encode(TimeQuestion(WIRE_VERSION, bytes(16)))
            answer = codec.decode_time_answer(await cloud.bus.ask(subjects.TIME, question))
            assert abs(answer.time_s - SYSTEM.now_s()) < 60
            await cloud.until(lambda: cloud.count("times_told") == 1)

    asyncio.run(scenario())
    assert Floors(home.root / "floors.json").devices["a"].went_back == 1


def test_reports_that_nobody_may_send_are_counted(home, family):
    async def scenario():
        async with hosted(home, family, MemoryBroker()) as (_, cloud, _running):
            await cloud.until(lambda: True)
            await cloud.bus.publish(subjects.report("a"), b"garbage")
            await cloud.until(lambda: cloud.count("bad_reports") == 1)

    asyncio.run(scenario())


def test_a_learner_that_cannot_write_says_so_and_goes_on_by_itself(home, family, envelopes):
    away = home.raw.with_name("away")

    async def scenario():
        async with hosted(home, family, MemoryBroker()) as (host, cloud, _running):
            await cloud.until(lambda: True)
            home.raw.rename(away)
            home.raw.write_text("in the way")
            await cloud.send(envelopes)
            await cloud.until(lambda: cloud.count("paused") == 1)
            assert f"{home.raw}" in json.loads(cloud.status.detail)["paused"]
            assert cloud.status.events_archived == 0
            home.raw.unlink()
            away.rename(home.raw)
            await cloud.until_learned(10)
            await cloud.until(lambda: cloud.count("paused") == 0)
            assert cloud.status.events_archived == EVENTS + EVENTS * 3 // 4
            assert host.learner.ingest.totals["balanced"] == 1

    asyncio.run(scenario())
    check_ledger(home, len(batched(home)))


def calibrated(fields):
    """What one would answer who knew the world that coins come from."""
    return float(1 / (1 + np.exp(-4 * fields["x"])))


async def judged(host):
    """The student as it stands, judged: the outcome of each rule, and whether it was strict."""
    course, loop = host.learner.courses["coin"], asyncio.get_running_loop()
    candidate = await loop.run_in_executor(host.learner.thread, course.candidate)
    judgement = await host.submit("coin", candidate)
    strict = {each.rule for each in judgement.verdicts if "an alarm stands" in each.reason}
    return candidate, strict


def family_said(host):
    return json.loads(host.status().detail)["families"]["coin"]


def test_answers_that_grow_unsure_make_the_gate_strict_before_any_label_of_them_is_mature(
    home, family, coin
):
    spec = family.spec.hash
    calm = packed(coin.stream(EVENTS, seed=3, start_s=2000.0), spec, answer=calibrated)
    unsure = [
        (2800 + at * 0.02, kind, device + device, {**fields, "x": fields["x"] / 10}, heads, 3000.0)
        for at, (_, kind, device, fields, heads, _) in enumerate(coin.stream(EVENTS, seed=4))
        if kind == "asked"
    ]
    unlabelled = [
        each for each in packed(unsure, spec, answer=calibrated) if "label" not in each[0]
    ]

    async def scenario():
        async with hosted(home, family, MemoryBroker()) as (host, cloud, _running):
            await cloud.send(calm)
            await cloud.until_learned(10)
            _, strict = await judged(host)
            before = family_said(host)
            assert (strict, before["alarms"], list(host.lineage.read("alarm"))) == (set(), [], [])
            assert abs(before["expected"]["expected"] - before["expected"]["reached"]) < 0.03

            await cloud.send(unlabelled)
            archived = EVENTS + EVENTS * 3 // 4 + len(unsure)
            await cloud.until(lambda: cloud.status.events_archived == archived)
            candidate, strict = await judged(host)
            assert not candidate.alarmed  # nothing of it was learned, nor seen by the watch
            assert {"static_drop", "recent_drop"} <= strict
            await cloud.until(lambda: cloud.count("alarms_standing") == 1)
            return family_said(host), list(host.lineage.read("alarm"))

    after, [entry] = asyncio.run(scenario())
    [alarm] = after["alarms"]
    assert alarm["source"] == entry["source"] == "estimate"
    assert alarm["found"] == entry["found"] == entry["expected"] < entry["reach"] < entry["reached"]
    assert after["expected"]["expected"] == entry["expected"]


def test_what_devices_sketch_makes_the_gate_strict_before_any_record_comes(home, family):
    rows, clock = load_set(home.of("coin").reference).features, Moved()

    def report(rows):
        found = Histograms(family.spec.columns)
        found.add(rows)
        told = FeatureSketch("coin", family.spec.hash, len(rows), 2000.0, found.sketches())
        good = Report(WIRE_VERSION, "a", 1, 0.0, {}, [], 0, {}, {}, [], 0, 0)
        return msgspec.structs.replace(good, sketches=[told])

    async def scenario():
        async with hosted(home, family, MemoryBroker(), clock) as (host, cloud, _running):
            for _ in range(8):
                clock.ahead_s += 60.0
                await host.releasing["coin"].report(report(rows), 0)
            _, strict = await judged(host)
            assert (strict, family_said(host)["alarms"]) == (set(), [])

            clock.ahead_s += 60.0
            moved = rows + np.array([0, 3, 0], "f4")
            await cloud.bus.publish(subjects.report("a"), codec.encode(report(moved)))
            await cloud.until(lambda: cloud.count("alarms_standing") == 1)
            candidate, strict = await judged(host)
            assert (candidate.alarmed, "static_drop" in strict) == (False, True)
            assert cloud.count("sketches_heard") == 9
            return family_said(host)["alarms"], list(host.lineage.read("alarm"))

    [alarm], [entry] = asyncio.run(scenario())
    assert (alarm["source"], alarm["name"]) == (entry["source"], entry["name"]) == ("sketch", "x")
    assert entry["family"] == "coin"


def serve(home, url):
    command = [sys.executable, "-m", "cloud_learner.cli", "serve", "--home", str(home.root)]
    return subprocess.Popen(
        [*command, "--nats", url], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_learner_has_learned_every_batch_once_in_the_end(home, envelopes, tmp_path):
    third = len(envelopes) // 3

    async def beside(url, envelopes, batches):
        cloud = Cloud(await connect(url, name="test"))
        await cloud.listen()
        await cloud.until(lambda: True)
        await cloud.send(envelopes)
        await cloud.until_learned(batches)
        await cloud.bus.close()
        return cloud

    with Broker.start(tmp_path / "broker") as broker:
        first = serve(home, broker.url)
        try:
            asyncio.run(beside(broker.url, envelopes[: 2 * third], 3))
        finally:
            first.send_signal(signal.SIGKILL)
            first.communicate(timeout=WAIT_S)
        assert (
            checkpoint.load(home.of("coin").checkpoint)["number"] == 0
        )  # what was learned was not kept
        second = serve(home, broker.url)
        try:
            cloud = asyncio.run(beside(broker.url, envelopes[third:], 10))
        finally:
            second.terminate()
            _, said = second.communicate(timeout=WAIT_S)
    assert (second.returncode, "stopped" in said) == (0, True), said
    assert cloud.count("learned_twice") == 0
    assert cloud.status.events_archived == EVENTS + EVENTS * 3 // 4
    check_ledger(home, len(batched(home)))


def test_nobody_need_publish_for_what_a_thief_wrote_to_be_written_over(home, family):
    strange = ReleaseFile("coin", "strange", 1_000_000, b"no package")

    async def scenario() -> None:
        async with hosted(home, family, MemoryBroker()) as (host, cloud, running):
            await cloud.until(lambda: True)
            before = host.publisher.signed("timestamp")
            await forge_learner_alone(home.root, cloud.bus, strange, SYSTEM.now_s())
            forged = await cloud.bus.last(
                subjects.TRUST_STREAM, subjects.metadata("timestamp.json")
            )
            assert forged.data != before.encode()

            again = await cloud.bus.subscribe(subjects.REFRESH, cloud.refreshed)
            async with asyncio.timeout(WAIT_S):
                await cloud.nudged.wait()
            await again.close()

            shown = await cloud.bus.last(subjects.TRUST_STREAM, subjects.metadata("timestamp.json"))
            genuine = json.loads(host.publisher.signed("timestamp"))
            assert json.loads(shown.data) == genuine
            assert genuine["signed"]["version"] > json.loads(forged.data)["signed"]["version"]
            assert not running.done()

    asyncio.run(scenario())
