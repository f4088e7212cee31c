"""What serves with Headwater reports to nobody: ONNX Runtime's own telemetry never starts.

Its wheels start a thread when they are imported, and keep an id of the machine and a database of
events in the user's cache. The second test shows that they would, so that the first can fail.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import factory

SWITCH = "ORT_DISABLE_TELEMETRY"

# Threads that Python did not start are those of libraries; numpy's stand there from the beginning.
_THREADS = """
import json, os, sys, threading
import numpy
def foreign():
    return len(os.listdir("/proc/self/task")) - len(threading.enumerate())
before = foreign()
"""
# Ends at once: nothing that a library put off is done, or sent, on the way out.
_SAY = """
print(json.dumps({"before": before, "after": foreign(), "answer": answer}), flush=True)
os._exit(0)
"""
SERVING = f"""{_THREADS}
from edge_runtime import Runtime
from edge_runtime.runtime import Event
runtime = Runtime.open(sys.argv[1])
event = Event("scheduled", 1.8e9, {{"carrier": "UA", "distance": 998.0}})
answer = [runtime.predict("toy", event).outputs for _ in range(100)][-1]
{_SAY}"""
BARE = f"""{_THREADS}
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
answer = session.run(None, {{"features": numpy.ones((1, 5), numpy.float32)}})[0].tolist()
{_SAY}"""


def play(script: str, argument: Path, home: Path) -> dict[str, Any]:
    """What `script` says of itself, run with `home` for its home and no word about telemetry."""
    home.mkdir()
    told = {name: value for name, value in os.environ.items() if name != SWITCH}
    told = {name: value for name, value in told.items() if not name.startswith("XDG_")}
    own = {"HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(argument)],
        env=told | own,
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    said: dict[str, Any] = json.loads(done.stdout)
    return said | {"files": [path for path in home.rglob("*") if path.is_file()]}


def test_a_process_that_serves_has_no_telemetry_thread_and_leaves_no_file(
    tmp_path: Path, write_package: Callable[..., tuple[Path, str]]
) -> None:
    package, _ = write_package()
    info = factory.inspect(package)
    config = factory.write_config(tmp_path / "edge.toml", info, device="EWR")
    factory.install(config, package, info)
    found = play(SERVING, tmp_path / "edge.toml", tmp_path / "home")
    assert found["answer"][0] == pytest.approx(0.7310, abs=1e-3)
    assert found["after"] == found["before"]
    assert found["files"] == []


def test_without_our_switch_there_would_be_both(
    tmp_path: Path, write_package: Callable[..., tuple[Path, str]]
) -> None:
    found = play(BARE, write_package()[0], tmp_path / "home")
    if found["after"] == found["before"] and not found["files"]:
        pytest.skip("this build of ONNX Runtime has no telemetry")
    assert found["after"] == found["before"] + 1
    assert ".onnxruntime" in {path.parent.name for path in found["files"]}
