"""SIGKILL at every call of an update that touches the disk: download, verify, confirm, roll back.

A process without threads forks one child for each kill. The child has a real runtime, agent, client
and shelf, over a broker in memory that holds what a publisher signed; it follows a plan, and rolls
back. An observer counts its calls that touch the disk, python-tuf's included, and kills it as it
enters the n-th. The next child restarts on what is left, looks, and lets the device converge.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.release.metadata import ReleaseFile
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import SystemClock
from edge_runtime.config import EdgeConfig
from edge_runtime.rollout.agent import Agent
from edge_runtime.rollout.plan import Plan, PlanArm
from edge_runtime.runtime import Event, Runtime
from edge_runtime.update.client import UpdateClient
from edge_runtime.update.fetcher import BusFetcher
from edge_runtime.update.floorfile import FloorFile
from edge_runtime.update.trust import CHUNK_BYTES, Floor
from edge_runtime.wire import subjects

CALLS = frozenset(
    {
        *("open", "mkdir", "rmdir", "replace", "rename", "unlink", "remove", "symlink", "link"),
        *("write", "pwrite", "flush", "fsync", "fdatasync", "ftruncate", "truncate", "close"),
        "posix_fallocate",
    }
)
SCHEDULED = Event("scheduled", 1.36e9, {"carrier": "UA", "distance": 998.0})
RELEASES_KEPT_MAX = 3
VERDICT = {"outcome": "pass", "rules": ["static"], "sha256": "0" * 64}
WritePackage = Callable[..., tuple[Path, str]]


class Killer:
    """Counts the calls that touch the disk on the threads it watches; the n-th is the last."""

    def __init__(self, kill_at: int) -> None:
        self.kill_at, self.count = kill_at, 0

    def __call__(self, _frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call" or called.__name__ not in CALLS or not touches_the_disk(called):
            return
        if threading.current_thread().name.startswith(("update", "MainThread")):
            self.count += 1
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


def touches_the_disk(called: Any) -> bool:
    """Of the system, or of an open file; text and dates have a `replace` as well."""
    return called.__module__ in {"posix", "_io", "fcntl"} or isinstance(
        getattr(called, "__self__", None), io.IOBase
    )


@dataclass
class Life:
    """One process's time with the state below `folder`, under the messages in `broker`."""

    folder: Path
    messages: dict[str, bytes]

    @property
    def config(self) -> EdgeConfig:
        return EdgeConfig(
            device="EWR",
            families=["toy"],
            state_dir=self.folder / "state",
            socket=self.folder / "edge.sock",
        )

    @contextlib.asynccontextmanager
    async def agent(self, runtime: Runtime) -> AsyncIterator[tuple[Agent, UpdateClient]]:
        broker = MemoryBroker()
        bus = await broker.connect()
        await bus.ensure_stream(
            subjects.TRUST_STREAM, subjects.TRUST_ALL, max_bytes=1 << 26, discard_new=False
        )
        for subject, data in self.messages.items():
            await bus.publish(subject, data)
        root = (self.folder.parent / "root.json").read_bytes()
        fetcher = BusFetcher(bus, asyncio.get_running_loop())
        directory = self.config.state_dir / "update"
        client = UpdateClient(directory, root, fetcher, SystemClock(), ask_time=fetcher.ask_time)
        agent = Agent(runtime, client, runtime.shelf, bus, attributes={}, poll_s=1000.0)
        try:
            yield agent, client
        finally:
            client.close()

    async def follow(self, runtime: Runtime) -> dict[str, int]:
        async with self.agent(runtime) as (agent, _client):
            await agent.check()
            return {code: n for code, n in agent.statistics().items() if code.startswith("refused")}

    def floor(self) -> Floor:
        """What is confirmed on the disk."""
        return FloorFile(self.config.state_dir / "update").floor


def answer(runtime: Runtime) -> tuple[str, float]:
    found = runtime.predict("toy", SCHEDULED)
    return found.release, round(found.outputs[0], 6)


def play(life: Life, kill_at: int, say: Callable[[str], None]) -> int:
    """Follow the plan and roll back, or die on the way; gives the number of calls."""
    killer = Killer(kill_at)

    async def scene(runtime: Runtime) -> None:
        threading.setprofile(killer)
        async with life.agent(runtime) as (agent, _client):
            await agent.check()
        threading.setprofile(None)

    with Runtime.open(life.config) as runtime:
        asyncio.run(scene(runtime))
        assert answer(runtime)[0] == "r3"
        say("confirmed")
        sys.setprofile(killer)
        runtime.rollback("toy", "a test")
        sys.setprofile(None)
        say("left")
    return killer.count


