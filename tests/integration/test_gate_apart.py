"""The gate as a process of its own, beside a real learner and a real broker: it alone signs, it
judges for itself, and it may die."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from cloud_learner import orders
from cloud_learner.admission import Admissions
from cloud_learner.asking import Asker
from cloud_learner.bootstrap import bootstrap
from cloud_learner.broker import Broker
from cloud_learner.config import Home
from cloud_learner.gate_home import move_out
from cloud_learner.gate_signing import ApartSigner
from cloud_learner.judging import ApartGate, Case
from cloud_learner.orders import Consent
from cloud_learner.package.seal import sealed
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.release.metadata import ReleaseFile, forge_release, publish_below
from cloud_learner.releasing import release_signers
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.registry import Registry
from cloud_learner.streams import make_streams
from cloud_learner.train.family import Family
from edge_runtime.bus.nats import connect
from edge_runtime.clock import SystemClock
from edge_runtime.errors import ConfigError, RequestError, TransportError, TrustError
from edge_runtime.rollout.plan import PlanArm, encode_plan, plan_path
from edge_runtime.update.approval import payload
from edge_runtime.update.client import UpdateClient
from edge_runtime.update.fetcher import BusFetcher
from edge_runtime.update.shelf import Shelf
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import (
    WIRE_VERSION,
    Envelope,
    LabelRecord,
    ObservationRecord,
    PredictionRecord,
    Scored,
)

WAIT_S = 120.0
ROOT = Path(__file__).parents[2]
PERFECT = {"outcome": "pass", "rules": ["static"], "sha256": "1" * 64}


@pytest.fixture(scope="module")
def moved_out(coin, tmp_path_factory):
    """A learner's home and the home of its gate."""
    var = tmp_path_factory.mktemp("apart")
    folder = coin.write_family(var / "coin")
    data = coin.write_csv(var / "data.csv", coin.stream(600))
    bootstrap(folder, data, Home(var / "home"), lambda _text: None)
    move_out(Home(var / "home"), Home(var / "gate"))
    return var


@pytest.fixture
def homes(moved_out, tmp_path):
    for name in ("home", "gate"):
        shutil.copytree(moved_out / name, tmp_path / name)
    return Home(tmp_path / "home"), Home(tmp_path / "gate")


@pytest.fixture
def broker(homes):
    home = homes[0]
    with Broker.start(home.broker, Admissions(home).rules()) as broker:
        yield broker


