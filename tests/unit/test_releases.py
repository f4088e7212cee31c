"""A release that takes over: what its windows know at once, and what is carried."""

from __future__ import annotations

import asyncio
import shutil
import threading

import msgspec
import numpy as np
import pytest

from edge_runtime import factory
from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig
from edge_runtime.errors import PackageError, TrustError
from edge_runtime.features.spec import Spec
from edge_runtime.inference.slot import load_arm
from edge_runtime.rollout.plan import Plan, PlanArm, model_path
from edge_runtime.runtime import Event, Runtime
from edge_runtime.wire import codec

NOW_S = 1_360_000_000.0
WINDOW = '[[features]]\nname = "{name}"\nwindow = {{ over = "departed", {rest} }}\n'
SHORT = 'statistic = "sum", value = "delay", span_s = 600.0'
LONG = 'statistic = "sum", value = "delay", span_s = 50000.0'
EXTREME = 'statistic = "max", value = "delay", span_s = 9000.0'
KEYED = 'key = "carrier", statistic = "distinct", value = "delay", span_s = 9000.0'
FADING = 'key = "carrier", statistic = "decayed_mean", value = "delay", half_life_s = 600.0'
LATEST = 'key = "carrier", statistic = "count", span_events = 50'


def spec_of(*windows):
    parts = [WINDOW.format(name=f"w{n}", rest=rest) for n, rest in enumerate(windows)]
    return Spec.from_toml("version = 1\n" + "".join(parts))


def departed(time_s, delay=1.0, carrier="UA"):
    return Event("departed", time_s, {"carrier": carrier, "delay": delay})


def scheduled(time_s):
    return Event("scheduled", time_s, {"carrier": "UA", "distance": 1.0})


def stream(count, seed=3):
    """Events of two carriers, some out of order, some so late that they move no window."""
    random = np.random.default_rng(seed)
    late_s = random.choice([0, 0, 0, 500, 7900], count)
    return [
        departed(
            NOW_S + 100 * n - float(late_s[n]),
            float(random.integers(40)),
            str(random.choice(["UA", "AA"])),
        )
        for n in range(count)
    ]


@pytest.fixture
def config(tmp_path):
    return EdgeConfig(
        device="EWR", families=["toy"], state_dir=tmp_path / "state", socket=tmp_path / "edge.sock"
    )


@pytest.fixture
def load(write_package):
    def load(*windows, bias=0.0, **options):
        path, sha256 = write_package(bias=bias, spec=spec_of(*windows), **options)
        return load_arm(path, sha256, "stable", f"r{bias:g}", 1.0)

    return load


@pytest.fixture
def open_runtime(config, tmp_path):
    """`open_runtime(arm)` opens one more device, which serves `arm`."""
    opened = []

    def open_runtime(arm):
        own = msgspec.structs.replace(config, state_dir=tmp_path / f"state-{len(opened)}")
        opened.append(Runtime.open(own, clock=ManualClock(NOW_S), step=lambda: 1))
        opened[-1].swap("toy", [arm], plan_of(arm))
        return opened[-1]

    yield open_runtime
    for runtime in opened:
        runtime.close()


def plan_of(arm, seq=5):
    stable = PlanArm(arm.release, model_path("toy", arm.release), arm.sha256, 1, 1.0)
    return Plan(family="toy", seq=seq, stable=stable, salt="s")


def observe(runtime, events):
    for event in events:
        runtime.observe("toy", event)


def engine(runtime, arm):
    return runtime._members["toy"].pipeline.engines[arm.info.spec.hash]


def settle(runtime):
    """Wait until all that was logged is durable."""
    asyncio.run(runtime.log.wait_durable("event", runtime.log.handed_out("event")))


def features(runtime, time_s):
    runtime.predict("toy", scheduled(time_s))
    settle(runtime)
    data = list(runtime.log.tail("event", 0, 0))[-1][2]
    return np.frombuffer(codec.decode_record(data).features, "<f4").tolist()


