"""Whatever happens to a device, in whatever order: its windows say what its whole log says.

A seeded story of events, labels, swaps, adoptions beside events, roll backs, clean restarts and
power cuts. After each chapter, the values that the windows give are those of a pipeline that reads
the log, of which nothing was trimmed, from its first record on.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path

import msgspec
import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig, LogConfig
from edge_runtime.features.spec import Spec
from edge_runtime.inference.pipeline import Pipeline
from edge_runtime.rollout.arms import load_plan_arm
from edge_runtime.rollout.plan import Plan, PlanArm, model_path
from edge_runtime.runtime import Event, Runtime
from edge_runtime.wire import codec

NOW_S = 1_360_000_000.0
CARRIERS = "ABC"
ALWAYS = (
    'over = "label", key = "carrier", statistic = "mean", span_s = 900.0',
    'over = "departed", value = "delay", statistic = "sum", span_s = 300.0',
)
SOMETIMES = (
    'over = "departed", value = "delay", statistic = "std", span_s = 3000.0',
    'over = "departed", key = "carrier", value = "delay", statistic = "max", span_s = 600.0',
    'over = "departed", key = "carrier", value = "delay", statistic = "min", span_events = 20',
    'over = "departed", key = "carrier", statistic = "count", span_s = 60.0',
    'over = "departed", key = "carrier", statistic = "rate", span_s = 6000.0',
    'over = "departed", value = "delay", statistic = "distinct", span_s = 500.0',
    'over = "departed", key = "carrier", value = "delay", statistic = "distinct", span_events = 30',
    'over = "departed", value = "delay", statistic = "decayed_mean", half_life_s = 90.0',
    'over = "scheduled", key = "carrier", statistic = "time_since_last", span_s = 6000.0',
    'over = "scheduled", key = "carrier", statistic = "count", span_events = 40',
)


class Story:
    """A device through its lives; each chapter is a method that `chance` picks."""

    def __init__(self, config: EdgeConfig, write_package, seed: int) -> None:
        self.config, self.write_package = config, write_package
        self.chance, self.seed = random.Random(seed), seed
        self.releases, self.ids = 0, []
        self.now_s, self.lives = NOW_S, 0
        self.runtime = self.opened()
        self.swap()

    def opened(self) -> Runtime:
        return Runtime.open(self.config, clock=ManualClock(NOW_S))

    def release(self):
        """A new release on the shelf, of some of the windows: its arm and its plan."""
        self.releases += 1
        some = self.chance.sample(SOMETIMES, self.chance.randrange(1, 6))
        parts = [
            f'[[features]]\nname = "w{n}"\nfill = -1.0\nwindow = {{ {rest} }}\n'
            for n, rest in enumerate([*ALWAYS, *some])
        ]
        spec = Spec.from_toml("version = 1\n" + "".join(parts))
        path, sha256 = self.write_package(bias=self.releases / 8, spec=spec)
        self.runtime.shelf.put_whole(sha256, path.read_bytes())
        release = f"r{self.releases}"
        stable = PlanArm(release, model_path("toy", release), sha256, 1, 1.0)
        plan = Plan(family="toy", seq=self.releases, stable=stable, salt="s")
        return load_plan_arm(self.runtime.shelf, "stable", stable), plan

    # Chapters.

    def happen(self) -> None:
        for _ in range(self.chance.randrange(1, 120)):
            self.event()

    def event(self) -> None:
        chance, runtime = self.chance, self.runtime
        self.now_s += chance.choice([0, 1, 5, 30])
        time_s = self.now_s - chance.choice([0, 0, 0, 40, 2000, 9000])
        carrier, choice = chance.choice(CARRIERS), chance.randrange(8)
        asked = Event("scheduled", time_s, {"carrier": carrier, "distance": 1.0})
        if choice < 4:
            fields = {"carrier": carrier, "delay": float(chance.randrange(60))}
            runtime.observe("toy", Event("departed", time_s, fields))
        elif choice < 5 or not self.ids:
            self.ids.append(runtime.predict("toy", asked).id)
        elif choice < 6:
            self.ids += [each.id for each in runtime.predict_many("toy", [asked] * 3)]
        else:
            final = bool(chance.randrange(4))
            runtime.label(chance.choice(self.ids), 1.0 * (choice < 7), time_s=time_s, final=final)

    def swap(self) -> None:
        arm, plan = self.release()
        self.runtime.swap("toy", [arm], plan)
        self.runtime.shelf.save_current(plan)

    def adopt(self) -> None:
        arm, plan = self.release()
        asyncio.run(self.beside_events(self.runtime.adopt("toy", [arm], plan)))
        self.runtime.shelf.save_current(plan)

    def roll_back(self) -> None:
        if self.runtime.shelf.load_previous("toy") is not None:
            asyncio.run(self.beside_events(self.runtime.rollback_async("toy", "a story")))

    async def beside_events(self, change) -> None:
        task = asyncio.ensure_future(change)
        while not task.done():
            self.event()
            await asyncio.sleep(0)
        await task

    def restart(self) -> None:
        self.runtime.close()
        self.runtime = self.opened()

    def power_cut(self) -> None:
        self.settle()
        self.lives += 1
        folder = Path(f"{self.config.state_dir}-{self.lives}")
        shutil.copytree(self.runtime.config.state_dir, folder)
        self.runtime.close()
        self.config = msgspec.structs.replace(self.config, state_dir=folder)
        self.runtime = self.opened()

    # What must hold.

    def settle(self) -> None:
        log = self.runtime.log
        asyncio.run(log.wait_durable("event", log.handed_out("event")))
        asyncio.run(log.wait_durable("label", log.handed_out("label")))

    def check(self, context: str) -> None:
        self.settle()
        serving = self.runtime._members["toy"].pipeline
        pipeline = Pipeline("toy", ManualClock(NOW_S))
        pipeline.swap(serving.slot.arms)
        for _, _, data in self.runtime.log.tail("event", 0, 0):
            record = codec.decode_record(data)
            pipeline.replay(record.kind, record.time_s, record.fields)
        assert pipeline.newest_s == serving.newest_s, context
        for behind_s in (0, 30, 500):
            for carrier in CARRIERS:
                asked = serving.newest_s - behind_s, {"carrier": carrier}
                assert values(pipeline, *asked) == values(serving, *asked), context


def values(pipeline: Pipeline, time_s: float, fields) -> list[list[float]]:
    return [each.vector(time_s, fields).tolist() for each in pipeline.engines.values()]


def tell(story: Story, chapters: int) -> None:
    names = ["happen"] * 5 + ["swap", "adopt", "adopt", "roll_back", "restart", "power_cut"]
    told = []
    try:
        for _ in range(chapters):
            told.append(story.chance.choice(names))
            getattr(story, told[-1])()
            story.check(f"seed {story.seed}: {', '.join(told)}")
    finally:
        story.runtime.close()


@pytest.fixture
def config(tmp_path):
    return EdgeConfig(
        device="EWR",
        families=["toy"],
        state_dir=tmp_path / "state",
        socket=tmp_path / "edge.sock",
        log=LogConfig(linger_ms=1, linger_max_ms=0),
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_the_windows_are_what_the_log_says(config, write_package, seed) -> None:
    tell(Story(config, write_package, seed), chapters=25)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 14))
def test_the_same_over_many_stories(config, write_package, seed) -> None:
    tell(Story(config, write_package, seed), chapters=60)
