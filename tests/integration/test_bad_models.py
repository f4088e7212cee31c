"""Bad packages meet a device that serves: each is refused by name, and the old one answers on.

All of them are signed, as it were: the hash is right, the content is bad. They go the way of an
update: onto the shelf, through the prover, into memory. The last tests send them to a real daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import os
import platform
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper, parser

from cloud_learner.broker import Broker
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.release.metadata import ReleaseFile
from edge_runtime import factory
from edge_runtime.api.client import Client
from edge_runtime.bus import nats
from edge_runtime.bus.base import Bus, Message
from edge_runtime.clock import ManualClock, SystemClock
from edge_runtime.config import EdgeConfig
from edge_runtime.errors import CapacityError, PackageError, TrustError
from edge_runtime.inference.prover import Prover
from edge_runtime.inference.slot import Arm
from edge_runtime.rollout.arms import load_plan_arm
from edge_runtime.rollout.health import BAD_LOOKS
from edge_runtime.rollout.plan import Plan, PlanArm, model_path
from edge_runtime.runtime import Event, Runtime
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import Report

NOW_S = 1_360_000_000.0
MIB = 1 << 20
COMMAND = [sys.executable, "-m", "edge_runtime.cli"]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
FIELDS = {"carrier": "UA", "distance": 998.0}
WritePackage = Callable[..., tuple[Path, str]]
Spoil = Callable[[onnx.ModelProto], None]

on_x86 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="other CPUs do not trap this division"
)

# Each stands for the graph of the good package, with its inputs, outputs and metadata. What they
# do is hidden behind `features`, so that it is not worked out while the graph is optimised.
DIVIDES_BY_MINUS_ONE = """ <int32[1] lowest = {-2147483648}, int32[1] none = {0},
                            int32[1] minus_one = {-1}, int64[1] axis = {1}> {
    sum = ReduceSum (features, axis)
    x = Cast <to = 6> (sum)
    zero = Mul (x, none)
    low = Add (zero, lowest)
    high = Div (low, minus_one)
    probability = Cast <to = 1> (high) }"""
LOOPS = """ <int64 turns = {4611686018427387904}, bool yes = {1}, int64[1] axis = {1}> {
    same = Loop <body = b (int64 i, bool on, float[n,5] x) => (bool still, float[n,5] y) {
        still = Identity (on)
        y = Identity (x) }> (turns, yes, features)
    probability = ReduceSum (same, axis) }"""
FILLS = """ <int64[1] count = {25000000000}, int64[1] axis = {1}> {
    sum = ReduceSum (features, axis)
    much = ConstantOfShape (count)
    total = ReduceSum <keepdims = 0> (much)
    probability = Add (sum, total) }"""


def computing(body: str) -> Spoil:
    def spoil(model: onnx.ModelProto) -> None:
        text = '<ir_version: 8, opset_import: ["": 17]> '
        head = "g (float[n,5] features) => (float[n,1] probability)"
        model.graph.CopyFrom(parser.parse_model(text + head + body).graph)

    return spoil


def of_opset(version: int) -> Spoil:
    def spoil(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return spoil


def of_ir(version: int) -> Spoil:
    def spoil(model: onnx.ModelProto) -> None:
        model.ir_version = version

    return spoil


def with_input(name: str, element: int, columns: int) -> Spoil:
    def spoil(model: onnx.ModelProto) -> None:
        [given] = model.graph.input
        given.type.tensor_type.elem_type = element
        given.type.tensor_type.shape.dim[1].dim_value = columns
        given.name = model.graph.node[0].input[0] = name
        if element != onnx.TensorProto.FLOAT or columns != 5:
            model.graph.node[0].CopyFrom(
                onnx.helper.make_node("Cast", [name], ["logits"], to=onnx.TensorProto.FLOAT)
            )
            mean = onnx.helper.make_node("ReduceMean", ["logits"], ["logit"], axes=[1])
            model.graph.node.insert(1, mean)

    return spoil


def with_weights_in(location: str) -> Spoil:
    """The weights left out of the file: with a path that leads to something, or to nothing."""

    def spoil(model: onnx.ModelProto) -> None:
        weights = next(each for each in model.graph.initializer if each.name == "w")
        weights.ClearField("raw_data")
        weights.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": "0", "length": "20"}.items():
            weights.external_data.add(key=key, value=value)

    return spoil


def answering(value: float) -> Spoil:
    def spoil(model: onnx.ModelProto) -> None:
        bias = next(each for each in model.graph.initializer if each.name == "b")
        numpy = numpy_helper.to_array(bias) * 0 + value
        bias.CopyFrom(numpy_helper.from_array(numpy, "b"))

    return spoil


def saying(key: str, text: str | None) -> Spoil:
    """With another text in its metadata, or none under that key."""

    def spoil(model: onnx.ModelProto) -> None:
        said = {each.key: each.value for each in model.metadata_props}
        said.pop(f"headwater.{key}")
        if text is not None:
            said[f"headwater.{key}"] = text
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, said)

    return spoil


FLOAT, DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
BAD = {
    "of an opset to come": (of_opset(99), "unreadable_package"),
    "of a format to come": (of_ir(99), "unreadable_package"),
    "with another input": (with_input("rows", FLOAT, 5), "wrong_signature"),
    "with doubles for floats": (with_input("features", DOUBLE, 5), "wrong_signature"),
    "with another width": (with_input("features", FLOAT, 6), "wrong_signature"),
    "with weights at an absolute path": (with_weights_in("/etc/passwd"), "external_data"),
    "with weights above it": (with_weights_in("../../../../etc/passwd"), "external_data"),
    "with weights in another file": (with_weights_in("weights.bin"), "external_data"),
    "that answers otherwise": (answering(0.001), "golden_mismatch"),
    "that answers nothing": (answering(float("nan")), "golden_mismatch"),
    "without its interface": (saying("interface", None), "missing_metadata"),
    "with half a text": (saying("interface", '{"family": "toy", "kin'), "bad_metadata"),
    "with a text without end": (saying("golden", "[" * 100_000), "bad_metadata"),
    "with samples that are none": (saying("golden", '{"shape": [1e999, -1]}'), "bad_metadata"),
    "with features of no kind": (saying("features", '{"version": 1}'), "bad_metadata"),
    "of another family": (saying("family", "other"), "bad_metadata"),
    "that hangs": (computing(LOOPS), "package_hung"),
    "that fills the memory": (computing(FILLS), "package_too_big"),
}
CRASHES = computing(DIVIDES_BY_MINUS_ONE)


def spoiled(good: bytes, spoil: Spoil) -> bytes:
    model = onnx.load_from_string(good)
    spoil(model)
    return model.SerializeToString()


def planned(data: bytes) -> PlanArm:
    return PlanArm("r2", model_path("toy", "r2"), hashlib.sha256(data).hexdigest(), 1, 1.0)


@dataclass
class Device:
    """A runtime that serves the good package, and what an update goes through."""

    runtime: Runtime
    prover: Prover
    good: bytes

    def __post_init__(self) -> None:
        self.refused_before = self.prover.statistics()["refused"]

    def update(self, data: bytes) -> None:
        """What the agent does with a plan that names a package of these bytes."""
        loaded = self.load(data)
        self.runtime.swap("toy", [loaded], Plan(family="toy", seq=2, stable=planned(data)))

    def load(self, data: bytes) -> Arm:
        arm, shelf = planned(data), self.runtime.shelf
        path = shelf.put_whole(arm.sha256, data)
        return load_plan_arm(shelf, "stable", arm, lambda _: path, self.prover.prove)

    def spoiled(self, spoil: Spoil) -> bytes:
        return spoiled(self.good, spoil)

    def answer(self) -> tuple[str, list[float]]:
        prediction = self.runtime.predict("toy", Event("scheduled", NOW_S, FIELDS))
        return prediction.release, prediction.outputs


@pytest.fixture(scope="module")
def prover() -> Iterator[Prover]:
    with contextlib.closing(Prover(timeout_s=2.0)) as prover:
        yield prover


@pytest.fixture
def device(tmp_path: Path, write_package: WritePackage, prover: Prover) -> Iterator[Device]:
    path, _ = write_package()
    config = EdgeConfig(
        device="EWR",
        families=["toy"],
        state_dir=tmp_path / "state",
        socket=tmp_path / "edge.sock",
    )
    factory.install(config, path, factory.inspect(path))
    with Runtime.open(config, clock=ManualClock(NOW_S)) as runtime:
        yield Device(runtime, prover, path.read_bytes())


def refused(device: Device, data: bytes) -> str:
    """The code with which an update is refused, the old release answering before and after."""
    before = device.answer()
    assert before[0].startswith("factory")
    with pytest.raises(PackageError) as caught:
        device.update(data)
    assert device.answer() == before
    assert device.runtime.statistics()["counters"]["swaps"] == 1
    assert caught.value.message
    return caught.value.code


@pytest.mark.parametrize("name", BAD)
def test_a_bad_package_is_refused_by_name_and_the_old_one_serves_on(
    device: Device, name: str
) -> None:
    spoil, code = BAD[name]
    data = device.spoiled(spoil)
    with growing_at_most(64 * MIB):
        assert refused(device, data) == code
    with pytest.raises(TrustError, match="release_quarantined"):
        device.update(data)


@on_x86
def test_a_package_that_ends_the_process_ends_another_one(device: Device) -> None:
    assert refused(device, device.spoiled(CRASHES)) == "package_crashed"


# Sound on the samples, whose features are 100 at most; a distance is more.
SAYS_NAN = """ <float none = {0}, float high = {500}, int64[1] axis = {1}> {
    sum = ReduceSum (features, axis)
    logit = Mul (sum, thousandth)
    said = Sigmoid (logit)
    most = ReduceMax <axes = [1]> (features)
    left = Sub (high, most)
    root = Sqrt (left)
    nothing = Mul (root, none)
    probability = Add (said, nothing) }"""
FAILS = """ <float high = {500}, float[1,1] table = {0}, int64[1] axis = {1}> {
    sum = ReduceSum (features, axis)
    logit = Mul (sum, thousandth)
    said = Sigmoid (logit)
    most = ReduceMax <axes = [1], keepdims = 0> (features)
    part = Div (most, high)
    place = Cast <to = 7> (part)
    nothing = Gather (table, place)
    probability = Add (said, nothing) }"""


@pytest.mark.parametrize("body", [SAYS_NAN, FAILS], ids=["nan", "fails"])
def test_r5_a_release_that_only_fails_on_what_really_comes_is_left_without_a_network(
    device: Device, body: str
) -> None:
    body = body.replace("<float", "<float thousandth = {0.001}, float", 1)
    data = device.spoiled(computing(body))
    before = device.answer()

    def ask() -> None:
        with contextlib.suppress(PackageError):
            assert not math.isfinite(device.answer()[1][0])

    def looks(count: int) -> None:
        for _ in range(count):
            ask()
            device.runtime.watch.look_at_stable()

    device.runtime.watch.look_at_stable()
    device.update(data)
    looks(BAD_LOOKS - 1)
    assert device.runtime.model("toy").releases == ("r2",)
    looks(1)
    assert device.answer() == before
    assert device.runtime.watch.statistics()["releases_left"] == 1
    with pytest.raises(TrustError, match="release_quarantined"):
        device.update(data)


def test_r5_the_last_release_is_not_left_and_a_good_answer_acquits(device: Device) -> None:
    device.answer()
    for _ in range(2 * BAD_LOOKS):
        device.runtime.watch.look_at_stable()
    counts = device.runtime.watch.statistics()
    assert counts == {"bad_looks": 0, "releases_left": 0, "trials_left": 0}


def test_metadata_that_is_no_text_is_refused(device: Device) -> None:
    data = device.good.replace(b'"clock"', b'"cl\xffck"')
    assert data != device.good
    assert refused(device, data) == "unreadable_package"


def test_after_all_that_a_good_package_is_taken(device: Device) -> None:
    for spoil, _ in (BAD["that answers otherwise"], BAD["that fills the memory"]):
        refused(device, device.spoiled(spoil))
    provenance = json.dumps({"bias": 0.0, "second": True})
    device.update(device.spoiled(saying("provenance", provenance)))
    assert device.answer()[0] == "r2"


def test_a_truncated_package_is_refused_wherever_it_ends(device: Device) -> None:
    codes = {refused(device, device.good[: len(device.good) * part // 23]) for part in range(1, 23)}
    assert codes <= {"unreadable_package", "missing_metadata", "wrong_signature"}


def flips(device: Device, seed: int, count: int) -> None:
    """Packages with one to four flipped bits: refused by name, or sound, for some bits say little.

    It is the child that refuses, and outlives them all: what it found sound loads here, too.
    """
    starts = device.prover.statistics()["starts"]
    chance, before, codes = random.Random(seed), device.answer(), list[str]()
    for turn in range(count):
        data = bytearray(device.good)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        codes.append(loaded(device, bytes(data)))
        assert device.answer() == before, f"seed {seed}, turn {turn}"
    refused_here = [code for code in codes if code not in ("", "release_quarantined")]
    assert device.prover.statistics()["refused"] - device.refused_before == len(refused_here)
    assert device.prover.statistics()["starts"] - starts <= 1, f"seed {seed}: {set(codes)}"
    assert "" in codes, f"seed {seed}"
    assert len(set(refused_here)) > 2, f"seed {seed}: {set(refused_here)}"


def loaded(device: Device, data: bytes) -> str:
    """The code with which a package is refused; empty for one that was loaded."""
    try:
        device.load(data)
    except (PackageError, TrustError) as error:
        return error.code
    return ""


def test_flipped_bits_never_end_the_process_nor_raise_what_nobody_expects(device: Device) -> None:
    with growing_at_most(64 * MIB):
        flips(device, seed=1, count=100)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_flipped_bits(device: Device, seed: int) -> None:
    flips(device, seed, count=500)


def test_metadata_that_is_garbage_is_refused(device: Device) -> None:
    chance = random.Random(3)
    keys_said = [
        each.key.removeprefix("headwater.")
        for each in onnx.load_from_string(device.good).metadata_props
    ]
    for turn in range(100):
        key = chance.choice([each for each in keys_said if each != "provenance"])
        text = "".join(chance.choices('{}[]",:0123456789eE.-ntfalsru\\x\u2708', k=turn))
        assert refused(device, device.spoiled(saying(key, text))) in {
            *("bad_metadata", "spec_mismatch"),
        }


@contextlib.contextmanager
def growing_at_most(bytes_max: int) -> Iterator[None]:
    """Check that this process is at no moment of the block larger by more than so many bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what there is now
    before = memory("VmRSS")
    yield
    assert memory("VmHWM") - before <= bytes_max