def adopted(runtime, arm):
    asyncio.run(runtime.adopt("toy", [arm], plan_of(arm)))


def swapped(runtime, arm):
    runtime.swap("toy", [arm], plan_of(arm))


@pytest.mark.parametrize("bring", [swapped, adopted])
def test_new_windows_know_what_they_would_if_they_had_always_been_there(open_runtime, load, bring):
    old, new = load(SHORT, KEYED), load(SHORT, EXTREME, KEYED, FADING, LATEST, bias=1.0)
    device, always = open_runtime(old), open_runtime(new)
    for each in (device, always):
        observe(each, stream(300))
    assert device.counters()["late_events"] > 20
    bring(device, new)
    assert engine(device, new).snapshot() == engine(always, new).snapshot()
    for each in (device, always):
        observe(each, stream(50, seed=9))
    assert engine(device, new).snapshot() == engine(always, new).snapshot()


def test_the_newest_events_are_not_missed_though_the_disk_has_yet_to_take_them(open_runtime, load):
    device = open_runtime(load(SHORT))
    observe(device, [departed(NOW_S + n) for n in range(50)])
    swapped(device, load(SHORT, LATEST, bias=1.0))
    assert features(device, NOW_S + 60) == [50, 50]


def test_a_window_that_reaches_further_back_than_before_is_rebuilt(open_runtime, load):
    device = open_runtime(load(SHORT))
    observe(device, [departed(NOW_S + 100 * n) for n in range(200)])
    adopted(device, load(LONG, bias=1.0))
    assert features(device, NOW_S + 20_000) == [200]


def test_a_window_that_is_unchanged_goes_on_without_the_log(open_runtime, load):
    device = open_runtime(load(SHORT, KEYED, FADING))
    observe(device, stream(100))
    before = engine(device, device._members["toy"].pipeline.slot.arms[0]).snapshot()
    settle(device)
    shutil.rmtree(device.config.state_dir / "log")
    same = load(SHORT, KEYED, FADING, bias=1.0)
    swapped(device, same)
    assert engine(device, same).snapshot() == before
    fewer = load(FADING, KEYED, bias=2.0)
    swapped(device, fewer)
    kept = engine(device, fewer).tables
    assert {name.how: table.keys for name, table in kept.items()} == {
        "decayed 600.0": 2,
        "distinct": 2,
    }


def test_what_happens_while_the_log_is_read_is_not_missed(open_runtime, load):
    old, new = load(SHORT), load(SHORT, EXTREME, KEYED, LATEST, bias=1.0)
    device, always = open_runtime(old), open_runtime(new)
    events = stream(1500)
    observe(device, events[:1000])

    async def adopt_beside_events():
        adopting = asyncio.create_task(device.adopt("toy", [new], plan_of(new)))
        seen = 1000
        while not adopting.done():
            observe(device, events[seen : seen + 1])
            seen += 1
            await asyncio.sleep(0)
        await adopting
        return seen

    seen = asyncio.run(adopt_beside_events())
    observe(always, events[:seen])
    assert engine(device, new).snapshot() == engine(always, new).snapshot()


def test_nothing_is_missed_or_seen_twice_though_other_threads_go_on(open_runtime, load):
    new = load(SHORT, KEYED, LATEST, bias=1.0)
    for seed in range(5):
        device, always = open_runtime(load(SHORT)), open_runtime(new)
        events = stream(1000, seed)
        thread = threading.Thread(target=observe, args=(device, events))
        thread.start()
        adopted(device, new)
        thread.join(30)
        observe(always, events)
        assert engine(device, new).snapshot() == engine(always, new).snapshot(), f"seed {seed}"


