"""The uplink: drains the event log into JetStream, and gives back what the learner holds.

Why: what a device logged has to reach the learner once in effect, over a network that comes and
goes, from a process that may be killed, to a broker that may lose what it acknowledged.

Invariants: the learner's watermark is the only truth about what may be trimmed and where to go on:
every start, reconnect and failure begins again there. Envelopes of a class are published in the
order of their sequence numbers. A message id is never used for a second attempt: when envelope A
failed and B behind it was stored, B has to be stored again behind A, which the broker's dedupe
would swallow; the learner cuts by watermark what comes twice. Labels go first. An envelope that is
not full goes only when nothing of its class is under way, nor was within the last linger, so
under load envelopes grow by themselves. What was just committed goes out from memory; disk is
touched in a thread of its own.

Knows nothing about what a record means, nor about how a bus does what it does.
Implements proto/asyncapi.yaml (channel events, device side).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import msgspec

from edge_runtime.bus.base import Bus, Message
from edge_runtime.clock import Clock
from edge_runtime.errors import CapacityError, HeadwaterError, RequestError, TransportError
from edge_runtime.events.lane import Lane
from edge_runtime.events.log import CLASSES, EventLog
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import WIRE_VERSION, Envelope, EventClass, Watermark

ENVELOPE_BYTES = 64 * 1024
CE_TYPE = "headwater.records.v1"
_OVERHEAD_BYTES = 256
_RECORDS_MAX = 2048
_LINGER_S = 0.06
_WINDOW = 8
_DEADLINE_S = 5.0
_POLL_S = 1.0
_BACKOFF_S, _BACKOFF_MAX_S = 0.05, 2.0


class Uplink:
    """Publishes the log of `device` for as long as `run` runs.

    `trim_floor` tells the (epoch, seq) of class event that the last window snapshot covers: what
    lies behind it is needed for the next restart, and stays even when the learner holds it.
    """

    def __init__(
        self,
        log: EventLog,
        bus: Bus,
        device: str,
        clock: Clock,
        *,
        trim_floor: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self._log, self._bus, self._device, self._clock = log, bus, device, clock
        self._trim_floor = trim_floor
        self._lanes = {name: Lane(name) for name in CLASSES}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work = asyncio.Event()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="uplink-disk")
        self._counters: Counter[str] = Counter()
        self._attempt = self._reconnects = self._failures = 0
        self._start_over = False

    async def run(self) -> None:
        """Drain the log until cancelled; the network's errors are counted and waited out."""
        self._loop = asyncio.get_running_loop()
        subject = subjects.watermark(self._device)
        subscription = await self._bus.subscribe(subject, self._on_watermark)
        try:
            while True:
                await self._drain_or_wait()
        finally:
            self._loop = None
            await subscription.close()
            self._disk.shutdown()

    def wake(self) -> None:
        """Tell the uplink, from any thread, that more has become durable.

        While both classes are under way it looks again by itself.
        """
        loop = self._loop
        if loop is not None and not all(lane.under_way for lane in self._lanes.values()):
            with contextlib.suppress(RuntimeError):  # closed meanwhile: nobody drains any more
                loop.call_soon_threadsafe(self._work.set)

    def statistics(self) -> dict[str, int]:
        """Counters since the start; `unlearned` counts durable records the learner lacks."""
        numbers = {
            name: self._counters[name] for name in ("envelopes", "records", "missing", "rewinds")
        }
        numbers |= {name: count for name, count in self._counters.items() if name not in numbers}
        numbers["attempts"] = self._attempt
        numbers["under_way"] = self._under_way()
        numbers["unlearned"] = sum(
            max(0, last - max(first - 1, lane.learned.get(epoch, 0)))
            for lane in self._lanes.values()
            for epoch, first, last in self._log.epochs(lane.event_class)
        )
        return numbers

    async def _drain_or_wait(self) -> None:
        refused: list[HeadwaterError] = []
        try:
            await self._resume()
            await self._drain()
        except* (TransportError, CapacityError) as errors:
            refused = list(_each(errors))
        if refused:
            self._counters.update(f"failed_{error.code}" for error in refused)
            await asyncio.sleep(self._backoff_s())

    def _backoff_s(self) -> float:
        self._failures += 1
        ceiling = min(_BACKOFF_MAX_S, _BACKOFF_S * 2.0**self._failures)
        return ceiling * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret

    async def _resume(self) -> None:
        """Ask the learner's watermark, and go on from there."""
        self._reconnects = self._bus.statistics()["reconnects"]
        subject = subjects.watermark(self._device)
        message = await self._bus.last(subjects.STATE_STREAM, subject)
        for lane in self._lanes.values():
            lane.learned, lane.stored = {}, {}
        if message is not None:
            await self._on_watermark(message)
        self._attempt += 1
        self._start_over = False
        for lane in self._lanes.values():
            lane.start_over(self._clock.monotonic_s())

    async def _drain(self) -> None:
        async with asyncio.TaskGroup() as publishers:
            while not self._is_stale():
                self._work.clear()
                envelope = await self._next()
                if envelope is None:
                    await self._wait()
                else:
                    publishers.create_task(self._publish(envelope))

    def _is_stale(self) -> bool:
        # A broker that comes back may have lost what it had acknowledged.
        return self._start_over or self._bus.statistics()["reconnects"] != self._reconnects

    async def _wait(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_POLL_S):
                await self._work.wait()

    async def _next(self) -> Envelope | None:
        """The next envelope to publish, counted as under way; None when nothing may go now."""
        for lane in self._lanes.values():
            if self._under_way() < _WINDOW and (found := self._behind(lane)) is not None:
                epoch, after_seq, last_seq = found
                if lane.under_way == 0 or last_seq - after_seq >= lane.full_records:
                    envelope = await self._read(lane, epoch, after_seq, last_seq)
                    if envelope is not None:
                        return envelope
        return None

    def _under_way(self) -> int:
        return sum(lane.under_way for lane in self._lanes.values())

    def _behind(self, lane: Lane) -> tuple[int, int, int] | None:
        """(epoch, last sent, last durable) of the first epoch that has more to send."""
        for epoch, _, last_seq in self._log.epochs(lane.event_class):
            after_seq = lane.sent.get(epoch, 0)
            if after_seq < last_seq:
                return epoch, after_seq, last_seq
        return None

    async def _read(self, lane: Lane, epoch: int, after_seq: int, last_seq: int) -> Envelope | None:
        found = await self._records(lane.event_class, epoch, after_seq)
        first_seq = found[0][0] if found else last_seq + 1
        self._counters["missing"] += first_seq - after_seq - 1
        records = [
            msgspec.Raw(data) for at, (seq, data) in enumerate(found) if seq == first_seq + at
        ]
        lane.sent[epoch] = first_seq + len(records) - 1
        if not records:
            return None
        if lane.sent[epoch] < last_seq:
            lane.full_records = len(records)
        lane.under_way += 1
        return Envelope(WIRE_VERSION, self._device, epoch, lane.event_class, first_seq, records)

    async def _records(
        self, event_class: EventClass, epoch: int, after_seq: int
    ) -> list[tuple[int, bytes]]:
        """What an envelope has room for: from memory, or from disk what is not there any more."""
        bounds = ENVELOPE_BYTES - _OVERHEAD_BYTES, _RECORDS_MAX
        if epoch == self._log.epoch:
            found = self._log.recent(event_class, after_seq, *bounds)
            if found is not None:
                return found
        return await asyncio.get_running_loop().run_in_executor(
            self._disk, self._log.read, event_class, epoch, after_seq, *bounds
        )

    async def _publish(self, envelope: Envelope) -> None:
        lane = self._lanes[envelope.event_class]
        last_seq = envelope.base_seq + len(envelope.records) - 1
        name = f"{self._device}/{envelope.epoch}/{lane.event_class}/{envelope.base_seq}-{last_seq}"
        try:
            await self._bus.publish(
                subjects.events(self._device, lane.event_class),
                codec.encode(envelope),
                headers=self._headers(name),
                message_id=f"{name}/{self._log.epoch}.{self._attempt}",
                timeout_s=_DEADLINE_S,
            )
            self._count_stored(lane, envelope.epoch, last_seq, len(envelope.records))
            if len(envelope.records) < lane.full_records:
                await asyncio.sleep(_LINGER_S)  # holds the lane, so that the next grows
        finally:
            lane.under_way -= 1
            self._work.set()

    def _count_stored(self, lane: Lane, epoch: int, last_seq: int, count: int) -> None:
        lane.acknowledged(epoch, last_seq, self._clock.monotonic_s())
        self._failures = 0
        self._counters["envelopes"] += 1
        self._counters["records"] += count

    def _headers(self, name: str) -> dict[str, str]:
        """The CloudEvents attributes of an envelope, in the NATS binding's binary mode."""
        return {
            "ce-id": name,
            "ce-source": f"/headwater/{self._device}",
            "ce-type": CE_TYPE,
            "ce-specversion": "1.0",
            "ce-time": datetime.fromtimestamp(self._clock.now_s(), UTC).isoformat(),
        }

    async def _on_watermark(self, message: Message) -> None:
        try:
            watermark = codec.decode_watermark(message.data)
        except RequestError:
            self._counters["bad_watermarks"] += 1
            return
        if watermark.device != self._device:
            self._counters["bad_watermarks"] += 1
            return
        self._learn(watermark)
        floors = self._floors(watermark)
        await asyncio.get_running_loop().run_in_executor(self._disk, self._trim, floors)

    def _learn(self, watermark: Watermark) -> None:
        now_s = self._clock.monotonic_s()
        for lane in self._lanes.values():
            marks = {m.epoch: m.seq for m in watermark.marks if m.event_class == lane.event_class}
            if not lane.learn(marks, now_s):
                self._counters["rewinds"] += 1
                self._start_over = True
        self._work.set()

    def _floors(self, watermark: Watermark) -> list[tuple[EventClass, int, int]]:
        """What may be trimmed: all that the learner holds, events only below the snapshot."""
        floor = self._trim_floor() if self._trim_floor else None
        return [
            (mark.event_class, mark.epoch, _below(floor, mark.epoch, mark.seq))
            if mark.event_class == "event" and floor
            else (mark.event_class, mark.epoch, mark.seq)
            for mark in watermark.marks
        ]

    def _trim(self, floors: list[tuple[EventClass, int, int]]) -> None:
        for event_class, epoch, seq in floors:
            self._log.learned(event_class, epoch, seq)


def _below(floor: tuple[int, int], epoch: int, seq: int) -> int:
    if epoch == floor[0]:
        return min(seq, floor[1])
    return seq if epoch < floor[0] else 0


def _each(errors: BaseExceptionGroup[HeadwaterError]) -> Iterator[HeadwaterError]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _each(error)
        else:
            yield error
