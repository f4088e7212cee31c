"""Clients of a device's Unix socket: `AsyncClient` for many requests at once, `Client` for one.

Why: an application answers from the runtime beside it, and must be light: importing this loads
neither ONNX Runtime nor TUF nor NATS, and no numpy before tensors are sent.

Invariants: each request of a `Client` gets exactly one answer or one error, and after an error of
the connection the client is closed.

Implements the client's half of proto/socket.md.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from edge_runtime.api import frames
from edge_runtime.api.frames import (
    Done,
    Failed,
    Hello,
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
from edge_runtime.api.pipelined import (
    IN_FLIGHT_MAX,
    AsyncClient,
    infer_request,
    lost,
    unreachable,
)
from edge_runtime.api.session_client import Session
from edge_runtime.api.session_frames import ForgetSessions, Forgotten
from edge_runtime.errors import TransportError

__all__ = ["IN_FLIGHT_MAX", "AsyncClient", "Client"]

_READ_BYTES = 1 << 18

R = TypeVar("R", bound=Reply)


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
            raise unreachable(path, error) from error

    def hello(self) -> Welcome:
        """As AsyncClient.hello."""
        return self._ask(Hello(self._next_id()), Welcome)

    def predict(
        self, family: str, kind: str, time_s: float, fields: Mapping[str, Any]
    ) -> Predicted:
        """As AsyncClient.predict."""
        return self._ask(Predict(self._next_id(), family, kind, time_s, dict(fields)), Predicted)

    def observe(self, family: str, kind: str, time_s: float, fields: Mapping[str, Any]) -> Done:
        """As AsyncClient.observe."""
        return self._ask(Observe(self._next_id(), family, kind, time_s, dict(fields)), Done)

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
        return self._ask(Label(self._next_id(), family, prediction_id, value, time_s, final), Done)

    def infer(
        self, family: str, inputs: Mapping[str, Any], outputs: Sequence[str] = (), release: str = ""
    ) -> Inferred:
        """As AsyncClient.infer."""
        return self._ask(infer_request(self._next_id(), family, inputs, outputs, release), Inferred)

    def session(self, family: str, key: str) -> Session:
        """As AsyncClient.session."""
        return Session(self._ask, self._next_id, family, key)

    def forget_sessions(self, family: str = "") -> Forgotten:
        """As AsyncClient.forget_sessions."""
        return self._ask(ForgetSessions(self._next_id(), family), Forgotten)

    def rollback(self, family: str, reason: str) -> RolledBack:
        """As AsyncClient.rollback."""
        return self._ask(Rollback(self._next_id(), family, reason), RolledBack)

    def status(self) -> StatusReply:
        """As AsyncClient.status."""
        return self._ask(Status(self._next_id()), StatusReply)

    def close(self) -> None:
        """Close the connection; closing twice is no error."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _ask(self, request: Request, wanted: type[R]) -> R:
        data = frames.frame(request)
        try:
            with contextlib.suppress(BrokenPipeError):  # what was said before closing may be read
                self._socket.sendall(data)
            reply = self._receive()
        except (OSError, TransportError) as error:
            self.close()
            if isinstance(error, TransportError):
                raise
            raise TransportError(
                "connection_lost", f"the runtime did not answer: {error}"
            ) from error
        if isinstance(reply, Failed):
            raise frames.error_in(reply)
        assert isinstance(reply, wanted)
        assert reply.request_id == request.request_id
        return reply

    def _receive(self) -> Reply:
        while data := self._socket.recv(_READ_BYTES):
            bodies, broken = self._splitter.feed(data)
            if broken is not None:
                raise TransportError(broken.code, broken.message)
            if bodies:
                return frames.reply_in(bodies[0])
        raise lost()
