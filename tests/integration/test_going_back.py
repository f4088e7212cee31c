"""`edge-runtime rollback`: a real device goes back to the release before, and stays there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx

from edge_runtime.api.client import Client
from edge_runtime.device.starts import STARTS_MAX
from edge_runtime.rollout.plan import PlanArm, model_path
from edge_runtime.update.shelf import Shelf

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "edge_runtime.cli"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def edge_runtime(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *args],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextlib.contextmanager
def running(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The device in `folder`, from when it says that it is ready until it has ended."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor,
        (folder / "log").open("w") as narration,
    ):
        supervisor.bind(str(folder / "notify"))
        supervisor.settimeout(30)
        daemon = subprocess.Popen(
            [*COMMAND, "run"],
            cwd=folder,
            env=ENVIRONMENT | {"NOTIFY_SOCKET": str(folder / "notify")},
            stdin=subprocess.DEVNULL,
            stderr=narration,
        )
        try:
            assert supervisor.recv(4096).startswith(b"READY=1")
            yield daemon
            daemon.terminate()
            assert daemon.wait(10) == 0
        finally:
            daemon.kill()
            daemon.wait(10)
            (folder / "notify").unlink()


def serving(folder: Path) -> str:
    status = json.loads(edge_runtime(folder, "status", "--json").stdout)
    [arm] = status["families"]["toy"]["arms"]
    return arm["release"]


def set_up(folder: Path, write_package: Callable[..., tuple[Path, str]]) -> tuple[str, str]:
    """A device that was given one release after another; the hashes of their packages."""
    (first, first_sha256), (second, second_sha256) = write_package(0.0), write_package(1.0)
    for options in (["--device", "EWR", "--package", str(first)], ["--package", str(second)]):
        done = edge_runtime(folder, "init", *options)
        assert done.returncode == 0, done.stderr
    return first_sha256, second_sha256


def named(sha256: str) -> str:
    """The release that `init` makes of a package."""
    return f"factory-{sha256[:12]}"


def test_a_device_goes_back_when_told_and_stays_there_over_a_restart(
    tmp_path: Path, write_package: Callable[..., tuple[Path, str]]
) -> None:
    before, newest = map(named, set_up(tmp_path, write_package))
    with running(tmp_path):
        assert serving(tmp_path) == newest
        back = edge_runtime(tmp_path, "rollback", "toy", "--reason", "answers are too high")
        assert (back.returncode, back.stdout) == (0, f"{before}\n"), back.stderr
        assert serving(tmp_path) == before
        again = edge_runtime(tmp_path, "rollback", "toy", "--reason", "still")
        assert (again.returncode, again.stdout) == (1, "")
        assert "nothing_to_roll_back" in again.stderr
    assert f"{newest} is left" in (tmp_path / "log").read_text()
    with running(tmp_path):
        assert serving(tmp_path) == before


def crashed(folder: Path) -> str:
    """What the device in `folder` serves, before it dies."""
    with contextlib.suppress(AssertionError), running(folder) as daemon:
        found = serving(folder)
        daemon.kill()
        daemon.wait(10)
    return found


def test_r6_a_device_that_dies_again_and_again_leaves_its_newest_release(
    tmp_path: Path, write_package: Callable[..., tuple[Path, str]]
) -> None:
    hashes = set_up(tmp_path, write_package)
    before, newest = map(named, hashes)
    for _ in range(STARTS_MAX):
        assert crashed(tmp_path) == newest
    with running(tmp_path):
        assert serving(tmp_path) == before
        status = json.loads(edge_runtime(tmp_path, "status", "--json").stdout)
        assert status["starts"] == {"starts": 1, "releases_left": 1}
        assert status["health"]["reasons"] == ["crash_loop"]
    quarantine = json.loads((tmp_path / "state" / "shelf" / "quarantine.json").read_text())
    assert quarantine == {hashes[1]: "crash_loop"}


def test_r9_a_second_agent_on_a_state_directory_is_refused_and_counts_for_nothing(
    tmp_path: Path, write_package: Callable[..., tuple[Path, str]]
) -> None:
    (first, _), (second, sha256) = write_package(0.0), write_package(1.0)
    for options in (["--device", "EWR", "--package", str(first)], ["--package", str(second)]):
        assert edge_runtime(tmp_path, "init", *options).returncode == 0
    with running(tmp_path):
        other = edge_runtime(tmp_path, "run")
        assert (other.returncode, "already_owned" in other.stderr) == (2, True), other.stderr
        assert serving(tmp_path) == f"factory-{sha256[:12]}"
    with running(tmp_path):
        assert serving(tmp_path) == f"factory-{sha256[:12]}"


def test_r5_a_daemon_leaves_a_trial_within_three_requests_and_fails_none(
    tmp_path: Path, write_package: Callable[..., tuple[Path, str]]
) -> None:
    hashes = set_up(tmp_path, write_package)
    shelf = Shelf(tmp_path / "state" / "shelf")
    plan = shelf.load_current("toy")
    assert plan is not None
    bad, _ = write_package(2.0)
    data = failing_on_the_road(bad)
    sha256 = hashlib.sha256(data).hexdigest()
    shelf.put_whole(sha256, data)
    canary = PlanArm("r2", model_path("toy", "r2"), sha256, 1, 9.0)
    shelf.save_current(msgspec.structs.replace(plan, canary=canary))
    with running(tmp_path), Client(tmp_path / "edge.sock") as client:
        for _ in range(6):
            answer = client.predict("toy", "scheduled", 1.36e9, {"carrier": "UA", "distance": 1e3})
            assert answer.release == named(hashes[1])
        names = ([arm["arm"] for arm in told(client)["arms"]] for _ in range(100_000))
        assert ["stable", "left"] in names
        assert sum(arm["answered"] for arm in told(client)["arms"]) == 6
    assert json.loads(shelf_file(tmp_path).read_text()) == {sha256: "failures"}
    with running(tmp_path):
        assert serving(tmp_path) == named(hashes[1])


def told(client: Client) -> dict[str, Any]:
    return client.status().status["families"]["toy"]


def shelf_file(folder: Path) -> Path:
    return folder / "state" / "shelf" / "quarantine.json"


def failing_on_the_road(path: Path) -> bytes:
    """The package at `path` with a look-up that fails where the second feature is 500 or more."""
    model = onnx.load(path)
    nodes, graph = model.graph.node, model.graph
    for name, value in {"second": np.array([1]), "cells": np.zeros(500, np.float32)}.items():
        graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    logit = nodes.pop().input[0]
    nodes.append(onnx.helper.make_node("Gather", ["features", "second"], ["x"], axis=1))
    nodes.append(onnx.helper.make_node("Cast", ["x"], ["at"], to=onnx.TensorProto.INT64))
    nodes.append(onnx.helper.make_node("Gather", ["cells", "at"], ["nothing"]))
    nodes.append(onnx.helper.make_node("Add", [logit, "nothing"], ["same"]))
    nodes.append(onnx.helper.make_node("Sigmoid", ["same"], ["probability"]))
    data: bytes = model.SerializeToString()
    return data
