"""A site of tools/bench-updates: broker, keys, publisher and one device, all real.

Why: what an update takes is the sum of many small waits, and only the whole way has all of them.

Invariants: time begins when the publisher is asked, patches, signatures and pushes included, and
ends when the device's socket names the release. The large model's time is that of its download:
from the broker having it whole to its hash having been proven on the shelf.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from bench_rows import Row
from bench_updates_models import FAMILY, large, students

from cloud_learner.broker import Broker
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.release.metadata import ReleaseFile
from cloud_learner.simulate.fleet import DeviceProcess
from edge_runtime.api.client import AsyncClient
from edge_runtime.bus.nats import connect
from edge_runtime.clock import SystemClock
from edge_runtime.errors import TransportError
from edge_runtime.files import OsFiles
from edge_runtime.rollout.plan import Plan, PlanArm
from edge_runtime.update.arrival import whole_chunks
from edge_runtime.update.trust import chunk_sizes

P50_S, P99_S, LARGE_S, TRUST_MB = 0.2, 0.6, 3.0, 30.0
WAIT_S = 120.0
POLL_S = 0.002


class Site:
    """What publishes to `device`, release after release."""

    def __init__(self, broker: Broker, publisher: Publisher, device: DeviceProcess) -> None:
        self.broker, self.publisher, self.device = broker, publisher, device
        self._number = 0

    async def publish(self, data: bytes) -> str:
        """Sign and push a release and the plan that makes it stable; gives its name."""
        self._number += 1
        number, name = self._number, f"r{self._number}"
        verdict = {"outcome": "pass", "rules": [], "sha256": hashlib.sha256(data).hexdigest()}
        release = ReleaseFile(FAMILY, name, number, data, verdict)
        arm = PlanArm(name, release.path, release.sha256, number, 1.0)
        await self.publisher.publish(release, Plan(family=FAMILY, seq=number, stable=arm))
        return name

    async def served(self, client: AsyncClient, name: str) -> None:
        """Wait until the device's socket names the release."""
        async with asyncio.timeout(WAIT_S):
            while True:
                arms = (await client.status()).status["families"][FAMILY]["arms"]
                if arms and arms[0]["release"] == name:
                    return
                await asyncio.sleep(POLL_S)

    async def counts(self, client: AsyncClient) -> dict[str, int]:
        """What the device says of its downloads."""
        found: dict[str, int] = (await client.status()).status["updates"]
        return found


@asynccontextmanager
async def site(home: Path) -> AsyncIterator[Site]:
    keys.create(home / "cloud", [FAMILY])
    with Broker.start(home / "broker") as broker:
        bus = await connect(broker.url, name="bench")
        signed = keys.load(home / "cloud")
        root = home / "cloud" / "trust" / "root.json"
        device = DeviceProcess(
            "bench", home / "device", families=[FAMILY], nats=broker.url, root=root
        )
        try:
            publisher = Publisher(home / "cloud", bus, signed, SystemClock())
            await device.start()
            yield Site(broker, publisher, device)
        finally:
            await device.stop()
            await bus.close()


async def serving(home: Path, distinct: int, count: int) -> list[Row]:
    """Small releases one after the other, as the learner makes them."""
    packages = [each.package for each in students(home, distinct)]
    spent_s = []
    async with site(home) as place, await AsyncClient.connect(place.device.socket) as client:
        await place.served(client, await place.publish(packages[-1]))
        for number in range(count):
            started_s = time.perf_counter()
            name = await place.publish(packages[number % distinct])
            await place.served(client, name)
            spent_s.append(time.perf_counter() - started_s)
        counts = await place.counts(client)
    what = "publish to verified and serving on an online device, small model"
    return [
        Row(f"{what}, p50", float(np.quantile(spent_s, 0.5)), "s", P50_S),
        Row(f"{what}, p99", float(np.quantile(spent_s, 0.99)), "s", P99_S),
        Row("of these, releases that came as a patch", counts["patched"] / count, "share"),
        Row("patches that failed", counts["patch_failed"], "", 0),
    ]


async def resume(home: Path, megabytes: int) -> list[Row]:
    """A large release; the broker is killed in the middle of its download, and comes back."""
    data = large(megabytes)
    sha256, chunks = hashlib.sha256(data).hexdigest(), len(chunk_sizes(len(data)))
    packages = home / "device" / "state" / "shelf" / "packages"
    part, whole = packages / f".{sha256}.part", packages / f"{sha256}.onnx"
    async with site(home) as place, await AsyncClient.connect(place.device.socket) as client:
        publishing = asyncio.create_task(place.publish(data))
        await asyncio.to_thread(wait_for, lambda: part.exists() or whole.exists())
        started_s = time.perf_counter()
        killed_at = await asyncio.to_thread(kill_in_the_middle, place.broker, part, len(data))
        await asyncio.to_thread(wait_for, whole.exists)
        spent_s = time.perf_counter() - started_s
        with contextlib.suppress(TransportError):  # the nudge after it met the dead broker
            await publishing
        await place.served(client, "r1")
        until_serving_s = time.perf_counter() - started_s
        counts = await place.counts(client)
    right = hashlib.sha256(whole.read_bytes()).hexdigest() == sha256
    again = counts["bytes"] - len(data)
    return [
        Row(
            f"{megabytes} MB model with the broker killed once in the middle", spent_s, "s", LARGE_S
        ),
        Row("the model's share that was there when the broker died", killed_at / chunks, ""),
        Row("the model's share that was fetched again", again / len(data), "", 0.1),
        Row("hash right after the broker's death", float(right), "", 1.0, at_least=True),
        Row("the same, until it serves", until_serving_s, "s"),
    ]


def kill_in_the_middle(broker: Broker, part: Path, length: int) -> int:
    """Kill the broker, and start it again, when a quarter is there; how many chunks there were."""
    disk, quarter = OsFiles(), len(chunk_sizes(length)) // 4
    wait_for(lambda: whole_chunks(disk, part, length) >= quarter or not part.exists())
    broker.kill()
    there = whole_chunks(disk, part, length)
    broker.restart()
    return there


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError("what is waited for does not come")
        time.sleep(POLL_S)


async def memory(home: Path) -> list[Row]:
    """The same imports and connection in a process of its own, without trust and with it."""
    async with site(home) as place:
        await place.publish(large(1))
        config = home / "memory.json"
        told = {
            "url": place.broker.url,
            "root": str(home / "cloud" / "trust" / "root.json"),
            "state": str(home / "memory"),
            "family": FAMILY,
        }
        config.write_text(json.dumps(told))
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, str(Path(__file__).parent / "bench_updates_trust.py"), str(config)),
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await child.communicate()
        assert child.returncode == 0, "see above what the child says"
    found = json.loads(output)
    shutil.rmtree(home / "memory")
    return [
        Row("added by trust to the daemon's RSS", found["added_mb"], "MB", TRUST_MB),
        Row("RSS before trust: runtime, bus, uplink, no model", found["before_mb"], "MB"),
    ]
