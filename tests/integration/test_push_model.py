"""tools/push-model, end to end: any ONNX file, an operator's key, a real broker and host."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import parser

from cloud_learner import orders, pushing
from cloud_learner.admission import Admissions, operator_inbox
from cloud_learner.bootstrap import bootstrap
from cloud_learner.broker import Broker
from cloud_learner.config import Home
from cloud_learner.gate_home import move_out
from cloud_learner.rules import recent_hold_out
from cloud_learner.store.examples import Example
from cloud_learner.train.family import Family
from edge_runtime.bus.access import Access
from edge_runtime.bus.nats import connect
from edge_runtime.wire import subjects

ROOT = Path(__file__).parents[2]
WAIT_S = 120.0


@pytest.fixture(scope="module")
def bootstrapped(coin, tmp_path_factory):
    var = tmp_path_factory.mktemp("push")
    folder = coin.write_family(var / "coin")
    data = coin.write_csv(var / "data.csv", coin.stream(600))
    bootstrap(folder, data, Home(var / "home"), lambda _text: None)
    keep_recent(Family.load(folder), Home(var / "home"), coin.stream(800, seed=3, start_s=2000.0))
    return var


def keep_recent(family, home, events):
    """A hold-out as an earlier life of the gate would have kept it."""
    hold_out = recent_hold_out(family)
    asked = [each for each in events if each[4] is not None]
    for seq, (time_s, kind, device, fields, heads, label_time_s) in enumerate(asked, start=1):
        features = np.array([0.0, fields["x"], 0.0], "<f4").tobytes()
        ids = (device, 1, seq, "coin", time_s, label_time_s, features, family.spec.hash)
        hold_out.add([Example(*ids, heads, 1.0, [], 0.0, 0.0, kind, fields)])
    hold_out.save(home.of("coin").hold_out)


@pytest.fixture
def site(bootstrapped, tmp_path):
    """A home that knows the operator anna."""
    shutil.copytree(bootstrapped / "home", tmp_path / "home")
    home = Home(tmp_path / "home")
    orders.create(tmp_path / "anna.pem", home.operators / "anna.pub")
    orders.create(tmp_path / "eve.pem", tmp_path / "eve.pub")
    return home


@contextlib.contextmanager
def served(home, gate=None):
    """The broker's url, with a learner beside it, and a gate where it is apart."""
    with Broker.start(home.broker, Admissions(home).rules()) as broker, contextlib.ExitStack() as s:
        s.enter_context(process("serve", home, broker.url))
        if gate is not None:
            s.enter_context(process("gate", gate, broker.url))
        asyncio.run(spoken(home, broker.url))
        yield broker.url


@contextlib.contextmanager
def process(name, home, url):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cloud_learner.cli", name, "--home", str(home.root)]
    with subprocess.Popen(
        [*command, "--nats", url], stdout=subprocess.DEVNULL, env=environment
    ) as child:
        try:
            yield
        finally:
            child.terminate()
            child.wait(WAIT_S)


async def spoken(home, url):
    """Until the learner has said something."""
    bus, heard = await connect(url, name="test", access=Admissions(home).access()), asyncio.Event()

    async def hear(_message):
        heard.set()

    await bus.subscribe(subjects.LEARNER_STATUS, hear)
    async with asyncio.timeout(WAIT_S):
        await heard.wait()
    await bus.close()


def tool():
    path = ROOT / "tools" / "push-model"
    loader = importlib.machinery.SourceFileLoader("push_model", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("push_model", loader))
    loader.exec_module(module)
    return module.main


MAIN = tool()


def pushed(folder, file, *options):
    """Exit code, stdout and stderr of the tool."""
    arguments = [str(each) for each in (file, "--family", folder, *options)]
    done = CliRunner().invoke(MAIN, arguments)
    assert isinstance(done.exception, SystemExit | None), done.exception
    return done.exit_code, done.stdout, done.stderr


def converted(name):
    """A pipeline of scikit-learn that learned to toss this coin, as skl2onnx wrote it."""
    return ROOT / "tests" / "fixtures" / "foreign-1" / f"{name}.onnx"


# Hidden behind `features`, so that it is not worked out while the graph is optimised.
DIVIDES_BY_MINUS_ONE = """<ir_version: 8, opset_import: ["": 17]>
    g (float[n,3] features) => (float[n,1] probability)
    <int32[1] lowest = {-2147483648}, int32[1] none = {0}, int32[1] minus_one = {-1},
     int64[1] axis = {1}> {
    sum = ReduceSum (features, axis)
    x = Cast <to = 6> (sum)
    zero = Mul (x, none)
    low = Add (zero, lowest)
    high = Div (low, minus_one)
    probability = Cast <to = 1> (high) }"""


async def handed_in(url, home, key, data):
    """What comes of a package that the tool did not make."""
    wish = orders.Wish(family="coin", packages=[hashlib.sha256(data).hexdigest()] * 2)
    seed = home.root.parent / "anna.seed"
    seed.write_text(orders.seed(key))
    seed.chmod(0o600)
    access = Access(key=seed, inbox=operator_inbox("anna"))
    bus = await connect(url, name="test", access=access)
    try:
        return await pushing.hand_in(bus, orders.signed(wish, "anna", key), data, data)
    finally:
        await bus.close()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs do not trap this division")
