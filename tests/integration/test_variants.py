"""A release of two variants, from the learner's hands to a device that picks one and says which."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import types
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cloud_learner.bootstrap import bootstrap
from cloud_learner.config import Home
from cloud_learner.host import Host
from cloud_learner.store.lineage import Lineage
from cloud_learner.train.family import Family
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import SystemClock
from edge_runtime.config import EdgeConfig
from edge_runtime.features.engine import Engine
from edge_runtime.inference.package import read_package
from edge_runtime.inference.runner import Runner
from edge_runtime.rollout.agent import Agent
from edge_runtime.rollout.plan import Plan, decode_plan, encode_plan, model_path
from edge_runtime.runtime import Event, Runtime
from edge_runtime.update.client import UpdateClient
from edge_runtime.update.fetcher import BusFetcher
from edge_runtime.wire.messages import ArmReport

WAIT_S = 30.0
ASKED = Event("asked", 1000.0, {"side": "left", "x": 0.5})


@pytest.fixture(scope="module")
def bootstrapped(coin: types.SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    var = tmp_path_factory.mktemp("variants")
    folder = coin.write_family(var / "coin")
    data = coin.write_csv(var / "data.csv", coin.stream(600))
    bootstrap(folder, data, Home(var / "home"), lambda _text: None)
    return var / "home"


@pytest.fixture
def home(bootstrapped: Path, tmp_path: Path) -> Home:
    shutil.copytree(bootstrapped, tmp_path / "home")
    return Home(tmp_path / "home")


@dataclass
class Scene:
    """A host that serves `home`, and one device that asked it for its plan."""

    host: Host
    runtime: Runtime
    agent: Agent

    @property
    def plan(self) -> Plan:
        plan = self.runtime.current("coin")
        assert plan is not None
        return plan

    @property
    def arm(self) -> ArmReport:
        (arm,) = self.runtime.report({}).arms
        return arm

    async def heard(self) -> dict[str, Any]:
        """What the controller knows of the device after its report."""
        await self.host.releasing["coin"].controller.report(self.runtime.report({}))
        found: dict[str, Any] = self.host.releasing["coin"].controller.status()["devices"]["a"]
        return found


def configured(home: Home) -> EdgeConfig:
    return EdgeConfig(
        device="a",
        families=["coin"],
        state_dir=home.root.parent / "device",
        socket=home.root.parent / "edge.sock",
    )


@contextlib.asynccontextmanager
async def scene(home: Home) -> AsyncIterator[Scene]:
    broker, clock = MemoryBroker(), SystemClock()
    family = Family.load(Path(home.of("coin").origin().folder))
    host = Host(home, [family], await broker.connect(name="learner"), clock)
    config = configured(home)
    bus = await broker.connect(name="a")
    fetcher = BusFetcher(bus, asyncio.get_running_loop())
    with Runtime.open(config) as runtime:
        root = home.trusted_root.read_bytes()
        client = UpdateClient(config.state_dir / "update", root, fetcher, clock)
        agent = Agent(runtime, client, runtime.shelf, bus, attributes={}, poll_s=1000.0)
        running = asyncio.create_task(host.run())
        try:
            async with asyncio.timeout(WAIT_S):
                while runtime.current("coin") is None:
                    await agent.check()
            yield Scene(host, runtime, agent)
        finally:
            running.cancel()
            await asyncio.wait([running])
            client.close()


def play(home: Home, stage: Callable[[Scene], Awaitable[None]]) -> None:
    async def run() -> None:
        async with scene(home) as found:
            await stage(found)

    asyncio.run(run())


def test_a_release_ships_both_forms_judged_and_signed_under_one_counter(home: Home) -> None:
    async def stage(found: Scene) -> None:
        stable = found.plan.stable
        assert [each.name for each in stable.variants] == ["int8", "float32"]
        verdict = next(Lineage(home.lineage).read("verdict"))
        hashes = {each.name: each.sha256 for each in stable.variants}
        assert verdict["variants"] == hashes
        assert all(
            found.host.releasing["coin"].door.gate.passed("", sha256) for sha256 in hashes.values()
        )
        rules = {each["rule"] for each in verdict["verdicts"]}
        assert {"static_quality", "float32_static_quality", "int8_gap"} <= rules

    play(home, stage)


def test_the_device_picks_one_answers_with_it_and_says_which(home: Home) -> None:
    async def stage(found: Scene) -> None:
        chosen = found.arm.variant
        assert found.arm.run_us > 0
        packages = {each.name: each.sha256 for each in found.plan.stable.variants}
        shelf = found.runtime.shelf
        kept = [name for name, sha256 in packages.items() if shelf.path_of(sha256) is not None]
        assert kept == [chosen]
        files = {name: home.registry / f"{sha256}.onnx" for name, sha256 in packages.items()}
        features = Engine(Family.load(Path(home.of("coin").origin().folder)).spec)
        row = features.vector(ASKED.time_s, ASKED.fields)[None]
        answers = {name: Runner(path).run(row).item() for name, path in files.items()}
        assert answers["int8"] != answers["float32"]
        assert found.runtime.predict("coin", ASKED).outputs == [pytest.approx(answers[chosen])]
        heard = await found.heard()
        assert heard["variants"] == {"stable": chosen}

    play(home, stage)


def test_a_device_of_before_variants_runs_the_default_one(home: Home) -> None:
    async def stage(found: Scene) -> None:
        text = json.loads(encode_plan(found.plan))
        del text["stable"]["variants"]  # an older device skips what it does not know
        arm = decode_plan(json.dumps(text).encode()).stable
        int8 = found.plan.stable.variants[0]
        assert (arm.path, arm.sha256) == (int8.path, int8.sha256)
        assert arm.path == model_path("coin", arm.release)

    play(home, stage)


def test_after_a_restart_without_a_network_the_same_variant_serves(home: Home) -> None:
    served: list[tuple[str, list[float]]] = []

    async def stage(found: Scene) -> None:
        served.append((found.arm.variant, found.runtime.predict("coin", ASKED).outputs))

    play(home, stage)
    with Runtime.open(configured(home)) as runtime:
        (arm,) = runtime.report({}).arms
        served.append((arm.variant, runtime.predict("coin", ASKED).outputs))
    assert served[0] == served[1]


@pytest.mark.parametrize("forms", [["int8"], ["float32"]])
def test_a_family_may_ship_one_form_alone(
    coin: types.SimpleNamespace, tmp_path: Path, forms: list[str]
) -> None:
    changes = {"family.toml": ('selector = { site = "a" }', f"selector = {{}}\nvariants = {forms}")}
    folder = coin.write_family(tmp_path / "coin", changes)
    data = coin.write_csv(tmp_path / "data.csv", coin.stream(600))
    home = Home(tmp_path / "home")
    bootstrap(folder, data, home, lambda _text: None)

    async def stage(found: Scene) -> None:
        assert found.plan.stable.variants == ()
        path = home.registry / f"{found.plan.stable.sha256}.onnx"
        assert read_package(Runner(path).metadata).provenance["form"] == forms[0]
        assert (found.arm.release, found.arm.variant) == (found.plan.stable.release, "")

    play(home, stage)