def memory(what: str, pid: int | str = "self") -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


@dataclass
class Cloud:
    """A broker, and a publisher that signs whatever it is given."""

    bus: Bus
    publisher: Publisher
    reports: asyncio.Queue[Report]

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, home: Path, url: str) -> AsyncIterator[Cloud]:
        bus = await nats.connect(url, name="cloud")
        reports: asyncio.Queue[Report] = asyncio.Queue()

        async def take(message: Message) -> None:
            reports.put_nowait(codec.decode_report(message.data))

        subscription = await bus.subscribe(subjects.report("EWR"), take)
        await bus.ensure_stream(
            subjects.STATE_STREAM,
            subjects.STATE_ALL,
            max_bytes=MIB,
            per_subject=1,
            discard_new=False,
        )
        publisher = Publisher(home, bus, keys.load(home), SystemClock())
        await publisher.publish()
        yield cls(bus, publisher, reports)
        await subscription.close()
        await bus.close()

    async def publish(self, name: str, seq: int, data: bytes) -> None:
        release = ReleaseFile(
            "toy", name, seq, data, {"outcome": "pass", "rules": [], "sha256": ""}
        )
        arm = PlanArm(name, release.path, release.sha256, seq, 1.0)
        await self.publisher.publish(release, Plan(family="toy", seq=seq, stable=arm))

    async def until(self, holds: Callable[[Report], bool]) -> Report:
        """The next report of the device of which `holds` is true."""
        async with asyncio.timeout(30):
            while not holds(report := await self.reports.get()):
                pass
        return report


