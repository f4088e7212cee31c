"""The flood's part of tools/bench-events: what others wait while one device sends without end.

Why: a device that is broken, or hostile, must not make the others late.

Invariants: the flood comes from a process of its own, at the lowest priority, since on a fleet it
has a machine of its own; it publishes whole envelopes of valid events, as fast as the broker takes
them, and tries again at once where it is refused. Calm and flood take turns on the same broker.

Run by itself: bench_events_flood.py URL, floods until it is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import msgspec  # noqa: E402
from bench_events_model import Row, encoded, quantiles  # noqa: E402

from cloud_learner.broker import Broker  # noqa: E402
from cloud_learner.simulate.rig import Cloud, Device  # noqa: E402
from edge_runtime.bus.base import Bus  # noqa: E402
from edge_runtime.bus.nats import connect  # noqa: E402
from edge_runtime.errors import CapacityError  # noqa: E402
from edge_runtime.wire import codec, subjects  # noqa: E402
from edge_runtime.wire.messages import NO_PRIOR, WIRE_VERSION, Envelope  # noqa: E402

PACE_S = 0.02
PUBLISHERS = 16
WARM_UP_S = 1.0


async def flood(url: str) -> None:
    """Publish without end."""
    bus = await connect(url, name="flood")
    pool = [msgspec.Raw(each) for each in encoded(320, 7)]
    at, subject = 1, subjects.events("flood", "event")

    async def publish() -> None:
        nonlocal at
        while True:
            envelope = Envelope(WIRE_VERSION, "flood", 7, "event", at, pool, prior=NO_PRIOR)
            at += len(pool)
            with contextlib.suppress(CapacityError):
                await bus.publish(subject, codec.encode(envelope))

    print("flooding", flush=True)
    await asyncio.gather(*(publish() for _ in range(PUBLISHERS)))


@contextlib.contextmanager
def flooded(url: str) -> Iterator[None]:
    """While this lasts, somebody floods the broker at `url`."""
    command = [sys.executable, __file__, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=lambda: os.nice(19)) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            yield
        finally:
            child.kill()


async def measure(home: Path, rounds: int, seconds: float) -> list[Row]:
    """The p99 from append to commit of an honest device, in the calm and in the flood."""
    calm: list[float] = []
    flood_: list[float] = []
    with Broker.start(home / "broker") as broker:

        async def to_broker(name: str) -> Bus:
            return await connect(broker.url, name=name)

        cloud = await Cloud.start(home / "learner", to_broker)
        device = Device(home, "honest", to_broker)
        await device.connect()
        await delays(cloud, device, WARM_UP_S)
        for _ in range(rounds):
            calm.append(quantiles(await delays(cloud, device, seconds))[1])
            with flooded(broker.url):
                await asyncio.sleep(WARM_UP_S)
                flood_.append(quantiles(await delays(cloud, device, seconds))[1])
            await asyncio.sleep(WARM_UP_S)
        taken = sum(each.seq for lane, each in cloud.accounts().items() if lane[0] == "flood")
        await device.stop()
        await cloud.stop()
    name = "a device floods: p99 from append to learner of another"
    return [
        Row(f"{name}, calm", 1000 * min(calm), "ms"),
        Row(f"{name}, flooded ({taken:,} events taken)", 1000 * min(flood_), "ms"),
        Row(f"{name}, flooded to calm", min(flood_) / min(calm), "times", 1.2),
    ]


async def delays(cloud: Cloud, device: Device, seconds: float) -> list[float]:
    """Seconds from each append to the commit that covers it."""
    lane, found = (device.name, device.log.epoch, "event"), []
    appended = {}

    async def watch() -> None:
        while True:
            await cloud.news.wait()
            cloud.news.clear()
            settle()

    def settle() -> None:
        mark, now_s = cloud.mark(lane), time.perf_counter()
        for seq in [seq for seq in appended if seq <= mark]:
            found.append(now_s - appended.pop(seq))

    watching = asyncio.create_task(watch())
    for _ in range(int(seconds / PACE_S)):
        device.predict()
        appended[device.log.handed_out("event")] = time.perf_counter()
        await asyncio.sleep(PACE_S)
    while appended:
        await asyncio.sleep(0.01)
        settle()
    watching.cancel()
    return found


if __name__ == "__main__":
    asyncio.run(flood(sys.argv[1]))
