"""`tools/key-ceremony`: the checklist, what it refuses, and what it says to do next."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cloud_learner.config import Home
from cloud_learner.release import keys
from cloud_learner.release.custody import ALL_KEYS, OFFLINE, ROOT_KEYS
from cloud_learner.release.keyfiles import public_pem, read_public, write_new
from edge_runtime.errors import ConfigError

TOOL = Path(__file__).parents[2] / "tools" / "key-ceremony"
LOADER = SourceFileLoader("key_ceremony", str(TOOL))
SPEC = importlib.util.spec_from_loader("key_ceremony", LOADER)
PASSPHRASE = "four words nobody takes"


class Place:
    """A home and three folders apart from it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.apart = folder, folder / "home", folder / "a"

    def run(self, *words: str, apart: str = "abc", code: int = 0) -> Result:
        module = importlib.util.module_from_spec(SPEC)
        LOADER.exec_module(module)
        offline = [word for name in apart for word in ("--offline", str(self.folder / name))]
        words = (*words, "--home", str(self.home), *offline)
        result = CliRunner().invoke(module.main, words, catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result

    def show(self, apart: str = "abc") -> dict[str, dict[str, str]]:
        found = json.loads(self.run("show", "--json", apart=apart).stdout)
        return {row["key"]: row for row in found["keys"]}

    def snapshot(self) -> dict[str, bytes]:
        files = self.folder.rglob("*.*")
        return {str(path): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    place.run("create", "--family", "toy")
    return place


def test_root_and_targets_lie_apart_and_the_rest_at_home(place: Place) -> None:
    online = {f"{name}.pem" for name in ALL_KEYS if name not in OFFLINE}
    assert {path.name for path in (place.home / "keys").iterdir()} == online
    apart = {name: {p.name for p in (place.folder / name).iterdir()} for name in "abc"}
    assert apart == {
        "a": {"root-1.pem", "targets.pem"},
        "b": {"root-2.pem"},
        "c": {"root-3.pem"},
    }
    assert {p.stat().st_mode & 0o777 for p in place.folder.rglob("*.pem")} == {0o600}


def test_the_checklist_says_what_was_done_and_what_is_next(place: Place) -> None:
    said = place.run("rotate", "timestamp").stdout
    steps = [line[3:] for line in said.splitlines()[1:]]
    assert [step[:3] for step in steps] == ["[x]"] * 8 + ["[ ]"] * 2
    for number, words in enumerate(
        ("read the trust: root 1", "find who signs: root-1, root-2, root-3", "make a key snapshot")
    ):
        assert words in steps[number]
    assert "sign root 2 with root-1, root-2, root-3" in said


def test_show_tells_who_holds_what(place: Place) -> None:
    rows = place.show()
    assert list(rows) == list(ALL_KEYS)
    assert [rows["root-1"][name] for name in ("signs", "threshold")] == ["root", "2 of 3"]
    assert [rows["gate"][name] for name in ("signs", "threshold")] == ["m-toy, approvals", "2 of 2"]
    assert [rows["rollout"][name] for name in ("signs", "threshold")] == ["plans", "1 of 1"]
    assert rows["root-2"]["private"] == str(place.folder / "b" / "root-2.pem")
    assert rows["gate"]["id"] == keys.load_signer(place.home, "gate").public_key.keyid
    assert rows["root-1"]["expires"]
    assert place.show(apart="")["root-1"]["private"] == "not here"
    assert "root-1" in place.run("show").stdout


def test_show_goes_on_over_keys_that_it_cannot_read(place: Place) -> None:
    (place.home / "keys" / "gate.pem").chmod(0o644)
    shutil.copy(place.home / "keys" / "time.pem", place.home / "keys" / "learner.pem")
    rows = place.show()
    assert "chmod 600" in rows["gate"]["private"]
    assert "another key" in rows["learner"]["private"]


def test_keys_are_made_once(place: Place) -> None:
    before = place.snapshot()
    assert "keys_exist" in place.run("create", "--family", "toy", code=2).stderr
    assert place.snapshot() == before


def test_an_operator_gets_a_key_and_the_gate_its_public_half(place: Place) -> None:
    place.run("create", "--operator", "ann")
    public = place.home / "keys" / "operators" / "ann.pub"
    private = place.apart / "operators" / "ann.pem"
    assert private.stat().st_mode & 0o777 == 0o600
    assert place.show()["operators/ann"]["private"] == str(private)
    assert place.show()["operators/ann"]["id"] == read_public(public).keyid
    assert "keys_exist" in place.run("create", "--operator", "ann", code=2).stderr
    assert "bad_name" in place.run("create", "--operator", "../ann", code=2).stderr
    place.run("revoke", "operators/ann")
    assert not public.exists()
    assert "unknown_key" in place.run("revoke", "operators/ann", code=2).stderr
    assert "bad_name" in place.run("revoke", "operators/../gate", code=2).stderr


def test_too_few_root_keys_change_nothing(place: Place) -> None:
    before = place.snapshot()
    for words in (["rotate", "root"], ["revoke", "snapshot"]):
        said = place.run(*words, apart="a", code=2).stderr
        assert "below_threshold" in said
        assert "root-1 may sign" in said
    assert "below_threshold" in place.run("revoke", "root-1", "root-2", code=2).stderr
    assert place.snapshot() == before


def test_two_of_three_root_keys_are_enough(place: Place) -> None:
    lost = place.show()["root-3"]["id"]
    shutil.rmtree(place.folder / "c")
    place.run("revoke", "root-3")
    assert place.show()["root-3"]["id"] != lost
    assert place.show()["root-3"]["private"] == str(place.folder / "c" / "root-3.pem")


def test_a_lost_targets_key_is_told_and_replaced(place: Place) -> None:
    (place.apart / "targets.pem").unlink()
    before = place.snapshot()
    said = place.run("rotate", "learner", code=2).stderr
    assert "there is no key targets in" in said
    assert "tools/key-ceremony revoke targets" in said
    assert place.snapshot() == before
    place.run("revoke", "targets")
    place.run("rotate", "learner")


def test_a_key_of_another_home_is_not_used(place: Place, tmp_path: Path) -> None:
    keys.create(tmp_path / "other", ["toy"])
    shutil.copy(tmp_path / "other" / "keys" / "gate.pem", place.home / "keys" / "gate.pem")
    with pytest.raises(ConfigError, match="key_not_trusted"):
        keys.load_signer(place.home, "gate")


def test_a_key_with_a_wrong_mode_stops_a_ceremony(place: Place) -> None:
    (place.apart / "root-1.pem").chmod(0o640)
    before = place.snapshot()
    said = place.run("rotate", "root", code=2).stderr
    assert f"chmod 600 {place.apart / 'root-1.pem'}" in said
    assert place.snapshot() == before


def test_nothing_happens_while_the_home_is_served(place: Place) -> None:
    before = place.snapshot()
    with Home(place.home).owned():
        for words in (["rotate", "gate"], ["revoke", "gate"], ["admit", "more"]):
            assert "already_owned" in place.run(*words, code=2).stderr
    assert place.snapshot() == before


def test_another_family_needs_the_targets_key(place: Place) -> None:
    with pytest.raises(ConfigError, match="the targets key is needed") as caught:
        keys.admit(place.home, "more")
    assert f"tools/key-ceremony admit more --home {place.home}" in caught.value.hint
    place.run("admit", "more")
    keys.admit(place.home, "more")  # as the bootstrap does, and there is nothing left to sign
    assert place.show()["gate"]["signs"] == "m-toy, approvals, m-more"
    place.run("rotate", "gate")
    assert place.show()["gate"]["id"] == keys.load_signer(place.home, "gate").public_key.keyid


def test_encrypted_keys_stay_encrypted(tmp_path: Path) -> None:
    place, secret = Place(tmp_path), tmp_path / "passphrase"
    secret.write_text(PASSPHRASE)
    secret.chmod(0o600)
    words = ("--passphrase-file", str(secret))
    place.run("create", "--family", "toy", "--operator", "ann", "--encrypt", *words)
    place.run("rotate", *ALL_KEYS, *words)
    pems = list(place.folder.rglob("*.pem"))
    assert len(pems) == len(ALL_KEYS) + 1
    assert all(b"ENCRYPTED" in path.read_bytes() for path in pems)
    assert "encrypted" in place.show()["gate"]["private"]
    assert "key_encrypted" in place.run("rotate", "root", code=2).stderr
    secret.write_text("another one entirely")
    assert "bad_passphrase" in place.run("rotate", "root", *words, code=2).stderr
    secret.chmod(0o644)
    assert "key_mode" in place.run("rotate", "root", *words, code=2).stderr


def test_a_key_with_a_keeper_of_its_own_is_a_change_of_uri(tmp_path: Path) -> None:
    place, folder = Place(tmp_path), tmp_path / "home" / "keys"
    folder.mkdir(parents=True)
    first = write_new(tmp_path / "keeper" / "1.pem", None).public_key
    (folder / "gate.uri").write_text(
        f"file2:{tmp_path / 'keeper' / '1.pem'}\n{public_pem(first).decode()}"
    )
    place.run("create", "--family", "toy")
    assert place.show()["gate"]["id"] == first.keyid
    assert not (folder / "gate.pem").exists()
    assert "gate.next.uri" in place.run("rotate", "gate", code=2).stderr
    second = write_new(tmp_path / "keeper" / "2.pem", None).public_key
    (folder / "gate.next.uri").write_text(
        f"file2:{tmp_path / 'keeper' / '2.pem'}\n{public_pem(second).decode()}"
    )
    place.run("rotate", "gate")
    assert keys.load_signer(place.home, "gate").public_key == second
    assert not (folder / "gate.next.uri").exists()


def test_a_gate_that_shows_its_public_key_alone_takes_part(tmp_path: Path) -> None:
    place, folder = Place(tmp_path), tmp_path / "home" / "keys"
    gates = [write_new(tmp_path / "gate" / f"{n}.pem", None).public_key for n in (1, 2)]
    folder.mkdir(parents=True)
    (folder / "gate.pub").write_bytes(public_pem(gates[0]))
    place.run("create", "--family", "toy")
    place.run("admit", "more")
    assert place.show()["gate"]["id"] == gates[0].keyid
    assert place.show()["gate"]["private"] == "with a keeper of its own"
    with pytest.raises(ConfigError, match="no_key"):
        keys.load_signer(place.home, "gate").sign(b"payload")
    assert "gate.next.pub" in place.run("revoke", "gate", code=2).stderr
    (folder / "gate.next.pub").write_bytes(public_pem(gates[1]))
    place.run("revoke", "gate")
    assert place.show()["gate"]["id"] == gates[1].keyid
    assert {path.name for path in folder.glob("gate*")} == {"gate.pub"}


def test_a_home_of_before_there_was_a_time_key_gets_one(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.run("create", "--family", "toy")
    document = place.home / "tuf" / "1.targets.json"
    old = keys.opened(keys.Targets, document.read_bytes(), None, "targets")
    key = old.delegations.roles.pop("time").keyids[0]
    del old.delegations.keys[key]
    targets = keys.Custody(place.home, [place.apart]).signer("targets", None)
    document.write_bytes(keys.sealed(old, [targets]))
    (place.home / "keys" / "time.pem").unlink()
    assert place.show()["time"]["private"] == "none: this home has no such role"
    place.run("rotate", "time")
    assert place.show()["time"]["signs"] == "time"
    keys.load_signer(place.home, "time")


@pytest.mark.parametrize("words", [("rotate", "gate"), ("admit", "more")])
def test_a_home_of_before_there_were_approvals_gets_the_role(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    place = Place(tmp_path)
    place.run("create", "--family", "toy")
    assert place.show()["gate"]["signs"] == "m-toy, approvals"
    document = place.home / "tuf" / "1.targets.json"
    old = keys.opened(keys.Targets, document.read_bytes(), None, "targets")
    del old.delegations.roles["approvals"]
    targets = keys.Custody(place.home, [place.apart]).signer("targets", None)
    document.write_bytes(keys.sealed(old, [targets]))
    assert place.show()["gate"]["signs"] == "m-toy"
    place.run(*words)
    assert "approvals" in place.show()["gate"]["signs"]
    new = keys.Custody(place.home).trust().targets.delegations.roles
    assert new["approvals"].keyids == [new["m-toy"].keyids[1]]


def test_unknown_names_and_homes_are_refused(place: Place, tmp_path: Path) -> None:
    assert "unknown_key" in place.run("rotate", "operators", code=2).stderr
    assert "--family" in place.run("create", code=2).stderr
    nowhere = Place(tmp_path / "nowhere")
    for words in (["show"], ["rotate", "root"], ["revoke", "gate"], ["admit", "toy"]):
        assert "no_trust" in nowhere.run(*words, code=2).stderr
    assert not nowhere.home.exists()


def test_it_runs_from_any_shell(tmp_path: Path) -> None:
    found = subprocess.run(
        [TOOL, "show", "--home", tmp_path / "home"], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert "no_trust" in found.stderr


def test_all_in_one_home_is_said(tmp_path: Path) -> None:
    place = Place(tmp_path)
    said = place.run("create", "--family", "toy", apart="").stdout
    assert "move these root keys apart" in said
    told: list[str] = []
    keys.admit(tmp_path / "laptop", "toy", tell=told.append)
    assert "root's included" in " ".join(told)
    for name in (*ROOT_KEYS, "targets"):
        (tmp_path / "laptop" / "keys" / f"{name}.pem").unlink()
    keys.load(tmp_path / "laptop")
