"""Keeps one connection up: dials, looks whether it still works, and dials again with jitter.

Why: how an outage is noticed and ended is one idea, what is said over a connection another.

Invariants: dialling never ends by itself, and its pauses are random up to a ceiling, so that a
fleet does not come back at once; a connection that does not last does not lower the ceiling. A
half-open connection is given up within `HALF_OPEN_S`, whatever still comes in on it. Each reason
for which a dial fails is said once, and so is a refusal within a minute; all are counted.

Knows nothing about messages.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable

from edge_runtime.bus.access import Access
from edge_runtime.bus.link import Link, log
from edge_runtime.errors import HeadwaterError, TransportError

PROBE_EVERY_S = 4.0
PROBE_WAIT_S = 4.0
HALF_OPEN_S = PROBE_EVERY_S + 2 * PROBE_WAIT_S
_CLOSE_WAIT_S = 1.0
_CANCEL_AGAIN_S = 0.1
_REDIAL_FIRST_S = 0.1
_REDIAL_MAX_S = 2.0
_REDIAL_REFUSED_MAX_S = 15.0  # who is turned away asks less often: a person has to act first
_REFUSALS = ("not_admitted", "untrusted_broker", "tls_failed", "not_tls")
_SAY_AGAIN_S = 60.0

Sleep = Callable[[float], Awaitable[None]]


class Keeper:
    """The connection to `url`, kept from `start` until `close`.

    `attach` is awaited with each new link before it is used; `on_change` is called when a link is
    lost, and when there is one again (True).
    """

    def __init__(
        self,
        url: str,
        name: str,
        access: Access | None,
        *,
        attach: Callable[[Link], Awaitable[None]],
        on_change: Callable[[bool], None],
        counters: Counter[str],
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._url, self._name, self._access = url, name, access
        self._attach, self._on_change = attach, on_change
        self._counters, self._sleep = counters, sleep
        self._link: Link | None = None
        self._task: asyncio.Task[None] | None = None
        self._doubt = asyncio.Event()
        self._failure: HeadwaterError | None = None  # of the last dial
        self._ceiling_s = _REDIAL_FIRST_S
        self._said_s = float("-inf")
        self._closing = False

    @property
    def connected(self) -> bool:
        """Whether there is a link that stands as far as is known."""
        return self._link is not None and self._link.open

    @property
    def link(self) -> Link:
        """The link. Raises: TransportError `unreachable`, with why the last dial failed."""
        if self._link is None or not self._link.open:
            text, why = f"not connected to the broker at {self._url}", self._failure
            if why is None:
                raise TransportError("unreachable", text)
            raise TransportError("unreachable", f"{text}: {why.message}", why.hint)
        return self._link

    async def start(self) -> None:
        """Dial once, then keep the connection up from a task of its own.

        Raises: ConfigError as `Access.open`.
        """
        try:
            await self._dial()
        except TransportError as error:
            self._note(error)
        self._task = asyncio.create_task(self._keep(), name=f"bus {self._name}")

    async def close(self) -> None:
        """End the connection; what was sent before has then arrived. Twice is no error."""
        self._closing = True
        while self._task is not None and not self._task.done():
            self._task.cancel()  # nats-py swallows a cancellation while it connects or closes
            await asyncio.wait([self._task], timeout=_CANCEL_AGAIN_S)
        link, self._link = self._link, None
        if link is not None:
            await link.probe(_CLOSE_WAIT_S)
            await link.abandon()

    def on_doubt(self) -> None:
        """As link.Events: look at once."""
        self._doubt.set()

    def on_refused(self, error: TransportError) -> None:
        """As link.Events."""
        self._counters["not_allowed"] += 1
        now_s = asyncio.get_running_loop().time()
        if now_s - self._said_s >= _SAY_AGAIN_S:
            self._said_s = now_s
            log.warning("%s; hint: %s", error.message, error.hint)

    def on_dropped(self) -> None:
        """As link.Events."""
        self._counters["dropped"] += 1

    async def _keep(self) -> None:
        while not self._closing:
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
        while await link.probe(PROBE_WAIT_S):
            try:
                async with asyncio.timeout(PROBE_EVERY_S):
                    await self._doubt.wait()
            except TimeoutError:
                self._ceiling_s = _REDIAL_FIRST_S  # it lasts
            self._doubt.clear()
        self._link = None
        log.warning("lost the broker at %s", self._url)
        self._on_change(False)
        await link.abandon()

    async def _redial(self) -> None:
        while self._link is None and not self._closing:
            await self._sleep(random.uniform(0, self._ceiling_s))  # noqa: S311 # jitter, no secret
            most_s = _REDIAL_MAX_S
            try:
                await self._dial()
            except HeadwaterError as error:
                self._note(error)
                most_s = _REDIAL_REFUSED_MAX_S if error.code in _REFUSALS else _REDIAL_MAX_S
            self._ceiling_s = min(most_s, self._ceiling_s * 2)
        if self._closing:
            return
        log.info("connected to the broker at %s", self._url)
        self._counters["reconnects"] += 1
        self._on_change(True)

    async def _dial(self) -> None:
        link = await Link.dial(self._url, self._name, self, self._access)
        try:
            await self._attach(link)
        except BaseException:
            await link.abandon()
            raise
        self._link, self._failure = link, None

    def _note(self, error: HeadwaterError) -> None:
        """Say why a dial failed, once for each reason until one succeeds."""
        news = self._failure is None or self._failure.code != error.code
        self._failure = error
        hint = f"; hint: {error.hint}" if error.hint else ""
        log.log(logging.WARNING if news else logging.DEBUG, "%s%s", error.message, hint)
