"""A device is killed at random moments, online: what it had said to be durable is learned once.

Promise P1. The child logs and sends as fast as it can and says after each commit what is durable.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys

import pytest

from cloud_learner.broker import Broker
from cloud_learner.simulate.rig import Cloud, Device, delivered, dialling, examples

LIFE_S = 10_000.0  # of event time, more than any of them lasts
CHILD = """
import asyncio, sys
from pathlib import Path
from cloud_learner.simulate.rig import Device
from edge_runtime.bus.nats import connect

async def main(home, url, start_s):
    async def to_broker(name):
        return await connect(url, name=name)

    device = Device(Path(home), "device", to_broker, start_s=float(start_s), segment_bytes=100_000)
    uplink = await device.connect()
    log = device.log

    def say():
        uplink.wake()
        line = f"{log.epoch} {log.durable('event')[1]} {log.durable('label')[1]}\\n"
        sys.stdout.write(line)
        sys.stdout.flush()

    log.on_commit = say
    while True:
        device.predict(20)
        await asyncio.sleep(0.002)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("times", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_what_was_durable_at_a_kill_is_learned_exactly_once(tmp_path, times):
    asyncio.run(kill_again_and_again(tmp_path, times, random.Random(times)))


async def kill_again_and_again(home, times, chance):
    told = {}
    with Broker.start(home / "broker") as broker:
        to = dialling(broker.url)
        cloud = await Cloud.start(home / "learner", to)
        for life in range(times):
            epoch, events, labels = await live_and_die(home, broker.url, LIFE_S * life, chance)
            told[epoch] = (events, labels)
        last = Device(home, "device", to, start_s=LIFE_S * times)
        await last.connect()
        await delivered(cloud, last)
        accounts = cloud.accounts()
        await last.stop()
        await cloud.stop()
    found = examples(home / "learner")
    assert len(told) == times  # each life had an epoch of its own
    assert set(found.values()) == {1}
    for epoch, (events, labels) in told.items():
        assert accounts["device", epoch, "event"].seq >= events
        assert accounts["device", epoch, "label"].seq >= labels
        for seq in range(1, min(events, labels) + 1):
            assert found["device", epoch, seq] == 1, (epoch, seq)
    assert all(account.is_balanced and not account.dropped for account in accounts.values())


async def live_and_die(home, url, start_s, chance):
    """A life of the device; its epoch and what it last said to be durable."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CHILD, str(home), url, str(start_s)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    lines = [await child.stdout.readline() for _ in range(chance.randint(1, 60))]
    child.kill()
    lines += (await child.stdout.read()).splitlines(keepends=True)
    await child.wait()
    whole = [line for line in lines if line.endswith(b"\n")]
    assert whole, "the child never spoke"
    return tuple(map(int, whole[-1].split()))
