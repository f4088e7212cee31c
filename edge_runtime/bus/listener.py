"""A core subscription that outlives the connections that carry it.

Why: what a room subscribed to once must be heard after every reconnect, and a callback that fails
must not end it.

Invariants: deliveries come one at a time, in order. What waits for a slow callback is bounded; what
comes beyond is dropped and counted, so a subscriber must be able to miss a message.

Knows nothing about streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from edge_runtime.bus.answers import own_headers
from edge_runtime.bus.base import UNHEARD_MAX, Message, no_answer
from edge_runtime.bus.link import Link, log

Callback = Callable[[Message], Awaitable[None]]


class Listener:
    """A core subscription that outlives connections."""

    def __init__(
        self,
        subject: str,
        callback: Callback,
        counters: Counter[str],
        forget: Callable[[Listener], None],
    ) -> None:
        self._subject = subject
        self._callback = callback
        self._counters = counters
        self._forget = forget
        self._ears: tuple[Link, Any] | None = None
        self._closed = False

    async def attach(self, link: Link) -> None:
        """Subscribe on a new connection. Raises: TransportError `unreachable`."""
        if self._closed:
            return
        self._ears = link, await link.listen(self._subject, self._receive, UNHEARD_MAX)
        if self._closed:  # meanwhile
            await link.silence(self._ears[1])

    async def close(self) -> None:
        """Stop the deliveries; closing twice is no error."""
        if self._closed:
            return
        self._closed = True
        self._forget(self)
        if self._ears is not None:
            await self._ears[0].silence(self._ears[1])

    async def _answer(self, where: str, data: bytes) -> None:
        if self._ears is not None:
            await self._ears[0].send(where, data)

    async def _receive(self, raw: Any) -> None:
        if self._closed:
            return
        try:
            answer = partial(self._answer, raw.reply) if raw.reply else no_answer
            message = Message(raw.subject, raw.data, own_headers(raw), answer=answer)
            await self._callback(message)
        except Exception:
            self._counters["callback_errors"] += 1
            log.exception("a subscriber to %s failed", self._subject)
