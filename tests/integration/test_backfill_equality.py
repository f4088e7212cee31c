"""Point in time: what a backfill computes is, bit for bit, what a device with the new features from
the start has logged.

Two devices live through one seeded story, one under the old features and one under the new: late
events, labels, events out of order, clean restarts and power cuts. Both send all of it by their
uplinks into a real ingest; then its raw envelopes are replayed.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path

import msgspec
import pytest

from cloud_learner.experiment.backfill import replayed
from cloud_learner.experiment.hindsight import Hindsight
from cloud_learner.experiment.lanes import Lanes
from cloud_learner.experiment.logged import Known
from cloud_learner.simulate.rig import Cloud
from cloud_learner.store.raw import RawLog
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import ManualClock, SystemClock
from edge_runtime.config import EdgeConfig, LogConfig
from edge_runtime.events.log import CLASSES, EventLog
from edge_runtime.events.uplink import Uplink
from edge_runtime.features.engine import Engine
from edge_runtime.features.spec import Spec
from edge_runtime.rollout.arms import load_plan_arm
from edge_runtime.rollout.plan import Plan, PlanArm, model_path
from edge_runtime.runtime import Event, Runtime
from edge_runtime.wire import codec
from edge_runtime.wire.messages import PredictionRecord

NOW_S = 1_360_000_000.0
EVENTS = 250
CARRIERS = "ABC"

HEAD = """
version = 1
[tables.carriers]
version = "1"
columns = ["size"]
rows = { A = [1.0], B = [2.5] }
"""
OLD = (
    'field = "distance"',
    'window = { over = "departed", value = "delay", statistic = "sum", span_s = 300.0 }',
    'window = { over = "departed", key = "carrier", statistic = "count", span_events = 20 }',
)
OLD_LABELS = ('window = { over = "label", key = "carrier", statistic = "mean", span_s = 900.0 }',)
NEW = (
    'field = "carrier"\nhash = 16\none_hot = true',
    'lookup = { table = "carriers", key = "carrier", column = "size" }',
    'cycle = { of = "day" }',
    'window = { over = "departed", value = "delay", statistic = "std", span_s = 3000.0 }',
    'window = { over = "departed", key = "carrier", value = "delay", statistic="max", span_s=6e2 }',
    'window = { over = "departed", key = "carrier", value="delay", statistic="min", span_events=9}',
    'window = { over = "departed", value = "delay", statistic = "distinct", span_s = 500.0 }',
    'window = { over = "departed", value="delay", statistic="decayed_mean", half_life_s=9.0 }',
    'window = { over = "scheduled", key = "carrier", statistic = "time_since_last", span_s = 6e3 }',
    'window = { over = "label", statistic = "count", span_s = 600.0 }',
    'window = { over = "label", key = "carrier", statistic = "mean", span_events = 5 }',
)


def spec_of(*features: str) -> Spec:
    parts = [f'[[features]]\nname = "{index}"\n{rest}\n' for index, rest in enumerate(features)]
    return Spec.from_toml(HEAD + "".join(parts))


class Life:
    """A device of the story, with a log that outlives its processes."""

    def __init__(self, state: Path, name: str, package, release: str) -> None:
        path, self.sha256 = package
        self.config = EdgeConfig(
            device=name,
            families=["toy"],
            state_dir=state,
            socket=state.with_suffix(".sock"),
            log=LogConfig(linger_ms=1, linger_max_ms=0),
        )
        self.ids: list[str] = []
        self.lives = 0
        self.runtime = self._opened()
        self.runtime.shelf.put_whole(self.sha256, path.read_bytes())
        arm = PlanArm(release, model_path("toy", release), self.sha256, 1, 1.0)
        plan = Plan(family="toy", seq=1, stable=arm, salt="s")
        self.runtime.swap("toy", [load_plan_arm(self.runtime.shelf, "stable", arm)], plan)
        self.runtime.shelf.save_current(plan)

    def _opened(self) -> Runtime:
        return Runtime.open(self.config, clock=ManualClock(NOW_S))

    def restart(self) -> None:
        self.runtime.close()
        self.runtime = self._opened()

    def power_cut(self) -> None:
        self.settle()
        self.lives += 1
        folder = self.config.state_dir.with_name(f"{self.config.device}-{self.lives}")
        shutil.copytree(self.config.state_dir, folder)
        self.runtime.close()
        self.config = msgspec.structs.replace(self.config, state_dir=folder)
        self.runtime = self._opened()

    def settle(self) -> None:
        for event_class in CLASSES:
            log = self.runtime.log
            asyncio.run(log.wait_durable(event_class, log.handed_out(event_class)))

    def logged(self) -> list[PredictionRecord]:
        self.settle()
        records = [codec.decode_record(data) for _, _, data in self.runtime.log.tail("event", 0, 0)]
        return [record for record in records if isinstance(record, PredictionRecord)]


def live_through(lives: list[Life], seed: int) -> None:
    """The story, for all devices alike."""
    chance, now_s = random.Random(seed), NOW_S
    for _ in range(EVENTS):
        now_s += chance.choice([0, 1, 5, 30])
        time_s = now_s - chance.choice([0, 0, 0, 40, 2000, 9000])
        carrier, choice = chance.choice(CARRIERS), chance.randrange(100)
        asked = Event("scheduled", time_s, {"carrier": carrier, "distance": chance.random()})
        delay, which, value = chance.randrange(60), chance.random(), chance.randrange(2)
        for life in lives:
            runtime, ids = life.runtime, life.ids
            if choice < 40:
                fields = {"carrier": carrier, "delay": float(delay)}
                runtime.observe("toy", Event("departed", time_s, fields))
            elif choice < 60 or not ids:
                ids.append(runtime.predict("toy", asked).id)
            elif choice < 65:
                ids += [each.id for each in runtime.predict_many("toy", [asked] * 3)]
            elif choice < 97:
                which_id = ids[int(which * len(ids))]
                # No event has this very time: which of the two came first could not be known.
                runtime.label(which_id, value, time_s=now_s + 0.5, final=choice < 90)
            elif choice < 99:
                life.restart()
            else:
                life.power_cut()


async def send_all(home: Path, lives: list[Life]) -> None:
    """Everything that lies in the logs, by uplinks into a real ingest."""
    broker = MemoryBroker()

    async def connect(name):
        return await broker.connect(name=name)

    cloud = await Cloud.start(home, connect)
    for life in lives:
        life.runtime.close()
        log = EventLog(life.config.state_dir / "log", device=life.config.device)
        bus = await connect(life.config.device)
        uplink = Uplink(log, bus, life.config.device, SystemClock())
        task = asyncio.create_task(uplink.run())
        ends = [
            ((life.config.device, epoch, event_class), seq)
            for event_class in CLASSES
            for epoch, seq in log.owed(event_class)
        ]
        await cloud.until(lambda ends=ends: all(cloud.mark(lane) >= end for lane, end in ends))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await bus.close()
        log.close()
    await cloud.stop()


def hindsights(home: Path, spec: Spec, interface, known: Known) -> dict:
    """By device, the vectors that a replay of the raw envelopes gives, and what it found."""
    lanes, raw = Lanes(home / "lanes", {}), RawLog(home / "raw")
    lanes.sort(raw, lambda _size: None)
    told = {}
    for device, epochs in lanes.epochs():
        hindsight = Hindsight(spec, interface, known)
        vectors = list(replayed(lanes, device, epochs, hindsight, lambda _size: None))
        told[device] = [vector.features for vector in vectors], hindsight.found
    lanes.close()
    raw.close()
    return told


@pytest.fixture
def told(tmp_path, write_package, toy_interface):
    """`told(old, seed)`: of a story, what the replay says, and what the new device logged."""

    def tell(old: Spec, seed: int):
        new = spec_of(*OLD, *OLD_LABELS, *NEW)
        specs = {"old": old, "new": new}
        lives = [
            Life(tmp_path / name, name, write_package(spec=spec), f"of-{name}")
            for name, spec in specs.items()
        ]
        live_through(lives, seed)
        logged = {life.config.device: [r.features for r in life.logged()] for life in lives}
        asyncio.run(send_all(tmp_path / "home", lives))
        saw = frozenset({"of-new"} | ({"of-old"} if Engine(old).sees_labels else set()))
        known = Known({old.hash: old, new.hash: new}, saw)
        return hindsights(tmp_path / "home", new, toy_interface, known), logged

    return tell


SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 10))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("old", [OLD, OLD + OLD_LABELS], ids=["labels unseen", "labels seen"])
def test_both_get_what_the_new_one_logged(told, old, seed) -> None:
    replay, logged = told(spec_of(*old), seed)

    assert len(logged["old"]) == len(logged["new"]) > 50, f"seed {seed}"
    for device, (vectors, found) in replay.items():
        assert vectors == logged["new"], f"seed {seed}, device {device}"
        assert found.compared == found.predictions == found.whole
        assert not found.differing
        assert not found.explained
        assert not found.lost
