"""A device with a second life: restored, cloned or wiped disks, and clocks that are years off.

Promise P12: nothing that either life says is taken for a repetition of the other, and somebody is
told; neither order nor repetition is judged by a clock.
"""

from __future__ import annotations

import asyncio
import shutil

import pytest

from cloud_learner.broker import Broker
from cloud_learner.simulate.rig import (
    Cloud,
    Device,
    delivered,
    dialling,
    examples,
    live,
    missing_and_twice,
    until,
)
from edge_runtime.clock import ManualClock

TEN_YEARS_S = 10 * 365.25 * 86400.0


async def alarm(cloud, uplink):
    """Until learner and device both know that there are two of them."""
    await until(lambda: uplink.statistics()["duplicate_identity"] > 0)
    assert cloud.ingest.statistics()["duplicate_identity"] >= 1


def test_a_disk_restored_from_an_old_image_loses_neither_life(tmp_path):
    asyncio.run(restored(tmp_path))


async def restored(home):
    with Broker.start(home / "broker") as broker:
        to = dialling(broker.url)
        cloud = await Cloud.start(home / "learner", to)
        device = Device(home, "device", to)
        await live(cloud, device)
        await device.stop()
        shutil.copytree(home / "device", home / "image")
        later = Device(home, "device", to, start_s=device.time_s)
        await live(cloud, later)
        await later.stop()
        shutil.rmtree(home / "device")
        (home / "image").rename(home / "device")
        again = Device(home, "device", to, start_s=later.time_s)
        uplink = await live(cloud, again)
        await alarm(cloud, uplink)
        await again.stop()
        await cloud.stop()
    predicted = device.predicted + later.predicted + again.predicted
    assert len(set(predicted)) == 150
    assert missing_and_twice(predicted, examples(home / "learner")) == (0, 0)


def test_a_disk_that_was_wiped_loses_neither_life(tmp_path):
    asyncio.run(wiped(tmp_path))


async def wiped(home):
    with Broker.start(home / "broker") as broker:
        to = dialling(broker.url)
        cloud = await Cloud.start(home / "learner", to)
        device = Device(home, "device", to)
        await live(cloud, device)
        await device.stop()
        shutil.rmtree(home / "device")
        again = Device(home, "device", to, start_s=device.time_s)
        uplink = await live(cloud, again)
        await alarm(cloud, uplink)
        await again.stop()
        await cloud.stop()
    predicted = device.predicted + again.predicted
    assert missing_and_twice(predicted, examples(home / "learner")) == (0, 0)


def test_two_clones_at_once_are_both_heard_and_both_told(tmp_path):
    asyncio.run(cloned(tmp_path))


async def cloned(home):
    with Broker.start(home / "broker") as broker:
        to = dialling(broker.url)
        cloud = await Cloud.start(home / "learner", to)
        first = Device(home, "device", to)
        await live(cloud, first)
        await first.stop()
        shutil.copytree(home / "device", home / "other" / "device")
        one, two = (
            Device(where, "device", to, start_s=first.time_s) for where in (home, home / "other")
        )
        uplinks = [await each.connect() for each in (one, two)]
        for _ in range(10):
            one.predict(10)
            two.predict(10)
            await asyncio.sleep(0.02)
        await delivered(cloud, one, two)
        for uplink in uplinks:
            await alarm(cloud, uplink)
        for each in (one, two):
            await each.stop()
        await cloud.stop()
    predicted = first.predicted + one.predicted + two.predicted
    assert missing_and_twice(predicted, examples(home / "learner")) == (0, 0)


@pytest.mark.parametrize("leap_s", [TEN_YEARS_S, -TEN_YEARS_S])
def test_a_clock_that_leaps_by_ten_years_changes_nothing(tmp_path, leap_s):
    asyncio.run(leaping(tmp_path, leap_s))


class LeapingClock(ManualClock):
    """Wall time that leaps, beside monotonic time that does not."""

    leap_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.leap_s


async def leaping(home, leap_s):
    with Broker.start(home / "broker") as broker:
        to = dialling(broker.url)
        cloud = await Cloud.start(home / "learner", to)
        clock = LeapingClock(1.8e9)
        device = Device(home, "device", to, clock=clock)
        await live(cloud, device)
        clock.leap_s = leap_s
        device.predict(50)
        await device.restart()
        await live(cloud, device)
        await device.stop()
        await cloud.stop()
    assert missing_and_twice(device.predicted, examples(home / "learner")) == (0, 0)
