"""Deaths of the broker under load: what is lost, what is learned twice, how long a device stalls.

Why: the same loop is a test with few deaths and a benchmark with a hundred, and both must count the
same things.

Invariants: a real nats-server is killed with SIGKILL and started again on its store, at moments
that follow from the seed; meanwhile a device predicts at a steady pace. A stall is the time from
when the server answers again until the learner holds something that the device logged after that.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from cloud_learner.broker import Broker
from cloud_learner.simulate.rig import (
    Cloud,
    Device,
    delivered,
    dialling,
    examples,
    missing_and_twice,
)
from cloud_learner.store.ingest_state import Lane

PACE_S = 0.01
PREDICTIONS = 5  # each PACE_S
LIVES_S = (0.2, 0.8)


class Outcome(msgspec.Struct):
    """What came of it; `stalls_s` has an entry for each death."""

    predicted: int
    lost: int
    learned_twice: int
    stalls_s: list[float]


async def broker_deaths(
    home: Path, times: int, seed: int, tell: Callable[[str], None] = lambda _text: None
) -> Outcome:
    """Kill the broker so many times; `tell` hears of the progress."""
    chance = random.Random(seed)  # noqa: S311 - moments, not secrets
    stalls_s = []
    with Broker.start(home / "broker") as broker:
        to_broker = dialling(broker.url)
        cloud = await Cloud.start(home / "learner", to_broker)
        device = Device(home, "device", to_broker)
        await device.connect()
        pace = asyncio.create_task(_predict(device))
        for number in range(times):
            await asyncio.sleep(chance.uniform(*LIVES_S))
            broker.kill()
            await asyncio.sleep(chance.uniform(0.0, LIVES_S[0]))
            await asyncio.to_thread(broker.restart)
            stalls_s.append(await _stall(cloud, device))
            tell(f"death {number + 1} of {times}: a stall of {stalls_s[-1]:.2f} s")
        pace.cancel()
        await delivered(cloud, device)
        await device.stop()
        await cloud.stop()
    lost, twice = missing_and_twice(device.predicted, examples(home / "learner"))
    return Outcome(len(device.predicted), lost, twice, stalls_s)


async def _predict(device: Device) -> None:
    while True:
        device.predict(PREDICTIONS)
        await asyncio.sleep(PACE_S)


async def _stall(cloud: Cloud, device: Device) -> float:
    """Seconds until the learner holds what the device logs next."""
    started_s, seq = time.monotonic(), device.log.handed_out("event") + 1
    lane: Lane = (device.name, device.log.epoch, "event")
    await cloud.until(lambda: cloud.mark(lane) >= seq)
    return time.monotonic() - started_s
