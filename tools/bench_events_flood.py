"""The flood's part of tools/bench-events: what others wait while one device sends without end.

Why: a device that is broken, or hostile, must not make the others late.

Invariants: the flood comes from a process of its own, at the lowest priority, since on a fleet it
has a machine of its own; it publishes whole envelopes of valid events, as fast as the broker takes
them, and tries again at once where it is refused. Calm and flood take turns on the same broker.

Run by itself: bench_events_flood.py flood URL, or honest URL FOLDER SECONDS.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import msgspec  # noqa: E402
from bench_events_model import encoded, quantiles  # noqa: E402
from bench_rows import Row  # noqa: E402

from cloud_learner.broker import Broker  # noqa: E402
from cloud_learner.simulate.rig import Cloud, Device, dialling  # noqa: E402
from edge_runtime.bus.nats import connect  # noqa: E402
from edge_runtime.errors import CapacityError  # noqa: E402
from edge_runtime.wire import codec, subjects  # noqa: E402
from edge_runtime.wire.messages import NO_PRIOR, WIRE_VERSION, Envelope  # noqa: E402

PACE_S = 0.02
PUBLISHERS = 16
WARM_UP_S = 1.0
SWITCH_INTERVAL_S = 0.0005  # as serve sets it


async def flood(url: str) -> None:
    """Publish without end; what is refused is tried again."""
    bus = await connect(url, name="flood")
    pool = [msgspec.Raw(each) for each in encoded(320, 7)]
    at, subject = 1, subjects.events("flood", "event")

    async def publish() -> None:
        nonlocal at
        while True:
            envelope = Envelope(WIRE_VERSION, "flood", 7, "event", at, pool, prior=NO_PRIOR)
            data, headers = codec.pack_envelope(envelope)
            at += len(pool)
            while True:
                try:
                    await bus.publish(subject, data, headers=headers)
                    break
                except CapacityError:
                    await asyncio.sleep(0)

    print("flooding", flush=True)
    await asyncio.gather(*(publish() for _ in range(PUBLISHERS)))


async def be_honest(url: str, home: Path, seconds: float) -> None:
    """Predict at a steady pace, and print when each prediction was appended."""
    device = Device(home, f"honest-{time.monotonic_ns()}", dialling(url))
    await device.connect()
    print(device.name, device.log.epoch, flush=True)
    for _ in range(int((WARM_UP_S + seconds) / PACE_S)):
        device.predict()
        print(device.log.handed_out("event"), time.monotonic(), flush=True)
        await asyncio.sleep(PACE_S)
    await asyncio.sleep(WARM_UP_S)
    await device.stop()


@contextlib.asynccontextmanager
async def another(*arguments: object, niceness: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process of its own that runs a part of what is here."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, *map(str, arguments)),
        stdout=asyncio.subprocess.PIPE,
        preexec_fn=lambda: os.nice(niceness),
    )
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def measure(home: Path, rounds: int, seconds: float) -> list[Row]:
    """The p99 from append to commit of an honest device, in the calm and in the flood."""
    calm: list[float] = []
    flooded: list[float] = []
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with Broker.start(home / "broker") as broker:
        cloud = await Cloud.start(home / "learner", dialling(broker.url))
        for _ in range(rounds):
            calm.append(await honest_p99(cloud, broker.url, home, seconds))
            async with another("flood", broker.url, niceness=19) as child:
                assert child.stdout is not None
                await child.stdout.readline()
                flooded.append(await honest_p99(cloud, broker.url, home, seconds))
        taken = sum(each.seq for lane, each in cloud.accounts().items() if lane[0] == "flood")
        await cloud.stop()
    name = "a device floods: p99 from append to learner of another"
    return [
        Row(f"{name}, calm", 1000 * min(calm), "ms"),
        Row(f"{name}, flooded ({taken:,} events taken)", 1000 * min(flooded), "ms"),
        Row(f"{name}, flooded to calm", min(flooded) / min(calm), "times", 1.2),
    ]


async def honest_p99(cloud: Cloud, url: str, home: Path, seconds: float) -> float:
    """Seconds from append to commit, of a device in a process of its own."""
    async with another("honest", url, home, seconds, niceness=0) as child:
        assert child.stdout is not None
        name, epoch = (await child.stdout.readline()).decode().split()
        lane, held = (name, int(epoch), "event"), [(0, 0.0)]

        async def watch() -> None:
            while True:
                await cloud.news.wait()
                cloud.news.clear()
                held.append((cloud.mark(lane), time.monotonic()))

        watching = asyncio.create_task(watch())
        lines = (await child.stdout.read()).decode().splitlines()
        watching.cancel()
    found = []
    for line in lines[int(WARM_UP_S / PACE_S) :]:
        seq, appended_s = line.split()
        found.append(next(at_s for mark, at_s in held if mark >= int(seq)) - float(appended_s))
    return quantiles(found)[1]


if __name__ == "__main__":
    if sys.argv[1] == "flood":
        asyncio.run(flood(sys.argv[2]))
    else:
        asyncio.run(be_honest(sys.argv[2], Path(sys.argv[3]), float(sys.argv[4])))
