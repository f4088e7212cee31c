"""`cloud-learner serve` with its own broker: devices come in by their keys, and nobody else."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cloud_learner.bootstrap import bootstrap
from cloud_learner.config import Home

WAIT_S = 30.0
LEARNER = [sys.executable, "-m", "cloud_learner.cli"]
DEVICE = [sys.executable, "-m", "edge_runtime.cli"]


@pytest.fixture
def home(coin: SimpleNamespace, tmp_path: Path) -> Path:
    folder = coin.write_family(tmp_path / "coin")
    data = coin.write_csv(tmp_path / "data.csv", coin.stream(600))
    bootstrap(folder, data, Home(tmp_path / "home"), lambda _text: None)
    return tmp_path / "home"


@contextlib.contextmanager
def served(home: Path) -> Iterator[str]:
    """The url at which `serve` is up."""
    command = [*LEARNER, "serve", "--home", str(home)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        try:
            assert child.stdout is not None
            yield child.stdout.readline().strip()
        finally:
            child.terminate()
            child.wait(WAIT_S)


def ran(command: list[str], *args: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [*command, *map(str, args)], capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    return done.returncode, done.stdout, done.stderr


def status(home: Path, url: str) -> dict[str, object]:
    """What the learner says of itself, as soon as it has spoken; who asks takes no more of the
    processors than a learner does, or on a busy machine it would never speak.
    """
    command = ("status", "--home", home, "--nats", url, "--json")
    deadline_s = time.monotonic() + WAIT_S
    while (done := ran(["chrt", "--idle", "0", *LEARNER], *command))[0]:
        assert "no_learner" in done[2]
        assert time.monotonic() < deadline_s, done[2]
    return json.loads(done[1])


def admission(config: Path) -> dict[str, str]:
    _, said, _ = ran(DEVICE, "doctor", "--config", config, "--json")
    [found] = [each for each in json.loads(said)["findings"] if each["what"] == "admission"]
    return found


def test_a_device_is_set_up_admitted_and_expelled_by_commands_alone(home, tmp_path):
    config = tmp_path / "device" / "edge.toml"
    config.parent.mkdir()
    (tmp_path / "device" / "root.json").write_bytes((home / "trust" / "root.json").read_bytes())
    with served(home) as url:
        options = ("--device", "kiosk-1", "--family", "coin", "--nats", url, "--root", "root.json")
        code, key, told = ran(DEVICE, "init", "--config", config, *options)
        assert code == 0, told
        before = admission(config)
        assert before["state"] == "fail"
        assert f"cloud-learner admit DEVICE {key.strip()}" in before["hint"]
        code, _, told = ran(LEARNER, "admit", "kiosk-1", key.strip(), "--home", home)
        assert (code, "the running broker knows it" in told) == (0, True), told
        assert admission(config)["state"] == "ok"
        assert "stage" in status(home, url)
        code, _, told = ran(LEARNER, "status", "--home", tmp_path / "nowhere", "--nats", url)
        assert (code, "does not admit" in told) == (4, True)
        assert ran(LEARNER, "expel", "kiosk-1", "--home", home)[0] == 0
        assert "does not admit" in admission(config)["text"]