@on_x86
def test_a_daemon_survives_what_is_published_to_it(
    tmp_path: Path, write_package: WritePackage
) -> None:
    """One release ends the process that tries it, one fills its memory; the third is sound."""
    package, _ = write_package()
    good = package.read_bytes()
    home = tmp_path / "cloud"
    keys.create(home, ["toy"])

    async def scene(url: str) -> None:
        async with answering(home, url, tmp_path) as (cloud, first):
            await cloud.publish("r1", 1, spoiled(good, CRASHES))
            await cloud.until(lambda report: "package_crashed" in report.refused)
            assert asked(tmp_path) == first
            await cloud.publish("r2", 2, spoiled(good, computing(FILLS)))
            await cloud.until(lambda report: "package_too_big" in report.refused)
            assert asked(tmp_path) == first
            assert memory("VmHWM", daemon.pid) < 200 * MIB
            await cloud.publish("r3", 3, spoiled(good, saying("provenance", "{}")))
            report = await cloud.until(lambda report: report.arms[0].release == "r3")
            assert asked(tmp_path) == ("r3", first[1])
            assert report.counters["swap_failures"] == 0

    with Broker.start(tmp_path / "broker") as broker:
        root = str(home / "trust" / "root.json")
        options = ["--device", "EWR", "--nats", broker.url, "--root", root]
        subprocess.run(
            [*COMMAND, "init", *options, "--package", str(package)],
            cwd=tmp_path,
            env=ENVIRONMENT,
            check=True,
            capture_output=True,
        )
        with subprocess.Popen(
            [*COMMAND, "run"], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.DEVNULL
        ) as daemon:
            try:
                asyncio.run(scene(broker.url))
            finally:
                daemon.terminate()
        assert daemon.returncode == 0


