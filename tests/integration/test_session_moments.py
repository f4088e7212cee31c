"""What people do on a device whose events never leave it moves the next release's prior: over a
real broker, signed releases and signed reports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
import pytest

from cloud_learner.admission import Admissions
from cloud_learner.bootstrap import bootstrap
from cloud_learner.broker import Broker
from cloud_learner.config import Home
from cloud_learner.host import Host
from cloud_learner.simulate.fleet import DeviceProcess
from cloud_learner.store.registry import Registry
from cloud_learner.train.family import Family
from cloud_learner.train.pooled import told_of
from edge_runtime.bus.base import Bus, Message
from edge_runtime.bus.nats import connect
from edge_runtime.clock import ManualClock, SystemClock
from edge_runtime.config import EdgeConfig, SessionsConfig, UplinkConfig
from edge_runtime.device.exporting import EVERY_S
from edge_runtime.features.engine import Engine
from edge_runtime.inference.slot import Arm, load_arm
from edge_runtime.personal.moments import SESSIONS_MIN
from edge_runtime.runtime import Event, Runtime
from edge_runtime.uplinked import cloud_side
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import WIRE_VERSION, Report, SessionMoments

WAIT_S = 20.0
LABELS = 8
ASKED = {"side": "left", "x": 0.0}
MOVED_MIN = 0.5
EVENTS = 800
PERSONAL = """
[personal]
region = 3.0

[label]
"""


@pytest.fixture(scope="module")
def site(coin, tmp_path_factory) -> Path:
    var = tmp_path_factory.mktemp("moments")
    folder = coin.write_family(var / "coin", {"family.toml": ("\n[label]\n", PERSONAL)})
    data = coin.write_csv(var / "data.csv", coin.stream(600))
    bootstrap(folder, data, Home(var / "home"), lambda _text: None)
    return var / "home"


class Site:
    """A learner, a real broker, and devices in this process that speak over its sockets."""

    def __init__(self, home: Home, var: Path) -> None:
        self.home, self._var, self._ends = home, var, contextlib.AsyncExitStack()
        self.clock, self._said = ManualClock(2000.0), asyncio.Event()

    async def __aenter__(self) -> Self:
        admissions = Admissions(self.home)
        self._admit = admissions.admit
        broker = self._ends.enter_context(Broker.start(self.home.broker, admissions.rules()))
        self._url, self._access = broker.url, admissions.access()
        family = Family.load(Path(self.home.of("coin").origin().folder))
        self.host = Host(self.home, [family], await self._connected("learner"), SystemClock())
        self._bus = await self._connected("test")
        await self._bus.subscribe(subjects.LEARNER_STATUS, self._hear)
        self._run(self.host.run())
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._ends.aclose()

    async def device(self, name: str, **tables) -> Runtime:
        """One that serves the first release, as its signed plan says."""
        process = DeviceProcess(name, self._var / name, families=["coin"])
        self._admit(name, process.public_key())
        config = EdgeConfig(
            device=name,
            families=["coin"],
            state_dir=self._var / name / "state",
            socket=process.socket,
            nats=self._url,
            root=self.home.trusted_root,
            **tables,
        )
        runtime = self._ends.enter_context(Runtime.open(config, clock=self.clock))
        root = self.home.trusted_root.read_bytes()
        for work in await self._ends.enter_async_context(cloud_side(runtime, root, {})):
            self._run(work)
        await self.until(runtime.ready)
        return runtime

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds, looked at whenever the host speaks."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._said.clear()
                await self._said.wait()

    def count(self, name: str) -> int:
        return self.host.learner.statistics_of("coin").get(name, 0)

    async def say(self, name: str, moments: bytes) -> None:
        """A report in the name of a device that nobody has admitted, so that it needs no key."""
        told = [SessionMoments("coin", self.host.releasing["coin"].served.release, moments)]
        bare = Report(WIRE_VERSION, name, 1, 0.0, {}, [], 0, {}, {}, [], 0, 0, number=1)
        report = msgspec.structs.replace(bare, moments=told)
        await self._bus.publish(subjects.report(name), codec.encode(report))

    def refused(self) -> dict[str, str]:
        detail = json.loads(self.host.status().detail)
        return detail["families"]["coin"]["moments_refused"]

    def on_trial(self) -> Arm | None:
        """The newest package that the gate passed."""
        canary = self.host.publisher.plan("coin").canary
        if canary is None:
            return None
        path = Registry(self.home.registry).path(canary.sha256)
        return load_arm(path, canary.sha256, "stable", canary.release, 1.0)

    async def _connected(self, name: str) -> Bus:
        bus = await connect(self._url, name=name, access=self._access)
        self._ends.push_async_callback(bus.close)
        return bus

    def _run(self, work: Coroutine[object, object, None]) -> None:
        self._ends.push_async_callback(cancelled, asyncio.create_task(work))

    async def _hear(self, _message: Message) -> None:
        self._said.set()


async def cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def shift_of_strangers(arm: Arm) -> float:
    """By how much a new session is expected to move what the kiosk asks, in log odds."""
    row = Engine(arm.info.spec).packed(2000.0, ASKED)
    embeddings, _ = arm.runner.embed(np.frombuffer(row, "<f4")[None])
    return float(arm.info.policy.prior.mean @ np.append(1.0, embeddings[0]))


def meet_people(kiosk: Runtime) -> None:
    """Each visitor says heads, whatever is asked."""
    for number in range(SESSIONS_MIN):
        session = kiosk.session("coin", f"visitor-{number}")
        for _ in range(LABELS):
            event = Event("asked", 2000.0, ASKED)
            session.label(session.predict(event).id, 1.0, time_s=2001.0)
        session.close()


def play(device: Runtime, events: list) -> None:
    """What happens elsewhere, whose events the cloud hears."""
    for time_s, kind, _, fields, heads, label_time_s in events:
        if heads is None:
            device.observe("coin", Event(kind, time_s, fields))
            continue
        answer = device.predict("coin", Event(kind, time_s, fields))
        device.label(answer.id, heads, time_s=label_time_s)


def test_people_whose_events_never_leave_the_device_move_the_next_prior_and_garbage_does_not(
    coin, site, tmp_path
):
    events = coin.stream(EVENTS, seed=3, start_s=2000.0)

    async def story(name: str, *, export: bool) -> Arm:
        home = Home(tmp_path / name)
        shutil.copytree(site, home.root)
        async with Site(home, tmp_path / f"devices-{name}") as here:
            kiosk = await here.device(
                "kiosk",
                uplink={"coin": UplinkConfig(sample=0.0)},
                sessions=SessionsConfig(export=export),
            )
            meet_people(kiosk)
            here.clock.advance(EVERY_S)
            await here.say("hostile", b"garbage")
            await here.until(lambda: here.count("moments_waiting") == 1 + export)
            for one in "ab":
                play(await here.device(one), [each for each in events if each[2] == one])
            await here.until(lambda: here.on_trial() is not None)
            assert here.count("moments_heard") == export
            assert list(here.refused()) == ["hostile"]
            assert here.host.learner.ingest.totals["archived"] <= EVENTS * 7 // 4
            return here.on_trial()

    told, untold = (asyncio.run(story(f"{export}", export=export)) for export in (True, False))

    assert told_of(told.info.provenance) == SESSIONS_MIN
    assert told_of(untold.info.provenance) == 0
    moved = shift_of_strangers(told) - shift_of_strangers(untold)
    print(f"strangers are expected to say heads by {moved:.2f} in log odds more")
    assert moved > MOVED_MIN