def test_a_package_that_ends_the_process_that_tries_it_ends_no_gate(bootstrapped, site, tmp_path):
    model = onnx.load(next(site.registry.rglob("*.onnx")))
    model.graph.CopyFrom(parser.parse_model(DIVIDES_BY_MINUS_ONE).graph)
    key, good = tmp_path / "anna.pem", converted("scaled")
    with served(site) as url:
        found = asyncio.run(handed_in(url, site, key, model.SerializeToString()))
        assert found.answer.outcome == "fail"
        assert "package_crashed" in found.answer.verdicts[0].reason
        anna = ("--operator", "anna", "--key", key, "--nats", url, "--dry-run")
        code, out, told = pushed(bootstrapped / "coin", good, *anna)
        assert code == 0, told + out


def test_a_model_from_elsewhere_is_judged_and_released_or_refused_with_the_reason(
    bootstrapped, site, tmp_path
):
    folder = bootstrapped / "coin"
    good = converted("scaled")
    bad = converted("flipped")
    with served(site) as url:
        anna = ("--operator", "anna", "--key", tmp_path / "anna.pem", "--nats", url)
        code, out, told = pushed(folder, bad, *anna)
        assert code == 3, told
        assert "gate_refused" in told
        assert "fail  static" in out
        code, out, told = pushed(folder, good, *anna, "--dry-run")
        assert code == 0, told + out
        assert "a dry run: nothing is released" in out
        code, _, told = pushed(folder, good, *anna, "--stages", "1,10,50,100")
        assert (code, "unsupported_stages" in told) == (2, True), told
        code, _, told = pushed(folder, good, *anna, "--to", "site=z")
        assert (code, "unsupported_target" in told) == (2, True), told
        for name, key in (("anna", "eve.pem"), ("bob", "anna.pem")):
            stranger = ("--operator", name, "--key", tmp_path / key, "--nats", url)
            code, _, told = pushed(folder, good, *stranger)
            assert (code, f"{name} whom it knows by --key" in told) == (4, True), told
        command = [sys.executable, ROOT / "tools" / "push-model", good, "--family", folder, *anna]
        with subprocess.Popen(
            [str(each) for each in command], stderr=subprocess.PIPE, text=True
        ) as following:
            try:
                for line in following.stderr:
                    if "is on the canary" in line:
                        break
                else:
                    pytest.fail("it ended before it was on trial")
            finally:
                following.kill()


def test_a_gate_apart_judges_only_for_operators_that_it_knows_itself(bootstrapped, site, tmp_path):
    folder, gate = bootstrapped / "coin", Home(tmp_path / "gate")
    good = converted("scaled")
    move_out(site, gate)
    assert gate.key("gate").parent.stat().st_mode & 0o777 == 0o700
    shutil.copy(tmp_path / "eve.pub", site.operators)  # who owns the learner's home lets her in
    with served(site, gate) as url:
        anna = ("--operator", "anna", "--key", tmp_path / "anna.pem", "--nats", url)
        code, out, told = pushed(folder, good, *anna, "--dry-run")
        assert code == 0, told + out
        eve = ("--operator", "eve", "--key", tmp_path / "eve.pem", "--nats", url)
        code, _, told = pushed(folder, good, *eve)
        assert (code, "unknown_operator" in told) == (2, True), told


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (("--operator", "anna", "--key", "nowhere.pem"), 2, "no_key"),
        (("--operator", "anna"), 2, "name key"),
        (("--map", "features"), 2, "bad_map"),
        (("--stages", "many"), 2, "bad_stages"),
        (("--nats", "nats://127.0.0.1:9"), 4, "unreachable"),
        (("--quantize",), 1, "no_rows"),
    ],
)
def test_what_cannot_be_handed_in_is_refused_before_anything_is_sent(
    bootstrapped, tmp_path, options, code, word
):
    orders.create(tmp_path / "anna.pem", tmp_path / "anna.pub")
    file = converted("boosting")
    known = (
        () if "--operator" in options else ("--operator", "anna", "--key", tmp_path / "anna.pem")
    )

    found, _, told = pushed(bootstrapped / "coin", file, *known, *options)

    assert (found, word in told) == (code, True), told


@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="there is no environment to find")
def test_it_runs_from_a_shell_that_knows_no_environment():
    command = [f"{sys.base_prefix}/bin/python3", str(ROOT / "tools" / "push-model"), "--help"]
    assert subprocess.run(command, env={}, check=False, capture_output=True).returncode == 0


def test_an_unknown_family_names_the_known_ones(tmp_path):
    orders.create(tmp_path / "anna.pem", tmp_path / "anna.pub")
    file = converted("scaled")

    code, _, told = pushed("nobody", file, "--operator", "anna", "--key", tmp_path / "anna.pem")

    assert code == 2
    assert "unknown_family" in told
    assert "flight_delay" in told
