"""The exchange: an application's talk with one device, with every answer accounted for.

Why: a run must be able to say that what was answered is what was archived, exactly, although a
device may be killed at any moment; so the talk's other end keeps books of its own.

How: a device numbers what it accepts without gaps, per epoch and class, in the order of sending.
So after a crash the last number that survived, which `hello` tells, decides for each request:
- acknowledged and numbered above it: lost in the linger, counted, sent again;
- in flight and numbered up to it: it was logged, only its answer is missing. It counts as answered,
  and a prediction's id follows from its number;
- in flight and numbered above it: it never was; sent again.
What is sent again goes in the original order, so windows come out as if nothing had happened. A
label whose prediction was lost is sent again for the prediction's new id.

Invariants: answered - lost = records in the device's log. This holds while the exchange is the only
one that writes to the device, and while nothing that is in flight at a crash would be refused.

Knows nothing about where rows come from, nor when they are due. Drives proto/socket.md.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from pathlib import Path

from cloud_learner.experiment.replay import DataRow
from edge_runtime.api.client import AsyncClient
from edge_runtime.api.frames import Done, Predicted
from edge_runtime.errors import CapacityError, ConfigError, HeadwaterError, TransportError
from edge_runtime.metrics import Histogram
from edge_runtime.wire.messages import EventClass

IN_FLIGHT_MAX = 128
"""So many unanswered observations and labels; short enough not to hold a prediction up."""

REMEMBERED_MAX = 1 << 14
"""So many acknowledged requests can be sent again; the linger takes a few hundred at most."""

_RECONNECT_S = 0.02


class Question:
    """A row that asks for a prediction; `id` is empty until the answer came."""

    __slots__ = ("id", "row")

    def __init__(self, row: DataRow) -> None:
        self.row = row
        self.id = ""


class Label:
    """What turned out to be true of the prediction that answered `question`."""

    __slots__ = ("question",)

    def __init__(self, question: Question) -> None:
        self.question = question


_COUNTS = (
    *("asked_again", "answers_recovered", "dones_recovered"),
    *("labels_orphaned", "labels_unasked", "reconnects"),
)
Item = DataRow | Question | Label
_PLURAL = {DataRow: "observations", Question: "predictions", Label: "labels"}


class Exchange:
    """The talk with `device` at the socket `path` about `family`.

    A device that is away is awaited for `patience_s` at a time.
    """

    def __init__(self, device: str, path: Path, family: str, *, patience_s: float = 60.0) -> None:
        self.device, self.path, self.family = device, path, family
        self.latency = Histogram()
        self.answered: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.counts = dict.fromkeys(_COUNTS, 0)
        self._patience_s = patience_s
        self._client: AsyncClient | None = None
        self._epoch = 0
        self._last: dict[EventClass, int] = {"event": 0, "label": 0}
        self._flight: deque[tuple[Item, asyncio.Future[Predicted] | asyncio.Future[Done]]] = deque()
        self._kept: deque[tuple[Item, int]] = deque(maxlen=REMEMBERED_MAX)
        self._again: deque[Item] = deque()

    async def open(self) -> None:
        """Connect. Raises: TransportError `unreachable`, ConfigError `other_device`."""
        await self._come_back()

    async def send(self, item: Item) -> None:
        """Send the next item; a question returns answered, the others may still be on their way.

        Raises: TransportError `unreachable` when the device is away for too long.
        """
        if type(item) is Label and self._is_pointless(item):
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
            if all(log[f"{name}_durable"] >= last for name, last in self._last.items()):
                return
            await asyncio.sleep(_RECONNECT_S)

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

    def _post(self, item: Item) -> asyncio.Future[Predicted] | asyncio.Future[Done]:
        client = self._client
        assert client is not None, "open comes first"
        future: asyncio.Future[Predicted] | asyncio.Future[Done]
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
                self._book(item, future.result())
            elif isinstance(error, TransportError):
                return
            elif isinstance(error, HeadwaterError):
                self.refused[error.code] += 1
            else:
                raise error
            flight.popleft()

    def _book(self, item: Item, answer: Predicted | Done) -> None:
        if type(answer) is Predicted:
            assert type(item) is Question
            item.id = answer.id
            seq = int(answer.id[answer.id.rindex(".") + 1 :])
            self._last["event"] = seq
        else:
            seq = answer.seq  # type: ignore[union-attr]
            self._last["label" if type(item) is Label else "event"] = seq
        self.answered[_PLURAL[type(item)]] += 1
        self._kept.append((item, seq))

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
                if not self._is_pointless(item):
                    await asyncio.wait([self._post(item)])
                    self._take_answers()
            if not self._flight:
                return

    async def _come_back(self) -> None:
        deadline_s = time.monotonic() + self._patience_s
        while True:
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._patience_s):
                    return await self._meet()
            except (TransportError, TimeoutError) as error:
                if time.monotonic() > deadline_s:
                    raise TransportError(
                        "unreachable", f"{self.device} has been away for too long: {error}"
                    ) from error
            await asyncio.sleep(_RECONNECT_S)

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
            self.counts["reconnects"] += 1
        self._client = client
        here: dict[EventClass, int] = {
            "event": log["event_appended"],
            "label": log["label_appended"],
        }
        if welcome.epoch == self._epoch:  # only the connection broke
            self._judge(here)
        elif self._epoch:
            left = [each for each in welcome.survived if each.epoch == self._epoch]
            ends = {each.event_class: each.seq for each in left}
            self._judge({name: ends.get(name, 0) for name in here})
            self._kept.clear()  # what survived a restart is durable
        self._epoch, self._last = welcome.epoch, here

    def _judge(self, ends: dict[EventClass, int]) -> None:
        """Decide what became of what is kept and in flight; queue what is to be sent again."""
        if len(self._kept) == REMEMBERED_MAX and _is_above(*self._kept[0], ends):
            raise CapacityError(
                "too_much_lost", f"{self.device} lost more than {REMEMBERED_MAX} requests"
            )
        again = [item for item, seq in self._kept if self._is_gone(item, seq, ends, heard=True)]
        for item, future in self._flight:
            future.exception()  # the broken connection, known already
            name = _class_of(item)
            self._last[name] = seq = self._last[name] + 1
            if not _is_above(item, seq, ends):
                self._book_unheard(item, seq)
            if self._is_gone(item, seq, ends, heard=False):
                again.append(item)
        self._flight.clear()
        self._again.extendleft(reversed(again))

    def _is_gone(self, item: Item, seq: int, ends: dict[EventClass, int], *, heard: bool) -> bool:
        """Count what became of `item`; True when it has to be sent again."""
        if _is_above(item, seq, ends):
            if heard:
                self.lost[_PLURAL[type(item)]] += 1
            else:
                self.counts["asked_again"] += 1
            if type(item) is Question:
                item.id = ""
            return True
        if type(item) is Label and not item.question.id:  # it survived its prediction
            self.counts["labels_orphaned"] += 1
            return True
        return False

    def _book_unheard(self, item: Item, seq: int) -> None:
        if type(item) is Question:
            item.id = f"{self.device}.{self._epoch}.{seq}"
            self.counts["answers_recovered"] += 1
        else:
            self.counts["dones_recovered"] += 1
        self.answered[_PLURAL[type(item)]] += 1
        self._kept.append((item, seq))

    def _is_pointless(self, item: Item) -> bool:
        """Whether `item` is a label for a question that was refused; it is counted."""
        pointless = type(item) is Label and not item.question.id
        self.counts["labels_unasked"] += pointless
        return pointless


def _class_of(item: Item) -> EventClass:
    return "label" if type(item) is Label else "event"


def _is_above(item: Item, seq: int, ends: dict[EventClass, int]) -> bool:
    return seq > ends[_class_of(item)]
