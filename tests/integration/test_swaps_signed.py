"""R8 on the real path: releases are signed, published, proven and swapped while a daemon is asked.

The broker, the publisher's keys, the daemon and its socket are real; each answer is held against
what the release that it names gives by itself, bit for bit.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np

from cloud_learner.broker import Broker
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.release.metadata import ReleaseFile
from cloud_learner.simulate.fleet import DeviceProcess
from edge_runtime.api.client import AsyncClient
from edge_runtime.bus import nats
from edge_runtime.clock import SystemClock
from edge_runtime.inference.runner import Runner
from edge_runtime.rollout.plan import Plan, PlanArm

NOW_S = 1_360_000_000.0
FAMILY = "toy"
FIELDS = {"carrier": "UA", "distance": 998.0}
ROW = np.array([[2.0, 998.0, 0.0, -1.0, 0.0]], np.float32)  # what the toy's features are then
RELEASES, CONNECTIONS, IN_FLIGHT = 20, 3, 4
WAIT_S = 120.0
WritePackage = Callable[..., tuple[Path, str]]
Answer = tuple[str, float]


def released(write_package: WritePackage) -> tuple[list[ReleaseFile], dict[str, float]]:
    """Releases of which no two answer alike, and what each of them answers."""
    files, answers = [], {}
    for number in range(1, RELEASES + 1):
        path, sha256 = write_package(bias=number / 10 - 1, ballast=64)
        verdict = {"outcome": "pass", "rules": [], "sha256": sha256}
        name = f"r{number}"
        files.append(ReleaseFile(FAMILY, name, number, path.read_bytes(), verdict))
        answers[name] = float(Runner(path).run(ROW)[0, 0])
    assert len(set(answers.values())) == RELEASES
    return files, answers


def arm(release: ReleaseFile, weight: float) -> PlanArm:
    return PlanArm(release.release, release.path, release.sha256, release.counter, weight)


@asynccontextmanager
async def site(folder: Path) -> AsyncIterator[tuple[Publisher, DeviceProcess]]:
    """A publisher and a daemon that follows it."""
    home = folder / "home"
    keys.create(home, [FAMILY])
    with Broker.start(folder / "broker") as broker:
        bus = await nats.connect(broker.url, name="test")
        root = home / "trust" / "root.json"
        device = DeviceProcess(
            "EWR", folder / "device", families=[FAMILY], nats=broker.url, root=root
        )
        try:
            await device.start()
            yield Publisher(home, bus, keys.load(home), SystemClock()), device
        finally:
            await device.stop()
            await bus.close()


class Load:
    """Connections that ask without a pause; `told` is what they heard, `failed` what they did not.

    Every third question is of tensors, which only the stable release answers.
    """

    def __init__(self) -> None:
        self.told: list[set[Answer]] = [set() for _ in range(CONNECTIONS)]
        self.asked, self.failed = 0, list[str]()
        self._news = asyncio.Condition()
        self.over = False

    async def ask(self, device: DeviceProcess, connection: int) -> None:
        async with await AsyncClient.connect(device.socket) as client:
            await asyncio.gather(
                *(self._ask(client, self.told[connection]) for _ in range(IN_FLIGHT))
            )

    async def heard(self, name: str) -> None:
        """Until every connection has got an answer of this release."""
        async with asyncio.timeout(WAIT_S), self._news:
            await self._news.wait_for(
                lambda: all(any(release == name for release, _ in each) for each in self.told)
            )

    async def _ask(self, client: AsyncClient, told: set[Answer]) -> None:
        while not self.over:
            self.asked += 1
            try:
                answer = await self._one(client)
            except Exception as error:
                self.failed.append(repr(error))
                return
            if answer not in told:
                told.add(answer)
                async with self._news:
                    self._news.notify_all()

    async def _one(self, client: AsyncClient) -> Answer:
        if self.asked % 3 == 0:
            inferred = await client.infer(FAMILY, {"features": ROW})
            return inferred.release, float(inferred["probability"][0, 0])
        predicted = await client.predict(FAMILY, "scheduled", NOW_S, FIELDS)
        return predicted.release, predicted.outputs[0]


def test_r8_twenty_signed_releases_are_swapped_under_load_and_no_request_fails_or_is_mixed(
    tmp_path: Path, write_package: WritePackage
) -> None:
    files, answers = released(write_package)

    async def play() -> tuple[Load, dict[str, int]]:
        load, first = Load(), files[0]
        async with site(tmp_path) as (publisher, device):
            await publisher.publish(first, Plan(family=FAMILY, seq=1, stable=arm(first, 1.0)))
            async with await AsyncClient.connect(device.socket) as client:
                await serves(client, first)
                async with asyncio.TaskGroup() as group:
                    for connection in range(CONNECTIONS):
                        group.create_task(load.ask(device, connection))
                    await swapped(publisher, load)
                    load.over = True
                return load, (await client.status()).status["counters"]

    async def serves(client: AsyncClient, release: ReleaseFile) -> None:
        async with asyncio.timeout(WAIT_S):
            while not any(
                each["release"] == release.release
                for each in (await client.status()).status["families"][FAMILY]["arms"]
            ):
                pass

    async def swapped(publisher: Publisher, load: Load) -> None:
        """Each release on trial beside the one before it, then in its place."""
        for stable, new in pairwise(files):
            seq = 2 * new.counter
            trial = Plan(
                family=FAMILY, seq=seq, stable=arm(stable, 0.5), canary=arm(new, 0.5), salt="s"
            )
            await publisher.publish(new, trial)
            await load.heard(new.release)
            await publisher.publish(
                plan=Plan(family=FAMILY, seq=seq + 1, stable=arm(new, 1.0), salt="s")
            )

    load, counters = asyncio.run(play())

    assert load.failed == []
    assert [set(answers.items())] * CONNECTIONS == load.told
    assert counters["swaps"] >= RELEASES
    assert counters["swap_failures"] == counters["requests_dropped"] == 0
    assert counters["request_errors"] == 0
    assert load.asked >= counters["predictions"] + counters["infers"] >= CONNECTIONS * RELEASES