def test_of_two_that_come_at_once_the_one_that_serves_has_missed_nothing(open_runtime, load):
    one, two = load(SHORT, LATEST, bias=1.0), load(SHORT, KEYED, EXTREME, bias=2.0)
    device, events, seen = open_runtime(load(SHORT)), stream(3000), 1000
    observe(device, events[:seen])

    async def adopt_both():
        adopting = [
            asyncio.create_task(device.adopt("toy", [arm], plan_of(arm))) for arm in (one, two)
        ]
        seen = 1000
        while not all(task.done() for task in adopting):
            observe(device, events[seen : seen + 1])
            seen += 1
            await asyncio.sleep(0)
        await asyncio.gather(*adopting)
        return seen

    seen = asyncio.run(adopt_both())
    [arm] = device._members["toy"].pipeline.slot.arms
    always = open_runtime(arm)
    observe(always, events[:seen])
    assert engine(device, arm).snapshot() == engine(always, arm).snapshot()


def test_a_release_that_is_refused_leaves_windows_and_answers_as_they_were(
    open_runtime, load, toy_interface
):
    device = open_runtime(load(SHORT))
    observe(device, stream(20))
    before = device._members["toy"].pipeline.snapshot()
    other = msgspec.structs.replace(toy_interface, family="other")
    stranger = load(SHORT, LATEST, bias=1.0, interface=other)
    for bring in (adopted, swapped):
        with pytest.raises(PackageError, match="wrong_family"):
            bring(device, stranger)
    assert device._members["toy"].pipeline.snapshot() == before
    assert device.current("toy").stable.release == "r0"
    assert device.predict("toy", scheduled(NOW_S)).release == "r0"


def test_what_was_left_while_its_windows_were_rebuilt_does_not_come_to_serve(open_runtime, load):
    device, new = open_runtime(load(SHORT)), load(LATEST, bias=1.0)
    observe(device, stream(20))

    async def leave_meanwhile():
        adopting = asyncio.create_task(device.adopt("toy", [new], plan_of(new)))
        await asyncio.sleep(0)
        device.shelf.quarantine(new.sha256, "rolled_back")
        await adopting

    with pytest.raises(TrustError, match="release_quarantined"):
        asyncio.run(leave_meanwhile())
    assert device.predict("toy", scheduled(NOW_S)).release == "r0"


def install(config, write_package, *windows, bias=0.0):
    path, sha256 = write_package(bias=bias, spec=spec_of(*windows))
    factory.install(config, path, factory.inspect(path))
    return sha256


def windows(runtime):
    [engine] = runtime._members["toy"].pipeline.engines.values()
    return engine.snapshot()


def test_after_a_restart_a_window_that_the_snapshot_lacks_comes_from_the_log(
    config, write_package, load, open_runtime
):
    install(config, write_package, SHORT, KEYED)
    with Runtime.open(config, clock=ManualClock(NOW_S), step=lambda: 1) as runtime:
        observe(runtime, stream(300))
    install(config, write_package, SHORT, EXTREME, KEYED, LONG, bias=1.0)
    always = open_runtime(load(SHORT, EXTREME, KEYED, LONG, bias=1.0))
    observe(always, stream(300))
    with Runtime.open(config, clock=ManualClock(NOW_S), step=lambda: 1) as runtime:
        assert windows(runtime) == windows(always)
        assert runtime.statistics()["snapshots"]["replayed"] == 0


def test_without_package_and_snapshot_the_next_release_has_its_windows_from_the_log(
    config, write_package, load, open_runtime
):
    sha256 = install(config, write_package, SHORT)
    with Runtime.open(config, clock=ManualClock(NOW_S), step=lambda: 1) as runtime:
        observe(runtime, stream(300))
    (config.state_dir / "windows.snapshot").unlink()
    (config.state_dir / "shelf" / "packages" / f"{sha256}.onnx").unlink()
    arm = load(SHORT, KEYED, bias=1.0)
    always = open_runtime(arm)
    observe(always, stream(300))
    with Runtime.open(config, clock=ManualClock(NOW_S), step=lambda: 1) as runtime:
        assert not runtime.ready()
        adopted(runtime, arm)
        assert windows(runtime) == windows(always)
