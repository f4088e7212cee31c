"""The server of the Unix socket: frames in, the runtime's answers out.

Why: an application in any language asks the runtime beside it, many requests on one connection, for
little more than the cost of the answer itself.

Invariants: requests of a connection are answered in their order, all complete frames of a chunk in
one go and with one write. A request that fails gets its error and changes nothing; a frame that
cannot be told apart from garbage gets an error with request id 0, and its connection alone is
closed. While a client does not read, its requests are not read either, so memory stays bounded.

Knows nothing about models, logs or brokers. Implements the server's half of proto/socket.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec

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
    StatusReply,
    Survived,
    Welcome,
)
from edge_runtime.errors import CapacityError, ConfigError, HeadwaterError, RequestError
from edge_runtime.runtime import Event, Prediction

WRITE_BUFFER_BYTES = 256 * 1024
"""Above so many unread bytes of answers, a connection's requests wait."""

_CLOSE_S = 1.0


class Service(Protocol):
    """What the server asks of a runtime; all of it sync, on the loop's thread."""

    @property
    def device(self) -> str: ...

    @property
    def epoch(self) -> int: ...

    def predict(self, family: str, event: Event) -> Prediction: ...

    def observe(self, family: str, event: Event) -> int: ...

    def label(
        self,
        prediction_id: str,
        value: float,
        *,
        time_s: float | None = None,
        final: bool = True,
        family: str | None = None,
    ) -> int: ...

    def survived(self) -> list[tuple[int, str, int]]: ...


class SocketServer:
    """Serves `service` on a Unix socket; `status` is what a Status request is answered with."""

    def __init__(self, service: Service, status: Callable[[], dict[str, Any]]) -> None:
        self.service = service
        self.status = status
        self.connections: set[Connection] = set()
        self.counts = {"connections": 0, "frames": 0, "bad_frames": 0, "half_frames": 0}
        self._server: asyncio.Server | None = None
        self._path: Path | None = None

    async def start(self, path: Path) -> None:
        """Listen at `path`, for this user only.

        Raises: ConfigError (socket_in_use, bad_socket).
        """
        loop = asyncio.get_running_loop()
        listener = _listen(path)
        self._path = path
        self._server = await loop.create_unix_server(lambda: Connection(self), sock=listener)

    async def close(self) -> None:
        """Stop listening, let answers already written leave, then close the connections."""
        if self._server is None or self._path is None:
            return
        self._server.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        leaving = list(self.connections)
        for connection in leaving:
            connection.close()
        if leaving:
            await asyncio.wait([connection.lost for connection in leaving], timeout=_CLOSE_S)
        for connection in list(self.connections):
            connection.abort()
        self._server = None

    def statistics(self) -> dict[str, int]:
        """Counts since the start, and `open`, the connections now."""
        return self.counts | {"open": len(self.connections)}


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: SocketServer) -> None:
        self._server = server
        self._service = server.service
        self._splitter = frames.Splitter()
        self._transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self._server.connections.add(self)
        self._server.counts["connections"] += 1

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._transport = None
        self._server.connections.discard(self)
        self._server.counts["half_frames"] += self._splitter.started
        self.lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return
        bodies, broken = self._splitter.feed(data)
        self._server.counts["frames"] += len(bodies)
        replies = []
        for body in bodies:
            try:
                replies.append(self._answer(body))
            except RequestError as error:
                broken = error
                break
        if broken is not None:
            self._server.counts["bad_frames"] += 1
            replies.append(frames.frame(_failed(0, broken)))
        if replies:
            self._transport.write(b"".join(replies))
        if broken is not None:
            self._splitter.reset()
            self._transport.close()

    def pause_writing(self) -> None:
        assert self._transport is not None
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        assert self._transport is not None
        self._transport.resume_reading()

    def close(self) -> None:
        """Close once what is written has left."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close now."""
        if self._transport is not None:
            self._transport.abort()

    def _answer(self, body: memoryview) -> bytes:
        """The reply to a body, framed. Raises: RequestError when the body is garbage."""
        try:
            request = frames.decode_request(body)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            failed = frames.why_invalid(body, error)
            self._server.counts["bad_frames"] += 1
            return frames.frame(failed)
        try:
            return frames.frame(self._reply(request))
        except HeadwaterError as error:
            return frames.frame(_failed(request.request_id, error))

    def _reply(self, request: Request) -> Reply:
        if type(request) is Predict:
            event = Event(request.kind, request.time_s, request.fields)
            answer = self._service.predict(request.family, event)
            return Predicted(
                request.request_id, answer.id, answer.outputs, answer.release, answer.arm
            )
        if type(request) is Observe:
            event = Event(request.kind, request.time_s, request.fields)
            return Done(request.request_id, self._service.observe(request.family, event))
        if type(request) is Label:
            return Done(request.request_id, self._label(request))
        if type(request) is Hello:
            return self._welcome(request)
        return StatusReply(request.request_id, self._server.status())

    def _label(self, request: Label) -> int:
        return self._service.label(
            request.prediction_id,
            request.value,
            time_s=request.time_s,
            final=request.final,
            family=request.family,
        )

    def _welcome(self, request: Hello) -> Welcome:
        if request.version != frames.PROTOCOL_VERSION:
            raise RequestError(
                "bad_version",
                f"the client speaks version {request.version}; this {frames.PROTOCOL_VERSION}",
            )
        survived = [Survived(*each) for each in self._service.survived()]
        return Welcome(request.request_id, self._service.device, self._service.epoch, survived)


def _failed(request_id: int, error: HeadwaterError) -> Failed:
    retry = isinstance(error, CapacityError)
    return Failed(request_id, error.code, error.message, error.hint, retry)


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        listener.bind(str(path))
        os.chmod(path, 0o600)
    except OSError as error:
        listener.close()
        raise ConfigError("bad_socket", f"cannot listen at {path}: {error}") from error
    except ConfigError:
        listener.close()
        raise
    return listener


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