HANGS = """ <float thousandth = {0.001}, float high = {500}, int64 few = {3000},
               int64 many = {4611686018427387904}, bool yes = {1}, int64[1] axis = {1}> {
    sum = ReduceSum (features, axis)
    logit = Mul (sum, thousandth)
    said = Sigmoid (logit)
    most = ReduceMax <keepdims = 0> (features)
    much = Greater (most, high)
    turns = Where (much, many, few)
    probability = Loop <body = b (int64 i, bool on, float[n,1] x) => (bool still, float[n,1] y) {
        still = Identity (on)
        y = Identity (x) }> (turns, yes, said) }"""


def test_r5_a_heavy_release_that_hangs_on_what_really_comes_is_left(
    tmp_path: Path, write_package: WritePackage
) -> None:
    """It loops for ever where a feature is above 500; the samples are 100 at most."""
    package, _ = write_package()
    home = tmp_path / "cloud"
    keys.create(home, ["toy"])

    async def scene(url: str) -> None:
        async with answering(home, url, tmp_path) as (cloud, first):
            await cloud.publish("r1", 1, spoiled(package.read_bytes(), computing(HANGS)))
            await cloud.until(lambda report: report.arms[0].release == "r1")
            with pytest.raises(CapacityError, match="deadline_exceeded"):
                asked(tmp_path)
            await cloud.until(lambda report: report.arms[0].release == first[0])
            assert asked(tmp_path) == first
            await cloud.publisher.publish()
            await cloud.until(lambda report: "release_quarantined" in report.refused)
            await cloud.publish("r2", 2, spoiled(package.read_bytes(), computing(HEAVY)))
            await cloud.until(lambda report: report.arms[0].release == "r2")
            assert asked(tmp_path) == ("r2", pytest.approx(first[1]))

    with daemon_at(tmp_path, home, "--package", str(package)) as url:
        asyncio.run(scene(url))


