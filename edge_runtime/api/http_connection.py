"""One HTTP/1.1 connection: bytes to requests, replies to bytes, in their order and within bounds.

Why: httptools knows the grammar; what is left of a server is a queue and its bounds. A general
server in between costs more than the answer itself, and has not these bounds.

Invariants: replies leave in the order of their requests. Heads and bodies are bounded, and so is
what waits: while it does, nothing more is read. A request comes on, and is whole in time from its
first byte. A body that is too large is refused as soon as that is known; what still comes of it is
thrown away, so that its sender can read why, but not for ever. What is not HTTP gets one error.

Knows nothing about paths and tensors. Loads httptools: import it late.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

import httptools

from edge_runtime.api.app import Reply, Request
from edge_runtime.api.encodings import inflated, too_large
from edge_runtime.errors import CapacityError, HeadwaterError, RequestError

if TYPE_CHECKING:
    from edge_runtime.api.http import HttpServer

HEAD_BYTES_MAX = 64 * 1024
HEADERS_MAX = 64
DISCARD_BYTES_MAX = 256 << 20
IDLE_SWEEPS = 15
BYTES_PER_S_MIN = 32 * 1024
"""A request may take two sweeps, and what its bytes need at this rate: 16 MiB, nine minutes."""

SLICE_S = 0.002
"""So long requests that came at once are answered before the loop serves others."""
_NOTHING, _HEAD, _BODY, _REFUSED = range(4)
_LINES = {status.value: f"HTTP/1.1 {status} {status.phrase}".encode() for status in HTTPStatus}
_HEAD_TOO_LARGE = RequestError(
    "head_too_large", f"a head is at most {HEAD_BYTES_MAX} bytes and {HEADERS_MAX} headers"
)
_OVERLOADED = CapacityError("overloaded", "too many large requests at once; try again")
log = logging.getLogger("edge_runtime")


class HttpConnection(asyncio.Protocol):
    """One client of `server`."""

    def __init__(self, server: HttpServer) -> None:
        self._server, self._app, self._bytes_max = server, server.app, server.body_bytes_max
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._due: deque[Request | Reply] = deque()
        self._running: asyncio.Task[Reply] | None = None
        self._stage = _NOTHING
        self._target, self._headers = b"", dict[bytes, bytes]()
        self._body: bytes | bytearray = b""
        self._head_bytes = self._body_bytes = self._owed_bytes = 0
        self._running_bytes = self._held_bytes = 0
        self._silent_sweeps = self._sweeps = 0  # without a byte; since the first of a request
        self._moved = self._spoken = self._writes_wait = self._reads_wait = False
        self._last = self._broken = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if not self._server.admitted(self):
            self._break_off(CapacityError("too_many_connections", "too many are open"))
            self._answer()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._transport = None
        self._server.counts["half_requests"] += self._stage in (_HEAD, _BODY)
        self._hold(-self._held_bytes)
        if self._running is not None:
            self._running.cancel()
        self._server.left(self)

    def data_received(self, data: bytes) -> None:
        if self._last:  # nothing more is wanted; the sweep ends it
            return
        self._silent_sweeps, self._spoken, self._moved = 0, True, False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._last = True
        except httptools.HttpParserError as error:
            if isinstance(error, httptools.HttpParserCallbackError):
                raise  # a mistake of ours, which the loop logs
            if not self._last:  # what comes after the last request is nobody's business
                self._break_off(RequestError("bad_request", f"this is not HTTP/1.1: {error}"))
        if self._stage != _NOTHING and not self._last:
            self._wait(len(data))
        self._answer()

    def eof_received(self) -> bool:
        self._last = True
        return bool(self._due or self._running)  # True: stay open, an answer is still to come

    def pause_writing(self) -> None:
        self._writes_wait = True

    def resume_writing(self) -> None:
        self._writes_wait, self._silent_sweeps = False, 0
        self._answer()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._stage, self._moved = _HEAD, True
        self._target, self._headers, self._body = b"", {}, b""
        self._body_bytes = self._owed_bytes = self._sweeps = 0

    def on_url(self, target: bytes) -> None:
        """A piece of the target."""
        self._target += target

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which nobody asks for."""
        if self._stage == _HEAD:
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._stage, headers = _BODY, self._headers
        if int(headers.get(b"content-length", 0)) > self._bytes_max:
            self._refuse(too_large(self._bytes_max))
        elif len(headers) > HEADERS_MAX:
            self._refuse(_HEAD_TOO_LARGE)
        elif b"expect" in headers and not (self._due or self._running):
            assert self._transport is not None
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, chunk: bytes) -> None:
        """A piece of the body."""
        if self._stage == _REFUSED:
            return
        self._moved = True
        if not self._body_bytes:
            self._body = chunk  # which is mostly all
        elif isinstance(self._body, bytes):
            self._body = bytearray(self._body) + chunk
        else:
            self._body += chunk
        self._body_bytes += len(chunk)
        self._hold(len(chunk))
        if self._body_bytes > self._bytes_max:
            self._refuse(too_large(self._bytes_max))
        elif self._server.held_bytes > self._server.held_bytes_max:
            self._refuse(_OVERLOADED)

    def on_message_complete(self) -> None:
        """A request is whole."""
        keep_alive = self._parser.should_keep_alive()
        if self._stage != _REFUSED:
            self._due.append(self._request())
            self._body = b""
        if self._head_bytes:  # it came in pieces
            self._drop_head()
        self._stage = _NOTHING
        self._last = self._last or not keep_alive

    # What the server calls.

    def sweep(self) -> None:
        """Close if it is the client's turn and has been for long; called in regular intervals."""
        ours = (self._due or self._running) and not self._writes_wait
        if ours or self._transport is None:
            self._silent_sweeps = 0
            return
        self._silent_sweeps += 1
        self._sweeps += 1
        owes = self._stage != _NOTHING or not self._spoken
        if self._silent_sweeps > (1 if owes else IDLE_SWEEPS) or (owes and self._is_late()):
            self._transport.abort()

    def close(self) -> None:
        """Close once what is under way was answered."""
        self._last, self._broken = True, False
        self._answer()

    def abort(self) -> None:
        """Close now."""
        if self._transport is not None:
            self._transport.abort()

    def _request(self) -> Request | Reply:
        """The request that is whole, or why it is none."""
        body, headers = bytes(self._body), self._headers
        if b"content-encoding" in headers:
            try:
                body = inflated(body, headers[b"content-encoding"], self._bytes_max)
            except RequestError as error:
                self._hold(-self._body_bytes)
                return self._app.failed(error, self._target)
            self._hold(len(body) - self._body_bytes)
        method = self._parser.get_method().decode("latin1")
        return Request(method, self._target, headers, body)

    def _answer(self) -> None:
        """Answer what is due, as far as it may go now."""
        until_s = time.perf_counter() + SLICE_S
        while self._due and not self._running and not self._writes_wait and self._transport:
            item = self._due.popleft()
            if (reply := item if isinstance(item, Reply) else self._ask(item)) is not None:
                self._write(reply)
            if time.perf_counter() > until_s:
                break
        self._pace()

    def _ask(self, request: Request) -> Reply | None:
        """The reply, or None while it is still to come."""
        reply = self._app.answer(request)
        if isinstance(reply, Reply):
            self._hold(-len(request.body))
            return reply
        self._running_bytes = len(request.body)
        self._running = asyncio.get_running_loop().create_task(reply)
        self._running.add_done_callback(self._finished)
        return None

    def _finished(self, task: asyncio.Task[Reply]) -> None:
        self._running = None
        if task.cancelled() or self._transport is None:
            return
        self._hold(-self._running_bytes)
        error = task.exception()
        if error is not None:
            log.error("a request over HTTP ended in a broken invariant", exc_info=error)
            self._transport.abort()
            return
        self._write(task.result())
        self._answer()

    def _write(self, reply: Reply) -> None:
        assert self._transport is not None
        content = reply.content
        last = b"connection: close\r\n" if self._last and not self._due else b""
        self._transport.write(
            b"%b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b%b\r\n%b"
            % (_LINES[reply.status], reply.kind, len(content), reply.headers, last, content)
        )

    def _pace(self) -> None:
        """Go on with what is due, or read, or close: whatever comes next."""
        if self._transport is None or self._transport.is_closing():
            return
        waits = bool(self._due)
        if waits != self._reads_wait:
            self._reads_wait = waits
            (self._transport.pause_reading if waits else self._transport.resume_reading)()
        if waits and not self._running and not self._writes_wait:
            asyncio.get_running_loop().call_soon(self._answer)
        elif self._last and not waits and not self._running:
            # What is unread at a close would take the last reply with it: wait for the client.
            (self._transport.write_eof if self._broken else self._transport.close)()

    def _wait(self, size: int) -> None:
        """Bound what is there of a request whose end the last `size` bytes were not."""
        if self._stage != _REFUSED:
            head_bytes = max(size - self._body_bytes, 0)  # all that came last, but for the body
            self._head_bytes += head_bytes
            self._hold(head_bytes)
        self._owed_bytes += 0 if self._moved else size
        if self._stage == _REFUSED:
            if self._owed_bytes > DISCARD_BYTES_MAX:
                self.abort()
        elif self._owed_bytes > HEAD_BYTES_MAX or len(self._headers) > HEADERS_MAX:
            self._break_off(_HEAD_TOO_LARGE)
        elif self._stage == _HEAD and self._server.held_bytes > self._server.held_bytes_max:
            self._break_off(_OVERLOADED)

    def _is_late(self) -> bool:
        """Whether a request should be whole by now, or more of it be here."""
        needs_s = (self._body_bytes + self._owed_bytes) / BYTES_PER_S_MIN
        return (self._sweeps - 2) * self._server.sweep_s > needs_s

    def _refuse(self, error: HeadwaterError) -> None:
        """Answer a request that is not taken."""
        self._due.append(self._app.failed(error, self._target))
        self._hold(-self._body_bytes)
        self._stage, self._body, self._owed_bytes = _REFUSED, b"", 0
        self._drop_head()

    def _break_off(self, error: HeadwaterError) -> None:
        """Answer what makes no sense, and read no more."""
        self._server.counts["bad_requests"] += 1
        self._due.append(self._app.failed(error, self._target))
        self._drop_head()
        self._last = self._broken = True

    def _drop_head(self) -> None:
        self._hold(-self._head_bytes)
        self._target, self._headers, self._head_bytes = self._target[:64], {}, 0

    def _hold(self, size: int) -> None:
        self._held_bytes += size
        self._server.held_bytes += size
