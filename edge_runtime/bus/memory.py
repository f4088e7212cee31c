"""The bus in memory: the fake that other rooms test on; passes the contract suite of the real one.

Why: a test of the uplink, of ingest or of the publisher needs streams, consumers and outages, but
no server, no port and no disk.

Invariants: everything lives in one event loop and is lost with it. `down` and `up` do to every bus
of the broker what a restart of the server does: waiting calls fail, readings start over at the
acknowledgement floor, stored messages stay. Message ids are remembered for ever, not for a window,
and what stays unacknowledged comes again only after an outage or a reopening.

Knows nothing about NATS.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from edge_runtime.bus.base import (
    COUNTERS,
    UNHEARD_MAX,
    Message,
    PullSubscription,
    Subscription,
    check_message,
)
from edge_runtime.bus.memory_stream import Consumer, Limits, Stream, matches
from edge_runtime.errors import TransportError

Callback = Callable[[Message], Awaitable[None]]
log = logging.getLogger("headwater.bus")


class MemoryBroker:
    """The server side: streams and listeners, shared by the buses that `connect` returns."""

    def __init__(self) -> None:
        self.running = True
        self.streams: dict[str, Stream] = {}
        self.listeners: list[_Listener] = []
        self._buses: list[MemoryBus] = []

    async def connect(
        self, *, name: str = "", on_reconnect: Callable[[], None] | None = None
    ) -> MemoryBus:
        """A new bus of this broker."""
        bus = MemoryBus(self, name, on_reconnect)
        self._buses.append(bus)
        return bus

    def down(self) -> None:
        """Become unreachable; what is stored stays."""
        self.running = False

    def up(self) -> None:
        """Become reachable again, and tell every bus."""
        self.running = True
        for consumer in self._consumers():
            consumer.start_over()
        for bus in self._buses:
            bus.welcome()

    def forget(self, bus: MemoryBus) -> None:
        """Drop a closed bus."""
        if bus in self._buses:
            self._buses.remove(bus)

    def stream_of(self, subject: str) -> Stream:
        """The stream that holds `subject`. Raises: TransportError `no_stream`."""
        for stream in self.streams.values():
            if any(matches(pattern, subject) for pattern in stream.limits.subjects):
                return stream
        raise TransportError("no_stream", f"no stream holds {subject}")

    def deliver(self, message: Message) -> bool:
        """Hand a message to every core listener on its subject; whether there is one."""
        found = [each for each in self.listeners if matches(each.subject, message.subject)]
        for listener in found:
            listener.take(message)
        return bool(found)

    def _consumers(self) -> list[Consumer]:
        return [c for stream in self.streams.values() for c in stream.consumers.values()]


class MemoryBus:
    """A bus of a MemoryBroker; see base.Bus for what each call means."""

    def __init__(
        self, broker: MemoryBroker, name: str, on_reconnect: Callable[[], None] | None
    ) -> None:
        self.name = name
        self._broker = broker
        self._on_reconnect = on_reconnect
        self._closed = False
        self._counters: Counter[str] = Counter()
        self._listeners: list[_Listener] = []

    @property
    def connected(self) -> bool:
        return self._broker.running and not self._closed

    async def publish(
        self,
        subject: str,
        data: bytes,
        *,
        headers: dict[str, str] | None = None,
        message_id: str | None = None,
        timeout_s: float = 5.0,
    ) -> int:
        assert timeout_s > 0
        check_message(subject, data, headers or {})
        self._check_connected()
        await asyncio.sleep(0)  # others run while the acknowledgement is awaited
        self._check_connected()
        stream = self._broker.stream_of(subject)
        if message_id is not None and message_id in stream.ids:
            self._counters["duplicates"] += 1
            return stream.ids[message_id]
        message = stream.store(subject, data, headers or {}, message_id)
        self._broker.deliver(Message(subject, data, message.headers))
        self._counters["published"] += 1
        return message.seq

    async def send(self, subject: str, data: bytes) -> None:
        check_message(subject, data, {})
        self._check_connected()
        self._broker.deliver(Message(subject, data))

    async def ask(self, subject: str, data: bytes, *, timeout_s: float = 5.0) -> bytes:
        check_message(subject, data, {})
        self._check_connected()
        end: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def answer(reply: bytes) -> None:
            if not end.done():
                end.set_result(reply)

        if not self._broker.deliver(Message(subject, data, answer=answer)):
            raise TransportError("nobody", f"nobody answers on {subject}")
        try:
            return await asyncio.wait_for(end, timeout_s)
        except TimeoutError as error:
            raise TransportError("timeout", f"no answer on {subject}") from error

    async def subscribe(self, subject: str, callback: Callback) -> Subscription:
        listener = _Listener(self._broker, subject, callback, self._counters)
        self._listeners.append(listener)
        return listener

    async def last(self, stream: str, subject: str) -> Message | None:
        self._check_connected()
        await asyncio.sleep(0)
        return self._stream(stream).last(subject)

    async def last_many(self, stream: str, subjects: list[str]) -> list[Message | None]:
        return [await self.last(stream, subject) for subject in subjects]

    async def ensure_stream(
        self,
        name: str,
        subjects: list[str],
        *,
        max_bytes: int,
        per_subject: int | None = None,
        discard_new: bool,
    ) -> None:
        self._check_connected()
        stream = self._broker.streams.setdefault(name, Stream())
        stream.limits = Limits(list(subjects), max_bytes, per_subject, discard_new)
        stream.trim()

    async def purge(self, stream: str) -> int:
        self._check_connected()
        return self._stream(stream).purge()

    @asynccontextmanager
    async def pull(
        self, stream: str, durable: str, subject: str
    ) -> AsyncIterator[PullSubscription]:
        self._check_connected()
        source = self._stream(stream)
        consumer = source.consumers.setdefault(durable, Consumer(source, subject))
        consumer.start_over()
        yield _Pull(consumer, self)

    def statistics(self) -> dict[str, int]:
        return {name: self._counters[name] for name in COUNTERS}

    async def close(self) -> None:
        self._closed = True
        self._broker.forget(self)
        for listener in self._listeners:
            await listener.close()

    def welcome(self) -> None:
        """The broker is back."""
        self._counters["reconnects"] += 1
        if self._on_reconnect is not None:
            self._on_reconnect()

    def count_lost_ack(self) -> None:
        """An acknowledgement that could not be sent."""
        self._counters["acks_lost"] += 1

    def _stream(self, name: str) -> Stream:
        if name not in self._broker.streams:
            raise TransportError("no_stream", f"the broker has no stream {name}")
        return self._broker.streams[name]

    def _check_connected(self) -> None:
        if not self.connected:
            raise TransportError("unreachable", "not connected to the broker in memory")


class _Pull:
    """A reader of a consumer."""

    def __init__(self, consumer: Consumer, bus: MemoryBus) -> None:
        self._consumer = consumer
        self._bus = bus

    async def next_batch(self, max_messages: int, wait_s: float) -> list[Message]:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while True:
                    self._consumer.wake.clear()
                    if self._bus.connected and (batch := self._consumer.take(max_messages)):
                        return [self._with_ack(message) for message in batch]
                    await self._consumer.wake.wait()
        return []

    def _with_ack(self, message: Message) -> Message:
        ack = functools.partial(self._ack, message.seq)
        return Message(message.subject, message.data, message.headers, message.seq, ack)

    async def _ack(self, seq: int) -> None:
        if self._bus.connected:
            self._consumer.ack(seq)
        else:
            self._bus.count_lost_ack()


class _Listener:
    """A core subscription: its own queue and task, so that a slow callback delays no publisher."""

    def __init__(
        self, broker: MemoryBroker, subject: str, callback: Callback, counters: Counter[str]
    ) -> None:
        self.subject = subject
        self._queue: asyncio.Queue[Message] = asyncio.Queue(UNHEARD_MAX)
        self._broker = broker
        self._callback = callback
        self._counters = counters
        self._task = asyncio.create_task(self._run(), name=f"memory subscription {subject}")
        broker.listeners.append(self)

    def take(self, message: Message) -> None:
        """Queue a message, or drop and count it where too many wait."""
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self._counters["dropped"] += 1

    async def close(self) -> None:
        if self in self._broker.listeners:
            self._broker.listeners.remove(self)
        self._task.cancel()
        if self._task is not asyncio.current_task():
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            message = await self._queue.get()
            try:
                await self._callback(message)
            except Exception:
                self._counters["callback_errors"] += 1
                log.exception("a subscriber to %s failed", self.subject)
