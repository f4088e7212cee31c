"""The whole path in tools/bench-updates: from a micro-batch's last mature label to its release
serving on the canary.

Why: learning, judging, signing, publishing, proving and swapping are each measured elsewhere; what
freshness costs is all of them in a row, with the waits between.

How: `cloud-learner serve` and one `edge-runtime run`, both real processes, and real flights after a
bootstrap on January's. The stream never runs more than a hundred events ahead of the learner, and
waits while a release is on its way, so that micro-batches come one by one, as they do in the field,
where minutes lie between them.

Invariants: each release is measured from its own micro-batch's last mature label, by the controller
and the device's own report. The family's declaration is the product's, but the canary decides after
few pairs of labels. A candidate that finds the place taken all the same waits by the campaign's
policy, which is another wait: it is counted, and left out.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from bench_rows import Row
from bench_updates_models import FAMILY, FOLDER

from cloud_learner.admission import Admissions
from cloud_learner.bootstrap import bootstrap
from cloud_learner.broker import Broker
from cloud_learner.children import spawn_tied
from cloud_learner.config import Home
from cloud_learner.experiment.replay import DataRow, read_rows
from cloud_learner.simulate.fleet import DeviceProcess
from cloud_learner.simulate.player import Player
from cloud_learner.simulate.watch import Watch
from cloud_learner.store.lineage import Lineage
from cloud_learner.train.family import Family
from cloud_learner.train.modules import load_module
from edge_runtime.bus import nats

P50_S, P99_S = 0.8, 2.4
AHEAD, KNOWN, PLAYED = 100, "2013-02-01", "2013-08-01"
DAY_S, WAIT_S, LOOK_S = 86_400.0, 600.0, 1.0
DEVICE = "edge"
DECLARED: dict[str, Any] = {
    "window_s": 28800.0,  # or pairs are seldom mature before the next micro-batch is
    "device_cap": 500,  # there is one device
    "selector": "{}",
    "pairs_max": 30,  # undecided then, and rolled back: the place is free again
}


async def measure(home: Path, count: int) -> list[Row]:
    """Play flights until so many releases have gone the whole path, or no flight is left."""
    cloud, rows = await asyncio.to_thread(prepared, home)
    served_s: dict[str, float] = {}
    async with site(home, cloud) as (watch, device):

        def note() -> None:
            for arm in watch.reports[DEVICE].arms if watch.reports else ():
                served_s.setdefault(arm.release, arm.serving_since_s)

        await watch.wait("the first release", lambda: note() or served_s, WAIT_S)
        watch.on_status.append(note)
        playing = asyncio.create_task(play(watch, cloud, rows, device))
        while not playing.done() and len(found(cloud)[0]) < count:
            watch.check_alive()
            await asyncio.wait([playing], timeout=LOOK_S)
        playing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await playing
    return table(cloud, served_s)


def table(cloud: Home, served_s: dict[str, float]) -> list[Row]:
    spent_s, waited = found(cloud)
    seconds = list(spent_s.values())
    passed_s = {e["release"]: e["time_s"] for e in Lineage(cloud.lineage).read("release")}
    rest = [served_s[name] - passed_s[name] for name in spent_s if name in served_s]
    what = "the whole path: a micro-batch's last mature label to its release serving on the canary"
    return [
        Row(f"{what}, p50", float(np.quantile(seconds, 0.5)), "s", P50_S),
        Row(f"{what}, p99", float(np.quantile(seconds, 0.99)), "s", P99_S),
        Row("of it, from the gate's verdict on, p50", float(np.quantile(rest, 0.5)), "s"),
        Row("releases that went the whole path", len(seconds), ""),
        Row("left out, for they waited while another one was on trial", waited, ""),
    ]


def found(cloud: Home) -> tuple[dict[str, float], int]:
    """The seconds of each release that went on trial at once, and how many did not."""
    own = cloud.of(FAMILY)
    if not own.campaign.exists():
        return {}, 0
    state = msgspec.json.decode(own.campaign.read_bytes())
    spent_s = {each["release"]: each["freshness_s"] for each in state["freshness"]}
    ready: dict[str, str] = {}
    waited: set[str] = set()
    for entry in Lineage(cloud.lineage).read():
        if entry["kind"] == "release":
            ready[entry["sha256"]] = entry["release"]
        elif entry["kind"] == "plan":
            ready.pop(entry["canary"], None)  # it is on trial
        elif entry["kind"] == "decision":  # what is ready before it may go on trial only now
            waited |= set(ready.values())
    at_once = {name: spent for name, spent in spent_s.items() if name not in waited}
    return at_once, len(spent_s) - len(at_once)


def prepared(home: Path) -> tuple[Home, list[DataRow]]:
    """A bootstrapped home, and all flights as those of one device."""
    folder, cloud = declared(home / FAMILY), Home(home / "cloud")
    write_data = load_module(folder / "data.py").write_data
    for name, until in (("known", KNOWN), ("all", PLAYED)):
        write_data(home / f"{name}.parquet", until)
    bootstrap(folder, home / "known.parquet", cloud, lambda _said: None)
    from_s = cloud.of(FAMILY).origin().learned_through_s - DAY_S  # what fills the windows
    rows = read_rows(home / "all.parquet", Family.load(folder).interface)
    return cloud, [msgspec.structs.replace(r, device=DEVICE) for r in rows if r.time_s >= from_s]


def declared(folder: Path) -> Path:
    """The family in `folder`, with the numbers of DECLARED."""
    shutil.copytree(FOLDER, folder)
    text = (folder / "family.toml").read_text()
    for key, value in DECLARED.items():
        text, times = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
        assert times == 1, key
    (folder / "family.toml").write_text(text)
    return folder


@asynccontextmanager
async def site(home: Path, cloud: Home) -> AsyncIterator[tuple[Watch, DeviceProcess]]:
    """Broker, learner and device, and who watches them."""
    admissions, watch = Admissions(cloud), Watch()
    with Broker.start(cloud.broker, admissions.rules()) as broker:
        device = DeviceProcess(
            DEVICE, home / "device", families=[FAMILY], nats=broker.url, root=cloud.trusted_root
        )
        admissions.admit(DEVICE, device.public_key())
        bus = await nats.connect(broker.url, name="bench", access=admissions.access())
        with learner(home, cloud, broker.url) as watch.check_alive:
            try:
                await watch.follow(bus)
                await device.start()
                yield watch, device
            finally:
                await device.stop()
                await bus.close()


@contextmanager
def learner(home: Path, cloud: Home, url: str) -> Iterator[Callable[[], None]]:
    """A learner's process, and what raises when it has ended."""
    command = [sys.executable, "-m", "cloud_learner.cli", "serve", "--home", str(cloud.root)]
    with open(home / "learner.log", "wb") as log:
        process = spawn_tied([*command, "--nats", url], output=log.fileno())

    def check_alive() -> None:
        assert process.poll() is None, (home / "learner.log").read_text()[-2000:]

    try:
        yield check_alive
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


async def play(watch: Watch, cloud: Home, rows: list[DataRow], device: DeviceProcess) -> None:
    """Play the rows, a few ahead of the learner, none while a release is on its way."""
    known_s = cloud.of(FAMILY).origin().learned_through_s
    times_s = [row.time_s for row in rows]

    allowed_s = known_s

    def horizon() -> float:
        nonlocal allowed_s
        if watch.status is not None and not on_its_way(watch):
            mature_s = max(known_s, watch.status.clock_s) + DECLARED["window_s"]
            ahead = bisect.bisect_right(times_s, mature_s) + AHEAD
            allowed_s = times_s[min(ahead, len(times_s) - 1)]
        return allowed_s

    interface = Family.load(FOLDER).interface
    player = Player(rows, {DEVICE: device.socket}, interface, horizon=horizon)
    watch.on_status.append(player.advance)
    await player.run()


def on_its_way(watch: Watch) -> bool:
    """Whether a release has the canary's place and does not serve there yet."""
    canary = watch.rollout(FAMILY).get("canary")
    return bool(canary) and not canary["devices"]
