"""One client of the Unix socket: its frames in, its replies out, in order.

Why: an application in any language asks the runtime beside it, many requests on one connection, for
little more than the cost of the answer itself.

What arrived is answered in slices: of at most SLICE requests, begun within SLICE_S, ending where
the client leaves answers unread. Between two slices the loop serves others. A request begins when
all before it are answered, except that consecutive ones that take long run side by side, at most
SLICE. While anything waits (for its slice, for what takes long, for a client that does not read)
nothing more is read, so memory stays bounded.

Invariants: replies leave in the order of requests. A request that fails gets its error and changes
nothing; after garbage comes an error with request id 0, and this connection alone is closed. What a
client that left still has running is given up.

Knows nothing about models, logs or brokers. Implements the server's half of proto/socket.md.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from time import perf_counter
from typing import cast

from edge_runtime.api import frames
from edge_runtime.api.answers import Answers, Item, group_end, takes_long
from edge_runtime.api.bounds import Bounds
from edge_runtime.api.frames import Infer, Reply
from edge_runtime.api.unreadable import UNREADABLE, check_large, why_invalid
from edge_runtime.errors import HeadwaterError, RequestError

SLICE = 128
"""Large enough that a model run costs a row little, small enough that others wait for one or two
milliseconds at most, and below the queue of a heavy model."""

SLICE_S = 0.001
"""So long a slice begins more; what it then begins keeps the loop as long again, at most."""

WRITE_BUFFER_BYTES = 256 * 1024
"""Above so many unread bytes of answers, a connection's requests wait."""


class Connection(asyncio.Protocol):
    """One client; `lost` is done when its connection is over."""

    def __init__(self, answers: Answers, bounds: Bounds) -> None:
        self.held = 0
        self._answers, self._bounds = answers, bounds
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self._inbox = frames.Splitter()
        self._waiting: list[Item] = []
        self._running: deque[asyncio.Task[Reply]] = deque()
        self._transport: asyncio.Transport | None = None
        self._reading, self._unread, self._ending = True, False, False
        self._blocked, self._due = False, False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        refusal = self._bounds.admit(self)
        if refusal is not None:
            self.end(refusal)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._transport = None
        for task in self._running:
            task.cancel()
        self._bounds.part(self)
        self.lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        if not self._answer_at_once(data):
            self._work(data)

    def pause_writing(self) -> None:
        self._unread = True

    def resume_writing(self) -> None:
        self._unread = False
        self._soon()

    def end(self, error: HeadwaterError) -> None:
        self._inbox, self._waiting, self._ending = frames.Splitter(), [], True
        if self._transport is None:
            return
        if self._unread:
            self._transport.abort()
            return
        self._write([frames.failed(0, error)])
        self._transport.close()

    def close(self) -> None:
        self._waiting, self._ending = [], True
        self._read_on()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _answer_at_once(self, data: bytes) -> bool:
        """Answer a chunk that is just one frame while nothing waits, the usual case of a client
        that asks and waits; False, with nothing done, when it is any other.
        """
        busy = self._waiting or self._running or self._inbox.held or self._unread or self._ending
        if busy or self._transport is None or (body := frames.only_body(data)) is None:
            return False
        try:
            request = frames.decode_request(body)
        except UNREADABLE:
            return False
        model = self._answers.model(request)
        if takes_long(request, model):
            return False
        self._bounds.counts["frames"] += 1
        self._transport.write(frames.frames_of(self._answers.now([request], model)))
        return True

    def _soon(self) -> None:
        """Let others be served, then go on; once, however often it is asked."""
        if not self._due:
            self._due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._due = False
        self._work()

    def _work(self, data: bytes = b"") -> None:
        """Answer one slice of what waits, and see what comes next."""
        if self._transport is None:
            return
        took = self._take(data)
        self._begin()
        self._read_on()
        half = self._reading and self._inbox.held > 0
        self._bounds.hold(self, self._inbox.held, half=half, fresh=took)

    def _take(self, data: bytes) -> bool:
        """Decode as many requests as may begin; whether there was any."""
        if self._ending or (self._waiting and not data):
            return False
        most = 0 if self._waiting or self._unread else SLICE - len(self._running)
        bodies, broken = self._inbox.feed(data, most)
        for body in bodies:
            try:
                if len(body) > frames.PLAIN_BYTES_MAX:
                    check_large(body)
                self._waiting.append(frames.decode_request(body))
            except UNREADABLE as error:
                self._bounds.counts["bad_frames"] += 1
                try:
                    self._waiting.append(why_invalid(body, error))
                except RequestError as garbage:
                    self._waiting.append(frames.failed(0, garbage))
                    self._ending = True
                    return True
        self._bounds.counts["frames"] += len(bodies)
        if broken is not None:
            self._bounds.counts["bad_frames"] += 1
            self._waiting.append(frames.failed(0, broken))
            self._ending = True
        return bool(bodies)

    def _begin(self) -> None:
        """Answer what waits, up to what must wait for those that take long, or for the next slice.

        Tensors are written at once: it tells whether the client reads.
        """
        items, at = self._waiting, 0
        replies: list[Reply] = []
        until_s = perf_counter() + SLICE_S
        self._blocked = False
        while at < len(items) and not self._unread:
            model = self._answers.model(items[at])
            end = group_end(items, at, model)
            if takes_long(items[at], model):
                self._running.extend(self._run(item) for item in items[at:end])
            elif self._running:
                self._blocked = True
                break
            else:
                replies += self._answers.now(items[at:end], model)
                if type(items[at]) is Infer:
                    self._write(replies)
                    replies = []
            at = end
            if at < len(items) and perf_counter() >= until_s:
                break
        self._waiting = items[at:]
        self._write(replies)

    def _run(self, item: Item) -> asyncio.Task[Reply]:
        task = self._loop.create_task(self._answers.later(item))
        task.add_done_callback(self._ran)
        return task

    def _ran(self, task: asyncio.Task[Reply]) -> None:
        if task.cancelled():
            return
        if task.exception() is not None:  # an assertion of ours: the connection is out of step
            self.abort()
            task.result()
        replies = []
        while self._running and self._running[0].done():
            replies.append(self._running.popleft().result())
        self._write(replies)
        self._work()

    def _write(self, replies: Iterable[Reply]) -> None:
        if replies and self._transport is not None:
            self._transport.write(frames.frames_of(replies))

    def _read_on(self) -> None:
        """Read more when nothing waits, go on with what waits when it may, close at the end."""
        if self._transport is None:
            return
        if self._ending and not self._waiting and not self._running:
            self._transport.close()
            return
        full = len(self._running) >= SLICE
        reading = not (self._waiting or self._unread or full or self._inbox.ready or self._ending)
        if reading != self._reading:
            self._reading = reading
            if reading:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()
        stuck = self._unread or (self._blocked if self._waiting else full)
        if (self._waiting or self._inbox.ready) and not stuck:
            self._soon()
