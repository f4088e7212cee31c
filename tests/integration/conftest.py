"""What integration tests share: buses, and nats-servers with configurations of the tests' own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sysconfig
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from cloud_learner.broker import Broker
from cloud_learner.children import spawn_tied
from cloud_learner.nats_server import find_server
from edge_runtime.bus import nats
from edge_runtime.bus.base import Bus
from edge_runtime.bus.memory import MemoryBroker

BusOf = Callable[[str], AbstractAsyncContextManager[Bus]]
READY_S = 20.0


class Servers:
    """Servers on loopback that share a store in `folder`; call it to start one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._started = 0

    def __call__(self, config: str, *, server: Path | None = None, port: int = -1) -> str:
        """Start a server with that text in its configuration; returns its url when it is ready.

        `server` is the program, by default the one that the broker runs.
        """
        self._started += 1
        folder = self._folder / f"server-{self._started}"
        folder.mkdir()
        store = json.dumps(str(self._folder / "store"))
        (folder / "server.conf").write_text(
            f'listen: "127.0.0.1:{port}"\nports_file_dir: {json.dumps(str(folder))}\n'
            f"jetstream {{ store_dir: {store}, sync_interval: always }}\n{config}"
        )
        found = server or find_server(Path(sysconfig.get_path("scripts")), os.environ)
        with open(folder / "log", "wb") as log:
            command = [str(found), "--config", str(folder / "server.conf")]
            child = spawn_tied(command, output=log.fileno())
        url = self._await_ready(child, folder)
        self._children[url] = child
        return url

    def stop(self, url: str) -> None:
        """End a server as an operator does."""
        child = self._children.pop(url)
        child.terminate()
        child.wait()

    def close(self) -> None:
        """End all of them."""
        for child in self._children.values():
            child.kill()
            child.wait()

    def _await_ready(self, child: subprocess.Popen[bytes], folder: Path) -> str:
        deadline_s = time.monotonic() + READY_S
        while child.poll() is None and time.monotonic() < deadline_s:
            for ports in folder.glob("*.ports"):
                with contextlib.suppress(ValueError):  # half written
                    return json.loads(ports.read_text())["nats"][0]
            time.sleep(0.01)
        child.kill()
        child.wait()
        raise AssertionError((folder / "log").read_text())


@pytest.fixture
def run_server(tmp_path: Path) -> Iterator[Servers]:
    """See `Servers`; all are stopped at the end."""
    servers = Servers(tmp_path)
    yield servers
    servers.close()


@pytest.fixture
def bus_of(tmp_path: Path) -> BusOf:
    """`async with bus_of(kind) as bus`: of a broker in `memory`, or of a real one (`nats`)."""

    @asynccontextmanager
    async def connected(kind: str) -> AsyncIterator[Bus]:
        if kind == "memory":
            yield await MemoryBroker().connect()
            return
        with Broker.start(tmp_path / "broker") as broker:
            bus = await nats.connect(broker.url, name="test")
            try:
                yield bus
            finally:
                await bus.close()

    return connected


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(size)` is the folder of a file system of so many bytes, and of no more."""
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if (
            os.geteuid() != 0
            or subprocess.run(command, check=False, capture_output=True).returncode
        ):
            pytest.skip("a small file system can only be mounted by root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
