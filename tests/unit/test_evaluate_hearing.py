"""What devices tell of their features: one shape of the whole fleet, and no device outweighs it."""

from __future__ import annotations

import asyncio

import msgspec
import numpy as np
import pytest

from cloud_learner.evaluate.hearing import LOOK_EVERY_S, STALE_S, Hearing
from cloud_learner.train.declaration import Drift
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig
from edge_runtime.device.sketching import EVERY_S, RECORDS_MAX, ROWS_MIN
from edge_runtime.errors import TransportError
from edge_runtime.features.histogram import Histograms
from edge_runtime.features.spec import Spec
from edge_runtime.inference.slot import load_arm
from edge_runtime.rollout.agent import Agent
from edge_runtime.runtime import Event, Runtime
from edge_runtime.update.trust import Freshness
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import FeatureSketch

SPEC = Spec.from_toml(
    """
version = 1
[[features]]
name = "distance"
field = "distance"
[[features]]
name = "carrier"
field = "carrier"
vocabulary = ["UA", "AA"]
"""
)


def table(random, rows, mean=100.0):
    return np.stack([random.normal(mean, 20, rows), random.integers(0, 3, rows)], 1).astype("f4")


def sketch(features, **changed):
    found = Histograms(SPEC.columns)
    found.add(features)
    made = FeatureSketch("toy", SPEC.hash, len(features), 1.36e9, found.sketches())
    return msgspec.structs.replace(made, **changed)


class Fleet:
    """Devices that tell a sketch each minute, and the hearing that hears them."""

    def __init__(self, devices=10, **drift):
        self.random = np.random.default_rng(3)
        self.devices, self.now_s, self.batch = devices, 0.0, 0
        self.hearing = Hearing("toy", SPEC, Drift(**drift), table(self.random, 3000))

    def minute(self, mean=100.0, *, odd=0, odd_rows=600, odd_mean=0.0):
        """Each device tells 600 rows; the first `odd` of them tell others. The alarms."""
        self.now_s, self.batch = self.now_s + LOOK_EVERY_S, self.batch + 1
        raised = []
        for at in range(self.devices):
            rows = table(self.random, 600, mean)
            if at < odd:
                rows = table(self.random, odd_rows, odd_mean)
            raised += self.tell(f"d{at}", sketch(rows))
        return raised

    def tell(self, device, *sketches):
        return self.hearing.hear(device, sketches, now_s=self.now_s, batch=self.batch)


def test_a_fleet_that_stands_still_is_quiet_and_one_that_moves_is_alarmed_by_name():
    fleet = Fleet()
    assert [fleet.minute() for _ in range(60)] == [[]] * 60
    raised = fleet.minute(150.0) + fleet.minute(150.0)

    assert [(each.source, each.name, each.kind) for each in raised] == [
        ("sketch", "distance", "sudden")
    ]
    assert raised[0].found > raised[0].reach
    assert fleet.hearing.standing(fleet.batch) == raised
    assert fleet.hearing.standing(fleet.batch + Drift().calm_batches) == []


def test_one_device_of_ten_raises_no_alarm_however_much_it_tells():
    fleet = Fleet()
    for _ in range(8):
        fleet.minute()

    assert [fleet.minute(odd=1, odd_rows=60_000, odd_mean=130.0) for _ in range(8)] == [[]] * 8
    assert any(fleet.minute(odd=8, odd_mean=130.0) for _ in range(2))


def test_hearing_a_sketch_twice_is_hearing_it_once():
    fleet, again = Fleet(devices=2), Fleet(devices=2)
    for each, times in ((fleet, 1), (again, 5)):
        each.now_s = LOOK_EVERY_S - 1
        for at in range(times * 3):
            rows = table(np.random.default_rng(at % 3), 600)
            each.tell(f"d{at % 3}", sketch(rows))

    assert fleet.hearing.statistics()["sketching_devices"] == 3
    assert again.hearing.statistics()["sketching_devices"] == 3
    assert fleet.minute() == again.minute()