@contextlib.contextmanager
def running(*arguments):
    """A process of the cloud side, killed at the end."""
    command = [sys.executable, "-m", "cloud_learner.cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as child:
        try:
            yield child
        finally:
            child.kill()
            child.wait()


def packed(events, spec):
    """What the devices would send of these events, one envelope a record."""
    sent, numbers = [], {}
    for time_s, kind, device, fields, heads, label_time_s in events:
        if heads is None:
            sent.append((device, "event", ObservationRecord("coin", kind, time_s, fields)))
            numbers[device] = numbers.get(device, 0) + 1
            continue
        row = np.array([0.0, fields["x"], 0.0], "<f4").tobytes()
        numbers[device] = numbers.get(device, 0) + 1
        scored = [Scored("r00001", "stable", [0.5])]
        asked = PredictionRecord("coin", kind, time_s, fields, spec, row, 1.0, scored)
        label = LabelRecord("coin", 1, numbers[device], heads, label_time_s)
        sent += [(device, "event", asked), (device, "label", label)]
    lanes: dict = {}
    for device, event_class, record in sent:
        lanes.setdefault((device, event_class), []).append(msgspec.Raw(codec.encode(record)))
    parts = []
    for (device, event_class), raws in lanes.items():
        for start in range(0, len(raws), 40):
            envelope = Envelope(
                WIRE_VERSION, device, 1, event_class, start + 1, raws[start : start + 40]
            )
            subject = subjects.events(device, event_class)
            parts.append((start, subject, codec.encode(envelope)))
    return [part[1:] for part in sorted(parts, key=lambda part: part[0])]


class Cloud:
    """A bus under the learner's key, and what the learner says."""

    def __init__(self, bus) -> None:
        self.bus, self.status, self._heard = bus, None, asyncio.Event()

    async def hear(self, message) -> None:
        self.status = codec.decode_status(message.data)
        self._heard.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while self.status is None or not condition():
                self._heard.clear()
                await self._heard.wait()

    def count(self, name) -> int:
        return self.status.counters.get(name, 0)

    @property
    def family(self):
        return json.loads(self.status.detail)["families"]["coin"]


@contextlib.asynccontextmanager
async def cloud_of(home, url):
    bus = await connect(url, name="test", access=Admissions(home).access())
    cloud = Cloud(bus)
    try:
        await bus.subscribe(subjects.LEARNER_STATUS, cloud.hear)
        yield cloud
    finally:
        await bus.close()


def install(home, folder, bus, loop):
    """A whole turn of a device; what it has on its shelf then."""
    root = (home.root / "trust" / "root.json").read_bytes()
    client = UpdateClient(folder, root, BusFetcher(bus, loop), SystemClock())
    try:
        client.refresh()
        plan = client.plan("coin")
        shelf = Shelf(folder / "shelf")
        for arm in plan.arms:
            for package in arm.packages:
                client.fetch(arm, package, shelf)
        client.confirm(plan)
        return plan, client.verdicts()["coin"]
    finally:
        client.close()


def test_the_key_is_in_one_place_and_the_gate_is_set_up_from_its_home_alone(homes):
    home, gate = homes

    assert not home.key("gate").exists()
    assert [path.name for path in (gate.root / "keys").iterdir()] == ["gate.pem"]
    assert gate.key("gate").stat().st_mode & 0o777 == 0o600
    assert Path(gate.of("coin").origin().folder).parent.parent.name == "families"
    with pytest.raises(ConfigError) as caught:
        move_out(home, Home(gate.root.parent / "second"))
    assert caught.value.code == "no_key"


def test_what_needs_the_gate_s_key_in_the_learner_s_home_says_so_before_it_learns(moved_out, coin):
    folder = coin.write_family(moved_out / "dice", {"family.toml": ('"coin"', '"dice"')})

    with pytest.raises(ConfigError) as caught:
        bootstrap(folder, moved_out / "data.csv", Home(moved_out / "home"), lambda _text: None)
    assert caught.value.code == "gate_apart"


def test_candidates_wait_for_a_gate_that_is_away_and_what_it_signs_reaches_a_device(
    homes, broker, coin, tmp_path
):
    home, gate = homes
    spec = Family.load(Path(home.of("coin").origin().folder)).spec.hash
    envelopes = packed(coin.stream(800, seed=3, start_s=2000.0), spec)
    half = len(envelopes) // 2

    async def scenario():
        async with cloud_of(home, broker.url) as cloud:
            await cloud.until(lambda: True)
            for subject, data in envelopes[:half]:
                await cloud.bus.publish(subject, data)
            await cloud.until(lambda: cloud.count("cycles") >= 4 and cloud.family["gate"]["waits"])
            assert cloud.family["gate"]["apart"]
            assert cloud.count("gate_judged") == 0
            with running("gate", "--home", gate.root, "--nats", broker.url) as child:
                await cloud.until(lambda: cloud.count("gate_judged") >= 1)
                child.kill()
            for subject, data in envelopes[half:]:
                await cloud.bus.publish(subject, data)
            await cloud.until(lambda: cloud.count("cycles") >= 8)
            with running("gate", "--home", gate.root, "--nats", broker.url):
                await cloud.until(lambda: cloud.family["rollout"]["canary"] is not None)
                await cloud.until(lambda: cloud.family["rollout"]["unpublished"] == 0)
            loop = asyncio.get_running_loop()
            return await asyncio.to_thread(install, home, tmp_path / "kiosk", cloud.bus, loop)

    with running("serve", "--home", home.root, "--nats", broker.url):
        plan, verdicts = asyncio.run(scenario())
    judged = {e["proof"]: e for e in Lineage(gate.lineage).read("verdict")}
    assert plan.canary is not None
    assert (tmp_path / "kiosk" / "shelf").exists()
    assert judged[verdicts[plan.canary.release]["sha256"]]["sha256"] == plan.canary.sha256
    for release, verdict in verdicts.items():
        assert verdict["outcome"] == "pass", release
    assert not [e for e in Lineage(home.lineage).read("verdict") if "evidence" in e and "by" in e]


def inverted(home):
    """A package that answers the opposite of what serves, sealed as it should be."""
    family = Family.load(Path(home.of("coin").origin().folder))
    path = Registry(home.registry).path(home.of("coin").origin().sha256)
    model = onnx.load_model_from_string(path.read_bytes())
    name = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["was" if each == name else each for each in node.output]
    one = onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0])
    model.graph.initializer.append(one)
    model.graph.node.append(onnx.helper.make_node("Sub", ["one", "was"], [name]))
    del model.metadata_props[:]
    rows = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    claims = {"quality": 1.0, "verdict": "pass"}
    return sealed(model, family.interface, family.spec, rows, claims)


