"""The HTTP server: listeners on loopback TCP and on a Unix socket, before one application.

Why: tools that speak HTTP, and clients of other inference servers, ask a device as they are; what
wants microseconds uses the Unix socket beside it (proto/socket.md).

Invariants: TCP is bound to 127.0.0.1 alone, there being no authentication. It runs in the daemon's
own loop. Half a request ends in a closed connection, soon in silence, and in time if it dribbles;
a thousand idle ones cost memory only; all bodies and half heads that are held at once are bounded
together. Without the extra `http` it says what to install.

Knows nothing about paths and tensors. httptools is loaded by `start`, not before.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.api import socket as unix_socket
from edge_runtime.api.app import App
from edge_runtime.errors import ConfigError
from edge_runtime.runtime import Runtime

if TYPE_CHECKING:
    from edge_runtime.api.http_connection import HttpConnection

HOST = "127.0.0.1"
HELD_BODIES_MAX = 4
"""So many bodies of the largest size may be held at once, over all connections."""

CONNECTIONS_MAX = 1024
"""So many connections may be open; each may hold the head of a request, of 64 KiB, beside that."""

_BACKLOG = 1024
_CLOSE_S = 1.0


class HttpServer:
    """Serves `runtime` over HTTP; `status` is what /edge/v1/status and /metrics speak of.

    `silence_s` is how long half a request may wait for more, and, but for what its bytes need at
    the slowest rate, how long it may take from its first byte.
    """

    def __init__(
        self,
        runtime: Runtime,
        status: Callable[[], dict[str, Any]],
        *,
        body_bytes_max: int = 16 << 20,
        silence_s: float = 10.0,
    ) -> None:
        self.port: int | None = None
        self.app, self.body_bytes_max = App(runtime, status), body_bytes_max
        self.counts = dict.fromkeys(("connections", "bad_requests", "half_requests"), 0)
        self.held_bytes, self.held_bytes_max = 0, HELD_BODIES_MAX * body_bytes_max
        self._connections: set[HttpConnection] = set()
        self._empty = asyncio.Event()
        self.sweep_s = silence_s / 2
        self._sweeper: asyncio.TimerHandle | None = None
        self._servers: list[asyncio.Server] = []
        self._path: Path | None = None
        self._made = (0, 0)

    async def start(
        self, port: int | None, path: Path | None = None, *, mode: int = 0o600, group: str = ""
    ) -> None:
        """Listen on loopback TCP at `port` (0: any that is free), at `path`, or at both.

        Raises: ConfigError (http_not_installed, port_in_use, socket_in_use, bad_socket).
        """
        protocol, loop = _protocol(), asyncio.get_running_loop()

        def admit() -> HttpConnection:
            return protocol(self)

        if port is not None:
            listener = _bind(port)
            self.port = listener.getsockname()[1]
            server = await loop.create_server(admit, sock=listener, backlog=_BACKLOG)
            self._servers.append(server)
        if path is not None:
            listener = unix_socket.bind(path, mode, group)
            self._path, self._made = path, unix_socket.identity(path)
            server = await loop.create_unix_server(admit, sock=listener, backlog=_BACKLOG)
            self._servers.append(server)
        self._sweep()

    async def close(self) -> None:
        """Stop listening, let answers that are under way leave, then close the connections."""
        for server in self._servers:
            server.close()
        if self._path is not None:
            unix_socket.remove_own(self._path, self._made)
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self._connections):
            connection.close()
        await self._emptied(_CLOSE_S)
        for connection in list(self._connections):
            connection.abort()
        await self._emptied(_CLOSE_S)
        self._servers, self._path = [], None

    def admitted(self, connection: HttpConnection) -> bool:
        """Know a connection that is open now; False: it is one too many, and is to be told so."""
        self._connections.add(connection)
        self.counts["connections"] += 1
        return len(self._connections) <= CONNECTIONS_MAX

    def left(self, connection: HttpConnection) -> None:
        """Forget a connection."""
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    def statistics(self) -> dict[str, int]:
        """Counts since the start; `open` connections, and bytes of bodies held, are those now."""
        now = {"open": len(self._connections), "held_bytes": self.held_bytes}
        return {**self.app.counts, **self.counts, **now}

    async def _emptied(self, patience_s: float) -> None:
        if self._connections:
            self._empty.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), patience_s)

    def _sweep(self) -> None:
        self._sweeper = asyncio.get_running_loop().call_later(self.sweep_s, self._sweep)
        for connection in list(self._connections):
            connection.sweep()


def _protocol() -> type[HttpConnection]:
    try:
        from edge_runtime.api.http_connection import HttpConnection
    except ModuleNotFoundError as error:
        raise ConfigError(
            "http_not_installed",
            f"HTTP is configured, and {error.name} is not installed",
            "pip install 'headwater[http]'",
        ) from error
    return HttpConnection


def _bind(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            "port_in_use",
            f"cannot listen at {HOST}:{port}: {error}",
            "choose another http.port, or 0 for any that is free",
        ) from error
    return listener
