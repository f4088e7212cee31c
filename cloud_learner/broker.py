"""The embedded broker: a nats-server child that lives and dies with the process that started it.

Why: a laptop, a test and a small site need no broker of their own to install; one call makes one.

Invariants: ready when `start` returns; listens on loopback only; what it acknowledged is on disk
(`sync_interval: always`), so any death of it loses nothing. It is killed when its parent dies, and
the store is locked by parent and child together, so two servers never share one.

Durable state: the server's own JetStream store below the state directory.
Knows nothing about streams or subjects, nor who may come in: that is a text it is given.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Self

import msgspec

from cloud_learner.children import spawn_tied
from cloud_learner.nats_server import find_server
from edge_runtime.errors import ConfigError, TransportError
from edge_runtime.files import write_atomic

_READY_WAIT_S = 60.0  # a large store takes a while to recover
_STOP_WAIT_S = 10.0
_RELOAD_WAIT_S = 30.0
_POLL_S = 0.01

ACCOUNT = "HEADWATER"
"""The account that holds the streams, where there are accounts."""

_ACCESS_FILE, _PORT_FILE = "access.conf", "port"
_RELOADED, _FAILED = b"Reloaded server configuration", b"Failed to reload"
_RELOADS = 2  # the server opens the doors of a new account only when it reads it a second time

_CONFIG = """\
server_name: headwater
listen: "127.0.0.1:{port}"
ports_file_dir: {directory}
log_file: {log}
max_payload: 1MB
write_deadline: "10s"
jetstream {{
  store_dir: {store}
  sync_interval: always
  max_file_store: 64GB
  max_memory_store: 64MB
}}
feature_flags {{ js_ack_fc_v2: false }}
include {access}
"""


class Broker:
    """A running nats-server; made by `start`, also a context manager."""

    def __init__(self, server: Path, state_dir: Path) -> None:
        self.url = ""
        self._server = server
        self._dir = state_dir
        self._child: subprocess.Popen[bytes] | None = None
        self._lock_fd: int | None = _lock(state_dir)

    @classmethod
    def start(cls, state_dir: Path, access: str = "") -> Self:
        """Start a server with its store in `state_dir` and wait until it answers.

        It listens where the last one on this store did, so that devices find it again, if that
        port is free. `access` is the part of its configuration that says who may come in; empty:
        everybody.

        Raises: ConfigError `no_nats_server`, `old_nats_server`, `already_owned`,
        `broker_failed`; TransportError `timeout`.
        """
        server = find_server(Path(sysconfig.get_path("scripts")), os.environ)
        state_dir = state_dir.absolute()
        state_dir.mkdir(parents=True, exist_ok=True)
        broker = cls(server, state_dir)
        try:
            write_access(state_dir, access)
            if access:
                _adopt(state_dir / "jetstream" / "jetstream")
            broker._launch(port=_last_port(state_dir))
        except BaseException:
            broker.stop()
            raise
        return broker

    @property
    def pid(self) -> int:
        """The process id of the child."""
        assert self._child is not None, "the broker is stopped"
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether the child lives."""
        return self._child is not None and self._child.poll() is None

    def restart(self) -> None:
        """Stop if running, and start again: same store, same port. Raises: as `start`."""
        self._end(signal.SIGTERM)
        self._launch(port=int(self.url.rsplit(":", 1)[1]))

    def kill(self) -> None:
        """End the child as a crash would; `restart` brings it back."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End the child and release the store; stopping twice is no error."""
        self._end(signal.SIGTERM)
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def _launch(self, port: int) -> None:
        assert self._lock_fd is not None, "the broker is stopped"
        config = self._dir / "nats-server.conf"
        write_atomic(config, self._config(port).encode())
        for stale in self._dir.glob("*.ports"):
            stale.unlink()
        command = [str(self._server), "--config", str(config)]
        # The store stays locked until the child is gone, too.
        self._child = spawn_tied(command, pass_fds=[self._lock_fd])
        self.url = self._await_ready()
        write_atomic(self._dir / _PORT_FILE, self.url.rpartition(":")[2].encode())

    def _config(self, port: int) -> str:
        return _CONFIG.format(
            port=port,
            directory=_quoted(self._dir),
            log=_quoted(self._dir / "nats-server.log"),
            store=_quoted(self._dir / "jetstream"),
            access=_quoted(Path(_ACCESS_FILE)),
        )

    def _await_ready(self) -> str:
        """The url from the ports file, which the server writes once it listens."""
        ports = self._dir / f"nats-server_{self.pid}.ports"
        deadline_s = time.monotonic() + _READY_WAIT_S
        while time.monotonic() < deadline_s:
            if self._child is None or self._child.poll() is not None:
                raise ConfigError("broker_failed", f"nats-server ended: {self._last_words()}")
            if urls := _urls(ports):
                return urls[0]
            time.sleep(_POLL_S)
        raise TransportError("timeout", f"nats-server is not ready after {_READY_WAIT_S:.0f} s")

    def _last_words(self) -> str:
        try:
            lines = (self._dir / "nats-server.log").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        bad = [line for line in lines if "[FTL]" in line or "[ERR]" in line]
        return (bad or lines or ["it wrote no log"])[-1]

    def _end(self, how: signal.Signals) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.send_signal(how)
        try:
            child.wait(_STOP_WAIT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def write_access(state_dir: Path, access: str) -> None:
    """Write who may come in; a running server takes it at its next `reload`."""
    write_atomic(state_dir / _ACCESS_FILE, access.encode(), mode=0o600)


def reload(state_dir: Path) -> bool:
    """Let the server that runs on `state_dir`, in whatever process, read its configuration again.

    Connections that it still admits stay. False when none runs.

    Raises: ConfigError `broker_refused`, with the old configuration still in force; TransportError
    `timeout`.
    """
    pid = _running(state_dir.absolute())
    if pid is None:
        return False
    for _ in range(_RELOADS):
        _reload(pid, state_dir / "nats-server.log")
    return True


def _reload(pid: int, log: Path) -> None:
    start = log.stat().st_size
    os.kill(pid, signal.SIGHUP)
    deadline_s = time.monotonic() + _RELOAD_WAIT_S
    while time.monotonic() < deadline_s:
        said = _said_since(log, start)
        if _RELOADED in said:
            return
        if _FAILED in said:
            last = said.decode(errors="replace").splitlines()[-1]
            raise ConfigError("broker_refused", f"{last}; the old configuration stays in force")
        time.sleep(_POLL_S)
    raise TransportError(
        "timeout",
        f"nats-server says nothing after {_RELOAD_WAIT_S:.0f} s; the change is written, and holds"
        " from its next start on",
        f"see {log}",
    )


def _said_since(log: Path, start: int) -> bytes:
    """The whole lines in a log from byte `start` on."""
    with open(log, "rb") as file:
        file.seek(start)
        return file.read().rpartition(b"\n")[0]


def _adopt(accounts: Path) -> None:
    """Streams of a server that let everybody in belong to the learner once there are accounts."""
    everybody, ours = accounts / "$G", accounts / ACCOUNT
    if everybody.exists() and not ours.exists():
        os.rename(everybody, ours)


def _running(state_dir: Path) -> int | None:
    """The process id of the server on `state_dir`; a file of a dead one may still lie there."""
    for ports in state_dir.glob("nats-server_*.ports"):
        pid = int(ports.stem.rpartition("_")[2])
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if str(state_dir / "nats-server.conf").encode() in command.split(b"\0"):
            return pid
    return None


def _last_port(state_dir: Path) -> int:
    """Where the last server on this store listened, if that is free; else -1, any."""
    try:
        port = int((state_dir / _PORT_FILE).read_text())
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except (OSError, ValueError, OverflowError):
        return -1
    return port


def _lock(state_dir: Path) -> int:
    """Own the store. Raises: ConfigError `already_owned`."""
    fd = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        hint = "stop the other process, or choose another state directory"
        raise ConfigError("already_owned", f"another broker runs on {state_dir}", hint) from error
    return fd


def _urls(ports: Path) -> list[str]:
    """The client urls in a ports file; none while it is absent or half written."""
    try:
        found = msgspec.json.decode(ports.read_bytes(), type=dict[str, list[str]])
    except (OSError, msgspec.DecodeError):
        return []
    return found.get("nats", [])


def _quoted(path: Path) -> str:
    return msgspec.json.encode(str(path)).decode()
