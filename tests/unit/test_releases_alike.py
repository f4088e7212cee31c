"""Releases whose windows are the same, and what comes while new ones are rebuilt."""

from __future__ import annotations

import asyncio
import dataclasses

import msgspec
import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig
from edge_runtime.device.releases import CATCH_UP_MAX
from edge_runtime.events.snapshots import SnapshotFile
from edge_runtime.features.spec import Spec
from edge_runtime.inference import pipeline
from edge_runtime.inference.slot import load_arm
from edge_runtime.runtime import Event, Runtime
from edge_runtime.update.shelf import Shelf

NOW_S = 1_360_000_000.0
FIELD = '[[features]]\nname = "distance"\nfield = "distance"\nfill = {fill}\n'
WINDOW = '[[features]]\nname = "{name}"\nwindow = {{ {rest} }}\n'
TOTAL = 'over = "departed", value = "delay", statistic = "sum", span_s = 600.0'
KEYED = 'over = "departed", key = "carrier", statistic = "count", span_s = 600.0'
LATEST = 'over = "departed", key = "carrier", statistic = "count", span_events = 5000'
ASKED = 'over = "scheduled", statistic = "count", span_s = 600.0'
LABELS = 'over = "label", key = "carrier", statistic = "count", span_s = 600.0'


def spec_of(fill, *windows):
    """A spec whose hash differs with `fill`, which its windows do not."""
    parts = [WINDOW.format(name=f"w{n}", rest=rest) for n, rest in enumerate(windows)]
    return Spec.from_toml("version = 1\n" + FIELD.format(fill=fill) + "".join(parts))


def departed(time_s, delay=1.0):
    return Event("departed", time_s, {"carrier": "UA", "delay": delay})


def scheduled(time_s):
    return Event("scheduled", time_s, {"carrier": "UA", "distance": 1.0})


@pytest.fixture
def config(tmp_path):
    return EdgeConfig(
        device="EWR", families=["toy"], state_dir=tmp_path / "state", socket=tmp_path / "edge.sock"
    )


@pytest.fixture
def load(config, write_package):
    """`load(*windows, bias=...)` is an arm, its package on the shelf; `bias` is its fill, too."""

    def load(*windows, bias=0.0, name="stable", weight=1.0):
        path, sha256 = write_package(bias=bias, spec=spec_of(bias, *windows))
        Shelf(config.state_dir / "shelf").put_whole(sha256, path.read_bytes())
        return load_arm(path, sha256, name, f"r{bias:g}", weight)

    return load


@pytest.fixture
def pair(load):
    """`pair(*windows)` is a stable arm and a canary that differ in their fill alone."""
    return lambda *windows: (
        load(*windows, weight=0.5),
        load(*windows, bias=1.0, name="canary", weight=0.5),
    )


@pytest.fixture
def opened(plan_of):
    """`opened(config, *arms)` is a device that serves them."""

    def opened(config, *arms):
        runtime = Runtime.open(config, clock=ManualClock(NOW_S), step=lambda: 1)
        if arms:
            runtime.swap("toy", arms, plan_of(*arms))
        return runtime

    return opened


def engines(runtime):
    return list(runtime._members["toy"].pipeline.engines.values())


def known(runtime, time_s):
    """What the windows say, in each arm's features but for the distance."""
    return [each.vector(time_s, {"carrier": "UA"}).tolist()[1:] for each in engines(runtime)]


def test_a_release_with_the_same_windows_goes_on_with_the_same_tables(
    config, load, opened, plan_of
):
    first, second = load(TOTAL, KEYED), load(TOTAL, KEYED, bias=1.0)
    assert first.info.spec.hash != second.info.spec.hash
    with opened(config, first) as runtime:
        runtime.observe("toy", departed(NOW_S, 3.0))
        tables = engines(runtime)[0].tables
        runtime.swap("toy", [second], plan_of(second))
        [engine] = engines(runtime)
        assert (engine.spec.hash, engine.tables is tables) == (second.info.spec.hash, True)
        runtime.observe("toy", departed(NOW_S + 1, 4.0))
        assert known(runtime, NOW_S + 2) == [[7.0, 2.0]]
        assert engine.vector(NOW_S + 2, {})[0] == 1.0  # the rest is its own


def test_what_arms_hold_in_common_sees_each_event_and_label_once(config, pair, opened):
    with opened(config, *pair(TOTAL, ASKED, LABELS)) as runtime:
        stable, canary = engines(runtime)
        assert stable.tables is canary.tables
        runtime.observe("toy", departed(NOW_S, 3.0))
        answer = runtime.predict("toy", scheduled(NOW_S + 1))
        runtime.predict_many("toy", [scheduled(NOW_S + 2)] * 2)
        runtime.label(answer.id, 1.0, time_s=NOW_S + 3)
        assert known(runtime, NOW_S + 3) == [[3.0, 3.0, 1.0]] * 2