HEAVY = HANGS.replace("Where (much, many, few)", "Where (much, few, few)")


def test_a_daemon_without_tokenizers_keeps_what_serves_and_says_what_to_install(
    tmp_path: Path,
    write_package: WritePackage,
    write_text_package: WritePackage,
    without_tokenizers: Path,
) -> None:
    """No package is at fault: nothing is in quarantine, and the next release serves."""
    package, _ = write_package()
    path = os.pathsep.join([str(without_tokenizers), ENVIRONMENT["PYTHONPATH"]])
    home = tmp_path / "cloud"
    keys.create(home, ["toy"])

    async def scene(url: str) -> None:
        async with answering(home, url, tmp_path) as (cloud, first):
            texts, _ = write_text_package(family="toy")
            await cloud.publish("r1", 1, texts.read_bytes())
            await cloud.until(lambda report: "missing_extra" in report.refused)
            assert asked(tmp_path) == first
            await cloud.publish("r2", 2, spoiled(package.read_bytes(), saying("provenance", "{}")))
            report = await cloud.until(lambda report: report.arms[0].release == "r2")
            assert report.refused.keys() == {"missing_extra"}
            assert asked(tmp_path) == ("r2", first[1])

    said = tmp_path / "daemon.log"
    with daemon_at(tmp_path, home, "--package", str(package), path=path, said=said) as url:
        asyncio.run(scene(url))
    assert "pip install 'headwater[text]'" in said.read_text()
    shelf = tmp_path / "state" / "shelf"
    assert shelf.is_dir()
    assert not (shelf / "quarantine.json").exists()


