"""C10: the audit of a home: real keys, a real publisher, journals, signed plans and lineage."""

from __future__ import annotations

import asyncio
import json
import shutil

import msgspec
import onnx
import pytest
from click.testing import CliRunner

from cloud_learner import approvals, orders
from cloud_learner.admission import Admissions
from cloud_learner.auditing import audit
from cloud_learner.bootstrap import bootstrap
from cloud_learner.cli import main
from cloud_learner.config import Home
from cloud_learner.controller import Controller
from cloud_learner.judging import passed_before
from cloud_learner.publisher import Publisher
from cloud_learner.release.keys import load_signer
from cloud_learner.release.repository import Repository
from cloud_learner.releasing import Releases, release_signers
from cloud_learner.rollout.control import Control
from cloud_learner.rollout.journal import Signed
from cloud_learner.rollout.state import Offer, Rules
from cloud_learner.rollouts import consent_of
from cloud_learner.store.examples import Example
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.registry import Registry
from edge_runtime.bus import nkey
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import ManualClock, SystemClock
from edge_runtime.errors import ConfigError
from edge_runtime.rollout.plan import model_path
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import ArmReport, Report, Scored

RULES = Rules(family="coin", selector={}, stages=(50.0, 100.0))
PASSED = {"outcome": "pass"}
DEVICES = [f"device-{number}" for number in range(12)]


@pytest.fixture(scope="module")
def audited(coin, tmp_path_factory):
    """A home whose campaign promoted one release and rolled another back."""
    var = tmp_path_factory.mktemp("audit")
    folder = coin.write_family(var / "coin")
    bootstrap(
        folder,
        coin.write_csv(var / "data.csv", coin.stream(600)),
        Home(var / "home"),
        lambda _: None,
    )
    asyncio.run(campaign(Home(var / "home")))
    return var / "home"


async def campaign(home):
    key = nkey.create(home.root / "device-1.nk")
    Admissions(home).admit("device-1", key.public)
    controller = await begun(home, RULES)
    await tried(home, controller, 2, 0.25, key, hold=True)
    await tried(home, controller, 3, 0.9, key)
    await controller.close()


async def begun(home, rules):
    """A controller over the home, with real keys and a real publisher."""
    lineage, clock = Lineage(home.lineage), ManualClock(SystemClock().now_s())
    known = passed_before(lineage.of("coin"))
    signers = release_signers(home, lambda _name, sha256: known.get(sha256, PASSED))
    publisher = Publisher(home.root, await MemoryBroker().connect(name="c"), signers, clock)
    part = lineage.of("coin")
    publish = Releases("coin", Registry(home.registry), part).publishing(publisher)
    controller = Controller(rules, home.of("coin").campaign, publish, part, clock)
    await controller.start()
    return controller


async def tried(home, controller, counter, new, key, *, hold=False):
    """Offer a release whose answers are `new`, until it is decided or waits for a person."""
    stable = controller.stable
    await controller.offer(changed(home, stable, counter))
    if hold:
        await controller.control(Control(verb="hold", by="anna", reason="x", device="device-1"))
    for batch in range(80):
        status, trial = controller.status(), controller.status()["canary"]
        if trial is None or status["waits"]:
            break
        for name in DEVICES:
            said = report(name, stable.release, trial["release"], 10_000 * counter + batch)
            await controller.report(said, sealed(said, key) if name == "device-1" else None)
        arms = (stable.release, 0.25), (trial["release"], new)
        seqs = range(10_000 * counter + 100 * batch, 10_000 * counter + 100 * batch + 100)
        await controller.examples([example(seq, *arms) for seq in seqs])


def changed(home, stable, counter):
    """The package that serves, with other words in it."""
    model = onnx.load(stable.file)
    model.doc_string = f"number {counter}"
    data = model.SerializeToString()
    registry = Registry(home.registry)
    sha256, name = registry.put(data), f"r{counter:05d}"
    return Offer(
        release=name,
        path=model_path("coin", name),
        sha256=sha256,
        counter=counter,
        file=str(registry.path(sha256)),
        learned_through_s=0.0,
        arrived_s=0.0,
        verdict=PASSED,
    )


def report(name, old, new, number):
    arms = [ArmReport("coin", arm, each, 0.0) for arm, each in (("stable", old), ("canary", new))]
    facts = (1, name, 1, float(number), {}, arms, 2, {}, {}, [], 0, 0)
    return Report(*facts, number=number)


def sealed(said, key):
    """The report as the device would have sent it."""
    body = codec.encode(said)
    return Signed(body, key.sign(codec.signed_report(subjects.report(said.device), body)))