def check(life: Life, said: str, _say: Callable[[str], None]) -> None:
    """What is left serves the old or the new release, proven; and then the device converges."""
    answers = json.loads((life.folder.parent / "answers").read_text())
    floor = life.floor()
    assert floor.plan_seq["toy"] in {2, 3}
    assert floor.release_counter.get("toy", 0) in {0, 2}
    assert floor.plan_seq["toy"] == 3 or "confirmed" not in said
    with Runtime.open(life.config) as runtime:
        shelf = runtime.shelf
        serving, value = answer(runtime)
        assert serving in {"r2", "r3"}, serving
        assert value == answers[serving]
        if floor.plan_seq["toy"] == 3:
            path = shelf.path_of(answers_sha(life, "r3"))
            assert path is not None, "confirmed, and not there"
        current, previous = shelf.load_current("toy"), shelf.load_previous("toy")
        for plan in (current, previous):
            if plan is not None:
                assert plan.stable.counter >= floor.release_counter.get("toy", 0)
        assert current is not None
        left = shelf.quarantined()
        refused = asyncio.run(life.follow(runtime))
        serving, value = answer(runtime)
        if left:
            assert set(left.values()) == {"rolled_back"}
            assert serving == "r2"
            assert refused == {"refused_release_quarantined": 1}
        else:
            assert "left" not in said
            assert serving == "r3"
            assert refused == {}
            assert shelf.load_current("toy").seq == 3
        assert value == answers[serving]
        assert life.floor().plan_seq["toy"] == 3 or left
        packages = list((life.config.state_dir / "shelf" / "packages").iterdir())
        assert len(packages) <= RELEASES_KEPT_MAX
        assert all(path.suffix == ".onnx" for path in packages), packages
    state = life.config.state_dir
    strays = [*state.glob("shelf/**/.*.tmp"), *state.glob("update/**/*tmp*")]
    assert not strays, strays


def answers_sha(life: Life, release: str) -> str:
    return str(json.loads((life.folder.parent / "sha256.json").read_text())[release])


def forked(work: Callable[[Callable[[str], None]], int | None]) -> tuple[int, str]:
    """Do `work` in a child; its exit status (negative: the signal) and what it said."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            count = work(lambda word: os.writev(writing, [word.encode() + b" "]))
            os.writev(writing, [str(count).encode()])
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as told:
        said = told.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def sweep(folder: Path, first: int, step: int) -> int:
    """Kill at every `step`-th call; how many kills there were."""
    text = json.loads((folder / "messages").read_text())
    life = Life(folder / "life", {subject: bytes.fromhex(data) for subject, data in text.items()})
    for kills in itertools.count():
        shutil.rmtree(life.folder, ignore_errors=True)
        shutil.copytree(folder / "base", life.folder, symlinks=True)
        kill_at = first + kills * step
        status, said = forked(partial(play, life, kill_at))
        assert status in {0, -signal.SIGKILL}, f"kill {kill_at}: {status}"
        looked, _ = forked(partial(check, life, said))
        assert looked == 0, f"killed at call {kill_at}, which had said {said!r}"
        if status == 0:
            break
    return kills


async def prepared(folder: Path, write_package: WritePackage) -> None:
    """A device that has followed two plans, and what a broker holds with the third."""
    keys.create(folder / "cloud", ["toy"])
    shutil.copy(folder / "cloud" / "trust" / "root.json", folder / "root.json")
    bus = await (broker := MemoryBroker()).connect()
    publisher = Publisher(folder / "cloud", bus, keys.load(folder / "cloud"), SystemClock())
    answers, hashes = {}, {}
    life = Life(folder / "base", {})
    for number in (1, 2, 3):
        path, sha256 = write_package(bias=float(number), ballast=250)
        assert path.stat().st_size > CHUNK_BYTES
        release = ReleaseFile("toy", f"r{number}", number, path.read_bytes(), VERDICT)
        arm = PlanArm(release.release, release.path, sha256, number, 1.0)
        hashes[release.release] = sha256
        if number == 3:
            await publisher.publish(release)
            await publisher.raise_floor("toy", 2)
            await publisher.publish(plan=Plan(family="toy", seq=number, stable=arm))
        else:
            await publisher.publish(release, Plan(family="toy", seq=number, stable=arm))
        stream = broker.streams[subjects.TRUST_STREAM]
        life.messages = {each.subject: each.data for each in stream.messages.values()}
        trial = life if number < 3 else Life(folder / "trial", life.messages)
        if number == 3:
            shutil.copytree(folder / "base", folder / "trial", symlinks=True)
        with Runtime.open(trial.config) as runtime:
            assert await trial.follow(runtime) == {}
            answers[release.release] = answer(runtime)[1]
    assert len(set(answers.values())) == 3
    (folder / "answers").write_text(json.dumps(answers))
    (folder / "sha256.json").write_text(json.dumps(hashes))
    text = json.dumps({subject: data.hex() for subject, data in life.messages.items()})
    (folder / "messages").write_text(text)


@pytest.fixture
def home(tmp_path: Path, write_package: WritePackage) -> Path:
    asyncio.run(prepared(tmp_path, write_package))
    return tmp_path


def kills_of(home: Path, first: int, step: int) -> int:
    """The sweep in a process of its own, which has no threads when it forks."""
    done = subprocess.run(
        [sys.executable, __file__, str(home), str(first), str(step)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_kill_at_a_call_of_an_update_leaves_the_old_or_the_new_release(home: Path) -> None:
    assert kills_of(home, first=1, step=7) > 8


@pytest.mark.slow
def test_a_kill_at_every_call_of_an_update_leaves_the_old_or_the_new_release(home: Path) -> None:
    assert kills_of(home, first=1, step=1) > 60


if __name__ == "__main__":
    print(sweep(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
