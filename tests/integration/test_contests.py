"""A contest through everything: a broker, the host, two devices, the commands, the archive."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from cloud_learner.bootstrap import bootstrap
from cloud_learner.broker import Broker
from cloud_learner.cli import main
from cloud_learner.config import Home
from cloud_learner.host import Host
from cloud_learner.judging import passed_before
from cloud_learner.rollout.kept import Kept
from cloud_learner.rollout.state import Offer
from cloud_learner.rules import campaign_rules
from cloud_learner.serve import load_families
from cloud_learner.simulate.fleet import DeviceProcess, Fleet
from cloud_learner.simulate.watch import Watch
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.registry import Registry
from cloud_learner.train.family import Family
from edge_runtime.api.client import Client
from edge_runtime.bus.nats import connect
from edge_runtime.clock import SystemClock
from edge_runtime.rollout.plan import model_path

WAIT_S = 90.0
RIVAL = "r00002-rival"
CHANCES = (0.2, 0.8)
"""What an answer of the stable release earns, and one of its rival."""


@pytest.fixture(scope="module")
def bootstrapped(coin, tmp_path_factory):
    """A home whose family has labels as rewards, and two releases that served."""
    var = tmp_path_factory.mktemp("contests")
    rollout = '[rollout]\nselector = { site = "a" }\n'
    changes = {"family.toml": (rollout, f'{rollout}outcome = "reward"\n')}
    folder = coin.write_family(var / "coin", changes)
    home = Home(var / "home")
    bootstrap(folder, coin.write_csv(var / "data.csv", coin.stream(600)), home, lambda _: None)
    serve_once(home, folder)
    return var / "home"


@pytest.fixture
def home(bootstrapped, tmp_path):
    shutil.copytree(bootstrapped, tmp_path / "home")
    return Home(tmp_path / "home")


def serve_once(home, folder):
    """The first release with other words in it, as one that the gate passed and all devices ran."""
    lineage, own = Lineage(home.lineage).of("coin"), home.of("coin")
    kept, rules = Kept(own.campaign), campaign_rules(Family.load(folder))
    saved = kept.load(rules, 0.0)
    first = saved.state.stable
    model = onnx.load(first.file)
    model.doc_string = "a rival"
    registry = Registry(home.registry)
    sha256 = registry.put(model.SerializeToString())
    passed = next(e for e in lineage.read("verdict") if e["outcome"] == "pass")
    facts = {key: passed[key] for key in ("outcome", "verdicts")} | {
        "proof": passed.get("proof", "")
    }
    lineage.append("verdict", **facts, sha256=sha256, variants={"int8": sha256})
    rival = Offer(
        release=RIVAL,
        path=model_path("coin", RIVAL),
        sha256=sha256,
        counter=first.counter + 1,
        file=str(registry.path(sha256)),
        learned_through_s=0.0,
        arrived_s=0.0,
        verdict=passed_before(lineage)[sha256],
    )
    saved.state.proven = [rival, first]
    kept.save(msgspec.json.encode(saved), [])


@contextlib.asynccontextmanager
async def hosted(home, url):
    """A host over the broker, and what it says."""
    watch, bus, own = Watch(), await connect(url, name="test"), await connect(url, name="learner")
    host = Host(home, load_families(home), own, SystemClock())
    running = asyncio.create_task(host.run())
    try:
        await watch.follow(bus)
        await watch.wait("the learner", lambda: watch.status is not None, WAIT_S)
        yield watch
    finally:
        running.cancel()
        await asyncio.wait([running])
        await bus.close()
        await own.close()


async def said(*arguments):
    """What a command prints."""
    done = await asyncio.to_thread(CliRunner().invoke, main, ["rollout", *map(str, arguments)])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def ask(sockets, stable, start_s, count):
    """Each device answers `count` requests by turns; each label comes five seconds later."""
    random, clients = np.random.default_rng(1), [Client(path, timeout_s=WAIT_S) for path in sockets]
    answered = {}
    due = []
    for number in range(count):
        time_s = start_s + 0.1 * number
        while due and due[0][0] <= time_s:
            known_s, client, prediction, value = due.pop(0)
            client.label("coin", prediction, value, known_s)
        for client in clients:
            asked = client.predict("coin", "asked", time_s, {"side": "left", "x": 0.5})
            earned = float(random.random() < CHANCES[asked.release != stable])
            due.append((time_s + 5, client, asked.id, earned))
            answered[asked.release] = answered.get(asked.release, 0) + 1
    for client in clients:
        client.close()
    return answered


@contextlib.asynccontextmanager
async def served(home, folder, url):
    """A host, two devices that serve the first release, what they say, and their sockets."""
    first = home.of("coin").origin().release
    devices = [
        DeviceProcess(name, folder / name, families=["coin"], nats=url, root=home.trusted_root)
        for name in ("a", "b")
    ]
    async with hosted(home, url) as watch, Fleet(devices):
        await watch.wait("the first release", lambda: both(watch, {first}), WAIT_S)
        yield watch, [device.socket for device in devices], first


def test_two_devices_two_releases_one_verdict(home, tmp_path):
    first = home.of("coin").origin().release
    common = ("--home", home.root)

    async def scenario(url):
        async with served(home, tmp_path, url) as (watch, sockets, first):
            word = ("coin", first, RIVAL, "--answers", 1000, "--reason", "which?", "--nats", url)
            await said("compare", *word, *common)
            await watch.wait("both on both", lambda: both(watch, {first, RIVAL}), WAIT_S)
            answered = await asyncio.to_thread(ask, sockets, first, 5000.0, 900)
            await watch.wait("the verdict", lambda: watch.decisions("coin"), WAIT_S)
            shown = json.loads(await said("status", "coin", "--json", "--nats", url, *common))
            await watch.wait("the winner", lambda: both(watch, {RIVAL}, "stable"), WAIT_S)
            return answered, watch.decisions("coin"), shown

    with Broker.start(home.broker) as broker:
        answered, decisions, shown = asyncio.run(scenario(broker.url))
    assert set(answered) == {first, RIVAL}
    assert min(answered.values()) > 450  # the winner may serve before all was asked
    assert (decisions[0]["release"], decisions[0]["reason"]) == (RIVAL, "won")
    assert decisions[0]["pairs"] >= 1000
    assert f"{RIVAL} earns" in decisions[0]["note"]
    assert shown["coin"]["stable"]["release"] == RIVAL
    estimates = json.loads(asyncio.run(said("estimate", "coin", first, RIVAL, "--json", *common)))
    for row, chance in zip(estimates, CHANCES, strict=True):
        assert row["rows"] >= 1000
        assert row["snips"]["value"] == pytest.approx(chance, abs=0.1)  # draws differ by the hour
    (checked,) = [
        each
        for each in json.loads(asyncio.run(said("audit", "coin", "--json", *common)))
        if each["reason"] == "won"
    ]
    assert checked["agrees"], checked


def test_devices_follow_the_shares_of_a_bandit(home, tmp_path):
    async def scenario(url):
        async with served(home, tmp_path, url) as (watch, sockets, first):
            word = ("coin", first, RIVAL, "--every-s", 1, "--floor", 0.1, "--reason", "a fair")
            await said("bandit", *word, "--nats", url, "--home", home.root)
            await watch.wait("both on both", lambda: both(watch, {first, RIVAL}), WAIT_S)
            await asyncio.to_thread(ask, sockets, first, 5000.0, 400)
            await watch.wait("shares", lambda: followed(watch, 0.9), WAIT_S)
            return first, await asyncio.to_thread(ask, sockets, first, 5100.0, 100)

    with Broker.start(home.broker) as broker:
        first, answered = asyncio.run(scenario(broker.url))
    assert 0 < answered[first] < 50
    assert answered[RIVAL] > 150


def followed(watch, share):
    """Whether the rival has this share, by a plan that both devices follow."""
    rollout = watch.rollout("coin")
    shares = [arm["share"] for arm in rollout["contest"]["arms"] if arm["release"] == RIVAL]
    seqs = [report.plan_seq for report in watch.reports.values()]
    return shares == [share] and min(seqs) >= rollout["plan_seq"] - 1 and not rollout["unpublished"]


def both(watch, releases, arm=""):
    """Whether both devices have exactly these releases in memory, as `arm` where one is named."""
    return len(watch.reports) == 2 and all(
        {each.release for each in report.arms if arm in {"", each.arm}} >= releases
        for report in watch.reports.values()
    )