def example(seq, *arms):
    wave = 0.02 * (seq % 5 - 2)
    answers = zip(arms, (wave, 1.01 * wave), strict=True)
    scored = [Scored(name, "", [answer + more]) for (name, answer), more in answers]
    facts = (DEVICES[seq // 20 % 12], 1, seq, "coin", float(seq), 0.0, b"", "")
    return Example(*facts, float(seq % 4 == 0), 0.5, scored, 0.0, 0.0)


@pytest.fixture
def home(audited, tmp_path):
    shutil.copytree(audited, tmp_path / "home")
    return Home(tmp_path / "home")


def test_c10_every_decision_is_come_to_again_from_signed_plans_and_journals(home):
    found = audit(home, "coin")

    assert [each.reason for each in found] == [
        *("canary", "control", "stage", "promoted"),
        *("canary", "harm"),
    ]
    assert [each.against for each in found] == [""] * 6
    assert audit(home, "coin", "r00003") == found[4:]


def test_c10_the_command_says_so_and_exits_by_it(home):
    done = CliRunner().invoke(
        main, ["rollout", "audit", "coin", "--home", str(home.root), "--json"]
    )
    assert (done.exit_code, len(json.loads(done.stdout))) == (0, 6)

    tamper(home, "00000006-r00003.jsonl", b'"example"', b",0.5,", b",0.4,")
    done = CliRunner().invoke(main, ["rollout", "audit", "coin", "--home", str(home.root)])

    assert done.exit_code == 1
    assert "DIFFERS" in done.stdout
    assert "5 of 6 decisions agree" in done.stderr


def tamper(home, name, where, old, new):
    """Change the first line that holds `where`."""
    path = home.of("coin").trials / name
    lines = path.read_bytes().split(b"\n")
    at = next(number for number, line in enumerate(lines) if where in line and old in line)
    lines[at] = lines[at].replace(old, new, 1)
    path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(
    ("name", "where", "change", "told"),
    [
        (".jsonl", b'"example"', (b",0.5,", b",0.4,"), "comes to"),
        (".jsonl", b'"report"', (b"device-4", b"device-5"), "the journal"),
        (".jsonl", b'"rules"', (b'"pairs_min":100', b'"pairs_min":9'), "the journal"),
        (".plans", b"promoted", (b"paired labels", b"pairs of them"), "another plan"),
        (".plans", b"promoted", (b"expires", b"expired"), "not signed"),
    ],
)
def test_c10_a_file_that_was_tampered_with_is_found(home, name, where, change, told):
    tamper(home, f"00000002-r00002{name}", where, *change)

    against = [each.against for each in audit(home, "coin", "r00002") if not each.agrees]

    assert against
    assert told in against[0]


def test_c10_lineage_that_says_something_else_is_found(home):
    path = home.lineage / "lineage.jsonl"
    path.write_bytes(
        path.read_bytes().replace(b"r00003 is rolled back", b"r00003 replaces all, back")
    )

    (found,) = [each for each in audit(home, "coin") if not each.agrees]

    assert (found.reason, found.against) == ("harm", "lineage says something else, or nothing")


def test_c10_a_report_that_its_device_did_not_sign_is_found(home, tmp_path):
    other = nkey.create(tmp_path / "other.nk")
    Admissions(home).admit("device-1", other.public, replace=True)

    against = [each.against for each in audit(home, "coin") if not each.agrees]

    assert "is not signed by device-1's key of now" in against[0]


def test_c8_an_operators_approval_brings_the_gates_signature_to_the_plan_that_follows(home):
    orders.create(home.root / "anna.pem", home.operators / "anna.pub")
    key = nkey.load(home.root / "device-1.nk")

    async def main():
        controller = await begun(home, msgspec.structs.replace(RULES, approve=True))
        await tried(home, controller, 4, 0.25, key)
        assert controller.status()["waits"] == "approve"
        order = consent_of(controller.status(), "looks well", "anna", home.root / "anna.pem")

        async def approve(plan):
            signer = load_signer(home.root, "gate")
            return approvals.approve(plan, order, home.operators, lambda _sha256: True, signer)

        said = Control(verb="approve", by="anna", reason="looks well")
        await controller.control(said, approve)
        status = controller.status()
        await controller.close()
        return status

    status = asyncio.run(main())
    assert (status["stages"][0]["state"], status["last_failure"]) == ("passed", "")
    published = Repository(home.root / "tuf").state.roles["plans"].text
    assert json.loads(published)["signed"]["targets"]["p/coin.json"]["custom"]["approval"]["keyid"]
    assert [each.against for each in audit(home, "coin", "r00004")] == ["", ""]


def test_what_is_not_kept_is_named(home):
    with pytest.raises(ConfigError) as caught:
        audit(home, "coin", "r00009")
    assert caught.value.code == "unknown_release"
    with pytest.raises(ConfigError) as caught:
        audit(home, "nobody")
    assert caught.value.code == "unknown_family"
