"""Clients of a device's Unix socket: `AsyncClient` for many requests at once, `Client` for one.

Why: an application answers from the runtime beside it, and must be light: importing this loads
neither ONNX Runtime nor TUF nor NATS.

Invariants: each request gets exactly one answer or one error; what was in flight when the
connection broke fails with TransportError `connection_lost`, and the caller decides by
`hello().survived` what to send again. At most IN_FLIGHT_MAX requests are in flight.

Implements the client's half of proto/socket.md.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from edge_runtime.api import frames
from edge_runtime.api.frames import (
    Done,
    Failed,
    Hello,
    Label,
    Observe,
    Predict,
    Predicted,
    Reply,
    Request,
    Status,
    StatusReply,
    Welcome,
)
from edge_runtime.errors import CapacityError, HeadwaterError, TransportError

IN_FLIGHT_MAX = 8192

_READ_BYTES = 1 << 16

R = TypeVar("R", Welcome, Predicted, Done, StatusReply)


class AsyncClient(asyncio.Protocol):
    """A connection on the running event loop; requests return futures and may be pipelined.

    Await a future for its answer, or keep it and send more; `await drain()` once in a while when
    sending without awaiting.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._splitter = frames.Splitter()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._out: list[bytes] = []
        self._last_id = 0
        self._writable = asyncio.Event()
        self._closed = self._loop.create_future()

    @classmethod
    async def connect(cls, path: str | Path) -> Self:
        """Connect to the socket at `path`. Raises: TransportError `unreachable`."""
        loop = asyncio.get_running_loop()
        try:
            _, client = await loop.create_unix_connection(cls, str(path))
        except OSError as error:
            raise _unreachable(path, error) from error
        return client

    def hello(self) -> asyncio.Future[Welcome]:
        """The device, its epoch, and what survived of earlier epochs."""
        return self._ask(Hello(self._next_id()))

    def predict(
        self, family: str, kind: str, time_s: float, fields: Mapping[str, Any]
    ) -> asyncio.Future[Predicted]:
        """The answer to an event: `.id`, `.outputs`, `.release`, `.arm`."""
        return self._ask(Predict(self._next_id(), family, kind, time_s, cast("Any", fields)))

    def observe(
        self, family: str, kind: str, time_s: float, fields: Mapping[str, Any]
    ) -> asyncio.Future[Done]:
        """Let the device remember an event; `.seq` is its number in the log."""
        return self._ask(Observe(self._next_id(), family, kind, time_s, cast("Any", fields)))

    def label(
        self,
        family: str,
        prediction_id: str,
        value: float,
        time_s: float | None = None,
        *,
        final: bool = True,
    ) -> asyncio.Future[Done]:
        """Say what turned out to be true of a prediction; `.seq` is the label's own number."""
        return self._ask(Label(self._next_id(), family, prediction_id, value, time_s, final))

    def status(self) -> asyncio.Future[StatusReply]:
        """What the device says about itself, as `.status`."""
        return self._ask(Status(self._next_id()))

    async def drain(self, in_flight: int = IN_FLIGHT_MAX // 2) -> None:
        """Wait until the socket takes more and at most `in_flight` requests are unanswered.

        Raises: TransportError `connection_lost`.
        """
        while len(self._waiting) > in_flight:
            await asyncio.wait([next(iter(self._waiting.values()))])
        await self._writable.wait()
        if self._transport is None:
            raise _lost()

    async def wait_closed(self) -> None:
        """Return when the connection is over, whoever ended it."""
        await asyncio.shield(self._closed)

    async def close(self) -> None:
        """Close the connection; closing twice is no error. What is in flight fails."""
        if self._transport is not None:
            self._flush()
            self._transport.close()
        await self._closed

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        bodies, broken = self._splitter.feed(data)
        try:
            for body in bodies:
                self._settle(frames.reply_in(body))
        except TransportError as error:
            self._break(error)
        if broken is not None:
            self._break(TransportError(broken.code, broken.message))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._transport = None
        self._writable.set()
        self._fail_all(_lost())
        self._closed.set_result(None)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _ask(self, request: Request) -> asyncio.Future[Any]:
        if self._transport is None:
            raise _lost()
        if len(self._waiting) >= IN_FLIGHT_MAX:
            raise CapacityError(
                "too_many_in_flight",
                f"{len(self._waiting)} requests are unanswered; this one was not sent",
                "await client.drain() between requests",
            )
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(frames.frame(request))
        future: asyncio.Future[Any] = self._loop.create_future()
        self._waiting[request.request_id] = future
        return future

    def _flush(self) -> None:
        if self._out and self._transport is not None:
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def _settle(self, reply: Reply) -> None:
        future = self._waiting.pop(reply.request_id, None)
        if type(reply) is Failed:
            if future is None:  # the server could not read our frame: the connection is over
                self._fail_all(frames.error_in(reply))
            elif not future.done():
                future.set_exception(frames.error_in(reply))
        elif future is not None and not future.done():
            future.set_result(reply)

    def _break(self, error: TransportError) -> None:
        self._fail_all(error)
        if self._transport is not None:
            self._transport.abort()

    def _fail_all(self, error: HeadwaterError) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)
        self._waiting.clear()


class Client:
    """A blocking connection; one request at a time, each answer bounded by `timeout_s`."""

    def __init__(self, path: str | Path, *, timeout_s: float = 10.0) -> None:
        self._splitter = frames.Splitter()
        self._last_id = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise _unreachable(path, error) from error

    def hello(self) -> Welcome:
        """As AsyncClient.hello."""
        return self._ask(Hello, Welcome)

    def predict(
        self, family: str, kind: str, time_s: float, fields: Mapping[str, Any]
    ) -> Predicted:
        """As AsyncClient.predict."""
        return self._ask(Predict, Predicted, family, kind, time_s, fields)

    def observe(self, family: str, kind: str, time_s: float, fields: Mapping[str, Any]) -> Done:
        """As AsyncClient.observe."""
        return self._ask(Observe, Done, family, kind, time_s, fields)

    def label(
        self,
        family: str,
        prediction_id: str,
        value: float,
        time_s: float | None = None,
        *,
        final: bool = True,
    ) -> Done:
        """As AsyncClient.label."""
        return self._ask(Label, Done, family, prediction_id, value, time_s, final)

    def status(self) -> StatusReply:
        """As AsyncClient.status."""
        return self._ask(Status, StatusReply)

    def close(self) -> None:
        """Close the connection; closing twice is no error."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _ask(self, request: Callable[..., Request], wanted: type[R], *values: Any) -> R:
        self._last_id += 1
        data = frames.frame(request(self._last_id, *values))
        try:
            self._socket.sendall(data)
            reply = self._receive()
        except OSError as error:
            self.close()
            raise TransportError(
                "connection_lost", f"the runtime did not answer: {error}"
            ) from error
        if isinstance(reply, Failed):
            raise frames.error_in(reply)
        assert isinstance(reply, wanted)
        assert reply.request_id == self._last_id
        return reply

    def _receive(self) -> Reply:
        while True:
            data = self._socket.recv(_READ_BYTES)
            if not data:
                raise _lost()
            bodies, broken = self._splitter.feed(data)
            if broken is not None:
                raise TransportError(broken.code, broken.message)
            if bodies:
                return frames.reply_in(bodies[0])


def _unreachable(path: str | Path, error: OSError) -> TransportError:
    return TransportError(
        "unreachable",
        f"no runtime answers at {path}: {error}",
        "edge-runtime run --config edge.toml",
    )


def _lost() -> TransportError:
    return TransportError("connection_lost", "the connection to the runtime is closed")
