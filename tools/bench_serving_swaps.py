"""Swaps under load, for tools/bench-serving: a device's process in which releases take turns.

Why a process of its own: its memory is watched, and nothing but runtime and socket lives in it. It
swaps as the rollout agent does: load and prove in a thread, then switch on the event loop.

Invariants: one release answers below one half and the other above it, so every value of an answer
shows whose it is. The process ends when its standard input does, so it never outlives the tool.

Run by `measure`: python tools/bench_serving_swaps.py SOCKET HOME LOW HIGH
"""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import uvloop
from bench_serving_client import Wire, frame_size, hot, socket_event, socket_infer
from bench_serving_model import FAMILY, Stream, rows, write_package
from bench_serving_rows import Found
from bench_serving_server import rss_mb

from edge_runtime.api import frames
from edge_runtime.api.socket import SocketServer
from edge_runtime.config import local_config
from edge_runtime.daemon import SWITCH_INTERVAL_S
from edge_runtime.inference.slot import load_arm
from edge_runtime.rollout.plan import Plan, PlanArm
from edge_runtime.runtime import Runtime

SWAPS, ROUNDS, WARM_UP = 100, 5, 30
INTERVAL_S, STEADY_S = 0.5, 5.0  # a learner makes a candidate about every half second
LEANS = {"low": -4.0, "high": 4.0}

Asked = list[tuple[float, bytes]]


def measure(found: Found, home: Path) -> None:
    """Swap under load, in rounds that take turns with steady load."""
    home.mkdir()
    packages = [str(write_package(home / f"{name}.onnx", lean)) for name, lean in LEANS.items()]
    path = str(home / "edge.sock")
    command = [sys.executable, __file__, path, str(home / "state"), *packages]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with Load(path) as load:
            swap(child, WARM_UP)
            start_mb, verdicts = rss_mb(child.pid), []
            load.take()
            for _ in range(ROUNDS):
                time.sleep(STEADY_S)
                found.add("steady", [us for us, _ in load.take()])
                swap(child, SWAPS // ROUNDS)
                answered = load.take()
                found.add("swapping", [us for us, _ in answered])
                verdicts += [verdict(answer) for _, answer in answered]
            found.add("swaps rss", [rss_mb(child.pid) - start_mb])
        child.stdin.close()
    found.add("swaps asked", [len(verdicts)])
    found.add("swaps failed", [verdicts.count("failed")])
    found.add("swaps mixed", [verdicts.count("mixed")])


class Load(threading.Thread):
    """Asks in turn for tensors and for predictions, one after another, until it is left."""

    def __init__(self, path: str) -> None:
        super().__init__(name="load")
        self._wire = Wire(path, frame_size)
        self._infer = socket_infer(rows(4))
        self._stream = Stream(step_s=1.0)  # the windows are soon as full as they get
        self._asked: Asked = []
        self._over = False

    def run(self) -> None:
        answer = b""

        def ask(request: bytes) -> None:
            nonlocal answer
            answer = self._wire.ask(request)

        while not self._over:
            (event,) = self._stream.questions(1)
            for request in (self._infer, socket_event(event)):
                times = hot(ask, [request])
                self._asked.append((times[0], answer))

    def take(self) -> Asked:
        """Microseconds and answers of what was asked since the last time."""
        taken, self._asked = self._asked, []
        return taken

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over = True
        self.join()
        self._wire.close()


def swap(child: subprocess.Popen[str], times: int) -> None:
    """Let the process swap, and return when it has."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{times}\n")
    child.stdin.flush()
    assert child.stdout.readline() == "swapped\n"


def verdict(answer: bytes) -> str:
    """`whole`; `mixed` when a value is not of the release that the answer names; or `failed`."""
    reply = frames.reply_in(memoryview(answer)[4:])
    if isinstance(reply, frames.Inferred):
        values = reply["probability"].ravel().tolist()
    elif isinstance(reply, frames.Predicted):
        values = reply.outputs
    else:
        return "failed"
    return "whole" if {LEANS[reply.release] > 0} == {value > 0.5 for value in values} else "mixed"


async def serve(path: str, home: str, *packages: str) -> None:
    """Be the device; a number on standard input is how many swaps are wanted."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    config = local_config(Path(packages[0]), FAMILY, Path(home), socket=Path(path))
    releases = itertools.cycle(zip(LEANS, packages, strict=True))
    with Runtime.open(config) as runtime, ThreadPoolExecutor(1) as loader:

        async def swap_once() -> None:
            await asyncio.sleep(INTERVAL_S)
            release, package = next(releases)
            loading = loader.submit(load_arm, package, None, "stable", release, 1.0)
            arm = await asyncio.wrap_future(loading)
            plan = Plan(family=FAMILY, seq=1, stable=PlanArm(release, "", "", 0, 1.0))
            runtime.swap(FAMILY, [arm], plan)

        await swap_once()
        server = SocketServer(runtime, runtime.statistics)
        await server.start(Path(path))
        print("ready", flush=True)
        while wanted := await asyncio.to_thread(sys.stdin.readline):
            for _ in range(int(wanted)):
                await swap_once()
            print("swapped", flush=True)
        await server.close()


if __name__ == "__main__":
    uvloop.run(serve(*sys.argv[1:]))