def test_what_arms_hold_in_common_is_told_of_once(config, pair, opened):
    with opened(config, *pair(TOTAL, KEYED)) as runtime:
        for step in range(10):
            runtime.observe("toy", departed(NOW_S + step))
        told = runtime.statistics()["families"]["toy"]
        assert (told["tables"], told["keys"], told["entries"]) == (2, 2, 20)


def test_what_was_held_in_common_goes_on_whichever_arm_is_left(config, pair, opened, plan_of):
    for keep in (0, 1):
        arms = pair(TOTAL, KEYED)
        own = msgspec.structs.replace(config, state_dir=config.state_dir / str(keep))
        with opened(own, *arms) as runtime:
            runtime.observe("toy", departed(NOW_S, 3.0))
            left = msgspec.structs.replace(plan_of(arms[keep]), seq=6)
            alone = dataclasses.replace(arms[keep], name="stable", weight=1.0)
            runtime.swap("toy", [alone], left)
            runtime.observe("toy", departed(NOW_S + 1, 4.0))
            assert known(runtime, NOW_S + 2) == [[7.0, 2.0]]
            runtime.swap("toy", arms, plan_of(*arms))
            runtime.observe("toy", departed(NOW_S + 2, 5.0))
            assert known(runtime, NOW_S + 3) == [[12.0, 3.0]] * 2


@pytest.mark.parametrize("kept", ["snapshot", "log"])
def test_what_arms_hold_in_common_comes_back_once_after_a_restart(
    config, pair, kept, opened, plan_of
):
    arms = pair(TOTAL, KEYED, ASKED)
    Shelf(config.state_dir / "shelf").save_current(plan_of(*arms))
    with opened(config) as runtime:
        for step in range(20):
            runtime.observe("toy", departed(NOW_S + step, float(step)))
            runtime.predict("toy", scheduled(NOW_S + step))
        before = runtime._members["toy"].pipeline.snapshot()
        told = known(runtime, NOW_S + 20)
    assert told == [[190.0, 20.0, 20.0]] * 2
    file = config.state_dir / "windows.snapshot"
    [state] = SnapshotFile(file).load().families.values()
    assert len(pipeline._decode(state).engines) == 1
    if kept == "log":
        file.unlink()
    with opened(config) as runtime:
        stable, canary = engines(runtime)
        assert stable.tables is canary.tables
        assert runtime._members["toy"].pipeline.snapshot() == before
        runtime.observe("toy", departed(NOW_S + 20, 10.0))
        assert known(runtime, NOW_S + 21) == [[200.0, 21.0, 20.0]] * 2
        replayed = runtime.statistics()["snapshots"]["replayed"]
        assert replayed == (40 if kept == "log" else 0)


def test_a_caller_may_use_its_dict_again_while_new_windows_are_rebuilt(
    config, load, opened, plan_of
):
    old, new = load(TOTAL), load(TOTAL, KEYED, LATEST, bias=1.0)

    async def adopt_beside_one_dict(runtime):
        adopting = asyncio.create_task(runtime.adopt("toy", [new], plan_of(new)))
        await asyncio.sleep(0)  # what comes now comes while the windows are rebuilt
        fields = {}
        for step, carrier in enumerate(["UA", "AA", "AA"]):
            fields |= {"carrier": carrier, "delay": 10.0**step}
            runtime.observe("toy", Event("departed", NOW_S + step, fields))
        fields |= {"carrier": "AA", "distance": 1.0}
        del fields["delay"]
        runtime.predict("toy", Event("scheduled", NOW_S + 3, fields))
        fields.clear()
        await adopting

    with opened(config, old) as runtime:
        asyncio.run(adopt_beside_one_dict(runtime))
        assert known(runtime, NOW_S + 4) == [[111.0, 1.0, 1.0]]


def test_much_that_comes_while_windows_are_rebuilt_is_seen_once_and_in_order(
    config, load, opened, plan_of
):
    old, new = load(TOTAL), load(TOTAL, LATEST, bias=1.0)

    async def adopt_beside_much(runtime):
        adopting = asyncio.create_task(runtime.adopt("toy", [new], plan_of(new)))
        await asyncio.sleep(0)
        gathered = runtime._members["toy"].pipeline.gathering[0]
        for step in range(10 * CATCH_UP_MAX):
            runtime.observe("toy", departed(NOW_S + step / 10, float(step % 7)))
        assert len(gathered) == 10 * CATCH_UP_MAX
        seen = 10 * CATCH_UP_MAX
        while not adopting.done():
            runtime.observe("toy", departed(NOW_S + seen / 10, float(seen % 7)))
            seen += 1
            await asyncio.sleep(0)
        await adopting
        return seen

    with opened(config, old) as runtime:
        seen = asyncio.run(adopt_beside_much(runtime))
        assert runtime._members["toy"].pipeline.gathering == []
        mine = runtime._members["toy"].pipeline.snapshot()
    again = msgspec.structs.replace(config, state_dir=config.state_dir / "always")
    with opened(again, new) as always:
        for step in range(seen):
            always.observe("toy", departed(NOW_S + step / 10, float(step % 7)))
        assert always._members["toy"].pipeline.snapshot() == mine