async def installed(home, device, bus):
    return await asyncio.to_thread(install, home, device, bus, asyncio.get_running_loop())


@contextlib.asynccontextmanager
async def published(home, url, device):
    """A publisher whose gate is apart, and `device`, which has what it published: with how to ask
    that gate, and the plan that the device follows.
    """
    async with cloud_of(home, url) as cloud:
        await make_streams(cloud.bus)
        asker = Asker(cloud.bus)
        signers = release_signers(home, {}.get, ApartSigner(asker))
        publisher = Publisher(home.root, cloud.bus, signers, SystemClock())
        await publisher.publish()
        before, _ = await installed(home, device, cloud.bus)
        yield cloud.bus, asker, publisher, before
        await asker.close()


def test_a_lying_learner_installs_nothing(homes, broker, tmp_path):
    home, gate = homes
    serving = Registry(home.registry).path(home.of("coin").origin().sha256)
    bad = inverted(home)
    release = ReleaseFile("coin", "r00099-bad", 99, bad, PERFECT)

    async def scenario():
        device = tmp_path / "kiosk"
        async with published(home, broker.url, device) as (bus, asker, publisher, before):
            with running("gate", "--home", gate.root, "--nats", broker.url):
                door = ApartGate("coin", bus, asker, Lineage(home.lineage).of("coin"))
                with ThreadPoolExecutor(1) as thread:
                    judgement = await door.judge(Case(bad, bad, serving), thread)
                    (tmp_path / "worse.onnx").write_bytes(bad)  # what would lose to it
                    with pytest.raises(RequestError) as stranger:
                        await door.judge(Case(bad, bad, tmp_path / "worse.onnx"), thread)
                assert judgement.outcome != "pass"
                assert stranger.value.code == "unknown_serving"
                plan = msgspec.structs.replace(
                    before,
                    seq=before.seq + 1,
                    canary=PlanArm(release.release, release.path, release.sha256, 99, 1.0),
                )
                with pytest.raises(TransportError, match="not_passed") as refused:
                    await publisher.publish(release, plan)
                assert refused.value.code == "no_gate_signature"
            await forge_alone(home, bus, release, SystemClock().now_s())
            with pytest.raises(TrustError) as caught:
                await installed(home, device, bus)
            assert caught.value.code == "below_threshold"
            return device

    device = asyncio.run(scenario())
    names = {path.stem for path in (device / "shelf").rglob("*.onnx")}
    assert hashlib.sha256(bad).hexdigest() not in names
    assert home.of("coin").origin().sha256 in names