@pytest.mark.parametrize(
    ("changed", "counted"),
    [
        ({"spec": "0" * 16}, {"sketches_of_other_spec"}),
        ({"rows": 5}, {"sketches_refused"}),
        ({"rows": -1}, {"sketches_refused"}),
        ({"columns": []}, {"sketches_refused"}),
        ({"family": "other"}, set()),
    ],
)
def test_what_is_no_sketch_of_the_family_is_counted_and_left_out(changed, counted):
    fleet = Fleet()

    assert fleet.tell("d0", sketch(table(fleet.random, 600), **changed)) == []
    found = fleet.hearing.statistics()
    assert found["sketching_devices"] == 0
    assert {name for name, count in found.items() if count} == counted


def test_devices_that_fell_silent_count_no_more():
    fleet = Fleet()
    for _ in range(8):
        fleet.minute()
    fleet.now_s += STALE_S + 1
    fleet.devices = 2
    fleet.minute()

    assert fleet.hearing.statistics()["sketching_devices"] == 2


def test_a_real_devices_report_reaches_the_hearing_and_its_change_is_alarmed(
    tmp_path, write_package, toy_spec
):
    """Predict, log, sketch, report over the bus, decode, hear: nothing between is left out."""
    path, sha256 = write_package()
    clock, random = ManualClock(1.36e9), np.random.default_rng(1)
    config = EdgeConfig(
        device="EWR",
        families=["toy"],
        state_dir=tmp_path / "state",
        socket=tmp_path / "edge.sock",
    )

    async def story():
        bus = await MemoryBroker().connect()
        await bus.ensure_stream(
            subjects.STATE_STREAM, subjects.STATE_ALL, max_bytes=1 << 20, discard_new=False
        )
        with Runtime.open(config, clock=clock) as runtime:
            runtime.swap("toy", [load_arm(path, sha256, "r1", "stable", 1.0)], None)

            async def hear(message):
                report = codec.decode_report(message.data)
                now_s = clock.now_s()
                heard.extend(
                    hearing.hear(report.device, report.sketches, now_s=now_s, batch=len(sizes))
                )
                if report.sketches:
                    told.set()
                    sizes.append((len(codec.encode(report)), len(codec.encode(report.sketches))))

            def minute(mean):
                for _ in range(ROWS_MIN // RECORDS_MAX + 1):
                    for _ in range(RECORDS_MAX):
                        fields = {"carrier": "UA", "distance": float(random.normal(mean, 20))}
                        runtime.predict("toy", Event("scheduled", 1.36e9, fields))
                    while runtime.log.statistics()["pending"]:
                        pass
                    runtime.sketcher.look()
                clock.advance(EVERY_S)

            heard, sizes, told = [], [], asyncio.Event()
            rows = np.zeros((2000, toy_spec.size), "f4")
            rows[:, 0], rows[:, 1] = 2.0, random.normal(998, 20, 2000)
            hearing = Hearing("toy", toy_spec, Drift(), rows)
            agent = Agent(
                runtime,
                _NoUpdates(),
                runtime.shelf,
                bus,
                attributes={},
                poll_s=1000.0,
                sketches=runtime.sketcher.look,
            )
            heard_of = await bus.subscribe(subjects.report("*"), hear)
            for mean in [998.0] * 6 + [1500.0]:
                minute(mean)
                told.clear()
                reporting = asyncio.create_task(agent._report())
                await told.wait()
                reporting.cancel()
            await heard_of.close()
            return heard, sizes

    heard, sizes = asyncio.run(asyncio.wait_for(story(), 30))
    print(f"a report is {sizes[0][0]} bytes, {sizes[0][1]} of them sketches")

    assert [(each.source, each.name) for each in heard if each.name == "distance"] == [
        ("sketch", "distance")
    ]


class _NoUpdates:
    """An update client that has nothing new."""

    freshness = Freshness()

    def refresh(self) -> None:
        raise TransportError("unreachable", "no network here")
