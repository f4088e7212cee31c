"""The bus over NATS JetStream: one connection at a time, redialled with jitter until closed.

Why: nats-py's asynchronous publish loses acknowledgements, its fetch is slow and its reconnect can
hang; here publishing, pulling and mending are our own, on its plain publish and subscribe.

Invariants: a message is sent on a live connection or not at all, and never replayed from a buffer
after an outage. Core subscriptions and pulls
survive an outage; questions that were waiting do not, and say so.

Knows nothing about what is published. Implements proto/asyncapi.yaml (the server binding).
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from edge_runtime.bus.access import Access
from edge_runtime.bus.answers import own_headers, read_reply, status_of
from edge_runtime.bus.base import (
    COUNTERS,
    Bus,
    Message,
    PullSubscription,
    Subscription,
    check_message,
)
from edge_runtime.bus.keeper import PROBE_WAIT_S, Keeper, Sleep
from edge_runtime.bus.link import Link, log
from edge_runtime.bus.listener import Callback, Listener
from edge_runtime.bus.pull import Pull
from edge_runtime.bus.questions import Question
from edge_runtime.bus.window import Window
from edge_runtime.errors import ConfigError, TransportError

_OUTSTANDING_MAX = 128  # publishes that wait for their acknowledgement
_OUTSTANDING_BYTES_MAX = 4 << 20
_GETS_AHEAD = 16  # direct gets in flight; chunks of 128 KB make 2 MB
_GET_TIMEOUT_S = 10.0
_DUPLICATE_WINDOW_NS = 120 * 1_000_000_000
_NAME_IN_USE = "10058"


async def connect(
    url: str,
    *,
    name: str,
    access: Access | None = None,
    on_reconnect: Callable[[], None] | None = None,
) -> Bus:
    """A bus to the server at `url` (`nats://host:port`), known there as `name`, by `access`.

    Returns after the first dial whether it succeeded or not: see `Bus.connected`. `on_reconnect`
    is called on the event loop whenever the connection is there again, also after a first dial
    that failed. Raises: ConfigError (bad_url; for a file of `access`, as `Access.open`).
    """
    if not url.startswith(("nats://", "tls://")):
        raise ConfigError("bad_url", f"{url!r} is no broker url", "write it as nats://host:port")
    bus = NatsBus(url, name, access, on_reconnect)
    await bus.start()
    return bus


class NatsBus:
    """The bus over one NATS connection; made by `connect`."""

    def __init__(
        self,
        url: str,
        name: str,
        access: Access | None = None,
        on_reconnect: Callable[[], None] | None = None,
        *,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._on_reconnect = on_reconnect
        self._listeners: list[Listener] = []
        self._pulls: set[Pull] = set()
        self._window = Window(_OUTSTANDING_MAX, _OUTSTANDING_BYTES_MAX)
        self._purged: dict[str, int] = {}  # up to where, by stream
        self._counters: Counter[str] = Counter()
        self._keeper = Keeper(
            url,
            name,
            access,
            attach=self._attach,
            on_change=self._changed,
            counters=self._counters,
            sleep=sleep,
        )

    @property
    def connected(self) -> bool:
        return self._keeper.connected

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
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        async with self._window.room(len(data), timeout_s):
            left_s = deadline_s - loop.time()
            question = await self._live().ask(subject, data, headers or None, left_s)
            message = await question.answer()
        reply = read_reply(message, subject)
        self._counters["duplicates" if reply.duplicate else "published"] += 1
        return reply.seq

    async def send(self, subject: str, data: bytes) -> None:
        check_message(subject, data, {})
        await self._live().send(subject, data)

    async def ask(self, subject: str, data: bytes, *, timeout_s: float = 5.0) -> bytes:
        check_message(subject, data, {})
        answer = await (await self._live().ask(subject, data, None, timeout_s)).answer()
        if status_of(answer) == "503":
            raise TransportError("nobody", f"nobody answers on {subject}")
        return bytes(answer.data)

    async def subscribe(self, subject: str, callback: Callback) -> Subscription:
        listener = Listener(subject, callback, self._counters, self._listeners.remove)
        self._listeners.append(listener)
        try:
            link = self._live()
            await listener.attach(link)
            await link.probe(PROBE_WAIT_S)  # once that is back, the server knows
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
        if floor == self._purged.get(stream, 0):
            return 0
        answer = await self._live().api(f"STREAM.PURGE.{stream}", {"seq": floor + 1})
        self._purged[stream] = floor
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
        return {name: self._counters[name] for name in COUNTERS}

    async def close(self) -> None:
        await self._keeper.close()

    async def start(self) -> None:
        """Dial once, then keep the connection up. Raises: ConfigError as `Access.open`."""
        await self._keeper.start()

    def _live(self) -> Link:
        return self._keeper.link

    async def _get(self, stream: str, subject: str) -> Question:
        where = f"$JS.API.DIRECT.GET.{stream}.{subject}"
        return await self._live().ask(where, b"", None, _GET_TIMEOUT_S)

    def _count_lost_ack(self) -> None:
        self._counters["acks_lost"] += 1

    async def _attach(self, link: Link) -> None:
        for listener in list(self._listeners):  # one may be closed meanwhile
            await listener.attach(link)

    def _changed(self, back: bool) -> None:
        for pull in self._pulls:
            pull.interrupt()
        if back and self._on_reconnect is not None:
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
