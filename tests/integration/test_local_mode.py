"""`edge-runtime run --package`: a real process serves one ONNX file and tells how to ask it.

What it tells is run as it stands, in a shell.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.api.client import Client
from edge_runtime.errors import RequestError

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "edge_runtime.cli"]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
NOW_S = 1_360_000_000.0


class Local:
    """One `edge-runtime run --package` child; ready once it has told so many commands."""

    def __init__(
        self, folder: Path, package: Path, *options: str, commands: int, **environment: str
    ) -> None:
        self.socket, self.commands = folder / "edge.sock", list[str]()
        self._expected, self._narration = commands, list[str]()
        self.process = subprocess.Popen(
            [*COMMAND, "run", "--package", str(package), *options],
            cwd=folder,
            env=ENVIRONMENT | {"TMPDIR": str(folder)} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._ready.wait(20)
        assert self.process.poll() is None, self._narration

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                if "ask it:\n" in self._narration and line.startswith("  "):
                    self.commands.append(line.strip())
                self._narration.append(line)
                if len(self.commands) == self._expected:
                    self._ready.set()
        self._ready.set()

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(10)
        self._reader.join(10)
        return status


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Local]]:
    started: list[Local] = []

    def launch(package: Path, *options: str, commands: int = 2, **environment: str) -> Local:
        local = Local(tmp_path, package, *options, commands=commands, **environment)
        started.append(local)
        return started[-1]

    yield launch
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait(10)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A model that knows nothing of Headwater: y = x * 2 and a text that it gives back."""
    value, two = helper.make_tensor_value_info, numpy_helper.from_array(np.float32(2), "two")
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "two"], ["y"]),
            helper.make_node("Identity", ["t"], ["same"]),
        ],
        "bare",
        [value("x", TensorProto.FLOAT, ["batch", 3]), value("t", TensorProto.STRING, ["batch"])],
        [value("y", TensorProto.FLOAT, ["batch", 3]), value("same", TensorProto.STRING, ["batch"])],
        [two],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "my model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def ran(command: str, folder: Path) -> str:
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def test_a_bare_onnx_file_is_served_and_what_is_told_works(
    start: Callable[..., Local], bare: Path, tmp_path: Path
) -> None:
    local = start(bare)
    with Client(local.socket) as client:
        inputs = {"x": np.array([[1, 2, 3]], "<f4"), "t": np.array(["a"], object)}
        answer = client.infer("my-model", inputs)
        assert answer["y"].tolist() == [[2, 4, 6]]
        assert client.infer("my-model", inputs, ["y"]).keys() == ["y"]
        with pytest.raises(RequestError) as refused:
            client.predict("my-model", "any", NOW_S, {})
        assert "no_features" in refused.value.code
        with pytest.raises(RequestError) as nothing:
            client.rollback("my-model", "just so")
        assert nothing.value.code == "nothing_to_roll_back"
    status, script = local.commands
    assert "my-model" in ran(status, tmp_path)
    assert "[[0., 0., 0.]]" in ran(script, tmp_path)
    assert local.end() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [bare.name]


def test_a_familys_package_answers_events_and_counts_labels(
    start: Callable[..., Local], write_package: Callable[..., tuple[Path, str]], tmp_path: Path
) -> None:
    package, _ = write_package()
    local = start(package, commands=3)
    _, predict, script = local.commands
    assert re.search(r"local\.\d+\.1\b", ran(predict, tmp_path))
    assert "probability" in ran(script, tmp_path)
    with Client(local.socket) as client:
        answer = client.predict("toy", "scheduled", NOW_S, {"carrier": "UA", "distance": 998.0})
        assert answer.id == f"local.{client.hello().epoch}.2"
        assert len(answer.outputs) == 1
        client.observe("toy", "departed", NOW_S, {"carrier": "UA", "delay": 5.0})
        client.label("toy", answer.id, 1.0, NOW_S + 60)
        counters = client.status().status["counters"]
    assert [counters[each] for each in ("predictions", "observations", "labels")] == [2, 1, 1]
    assert local.end() == 0


def test_over_http_what_is_told_works_too(
    start: Callable[..., Local], bare: Path, tmp_path: Path
) -> None:
    pytest.importorskip("httptools")
    if shutil.which("curl") is None:
        pytest.skip("there is no curl to run what is told")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    local = start(bare, "--http", str(port), commands=4)
    *_, model, infer = local.commands
    assert json.loads(ran(model, tmp_path))["name"] == "my-model"
    outputs = json.loads(ran(infer, tmp_path))["outputs"]
    assert {each["name"]: each["data"] for each in outputs} == {"y": [0, 0, 0], "same": [""]}
    assert local.end() == 0


@pytest.mark.parametrize("content", [b"", b"no model", bytes(100)], ids=["empty", "text", "zeros"])
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.onnx").write_bytes(content)
    done = subprocess.run(
        [*COMMAND, "run", "--package", "broken.onnx"],
        cwd=tmp_path,
        env=ENVIRONMENT | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "broken.onnx" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken.onnx"]


def test_the_socket_may_lie_elsewhere(
    start: Callable[..., Local], bare: Path, tmp_path: Path
) -> None:
    local = start(bare, "--socket", "my other.sock")
    status, script = local.commands
    assert status == "edge-runtime status --socket 'my other.sock'"
    assert "my-model" in ran(status, tmp_path)
    assert "same" in ran(script, tmp_path)


def test_a_supervisor_is_told_when_it_answers_while_it_lives_and_when_it_ends(
    start: Callable[..., Local], bare: Path, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.settimeout(10)
        local = start(bare, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="100000")
        heard = [supervisor.recv(4096).decode() for _ in range(3)]
        assert heard[0].startswith("READY=1\nSTATUS=serves my-model")
        assert heard[1:] == ["WATCHDOG=1", "WATCHDOG=1"]
        assert local.end() == 0
        supervisor.setblocking(False)
        last = b""
        while last != b"STOPPING=1":
            last = supervisor.recv(4096)  # BlockingIOError: it was never said