@contextlib.contextmanager
def daemon_at(
    folder: Path,
    home: Path,
    *more: str,
    path: str = ENVIRONMENT["PYTHONPATH"],
    said: Path = Path(os.devnull),
) -> Iterator[str]:
    """A daemon that gives models a fifth of a second, with a broker; it must end in order."""
    with Broker.start(folder / "broker") as broker:
        root = str(home / "trust" / "root.json")
        options = ["--device", "EWR", "--nats", broker.url, "--root", root, *more]
        subprocess.run(
            [*COMMAND, "init", *options],
            cwd=folder,
            env=ENVIRONMENT,
            check=True,
            capture_output=True,
        )
        with (folder / "edge.toml").open("a") as file:
            file.write("\n[inference]\ndeadline_ms = 200\n")
        with (
            said.open("w") as log,
            subprocess.Popen(
                [*COMMAND, "run"],
                cwd=folder,
                env=ENVIRONMENT | {"PYTHONPATH": path},
                stderr=log,
            ) as daemon,
        ):
            try:
                yield broker.url
            finally:
                daemon.terminate()
        assert daemon.returncode == 0


@contextlib.asynccontextmanager
async def answering(
    home: Path, url: str, folder: Path
) -> AsyncIterator[tuple[Cloud, tuple[str, list[float]]]]:
    """The cloud of a daemon that serves, and what that one answers."""
    async with Cloud.open(home, url) as cloud:
        await cloud.until(lambda report: bool(report.arms))
        yield cloud, asked(folder)


def asked(folder: Path) -> tuple[str, list[float]]:
    with Client(folder / "edge.sock") as client:
        answer = client.predict("toy", "scheduled", NOW_S, FIELDS)
    return answer.release, answer.outputs
