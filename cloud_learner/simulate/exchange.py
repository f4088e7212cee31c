"""The exchange: an application's talk with one device, kept up through crashes.

Why: who plays data should think about rows and times, not about what a crash does to a socket.

How: requests are pipelined in order. When the connection breaks, the exchange comes back, lets the
books decide by what survived, and sends again what they say, in the original order; so the device's
windows come out as if nothing had happened.

Invariants: items reach the device in the order of sending; what is unanswered is bounded.

Knows nothing about where rows come from, nor when they are due. Drives proto/socket.md.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from pathlib import Path
from typing import Any

from cloud_learner.experiment.replay import DataRow
from cloud_learner.simulate.books import Books, Ends, Item, Label, Question
from edge_runtime.api.client import AsyncClient
from edge_runtime.api.frames import Done, Welcome
from edge_runtime.errors import ConfigError, HeadwaterError, TransportError
from edge_runtime.metrics import Histogram

IN_FLIGHT_MAX = 128
"""So many unanswered observations and labels; short enough not to hold a prediction up."""

_RETRY_S = 0.02


class Exchange:
    """The talk with `device` at the socket `path` about `family`.

    A device that is away is awaited for `patience_s` at a time.
    """

    def __init__(self, device: str, path: Path, family: str, *, patience_s: float = 60.0) -> None:
        self.device, self.path, self.family = device, path, family
        self.latency = Histogram()
        self.books = Books(device)
        self.reconnects = 0
        self._patience_s = patience_s
        self._client: AsyncClient | None = None
        self._flight: deque[tuple[Item, asyncio.Future[Any]]] = deque()
        self._again: deque[Item] = deque()

    async def open(self) -> None:
        """Connect. Raises: TransportError `unreachable`, ConfigError `other_device`."""
        await self._come_back()

    async def send(self, item: Item) -> None:
        """Send the next item; a question returns answered, the others may still be on their way.

        Raises: TransportError `unreachable` when the device is away for too long.
        """
        if type(item) is Label and self.books.is_pointless(item):
            return
        started_ns = time.perf_counter_ns()
        future = self._post(item)
        if type(item) is not Question:
            if len(self._flight) >= IN_FLIGHT_MAX:
                await self.settle()
            return
        try:
            await future
        except HeadwaterError:
            await self.settle()
        else:
            self.latency.record((time.perf_counter_ns() - started_ns) / 1000)
            self._take_answers()

    async def settle(self) -> None:
        """Return once everything that was sent is answered, or counted as refused.

        Raises: as `send`.
        """
        if self._flight:
            await asyncio.wait([self._flight[-1][1]])
            self._take_answers()
        if self._flight:
            await self.recover()

    async def settle_durable(self) -> None:
        """Return once the device holds everything on its disk. Raises: as `send`."""
        while True:
            try:
                await self.settle()
                assert self._client is not None
                log = (await self._client.status()).status["log"]
            except TransportError:
                await self.recover()
                continue
            if all(log[f"{name}_durable"] >= last for name, last in self.books.last.items()):
                return
            await asyncio.sleep(_RETRY_S)

    async def wait_lost(self) -> None:
        """Return when the connection breaks."""
        assert self._client is not None
        await self._client.wait_closed()

    async def close(self) -> None:
        """Leave; closing twice is no error."""
        for _, future in self._flight:
            future.cancel()
        if self._client is not None:
            await self._client.close()

    # One request, one answer.

    def _post(self, item: Item) -> asyncio.Future[Any]:
        client = self._client
        assert client is not None, "open comes first"
        future: asyncio.Future[Any]
        try:
            if type(item) is DataRow:
                future = client.observe(self.family, item.kind, item.time_s, item.fields)
            elif type(item) is Question:
                row = item.row
                future = client.predict(self.family, row.kind, row.time_s, row.fields)
            else:
                assert type(item) is Label
                future = self._post_label(client, item.question)
        except HeadwaterError as error:
            future = asyncio.get_running_loop().create_future()
            future.set_exception(error)
        self._flight.append((item, future))
        return future

    def _post_label(self, client: AsyncClient, question: Question) -> asyncio.Future[Done]:
        row = question.row
        assert row.label is not None
        assert question.id
        return client.label(self.family, question.id, row.label, row.label_time_s)

    def _take_answers(self) -> None:
        """Book what was answered, in order, up to what a broken connection left unanswered."""
        flight = self._flight
        while flight:
            item, future = flight[0]
            if not future.done():
                return
            error = future.exception()
            if error is None:
                self.books.answer(item, future.result())
            elif isinstance(error, TransportError):
                return
            elif isinstance(error, HeadwaterError):
                self.books.refuse(error)
            else:
                raise error
            flight.popleft()

    # After a crash.

    async def recover(self) -> None:
        """Reconnect, settle by the surviving numbers what became of each request, send the rest.

        Raises: as `send`; CapacityError `too_much_lost` when more was lost than is remembered.
        """
        while True:
            self._take_answers()
            await self._come_back()
            while self._again and not self._flight:
                item = self._again.popleft()
                if not self.books.is_pointless(item):
                    await asyncio.wait([self._post(item)])
                    self._take_answers()
            if not self._flight:
                return

    async def _come_back(self) -> None:
        deadline_s = time.monotonic() + self._patience_s
        while True:
            try:
                async with asyncio.timeout(self._patience_s):
                    return await self._meet()
            except (TransportError, TimeoutError) as error:
                if time.monotonic() > deadline_s:
                    raise TransportError(
                        "unreachable", f"{self.device} has been away for too long: {error}"
                    ) from error
            await asyncio.sleep(_RETRY_S)

    async def _meet(self) -> None:
        """Connect, and hear what became of what was sent before."""
        client = await AsyncClient.connect(self.path)
        try:
            welcome = await client.hello()
            if welcome.device != self.device:
                raise ConfigError(  # noqa: TRY301 - its except closes what was opened here
                    "other_device", f"{self.path} belongs to {welcome.device}"
                )
            log = (await client.status()).status["log"]
        except BaseException:
            await client.close()
            raise
        if self._client is not None:
            await self._client.close()
            self.reconnects += 1
        self._client = client
        here: Ends = {"event": log["event_appended"], "label": log["label_appended"]}
        if self.books.epoch:
            self._judge(here if welcome.epoch == self.books.epoch else self._ends(welcome))
        self.books.begin(welcome.epoch, here)

    def _ends(self, welcome: Welcome) -> Ends:
        left = [each for each in welcome.survived if each.epoch == self.books.epoch]
        ends = {each.event_class: each.seq for each in left}
        return {"event": ends.get("event", 0), "label": ends.get("label", 0)}

    def _judge(self, ends: Ends) -> None:
        for _, future in self._flight:
            future.exception()  # the broken connection, known already
        again = self.books.judge((item for item, _ in self._flight), ends)
        self._flight.clear()
        self._again.extendleft(reversed(again))
