"""Several families in one home: added one by one, learned by turns, served by one device."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from cloud_learner.bootstrap import bootstrap
from cloud_learner.broker import Broker
from cloud_learner.cli import main
from cloud_learner.config import Home
from cloud_learner.host import Host
from cloud_learner.learner import Learner
from cloud_learner.serve import load_families
from cloud_learner.simulate.fleet import DeviceProcess
from cloud_learner.simulate.watch import Watch
from cloud_learner.store.examples import Batch, Example
from cloud_learner.store.lineage import Lineage
from cloud_learner.streams import make_streams
from edge_runtime.api.client import Client
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.bus.nats import connect
from edge_runtime.clock import ManualClock, SystemClock
from edge_runtime.errors import ConfigError
from edge_runtime.update.client import UpdateClient
from edge_runtime.update.fetcher import BusFetcher
from edge_runtime.update.trust import models_role

WAIT_S = 60.0
NAMES = ["coin", "dice"]
FORWARD = "        return self.out(self.drop((features - self.mean) / self.std))\n"
TOUCHY = FORWARD.replace(
    "        return",
    '        if self.training and features[:, 1].max() > 9:\n            raise RuntimeError("no")\n'
    "        return",
)


def family_folder(coin: SimpleNamespace, folder: Path, name: str) -> Path:
    """A family that one device alone can teach."""
    coin.write_family(folder, {"network.py": (FORWARD, TOUCHY)})
    text = (folder / "family.toml").read_text()
    text = text.replace('name = "coin"', f'name = "{name}"')
    (folder / "family.toml").write_text(text.replace("device_cap = 30", "device_cap = 50"))
    return folder


@pytest.fixture(scope="module")
def made(coin, tmp_path_factory):
    """A home into which one family was bootstrapped, and then another; a copy from in between."""
    var = tmp_path_factory.mktemp("families")
    data = coin.write_csv(var / "data.csv", coin.stream(600))
    for name in NAMES:
        folder = family_folder(coin, var / name, name)
        bootstrap(folder, data, Home(var / "home"), lambda _text: None)
        if name == "coin":
            shutil.copytree(var / "home", var / "before")
    return var


@pytest.fixture
def home(made, tmp_path):
    shutil.copytree(made / "home", tmp_path / "home")
    return Home(tmp_path / "home")


def test_a_second_family_leaves_the_first_and_the_root_of_trust_as_they_are(made):
    before, after = Home(made / "before"), Home(made / "home")

    assert (before.families(), after.families()) == (["coin"], NAMES)
    assert after.trusted_root.read_bytes() == before.trusted_root.read_bytes()
    for path in (before.root / "families").rglob("*.*"):
        same = after.root / path.relative_to(before.root)
        assert same.read_bytes() == path.read_bytes(), path
    releases = [entry["family"] for entry in Lineage(after.lineage).read("release")]
    assert releases == NAMES


def test_a_device_with_the_old_metadata_takes_the_new_family(made, tmp_path):
    """It has refreshed before the family was there, and keeps the root that it was given."""

    async def scenario():
        broker, clock = MemoryBroker(), SystemClock()
        bus = await broker.connect(name="device")
        root = Home(made / "before").trusted_root.read_bytes()
        fetcher = BusFetcher(bus, asyncio.get_running_loop())
        with contextlib.closing(UpdateClient(tmp_path, root, fetcher, clock)) as client:
            for name, served in (("before", ["coin"]), ("home", NAMES)):
                shutil.copytree(made / name, tmp_path / name)
                home = Home(tmp_path / name)
                host = Host(home, load_families(home), await broker.connect(name=name), clock)
                await make_streams(bus)
                await host.publisher.publish()
                await asyncio.to_thread(client.refresh)
                for family in served:
                    plan = await asyncio.to_thread(client.plan, family)
                    origin = home.of(family).origin()
                    assert (plan.family, plan.stable.sha256) == (family, origin.sha256)
                host.learner.ingest.intake.close()
            assert models_role("dice") == "m-dice"

    asyncio.run(scenario())


def test_a_family_that_is_there_is_refused_and_nothing_changes(made, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (made / "home").rglob("*")}

    arguments = ["bootstrap", str(made / "dice"), str(made / "data.csv")]
    done = CliRunner().invoke(main, [*arguments, "--home", str(made / "home")])

    assert (done.exit_code, "family_exists" in done.stderr) == (2, True)
    assert before == {path: path.stat().st_mtime_ns for path in (made / "home").rglob("*")}


def test_a_home_that_is_served_takes_no_family(coin, made, home, tmp_path):
    folder = family_folder(coin, tmp_path / "third", "third")

    with home.owned(), pytest.raises(ConfigError) as caught:
        bootstrap(folder, made / "data.csv", home, lambda _text: None)

    assert caught.value.code == "already_owned"
    assert "stop `cloud-learner serve`" in caught.value.hint
    assert home.families() == NAMES


def test_a_family_whose_folder_is_gone_is_named_when_its_records_are_there(home):
    async def opened() -> Host:
        bus = await MemoryBroker().connect(name="learner")
        return Host(home, load_families(home), bus, SystemClock())

    asyncio.run(opened()).learner.ingest.intake.close()
    shutil.rmtree(home.of("dice").root)

    with pytest.raises(ConfigError, match="dice") as caught:
        asyncio.run(opened())

    assert caught.value.code == "family_gone"


def batches(family: str, spec: str, count: int, *, x: float | None = None) -> list[Batch]:
    made, random = [], np.random.default_rng(3)
    for number in range(1, count + 1):
        rows = random.normal(size=(50, 3)).astype("<f4")
        if x is not None:
            rows[:, 1] = x
        made.append(
            Batch(number, [example(family, spec, number, *each) for each in enumerate(rows)])
        )
    return made


def example(family: str, spec: str, number: int, at: int, row: np.ndarray) -> Example:
    return Example(
        device="a",
        epoch=1,
        seq=100 * number + at,
        family=family,
        time_s=2000.0 + 100 * number + at,
        label_time_s=2005.0 + 100 * number + at,
        features=row.tobytes(),
        spec=spec,
        label=float(row[1] > 0),
        propensity=1.0,
        scored=[],
        arrived_s=1.0,
        matured_s=2.0,
    )


class Taught:
    """A learner whose families have batches waiting, and what each had learned at a candidate."""

    def __init__(self, home: Home, bus) -> None:
        self.families = load_families(home)
        self.seen: list[tuple[str, dict[str, int]]] = []
        self.news = asyncio.Event()
        self.learner = Learner(
            home,
            self.families,
            Lineage(home.lineage),
            bus,
            ManualClock(1e6),
            submit=self._submit,
            on_released=self._on_released,
        )
        self.courses = self.learner.courses

    async def _submit(self, family, _candidate) -> None:
        numbers = {name: course.number for name, course in self.courses.items()}
        self.seen.append((family, numbers))
        self.news.set()

    async def _on_released(self, _family, _released) -> None:
        pass

    def give(self, family: str, count: int, *, x: float | None = None) -> None:
        spec = self.courses[family].family.spec.hash
        self.courses[family].take(batches(family, spec, count, x=x), 1e6)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.learner.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self.learner.progress.clear()
                await self.learner.progress.wait()


def test_a_busy_family_does_not_keep_another_from_its_turn(home):
    async def scenario():
        bus = await MemoryBroker().connect(name="learner")
        await make_streams(bus)
        taught = Taught(home, bus)
        taught.give("coin", 20)
        taught.give("dice", 2)
        async with taught.running():
            await taught.until(lambda: len(taught.seen) == 2)
        first, second = taught.seen
        assert first[0] == "dice"
        assert first[1]["coin"] <= 3
        assert second == ("coin", {"coin": 20, "dice": 2})
        assert taught.courses["coin"].skipped == 19

    asyncio.run(scenario())


def test_a_family_that_fails_stops_no_other_and_says_so(home):
    async def scenario():
        bus = await MemoryBroker().connect(name="learner")
        await make_streams(bus)
        taught = Taught(home, bus)
        taught.give("coin", 3, x=10.0)
        taught.give("dice", 3)
        async with taught.running():
            await taught.until(lambda: taught.courses["coin"].number == 3 and bool(taught.seen))
        assert [family for family, _ in taught.seen] == ["dice"]
        assert taught.courses["coin"].failure == "batch 3: no"
        assert taught.learner.statistics()["micro_batches_failed"] == 3
        assert taught.learner.statistics_of("dice")["micro_batches_failed"] == 0

    asyncio.run(scenario())
    failed = list(Lineage(home.lineage).read("failed"))
    assert [(e["family"], e["batch"], e["code"]) for e in failed] == [
        ("coin", number, "RuntimeError") for number in (1, 2, 3)
    ]


def teach(socket: Path, events) -> None:
    """Ask for both families, and say what came of it when life says it."""
    due: list[tuple[float, str, str, float]] = []
    with Client(socket, timeout_s=WAIT_S) as client:
        for time_s, kind, _device, fields, heads, label_time_s in events:
            while due and due[0][0] <= time_s:
                known_s, family, prediction, value = due.pop(0)
                client.label(family, prediction, value, known_s)
            for family in NAMES:
                if heads is None:
                    client.observe(family, kind, time_s, fields)
                else:
                    asked = client.predict(family, kind, time_s, fields)
                    due.append((label_time_s, family, asked.id, heads))


async def stages_said(url: str) -> list[list[str]]:
    """What `cloud-learner status` says of each family's stage."""
    said = await asyncio.to_thread(CliRunner().invoke, main, ["status", "--nats", url])
    heading, *rows = said.stdout.splitlines()[:3]
    assert heading.split()[:2] == ["family", "stage"]
    return [row.split()[:2] for row in rows]


