"""The bus over NATS JetStream: one connection at a time, redialled with jitter until closed.

Why: nats-py's asynchronous publish loses acknowledgements, its fetch is slow and its reconnect can
hang; here publishing, pulling and mending are our own, on its plain publish and subscribe.

Invariants: a message is sent on a live connection or not at all, and never replayed from a buffer
after an outage. A half-open connection is noticed within two probes. Core subscriptions and pulls
survive an outage; questions that were waiting do not, and say so.

Knows nothing about what is published. Implements proto/asyncapi.yaml (the server binding).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from edge_runtime.bus.base import Bus, Message, PullSubscription, Subscription, check_message
from edge_runtime.bus.link import Link, Question, log, own_headers, read_reply, status_of
from edge_runtime.bus.listener import Callback, Listener
from edge_runtime.bus.pull import Pull
from edge_runtime.errors import ConfigError, TransportError

_OUTSTANDING_MAX = 128  # publishes that wait for their acknowledgement
_GETS_AHEAD = 16  # direct gets in flight; chunks of 128 KB make 2 MB
_GET_TIMEOUT_S = 10.0
_PROBE_EVERY_S = 5.0
_PROBE_WAIT_S = 5.0
_CLOSE_WAIT_S = 1.0
_REDIAL_FIRST_S = 0.1
_REDIAL_MAX_S = 2.0
_DUPLICATE_WINDOW_NS = 120 * 1_000_000_000
_NAME_IN_USE = "10058"


async def connect(url: str, *, name: str, on_reconnect: Callable[[], None] | None = None) -> Bus:
    """A bus to the server at `url` (`nats://host:port`), known there as `name`.

    Returns after the first dial whether it succeeded or not: see `Bus.connected`. `on_reconnect`
    is called on the event loop whenever the connection is there again, also after a first dial
    that failed. Raises: ConfigError `bad_url`.
    """
    if not url.startswith(("nats://", "tls://")):
        raise ConfigError("bad_url", f"{url!r} is no broker url", "write it as nats://host:port")
    bus = NatsBus(url, name, on_reconnect)
    await bus.start()
    return bus


class NatsBus:
    """The bus over one NATS connection; made by `connect`."""

    def __init__(self, url: str, name: str, on_reconnect: Callable[[], None] | None) -> None:
        self._url = url
        self._name = name
        self._on_reconnect = on_reconnect
        self._link: Link | None = None
        self._listeners: list[Listener] = []
        self._pulls: set[Pull] = set()
        self._doubt = asyncio.Event()
        self._window = asyncio.Semaphore(_OUTSTANDING_MAX)
        self._keeper: asyncio.Task[None] | None = None
        self._counters: Counter[str] = Counter()

    @property
    def connected(self) -> bool:
        return self._link is not None and self._link.open

    async def publish(
        self,
        subject: str,
        data: bytes,
        *,
        headers: dict[str, str] | None = None,
        message_id: str | None = None,
        timeout_s: float = 5.0,
    ) -> int:
        headers = dict(headers or {})
        if message_id is not None:
            headers["Nats-Msg-Id"] = message_id
        check_message(subject, data, headers)
        async with self._window:
            question = await self._live().ask(subject, data, headers or None, timeout_s)
            message = await question.answer()
        reply = read_reply(message, subject)
        self._counters["duplicates" if reply.duplicate else "published"] += 1
        return reply.seq

    async def send(self, subject: str, data: bytes) -> None:
        check_message(subject, data, {})
        await self._live().send(subject, data)

    async def subscribe(self, subject: str, callback: Callback) -> Subscription:
        listener = Listener(subject, callback, self._counters, self._listeners.remove)
        self._listeners.append(listener)
        if self._link is not None:
            try:
                await listener.attach(self._link)
                await self._link.probe(_PROBE_WAIT_S)  # once that is back, the server knows
            except TransportError as error:
                log.debug("%s; the next connection will have it", error.message)
        return listener

    async def last(self, stream: str, subject: str) -> Message | None:
        return _direct(await (await self._get(stream, subject)).answer(), stream)

    async def last_many(self, stream: str, subjects: list[str]) -> list[Message | None]:
        waiting: deque[Question] = deque()
        found: list[Message | None] = []
        try:
            for subject in subjects:
                waiting.append(await self._get(stream, subject))
                if len(waiting) == _GETS_AHEAD:
                    found.append(_direct(await waiting.popleft().answer(), stream))
            while waiting:
                found.append(_direct(await waiting.popleft().answer(), stream))
        finally:
            for question in waiting:
                question.forget()
        return found

    async def ensure_stream(
        self,
        name: str,
        subjects: list[str],
        *,
        max_bytes: int,
        per_subject: int | None = None,
        discard_new: bool,
    ) -> None:
        config = {
            "name": name,
            "subjects": subjects,
            "storage": "file",
            "retention": "limits",
            "num_replicas": 1,
            "max_bytes": max_bytes,
            "max_msgs_per_subject": per_subject or -1,
            "discard": "new" if discard_new else "old",
            "discard_new_per_subject": discard_new and per_subject is not None,
            "duplicate_window": _DUPLICATE_WINDOW_NS,
            "allow_direct": True,
        }
        link = self._live()
        try:
            await link.api(f"STREAM.CREATE.{name}", config)
        except TransportError as error:
            if _NAME_IN_USE not in error.message:
                raise
            await link.api(f"STREAM.UPDATE.{name}", config)

    async def purge(self, stream: str) -> int:
        floor = min(await self._floors(stream), default=0)
        if not floor:
            return 0
        answer = await self._live().api(f"STREAM.PURGE.{stream}", {"seq": floor + 1})
        return answer.purged

    async def _floors(self, stream: str) -> list[int]:
        """Up to where each consumer of `stream` has acknowledged everything."""
        floors: list[int] = []
        while True:
            page = await self._live().api(f"CONSUMER.LIST.{stream}", {"offset": len(floors)})
            floors += [each.ack_floor.stream_seq for each in page.consumers or ()]
            if not page.consumers or len(floors) >= page.total:
                return floors

    @asynccontextmanager
    async def pull(
        self, stream: str, durable: str, subject: str
    ) -> AsyncIterator[PullSubscription]:
        pull = Pull(self._live, stream, durable, subject, self._count_lost_ack)
        await pull.open()
        self._pulls.add(pull)
        try:
            yield pull
        finally:
            self._pulls.discard(pull)
            await pull.close()

    def statistics(self) -> dict[str, int]:
        names = ("published", "duplicates", "reconnects", "callback_errors", "acks_lost")
        return {name: self._counters[name] for name in names}

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        link, self._link = self._link, None
        if link is not None:
            await link.probe(_CLOSE_WAIT_S)  # what was sent before it has arrived when it returns
            await link.abandon()

    async def start(self) -> None:
        """Dial once, then keep the connection up from a task of this bus."""
        try:
            await self._attach()
        except TransportError as error:
            log.warning("%s; dialling on", error.message)
        self._keeper = asyncio.create_task(self._keep(), name=f"bus {self._name}")

    def _live(self) -> Link:
        if self._link is None or not self._link.open:
            raise TransportError("unreachable", f"not connected to the broker at {self._url}")
        return self._link

    async def _get(self, stream: str, subject: str) -> Question:
        where = f"$JS.API.DIRECT.GET.{stream}.{subject}"
        return await self._live().ask(where, b"", None, _GET_TIMEOUT_S)

    def _count_lost_ack(self) -> None:
        self._counters["acks_lost"] += 1

    async def _keep(self) -> None:
        while True:
            try:
                if self._link is None:
                    await self._redial()
                else:
                    await self._until_lost(self._link)
            except Exception:
                log.exception("keeping the connection to %s failed; going on", self._url)
                self._link = None

    async def _until_lost(self, link: Link) -> None:
        """Probe now and then, and at once when the client library reports anything."""
        while await link.probe(_PROBE_WAIT_S):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PROBE_EVERY_S):
                    await self._doubt.wait()
            self._doubt.clear()
        self._link = None
        log.warning("lost the broker at %s", self._url)
        for pull in self._pulls:
            pull.interrupt()
        await link.abandon()

    async def _redial(self) -> None:
        """Dial until it succeeds, with full jitter so that a fleet does not come back at once."""
        ceiling_s = _REDIAL_FIRST_S
        while self._link is None:
            await asyncio.sleep(random.uniform(0, ceiling_s))  # noqa: S311 # jitter, no secret
            ceiling_s = min(_REDIAL_MAX_S, ceiling_s * 2)
            try:
                await self._attach()
            except TransportError as error:
                log.debug("%s", error.message)
        self._welcome()

    async def _attach(self) -> None:
        link = await Link.dial(self._url, self._name, self._doubt.set)
        try:
            for listener in self._listeners:
                await listener.attach(link)
        except BaseException:
            await link.abandon()
            raise
        self._link = link

    def _welcome(self) -> None:
        log.info("connected to the broker at %s", self._url)
        self._counters["reconnects"] += 1
        for pull in self._pulls:
            pull.interrupt()
        if self._on_reconnect is not None:
            try:
                self._on_reconnect()
            except Exception:
                self._counters["callback_errors"] += 1
                log.exception("the reconnect callback failed")


def _direct(raw: Any, stream: str) -> Message | None:
    """The answer to a direct get. Raises: TransportError `no_stream`, `refused`."""
    headers = raw.headers or {}
    if "Nats-Sequence" in headers:
        seq = int(headers["Nats-Sequence"])
        return Message(headers["Nats-Subject"], raw.data, own_headers(raw), seq)
    status = status_of(raw)
    if status == "404":
        return None
    if status == "503":
        raise TransportError("no_stream", f"the broker has no stream {stream}")
    text = headers.get("Description", "no reason given")
    raise TransportError("refused", f"direct get from {stream}: {status} {text}")
