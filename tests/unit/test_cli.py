"""The `edge-runtime` command: what it writes, says and exits with."""

from __future__ import annotations

import contextlib
import json
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edge_runtime import config as configuration
from edge_runtime.api.telling import told
from edge_runtime.bus import nkey
from edge_runtime.cli import main
from edge_runtime.rollout.plan import Plan, PlanArm, model_path
from edge_runtime.runtime import Runtime
from edge_runtime.update.shelf import Shelf

WritePackage = Callable[..., tuple[Path, str]]


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[Callable[..., Result]]:
    """`edge("status")` runs a command in `tmp_path`."""
    with contextlib.chdir(tmp_path):
        yield lambda *args: CliRunner().invoke(main, list(args), catch_exceptions=False)


def test_init_writes_a_configuration_that_can_be_read(
    edge: Callable[..., Result], tmp_path: Path
) -> None:
    done = edge(
        *("init", "--device", "EWR", "--family", "flight_delay", "--attribute", "airport=EWR"),
        *("--nats", "nats://127.0.0.1:4222", "--root", "1.root.json"),
    )
    assert done.exit_code == 0
    assert "next: edge-runtime run" in done.stderr
    config = configuration.load(tmp_path / "edge.toml")
    assert (config.device, config.families) == ("EWR", ["flight_delay"])
    assert config.attributes == {"airport": "EWR"}
    assert config.root == tmp_path / "1.root.json"


def test_init_makes_the_devices_key_once_and_says_only_what_is_public(
    edge: Callable[..., Result], tmp_path: Path
) -> None:
    named = ("--device", "EWR", "--family", "toy")
    broker = ("--nats", "nats://127.0.0.1:4222", "--root", "1.root.json")
    first = edge("init", *named, *broker)
    key = tmp_path / "state" / "device.nk"
    seed = key.read_text().strip()
    public = nkey.load(key).public
    assert first.stdout == f"{public}\n"
    assert f"cloud-learner admit EWR {public}" in first.stderr
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert edge("init").stdout == f"{public}\n"
    assert key.read_text().strip() == seed
    assert seed not in first.output
    key.write_text("damaged")
    damaged = edge("init")
    assert (damaged.exit_code, damaged.stdout, key.read_text()) == (2, "", "damaged")
    assert "bad_key" in damaged.stderr


def test_init_without_a_broker_makes_no_key(edge: Callable[..., Result], tmp_path: Path) -> None:
    assert edge("init", "--device", "EWR", "--family", "toy").stdout == ""
    assert not (tmp_path / "state" / "device.nk").exists()


def test_init_with_a_package_makes_it_current(
    edge: Callable[..., Result], tmp_path: Path, write_package: WritePackage
) -> None:
    package, sha256 = write_package()
    for _again in range(2):
        options = [] if (tmp_path / "edge.toml").exists() else ["--device", "EWR"]
        done = edge("init", *options, "--package", str(package))
        assert done.exit_code == 0, done.stderr
        plan = Shelf(tmp_path / "state" / "shelf").load_current("toy")
        assert plan is not None
        assert (plan.stable.sha256, plan.reason) == (sha256, "factory")
        assert f"toy will serve factory-{sha256[:12]}" in done.stderr


def test_init_never_writes_over_a_configuration(
    edge: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "edge.toml").write_text("precious")
    done = edge("init", "--device", "EWR", "--family", "toy")
    assert (done.exit_code, (tmp_path / "edge.toml").read_text()) == (2, "precious")
    assert "config_exists" in done.stderr


def test_a_factory_package_does_not_replace_a_signed_release(
    edge: Callable[..., Result], tmp_path: Path, write_package: WritePackage
) -> None:
    assert edge("init", "--device", "EWR", "--family", "toy").exit_code == 0
    signed = Plan(
        family="toy", seq=4, stable=PlanArm("r4", model_path("toy", "r4"), "0" * 64, 4, 1.0)
    )
    shelf = Shelf(tmp_path / "state" / "shelf")
    shelf.save_current(signed)
    done = edge("init", "--package", str(write_package()[0]))
    assert done.exit_code == 2
    assert "signed_release" in done.stderr
    assert shelf.load_current("toy") == signed


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (["init", "--family", "toy"], 2, "add --device NAME"),
        (["init", "--device", "EWR"], 2, "add --family NAME"),
        (["init", "--device", "E WR", "--family", "toy"], 2, "bad_name"),
        (["init", "--device", "EWR", "--family", "toy", "--attribute", "x"], 2, "key=value"),
        (["init", "--device", "EWR", "--family", "toy", "--nats", "nats://x"], 2, "no_root"),
        (["run"], 2, "edge-runtime init"),
        (["status"], 2, "edge-runtime init"),
        (["predict", "toy", "{}"], 1, "kind"),
        (["predict", "toy"], 2, "Usage"),
        (["rollback", "toy", "--reason", "slow"], 2, "edge-runtime init"),
        (["rollback", "toy"], 2, "--reason"),
        (["run", "--package", "none.onnx"], 2, "does not exist"),
        (["run", "--http", "8080"], 2, "need --package"),
        (["run", "--socket", "edge.sock"], 2, "need --package"),
    ],
)
def test_a_mistake_has_its_exit_code_and_a_hint(
    edge: Callable[..., Result], tmp_path: Path, args: list[str], status: int, text: str
) -> None:
    done = edge(*args)
    assert (done.exit_code, done.stdout) == (status, "")
    assert text in done.stderr
    assert not (tmp_path / "edge.toml").exists()


