"""The server of the Unix socket: where it listens, who may connect, how it ends.

Why: an application in any language asks the runtime beside it; who may do so is a matter of the
file's mode and group.

Invariants: nobody can connect before mode and group are set, for only then the server listens. A
socket that another process answers at, and a file that is no socket, are left alone.

Knows nothing about frames and models. Implements the section Connecting of proto/socket.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_runtime.api.answers import Answers, Service
from edge_runtime.api.bounds import Bounds, Member
from edge_runtime.api.connection import Connection
from edge_runtime.errors import ConfigError

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
        service: Service,
        status: Callable[[], dict[str, Any]],
        *,
        connections_max: int = CONNECTIONS_MAX,
        half_frame_s: float = HALF_FRAME_S,
    ) -> None:
        self._answers = Answers(service, status)
        self._bounds = Bounds(connections_max, half_frame_s)
        self._server: asyncio.Server | None = None
        self._path: Path | None = None

    async def start(self, path: Path, mode: int = 0o600, group: str = "") -> None:
        """Listen at `path`, for those whom `mode` lets in; `group` owns it, empty: as it comes.

        Raises: ConfigError (socket_in_use, bad_socket, unknown_group).
        """
        listener = bind(path, mode, group)
        self._path = path
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: Connection(self._answers, self._bounds), sock=listener, backlog=_BACKLOG
        )

    async def close(self) -> None:
        """Stop listening, let the answers of what has begun leave, then close the connections."""
        if self._server is None or self._path is None:
            return
        self._server.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
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


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid if name else -1
    except KeyError as error:
        raise ConfigError(
            "unknown_group", f"there is no group {name!r} to give the socket to", "getent group"
        ) from error


def _remove_stale(path: Path) -> None:
    """Remove the socket that a killed process left; refuse one that answers, or another file."""
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise ConfigError("bad_socket", f"{path} exists and is no socket; it was left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise ConfigError(
                "socket_in_use", f"another process answers at {path}", "stop it, or change socket"
            )
    path.unlink()
