"""The broker dies, or forgets what it had acknowledged: nothing is lost, nothing is learned twice.

Promises P7 (the server killed again and again) and P9 (an old store put back).
"""

from __future__ import annotations

import asyncio
import shutil

import pytest

from cloud_learner.broker import Broker
from cloud_learner.simulate.deaths import broker_deaths
from cloud_learner.simulate.rig import (
    Cloud,
    Device,
    delivered,
    dialling,
    examples,
    missing_and_twice,
    until,
)

STALL_S = 5.0


@pytest.mark.parametrize("times", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_broker_that_dies_under_load_costs_no_record_and_no_long_stall(tmp_path, times):
    found = asyncio.run(broker_deaths(tmp_path, times, seed=times))

    assert found.predicted > 100 * times
    assert (found.lost, found.learned_twice) == (0, 0)
    assert len(found.stalls_s) == times
    assert max(found.stalls_s) < STALL_S  # what a device may wait, not what a machine is fast


def test_what_a_restored_broker_has_forgotten_comes_again(tmp_path):
    asyncio.run(forget_and_go_on(tmp_path))


async def forget_and_go_on(home):
    """While no learner takes anything, the broker acknowledges what an old store does not hold."""
    with Broker.start(home / "broker") as broker:
        to = dialling(broker.url)
        cloud = await Cloud.start(home / "learner", to)
        device = Device(home, "device", to)
        uplink = await device.connect()
        device.predict(50)
        await delivered(cloud, device)
        broker.kill()
        shutil.copytree(home / "broker" / "jetstream", home / "old")
        await asyncio.to_thread(broker.restart)
        device.predict(50)
        await delivered(cloud, device)  # learned, though the old store has not got it
        await cloud.stop()
        device.predict(50)
        stored = uplink.statistics()["records"]
        wanted = stored + 100  # acknowledged, not learned
        await until(lambda: uplink.statistics()["records"] >= wanted)
        broker.kill()
        shutil.rmtree(home / "broker" / "jetstream")
        shutil.copytree(home / "old", home / "broker" / "jetstream")
        await asyncio.to_thread(broker.restart)
        cloud = await Cloud.start(home / "learner", to)
        device.predict(50)
        await delivered(cloud, device)
        await device.stop()
        await cloud.stop()
    assert len(device.predicted) == 200
    assert missing_and_twice(device.predicted, examples(home / "learner")) == (0, 0)
