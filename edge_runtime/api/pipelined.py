"""The asynchronous client of a device's Unix socket: many requests at once on one connection.

Why: an application answers from the runtime beside it, and must be light: importing this loads
neither ONNX Runtime nor TUF nor NATS, and no numpy before tensors are sent.

Invariants: each request gets exactly one answer or one error; what was in flight when the
connection broke fails with TransportError `connection_lost`, or with what the runtime said about
its closing, and the caller decides by `hello().survived` what to send again. At most IN_FLIGHT_MAX
requests are in flight.

Implements the client's half of proto/socket.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

from edge_runtime.api import frames
from edge_runtime.api.frames import (
    Done,
    Failed,
    Hello,
    Infer,
    Inferred,
    Label,
    Observe,
    Predict,
    Predicted,
    Reply,
    Request,
    Rollback,
    RolledBack,
    Status,
    StatusReply,
    Welcome,
)
from edge_runtime.api.session_client import AsyncSession
from edge_runtime.api.session_frames import ForgetSessions, Forgotten
from edge_runtime.errors import CapacityError, HeadwaterError, TransportError

IN_FLIGHT_MAX = 8192


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
        self._reason: HeadwaterError | None = None

    @classmethod
    async def connect(cls, path: str | Path) -> Self:
        """Connect to the socket at `path`. Raises: TransportError `unreachable`."""
        loop = asyncio.get_running_loop()
        try:
            _, client = await loop.create_unix_connection(cls, str(path))
        except OSError as error:
            raise unreachable(path, error) from error
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

    def infer(
        self, family: str, inputs: Mapping[str, Any], outputs: Sequence[str] = (), release: str = ""
    ) -> asyncio.Future[Inferred]:
        """Arrays in by name, arrays out: `answer["name"]`, `dict(answer)`; and `.release`.

        `outputs` empty: all of them; `release` empty: the one that serves.
        """
        return self._ask(infer_request(self._next_id(), family, inputs, outputs, release))

    def session(self, family: str, key: str) -> AsyncSession:
        """A handle on the session of `key`, 1 to 256 characters that say whose it is."""
        return AsyncSession(self._ask, self._next_id, family, key)

    def forget_sessions(self, family: str = "") -> asyncio.Future[Forgotten]:
        """Forget all sessions of `family`, empty: of every one; `.sessions` is how many."""
        return self._ask(ForgetSessions(self._next_id(), family))

    def rollback(self, family: str, reason: str) -> asyncio.Future[RolledBack]:
        """Go back to the release that served before; `.release` is it, and serves now."""
        return self._ask(Rollback(self._next_id(), family, reason))

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
            raise self._reason or lost()

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
        self._fail_all(lost())
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
            raise self._reason or lost()
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
            if future is None:  # the server closes the connection, and this is why
                self._reason = frames.error_in(reply)
                self._fail_all(self._reason)
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


def infer_request(
    number: int, family: str, inputs: Mapping[str, Any], outputs: Sequence[str], release: str
) -> Infer:
    """The request of `infer`. Raises: RequestError `wrong_type`, for what cannot be sent."""
    import numpy as np

    from edge_runtime.api.raw import raws_of

    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    return Infer(number, family, raws_of(arrays), tuple(outputs), release)


def unreachable(path: str | Path, error: OSError) -> TransportError:
    """The error of a connection that could not be made."""
    return TransportError(
        "unreachable",
        f"no runtime answers at {path}: {error}",
        "edge-runtime run --config edge.toml",
    )


def lost() -> TransportError:
    """The error of a connection that is over."""
    return TransportError("connection_lost", "the connection to the runtime is closed")
