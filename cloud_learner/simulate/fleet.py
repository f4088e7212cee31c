"""The fleet: devices as real processes, started, killed, restarted and stopped.

Why: a demonstration and a test should meet the very program that runs in the field, with its own
disk, its own socket and its own death.

Invariants: a process is ready when `start` or `restart` returns. None outlives the one that started
it: leaving the fleet stops them, and the kernel kills them if that never comes.

Knows nothing about what is asked of a device.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from cloud_learner.children import spawn_tied
from edge_runtime import config as configuration
from edge_runtime import factory
from edge_runtime.api.client import AsyncClient
from edge_runtime.config import SOCKET_BYTES_MAX
from edge_runtime.errors import ConfigError, TransportError
from edge_runtime.files import write_atomic

_READY_WAIT_S = 30.0
_STOP_WAIT_S = 10.0
_POLL_S = 0.01
_SUPERVISE_S = 0.05
_TAIL_LINES = 15


class DeviceProcess:
    """A device called `name` with everything it owns below `home`; its output is in home/log.txt.

    `nats` and `root` as in `edge.toml`; without them it answers from its shelf.
    """

    def __init__(
        self,
        name: str,
        home: Path,
        *,
        families: Iterable[str],
        attributes: Mapping[str, str] | None = None,
        nats: str = "",
        root: Path | None = None,
        linger_ms: int = 5,
    ) -> None:
        self.name, self.home = name, home.absolute()
        self.wanted = False
        self._short: Path | None = None
        self.socket = self._socket()
        self._child: subprocess.Popen[bytes] | None = None
        self._settings: dict[str, Any] = {"device": name, "families": list(families)}
        if nats and root is not None:
            self._settings |= {"nats": nats, "root": str(root.absolute())}
        self._tables: dict[str, dict[str, Any]] = {
            "attributes": dict(attributes or {}),
            "log": {"linger_ms": linger_ms, "linger_max_ms": linger_ms},
        }

    @property
    def config_path(self) -> Path:
        """The configuration, there after `configure`."""
        return self.home / "edge.toml"

    @property
    def pid(self) -> int:
        """The process id. The device must have been started."""
        assert self._child is not None, f"{self.name} was not started"
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether the process lives; it need not answer yet."""
        return self._child is not None and self._child.poll() is None

    def configure(self) -> configuration.EdgeConfig:
        """Write the configuration, without starting anything. Raises: ConfigError."""
        self.home.mkdir(parents=True, exist_ok=True)
        if self._short is not None:
            self._short.mkdir(mode=0o700, exist_ok=True)
        settings = self._settings | {"state_dir": "state", "socket": str(self.socket)}
        text = _toml(settings)
        for name, table in self._tables.items():
            text += f"\n[{name}]\n{_toml(table)}"
        config = configuration.parse(text, self.config_path)
        write_atomic(self.config_path, text.encode())
        return config

    def public_key(self) -> str:
        """The key to admit the device by; made where there is none yet. Raises: ConfigError."""
        return factory.own_key(self.configure())

    async def start(self) -> None:
        """Start the process, and wait until it answers.

        Raises: ConfigError `device_failed`, TransportError `timeout`, with the end of its log.
        """
        assert not self.running, f"{self.name} runs already"
        self.wanted = True
        self.configure()
        self._spawn()
        try:
            await self._answers()
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL: it is gone when this returns, as after a power cut."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    async def restart(self) -> None:
        """Start again with the same disk, stopping first what runs. Raises: as `start`."""
        await self.stop()
        await self.start()

    async def stop(self) -> None:
        """SIGTERM, and wait until it is gone; what does not go in time is killed."""
        self.wanted = False
        try:
            if self._child is not None and self.running:
                self._child.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(self._child.wait, _STOP_WAIT_S)
        finally:
            self.kill()
            if self._short is not None:
                shutil.rmtree(self._short, ignore_errors=True)

    def _socket(self) -> Path:
        """In the home, or in a folder with a short name where the home's is too long for one."""
        socket = self.home / "edge.sock"
        if len(str(socket).encode()) <= SOCKET_BYTES_MAX:
            return socket
        self._short = Path(tempfile.mkdtemp(prefix="headwater-"))
        return self._short / "edge.sock"

    def _spawn(self) -> None:
        command = [sys.executable, "-m", "edge_runtime.cli", "run"]
        with open(self.home / "log.txt", "ab") as output:
            self._child = spawn_tied(
                [*command, "--config", str(self.config_path)], output=output.fileno()
            )

    async def _answers(self) -> None:
        deadline_s = time.monotonic() + _READY_WAIT_S
        while True:
            try:
                async with asyncio.timeout(_READY_WAIT_S):
                    return await self._hello()
            except (TransportError, TimeoutError) as error:
                if not self.running:
                    raise ConfigError("device_failed", self._epitaph("ended")) from error
                if time.monotonic() > deadline_s:
                    raise TransportError("timeout", self._epitaph("does not answer")) from error
                await asyncio.sleep(_POLL_S)

    async def _hello(self) -> None:
        async with await AsyncClient.connect(self.socket) as client:
            await client.hello()

    def _epitaph(self, what: str) -> str:
        try:
            lines = (self.home / "log.txt").read_text(errors="replace").splitlines()
        except OSError as error:
            lines = [str(error)]
        return "\n".join([f"device {self.name} {what}; the end of its log:", *lines[-_TAIL_LINES:]])


class Fleet:
    """Several devices; an async context manager that starts and stops them together."""

    def __init__(self, devices: Iterable[DeviceProcess]) -> None:
        self.devices = {device.name: device for device in devices}
        self.restarts = 0

    @property
    def sockets(self) -> dict[str, Path]:
        """Each device's socket, by its name."""
        return {name: device.socket for name, device in self.devices.items()}

    async def start(self) -> None:
        """Start all at once. Raises: as DeviceProcess.start, with all stopped."""
        try:
            await asyncio.gather(*(device.start() for device in self.devices.values()))
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop all at once."""
        try:
            await asyncio.gather(*(device.stop() for device in self.devices.values()))
        finally:
            for device in self.devices.values():
                device.kill()

    async def supervise(self) -> None:
        """Restart whatever dies unasked, for ever, as a service manager would.

        Raises: as DeviceProcess.start, when one does not come back.
        """
        while True:
            for device in self.devices.values():
                if device.wanted and not device.running:
                    self.restarts += 1
                    await device.start()
            await asyncio.sleep(_SUPERVISE_S)

    def statistics(self) -> dict[str, int]:
        """Counts since the start."""
        running = sum(device.running for device in self.devices.values())
        return {"devices": len(self.devices), "running": running, "restarts": self.restarts}

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.stop()


def _toml(table: Mapping[str, Any]) -> str:
    return "".join(f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in table.items())
