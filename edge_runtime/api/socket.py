"""The server of the Unix socket: where it listens, who may connect, how it ends.

Why: an application in any language asks the runtime beside it; who may do so is a matter of the
file's mode and group.

Invariants: nobody can connect before mode and group are set, for only then the server listens. Of
what is found at the path only a socket that nobody listens at is removed, and at the end only the
file that was made here.

Knows nothing about frames and models. Implements the section Connecting of proto/socket.md.
"""

from __future__ import annotations

import asyncio
import errno
import grp
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_runtime.api.answers import Answers
from edge_runtime.api.bounds import Bounds, Member
from edge_runtime.api.connection import Connection
from edge_runtime.errors import ConfigError
from edge_runtime.runtime import Runtime

CONNECTIONS_MAX = 4096
HALF_FRAME_S = 10.0

_BACKLOG = 1024
_CLOSE_S = 1.0


class SocketServer:
    """Serves `service` on a Unix socket; `status` is what a Status request is answered with.

    A frame must be whole `half_frame_s` after it began; the connection after `connections_max` is
    told why it is closed.
    """

    def __init__(
        self,
        service: Runtime,
        status: Callable[[], dict[str, Any]],
        *,
        connections_max: int = CONNECTIONS_MAX,
        half_frame_s: float = HALF_FRAME_S,
    ) -> None:
        self._answers = Answers(service, status)
        self._bounds = Bounds(connections_max, half_frame_s)
        self._server: asyncio.Server | None = None
        self._path: Path | None = None
        self._made = (0, 0)

    async def start(self, path: Path, mode: int = 0o600, group: str = "") -> None:
        """Listen at `path`, for those whom `mode` lets in; `group` owns it, empty: as it comes.

        Raises: ConfigError (socket_in_use, bad_socket, unknown_group).
        """
        listener = bind(path, mode, group)
        self._path, self._made = path, identity(path)
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: Connection(self._answers, self._bounds), sock=listener, backlog=_BACKLOG
        )

    async def close(self) -> None:
        """Stop listening, let the answers of what has begun leave, then close the connections."""
        if self._server is None or self._path is None:
            return
        self._server.close()
        remove_own(self._path, self._made)
        leaving = list(self._bounds.members)
        for connection in leaving:
            connection.close()
        await _all_lost(leaving)
        for connection in leaving:
            connection.abort()
        await _all_lost(leaving)
        self._bounds.close()
        self._server = None

    def statistics(self) -> dict[str, int]:
        """Counts since the start; `open` connections and `held_bytes` now."""
        return self._bounds.statistics()


async def _all_lost(connections: list[Member]) -> None:
    if connections:
        await asyncio.wait([each.lost for each in connections], timeout=_CLOSE_S)


def bind(path: Path, mode: int, group: str) -> socket.socket:
    """A socket bound to `path`, which nobody can connect to before it listens.

    Raises: ConfigError (socket_in_use, bad_socket, unknown_group).
    """
    gid = _group(group)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        listener.bind(str(path))
        os.chown(path, -1, gid)
        os.chmod(path, mode)
    except OSError as error:
        listener.close()
        raise ConfigError("bad_socket", f"cannot listen at {path}: {error}") from error
    except ConfigError:
        listener.close()
        raise
    return listener


def identity(path: Path) -> tuple[int, int]:
    """Which file is at `path`: its device and inode; zeros where there is none."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino


def remove_own(path: Path, made: tuple[int, int]) -> None:
    """Remove the file at `path`, unless another than the one `made` has taken its place."""
    if made == identity(path):
        path.unlink(missing_ok=True)


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid if name else -1
    except KeyError as error:
        raise ConfigError(
            "unknown_group", f"there is no group {name!r} to give the socket to", "getent group"
        ) from error


def _remove_stale(path: Path) -> None:
    """Remove the socket that a killed process left; refuse one that is in use, or another file."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError("bad_socket", f"{path} exists and is no socket; it was left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        found = probe.connect_ex(str(path))
    if found in (0, errno.EAGAIN):  # the latter where so many wait that no more may
        raise ConfigError(
            "socket_in_use", f"another process listens at {path}", "stop it, or change socket"
        )
    if found != errno.ECONNREFUSED:
        raise ConfigError(
            "bad_socket",
            f"{path} is a socket of another kind, or not ours to ask ({os.strerror(found)}); "
            "it was left alone",
        )
    path.unlink(missing_ok=True)