def test_one_device_serves_two_families_and_each_gets_a_release_learned_from_its_stream(
    coin, home, tmp_path
):
    async def scenario(url: str) -> Watch:
        families = load_families(home)
        watch, bus, own = Watch(), await connect(url, name="test"), await connect(url, name="l")
        host = Host(home, families, own, SystemClock())
        running = asyncio.create_task(host.run())
        device = DeviceProcess(
            "a",
            tmp_path / "device",
            families=NAMES,
            attributes={"site": "a"},
            nats=url,
            root=home.trusted_root,
        )
        try:
            await watch.follow(bus)
            await watch.wait("the learner", lambda: watch.status is not None, WAIT_S)
            await device.start()
            await watch.wait("both first releases", lambda: len(arms(watch, "stable")) == 2, WAIT_S)
            events = coin.stream(300, seed=3, start_s=2000.0)
            await asyncio.to_thread(teach, device.socket, events)
            await watch.wait("both canaries", lambda: len(arms(watch, "canary")) == 2, WAIT_S)
            async with asyncio.timeout(WAIT_S):  # the learner leaves a word once a second
                while await stages_said(url) != [[name, "canary"] for name in NAMES]:
                    pass
            await watch.wait("all of it", lambda: counts(watch, "held") >= 1050 - 20, WAIT_S)
        finally:
            await device.stop()
            running.cancel()
            await asyncio.wait([running])
            await bus.close()
            await own.close()
        return watch

    with Broker.start(tmp_path / "broker") as broker:
        watch = asyncio.run(scenario(broker.url))
    for name in NAMES:
        first = home.of(name).origin().release
        assert arms(watch, "stable")[name] == first
        assert arms(watch, "canary")[name] != first
        own = watch.family(name)["counters"]
        assert (own["learned_twice"], own["cycles"] >= 2, own["examples"] >= 100) == (0, True, True)
        assert watch.family(name)["failure"] == ""
    assert (counts(watch, "other_family"), counts(watch, "balanced")) == (0, 1)


def arms(watch: Watch, arm: str) -> dict[str, str]:
    """The release on this arm of the device, by family."""
    report = watch.reports.get("a")
    return {each.family: each.release for each in report.arms if each.arm == arm} if report else {}


def counts(watch: Watch, name: str) -> int:
    assert watch.status is not None
    return watch.status.counters.get(name, 0)
