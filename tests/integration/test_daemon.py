"""A real `edge-runtime run` process with a factory package on its shelf, and no broker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.api.client import Client
from edge_runtime.errors import RequestError, TransportError
from edge_runtime.events.log import EventLog
from edge_runtime.personal.policy import Policy
from edge_runtime.personal.prior import Prior
from edge_runtime.wire import codec
from edge_runtime.wire.messages import PredictionRecord

NOW_S = 1_360_000_000.0
ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "edge_runtime.cli"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
FIELDS = {"carrier": "UA", "distance": 998.0}


def edge_runtime(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *args],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


class Daemon:
    """One `edge-runtime run` child; ready once it has said where it serves."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "edge.sock"
        self.narration: list[str] = []
        self.process = subprocess.Popen(
            [*COMMAND, "run"],
            cwd=folder,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._ready.wait(20)
        assert self.process.poll() is None, self.narration

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.narration.append(line)
                if " serves " in line:
                    self._ready.set()
        self._ready.set()

    def end(self, number: signal.Signals) -> int:
        """Send a signal to the process group, as a terminal does; returns the exit status."""
        os.killpg(self.process.pid, number)
        status = self.process.wait(10)
        self._reader.join(10)
        return status


@pytest.fixture
def device(tmp_path: Path, write_package: Callable[..., tuple[Path, str]]) -> Path:
    """A folder with `edge.toml` and a factory package on the shelf; commits take a while."""
    package, _ = write_package()
    done = edge_runtime("init", "--device", "EWR", "--package", str(package), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = tmp_path / "edge.toml"
    config.write_text(config.read_text() + "\n[log]\nlinger_ms = 400\n")
    return tmp_path


@pytest.fixture
def start(device: Path) -> Iterator[Callable[[], Daemon]]:
    started: list[Daemon] = []

    def launch() -> Daemon:
        started.append(Daemon(device))
        return started[-1]

    yield launch
    for daemon in started:
        if daemon.process.poll() is None:
            daemon.end(signal.SIGKILL)


def features_in(state: Path) -> dict[str, bytes]:
    """The feature values of each prediction in the log of a device that does not run."""
    with EventLog(state / "log", device="EWR") as log:
        return {
            f"EWR.{epoch}.{seq}": record.features
            for epoch, seq, data in log.tail("event", 0, 0)
            if isinstance(record := codec.decode_record(data), PredictionRecord)
        }


def test_it_answers_through_the_socket_and_ends_cleanly_on_sigterm(
    start: Callable[[], Daemon], device: Path
) -> None:
    daemon = start()
    with Client(daemon.socket) as client:
        hello = client.hello()
        assert (hello.device, hello.survived) == ("EWR", [])
        answer = client.predict("toy", "scheduled", NOW_S, FIELDS)
        assert answer.id == f"EWR.{hello.epoch}.1"
        assert client.label("toy", answer.id, 1.0, NOW_S + 60).seq == 1
        with pytest.raises(RequestError, match="unknown_field") as caught:
            client.predict("toy", "scheduled", NOW_S, FIELDS | {"distanse": 1.0})
        assert "distanse" in caught.value.message
        found = json.loads(edge_runtime("status", "--json", cwd=device).stdout)
        assert (found["counters"]["predictions"], found["socket"]["open"]) == (1, 2)
        second = edge_runtime("run", cwd=device)
        assert (second.returncode, second.stdout) == (2, "")
        assert "already_owned" in second.stderr
        assert daemon.end(signal.SIGTERM) == 0
        with pytest.raises(TransportError, match="connection_lost"):
            client.hello()
    assert not daemon.socket.exists()
    assert "stopped" in daemon.narration[-1]
    [features] = features_in(device / "state").values()
    assert np.frombuffer(features, "<f4").tolist() == [2.0, 998.0, 0.0, -1.0, 0.0]


def test_after_sigkill_windows_are_bit_equal_no_id_comes_again_and_ctrl_c_leaves_nothing(
    start: Callable[[], Daemon], device: Path
) -> None:
    daemon = start()
    with Client(daemon.socket) as client:
        for step in range(300):
            delayed = {"carrier": ["UA", "AA"][step % 2], "delay": step / 7}
            client.observe("toy", "departed", NOW_S + step, delayed)
        epoch = client.hello().epoch
        before = client.predict("toy", "scheduled", NOW_S + 300, FIELDS)
        while client.status().status["log"]["pending"]:
            pass
        client.observe("toy", "departed", NOW_S + 299, {"carrier": "UA", "delay": 9.0})
        lost = client.predict("toy", "scheduled", NOW_S + 300, FIELDS)
    daemon.end(signal.SIGKILL)

    daemon = start()
    with Client(daemon.socket) as client:
        hello = client.hello()
        survived = {(each.epoch, each.event_class): each.seq for each in hello.survived}
        assert hello.epoch > epoch
        assert survived == {(epoch, "event"): 301, (epoch, "label"): 0}
        after = client.predict("toy", "scheduled", NOW_S + 300, FIELDS)
        assert (before.id, lost.id) == (f"EWR.{epoch}.301", f"EWR.{epoch}.303")
        assert after.id == f"EWR.{hello.epoch}.1"
        assert client.label("toy", before.id, 1.0).seq == 1
        with pytest.raises(RequestError, match="prediction_lost"):
            client.label("toy", lost.id, 1.0)
    assert daemon.end(signal.SIGINT) == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(daemon.process.pid, 0)
    assert not daemon.socket.exists()
    features = features_in(device / "state")
    assert features[before.id] == features[after.id]


def adapting_daemon(folder: Path, write_package: Callable[..., tuple[Path, str]]) -> None:
    """A device whose package knows sessions, and that keeps them over a restart."""
    prior = Prior("binary", np.zeros(3, "f4"), np.eye(3, dtype="f4"), region=2.0, norm_max=1e4)
    package, _ = write_package(policy=Policy(prior))
    done = edge_runtime("init", "--device", "EWR", "--package", str(package), cwd=folder)
    assert done.returncode == 0, done.stderr
    config = folder / "edge.toml"
    config.write_text(config.read_text() + "\n[sessions]\nkeep = true\n")


def test_sessions_are_kept_when_it_ends_and_gone_when_it_is_killed(
    tmp_path: Path, write_package: Callable[..., tuple[Path, str]]
) -> None:
    adapting_daemon(tmp_path, write_package)
    kept, key = tmp_path / "state" / "sessions", "a-person-0815"
    asked = ("scheduled", NOW_S, FIELDS)
    told = []
    for end in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        daemon = Daemon(tmp_path)
        try:
            assert not kept.exists()
            with Client(daemon.socket) as client:
                session = client.session("toy", key)
                told.append(session.predict(*asked))
                for _ in range(3):
                    session.label(session.predict(*asked).id, 1.0)
                told.append(session.predict(*asked))
        finally:
            daemon.end(end)
        assert key not in "".join(daemon.narration)

    before, after, again, more, anew, _ = told
    assert [each.adapted for each in told] == [False, True, True, True, False, True]
    assert again.outputs == after.outputs
    assert more.outputs[0] > after.outputs[0] > before.outputs[0]
    assert anew.outputs == before.outputs
    assert {tuple(each.base) for each in told} == {tuple(before.outputs)}
    holding = {path.name for path in tmp_path.rglob("*") if path.is_file() and holds(path, key)}
    assert holding == {"sessions"}


def holds(path: Path, key: str) -> bool:
    return key.encode() in path.read_bytes()