def test_a_broken_package_is_refused_before_anything_is_written(
    edge: Callable[..., Result], tmp_path: Path, write_package: WritePackage
) -> None:
    package, _ = write_package(0.0, model_bias=1.0)
    done = edge("init", "--device", "EWR", "--package", str(package))
    assert done.exit_code == 1
    assert "golden_mismatch" in done.stderr
    assert not (tmp_path / "edge.toml").exists()


def test_init_takes_variants_of_one_release(
    edge: Callable[..., Result], tmp_path: Path, write_package: WritePackage
) -> None:
    package, sha256 = write_package()
    variant, other = write_package(ballast=2)
    done = edge("init", "--device", "EWR", "--package", str(package), "--package", str(variant))
    assert done.exit_code == 0, done.stderr
    plan = Shelf(tmp_path / "state" / "shelf").load_current("toy")
    assert plan is not None
    assert [each.sha256 for each in plan.stable.packages] == [sha256, other]


def test_the_doctor_answers_for_people_and_for_scripts(
    edge: Callable[..., Result], tmp_path: Path
) -> None:
    assert edge("init", "--device", "EWR", "--family", "toy").exit_code == 0
    well = edge("doctor")
    assert (well.exit_code, "fail" in well.stdout) == (0, False), well.stdout
    (tmp_path / "edge.sock").touch()
    ill = edge("doctor")
    assert (ill.exit_code, "edge.sock is no socket" in ill.stdout) == (1, True)
    answer = json.loads(edge("doctor", "--json").stdout)
    assert not answer["ok"]
    [failed] = [each for each in answer["findings"] if each["state"] == "fail"]
    assert (failed["what"], bool(failed["hint"])) == ("socket", True)


@pytest.mark.parametrize(
    "args",
    [
        ["status"],
        ["predict", "toy", '{"kind": "k", "time_s": 1, "fields": {}}'],
        ["rollback", "toy", "--reason", "slow"],
        ["status", "--socket", "other.sock"],
    ],
    ids=lambda args: " ".join(args[:2]),
)
def test_without_a_running_device_the_exit_code_is_unreachable(
    edge: Callable[..., Result], args: list[str]
) -> None:
    assert edge("init", "--device", "EWR", "--family", "toy").exit_code == 0
    done = edge(*args)
    assert (done.exit_code, done.stdout) == (4, "")
    assert "hint: edge-runtime run" in done.stderr


def test_a_status_for_people_says_why_a_release_is_here(write_model: Callable[..., Path]) -> None:
    with Runtime.open(package=write_model()) as runtime:
        status = runtime.statistics()
    [(name, family)] = status["families"].items()
    release = family["arms"][0]["release"]
    assert f"release   {release}: counter 0, of no signed plan" in told(status)

    family["arms"][0] |= {"counter": 3, "provenance": {"parent": "r00002-ab"}}
    verdict = {"outcome": "pass", "rules": ["static", "recent"], "sha256": "0" * 64}
    text = told(status | {"verdicts": {name: {release: verdict}}})
    assert f"release   {release}: counter 3, 2 rules pass, after r00002-ab" in text


def test_a_status_for_people_says_what_the_device_waits_for(
    write_model: Callable[..., Path],
) -> None:
    with Runtime.open(package=write_model()) as runtime:
        status = runtime.statistics()
    assert "waits" not in told(status)
    waits = {
        "toy": {"for": "window", "until": "2027-01-15T10:00:00Z"},
        "toys": {"for": "hold", "until": ""},
    }
    lines = told(status | {"waits": waits}).splitlines()
    assert [line for line in lines if line.startswith("waits")] == [
        "waits     toy: window 2027-01-15T10:00:00Z",
        "waits     toys: hold",
    ]


def test_a_status_for_people_says_what_flash_bears(
    write_model: Callable[..., Path],
) -> None:
    with Runtime.open(package=write_model()) as runtime:
        lines = told(runtime.statistics()).splitlines()
    [flash] = [line for line in lines if line.startswith("flash")]
    assert re.fullmatch(
        r"flash     \d+ bytes written today, 0 yesterday, \d+\.\d\d per byte logged", flash
    )
