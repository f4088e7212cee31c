"""A bad network between a client and a broker: slow, cut, or half-open, as a proxy over TCP.

Why: what a connection survives can only be shown by taking it away in every way in which networks
do, on real sockets.

Invariants: bytes are never changed or reordered. What is done to the connections that exist does
not touch those that come later, so a client that dials anew is well. Leaving ends all of them.

Knows nothing about the protocol that passes through.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from typing import Self
from urllib.parse import urlsplit

from edge_runtime.bus.nats import connect
from edge_runtime.errors import HeadwaterError

_CHUNK_BYTES = 1 << 14
_RECEIVE_BYTES = 1 << 14  # a small window, so that what is not taken stays with its sender
_LOOK_S = 0.02


class Proxy:
    """Stands before the broker at `url`; `self.url` is where to go instead.

    Every chunk waits `latency_s` each way, and no more than `bytes_per_s` pass (0: all).
    """

    def __init__(self, url: str, *, latency_s: float = 0.0, bytes_per_s: float = 0.0) -> None:
        there = urlsplit(url)
        self.latency_s, self.bytes_per_s = latency_s, bytes_per_s
        self.url = ""
        self.accepted = 0
        self._scheme, self._there = there.scheme, (there.hostname, there.port)
        self._server: asyncio.Server | None = None
        self._pipes: set[_Pipe] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def cut(self) -> None:
        """Reset every connection."""
        for pipe in list(self._pipes):
            pipe.abort()

    def freeze(self, *, up: bool = True, down: bool = True) -> None:
        """Let nothing pass any more on the connections that exist, in the ways that are named.

        Nobody is told: to both ends the connection looks open, and slow.
        """
        for pipe in self._pipes:
            if up:
                pipe.up.clear()
            if down:
                pipe.down.clear()

    async def __aenter__(self) -> Self:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        limit = _CHUNK_BYTES
        self._server = await asyncio.start_server(self._serve, sock=listener, limit=limit)
        self.url = f"{self._scheme}://127.0.0.1:{listener.getsockname()[1]}"
        return self

    async def __aexit__(self, *_error: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await self._idle.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            there = await asyncio.open_connection(*self._there, limit=_CHUNK_BYTES)
        except OSError:
            writer.transport.abort()
            return
        pipe = _Pipe(writer, there[1])
        self._pipes.add(pipe)
        self._idle.clear()
        try:
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._pump(pipe, reader, there[1], pipe.up))
                ways.create_task(self._pump(pipe, there[0], writer, pipe.down))
        finally:
            pipe.abort()
            self._pipes.discard(pipe)
            if not self._pipes:
                self._idle.set()

    async def _pump(
        self,
        pipe: _Pipe,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        open_: asyncio.Event,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK_BYTES):
                if self.latency_s or self.bytes_per_s:
                    slow_s = len(data) / self.bytes_per_s if self.bytes_per_s else 0.0
                    await asyncio.sleep(self.latency_s + slow_s)
                await open_.wait()
                sink.write(data)
                await sink.drain()
        pipe.abort()


class _Pipe:
    """Both ends of one connection, and whether bytes pass each way."""

    def __init__(self, *ends: asyncio.StreamWriter) -> None:
        self.up, self.down = asyncio.Event(), asyncio.Event()
        self.up.set()
        self.down.set()
        self._ends = ends

    def abort(self) -> None:
        for end in self._ends:
            end.transport.abort()
        self.up.set()
        self.down.set()


async def half_open(
    url: str,
    connections: int,
    *,
    up: bool = True,
    down: bool = True,
    fill_bytes: int = 1 << 20,
    limit_s: float = 30.0,
) -> list[float]:
    """How long each of `connections` at once takes to notice that it is half-open, and be replaced.

    Each has `fill_bytes` that nobody takes. In seconds; infinity where `limit_s` did not suffice.
    """
    async with Proxy(url) as proxy:
        buses = [await connect(proxy.url, name=f"half-open {i}") for i in range(connections)]
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        proxy.freeze(up=up, down=down)
        unsent = [
            asyncio.create_task(bus.publish("nobody.listens", bytes(fill_bytes // 2 - 64)))
            for bus in buses
            for _ in range(2)
        ]
        took = [math.inf] * connections
        while math.inf in took and loop.time() < started_s + limit_s:
            await asyncio.sleep(_LOOK_S)
            for index, bus in enumerate(buses):
                if took[index] == math.inf and bus.statistics()["reconnects"] and bus.connected:
                    took[index] = loop.time() - started_s
        ends = await asyncio.gather(*unsent, return_exceptions=True)
        assert all(isinstance(end, HeadwaterError) for end in ends), "nobody takes what is unsent"
        await asyncio.gather(*(bus.close() for bus in buses))
    return took