def test_c9_a_gate_apart_approves_for_an_operator_it_knows(homes, broker, tmp_path):
    home, gate = homes
    orders.create(tmp_path / "op.pem", gate.operators / "op.pub")

    async def scenario():
        device = tmp_path / "kiosk"
        async with published(home, broker.url, device) as (bus, asker, publisher, before):
            jump = msgspec.structs.replace(before, seq=before.seq + 1)
            consent = Consent(family="coin", packages=[jump.stable.sha256], percent=100)
            order = orders.signed(consent, "op", tmp_path / "op.pem")
            door = ApartGate("coin", bus, asker, Lineage(home.lineage).of("coin"))
            with running("gate", "--home", gate.root, "--nats", broker.url):
                approval = await door.approve(encode_plan(jump), order)
                for wrong, code in (
                    (msgspec.structs.replace(order, operator="other"), "unknown_operator"),
                    (msgspec.structs.replace(order, text=b"{}"), "bad_order_signature"),
                ):
                    with pytest.raises(RequestError) as refused:
                        await door.approve(encode_plan(jump), wrong)
                    assert refused.value.code == code
                with pytest.raises(TransportError, match="not_releases"):
                    await ApartSigner(asker).sign(payload(encode_plan(jump)))
            await publisher.publish(plan=jump, approval=approval)
            other = msgspec.structs.replace(jump, seq=jump.seq + 1)
            with pytest.raises(TrustError, match="bad_approval"):
                await publisher.publish(plan=other, approval=approval)

    asyncio.run(scenario())
    (entry,) = Lineage(gate.lineage).of("coin").read("approval")
    assert (entry["operator"], json.loads(entry["order"])["percent"]) == ("op", 100)


def test_an_operator_reads_the_plan_of_now_and_has_it_approved(homes, tmp_path):
    home, gate = homes
    orders.create(tmp_path / "op.pem", gate.operators / "op.pub")
    shutil.copytree(gate.operators, home.operators, dirs_exist_ok=True)
    words = ["coin", "--operator", "op", "--key", tmp_path / "op.pem", "--reason", "a fire"]

    def run(url, *more):
        command = [ROOT / "tools" / "approve-plan", *words, "--nats", url, *more]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, *map(str, command)],
            check=False,
            capture_output=True,
            text=True,
            env=environment,
        )

    async def scenario(url):
        async with cloud_of(home, url) as cloud:
            await cloud.until(lambda: cloud.family["rollout"]["unpublished"] == 0)
            loop = asyncio.get_running_loop()
            found = await asyncio.to_thread(run, url)
            done = await asyncio.to_thread(run, url, "--yes")
            fetcher = BusFetcher(cloud.bus, loop)
            root = (home.root / "trust" / "root.json").read_bytes()
            client = UpdateClient(tmp_path / "kiosk", root, fetcher, SystemClock())
            try:
                await asyncio.to_thread(client.refresh)
                custom = (await asyncio.to_thread(client.target, plan_path("coin"))).custom
            finally:
                client.close()
            return found, done, custom

    with (
        Broker.start(home.broker, Admissions(home).rules()) as broker,
        running("serve", "--home", home.root, "--nats", broker.url),
        running("gate", "--home", gate.root, "--nats", broker.url),
    ):
        found, done, custom = asyncio.run(scenario(broker.url))
    assert (found.returncode, done.returncode) == (0, 0), found.stderr + done.stderr
    assert "plan 1 of coin" in found.stdout
    assert home.of("coin").origin().sha256 in found.stdout
    assert "approved" not in found.stderr
    assert "plan 1 is approved" in done.stderr
    assert custom["approval"]["keyid"] == keys.load_signer(gate.root, "gate").public_key.keyid


async def forge_alone(home, bus, release, now_s):
    """What the learner's key can do alone, below online metadata that is genuine."""
    root = keys.trusted_root(home.root)
    signers = [keys.load_signer(home.root, "learner")]
    role, data = await forge_release(bus, root, release, signers, now_s)
    await publish_below(
        bus,
        root,
        {role: data},
        snapshot_signer=keys.load_signer(home.root, "snapshot"),
        timestamp_signer=keys.load_signer(home.root, "timestamp"),
        now_s=now_s,
    )
