"""The uplink: drains the event log into JetStream, and gives back what the learner holds.

Why: what a device logged has to reach the learner once in effect, over a network that comes and
goes, from a process that may be killed, to a broker that may lose what it acknowledged.

Invariants: the learner's watermark is the only truth about what may be trimmed and where to go on:
every start, reconnect and failure begins again there. Envelopes of a class are published in the
order of their sequence numbers. A message id is never used for a second attempt: when envelope A
failed and B behind it was stored, B has to be stored again behind A, which the broker's dedupe
would swallow; the learner cuts by watermark what comes twice. Labels go first. An envelope that may
still grow goes only when nothing of its class is under way, nor was within the last linger, so
under load envelopes grow by themselves. A class that the broker has no room for is held: one of its
envelopes is tried now and then, at last once a second, and the other class goes on. A learner that
falls silent is sent again what it was not heard to hold, each time after twice as long.

Knows nothing about what a record means, nor about how a bus does what it does.
Implements proto/asyncapi.yaml (channel events, device side).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from edge_runtime.bus.base import Bus, Message
from edge_runtime.clock import Clock
from edge_runtime.errors import CapacityError, HeadwaterError, TransportError, each
from edge_runtime.events.lane import WINDOW, Lane
from edge_runtime.events.log import CLASSES, EventLog
from edge_runtime.events.pace import Pace
from edge_runtime.events.packing import Packed, Packer
from edge_runtime.events.watermarks import Floor, Watermarks
from edge_runtime.events.withhold import Withhold
from edge_runtime.wire import subjects

_LINGER_S = 0.03
_AHEAD, _READ_AT_ONCE = 8, 4  # envelopes
_DEADLINE_S, _LOOK_S = 5.0, 0.05
_POLL_S = 1.0
_ALWAYS = ("envelopes", "records", "bytes_sent", "skipped", "rewinds", "duplicate_identity")


class Uplink:
    """Publishes the log of `device` for as long as `run` runs.

    `trim_floor` tells the (epoch, seq) of class event that the last window snapshot covers: what
    lies behind it is needed for the next restart, and stays even when the learner holds it.
    `withhold` decides what does not leave the device; it is saved here.
    """

    def __init__(
        self,
        log: EventLog,
        bus: Bus,
        device: str,
        clock: Clock,
        *,
        trim_floor: Callable[[], tuple[int, int]] | None = None,
        withhold: Withhold | None = None,
    ) -> None:
        self._log, self._bus, self._device, self._clock = log, bus, device, clock
        self._withhold = withhold
        self._packer = Packer(log, device, clock, withhold.kept if withhold else None)
        self._lanes = {name: Lane(name) for name in CLASSES}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work = asyncio.Event()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="uplink-disk")
        self._pack = ThreadPoolExecutor(1, thread_name_prefix="uplink-pack")
        self._counters: Counter[str] = Counter()
        self._watermarks = Watermarks(log, device, trim_floor, self._counters)
        self._pace = Pace(clock)
        self._attempt = self._reconnects = 0
        self._start_over = False

    async def run(self) -> None:
        """Drain the log until cancelled; the network's errors are counted and waited out."""
        self._loop = asyncio.get_running_loop()
        where = subjects.watermark(self._device)
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(asyncio.to_thread, self._finish)
            subscription = await self._bus.subscribe(where, self._on_watermark)
            undo.push_async_callback(subscription.close)
            undo.callback(setattr, self, "_loop", None)
            while True:
                await self._drain_or_wait()

    def _finish(self) -> None:
        """Wait for what the threads still do; not on the event loop, for that may take long."""
        self._disk.shutdown()
        self._pack.shutdown()
        if self._withhold is not None:
            self._withhold.save()

    def wake(self) -> None:
        """Tell the uplink, from any thread, that more has become durable.

        While both classes are under way it looks again by itself.
        """
        loop = self._loop
        if loop is not None and not all(lane.under_way for lane in self._lanes.values()):
            with contextlib.suppress(RuntimeError):  # closed meanwhile: nobody drains any more
                loop.call_soon_threadsafe(self._work.set)

    def statistics(self) -> dict[str, int]:
        """Counters since the start; `unlearned` counts durable numbers that the learner lacks."""
        numbers = {**dict.fromkeys(_ALWAYS, 0), **self._counters}
        numbers["attempts"] = self._attempt
        numbers["under_way"] = self._under_way()
        numbers["held"] = sum(lane.held for lane in self._lanes.values())
        numbers["unlearned"] = sum(
            max(0, last_seq - lane.learned.get(epoch, 0))
            for lane in self._lanes.values()
            for epoch, last_seq in self._log.owed(lane.event_class)
        )
        return numbers

    async def _drain_or_wait(self) -> None:
        refused, started_s = list[HeadwaterError](), self._clock.monotonic_s()
        try:
            await self._resume()
            await self._drain()
        except* (TransportError, CapacityError) as errors:
            refused = list(each(errors))
        if refused:
            self._counters.update(f"failed_{error.code}" for error in refused)
            ran_s = self._clock.monotonic_s() - started_s
            await self._rest(self._pace.after_failure(ran_s))

    async def _rest(self, seconds: float) -> None:
        """Wait so long, or until the broker is there again."""
        looks = 1 + int(seconds / _LOOK_S)
        for _ in range(looks):
            if not self._is_stale():
                await asyncio.sleep(seconds / looks)

    async def _resume(self) -> None:
        """Ask the learner's watermark, and go on from there."""
        self._reconnects = self._bus.statistics()["reconnects"]
        subject = subjects.watermark(self._device)
        message = await self._bus.last(subjects.STATE_STREAM, subject)
        for lane in self._lanes.values():
            lane.learned, lane.stored = {}, {}
        if message is not None:
            await self._on_watermark(message)
        self._look_back()
        self._attempt += 1
        self._start_over = False
        for lane in self._lanes.values():
            lane.start_over(self._clock.monotonic_s())

    async def _drain(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while not self._is_stale():
                self._work.clear()
                for lane in sorted(self._lanes.values(), key=lambda lane: lane.probed_s):
                    self._advance(lane, tasks)
                await self._wait()
                now_s = self._clock.monotonic_s()
                if any(lane.is_forgotten(now_s) for lane in self._lanes.values()):
                    self._rewind()

    def _rewind(self) -> None:
        self._counters["rewinds"] += 1
        self._start_over = True

    def _is_stale(self) -> bool:  # a broker that comes back may have lost what it acknowledged
        return self._start_over or self._bus.statistics()["reconnects"] != self._reconnects

    async def _wait(self) -> None:
        wait_s = _POLL_S
        has_room = self._under_way() < WINDOW
        if has_room and any(lane.waits_for_probe() for lane in self._lanes.values()):
            wait_s = min(wait_s, self._pace.left_s() + 0.001)
        try:
            async with asyncio.timeout(wait_s):
                await self._work.wait()
        except TimeoutError:
            await self._give_back(self._watermarks.refused)

    def _advance(self, lane: Lane, tasks: asyncio.TaskGroup) -> None:
        """Start all that this class may do now: send what is read, and read what comes next."""
        if lane.settle():
            self._attempt += 1
        if lane.is_empty() and self._behind(lane) is None:
            lane.release()
        if lane.held and self._pace.left_s():
            return
        self._send(lane, tasks)
        self._read(lane, tasks)
        self._send(lane, tasks)

    def _send(self, lane: Lane, tasks: asyncio.TaskGroup) -> None:
        while lane.may_send() and self._under_way() < WINDOW:
            if lane.held:
                lane.probed_s = self._clock.monotonic_s()
                self._pace.hold(lane.hold_s)
            lane.under_way += 1
            tasks.create_task(self._publish(lane, lane.ahead.popleft()))

    def _under_way(self) -> int:
        return sum(lane.under_way for lane in self._lanes.values())

    def _behind(self, lane: Lane) -> tuple[int, int, int] | None:
        return lane.behind(*self._log.durable(lane.event_class))

    def _read(self, lane: Lane, tasks: asyncio.TaskGroup) -> None:
        if not lane.may_read(_AHEAD - _READ_AT_ONCE):
            return
        found = self._behind(lane)
        if found is None:
            return
        epoch, after_seq, last_seq = found
        if epoch == self._log.epoch and last_seq - after_seq < lane.full_records:
            if lane.under_way or lane.to_send():
                return  # it may grow until they are through
            packed = self._packer.at_once(lane.event_class, *found)
            if packed is not None:
                lane.read[epoch] = packed.last_seq  # more may have become durable meanwhile
                lane.ahead.append(packed)
                self._save_counts()
                return
        lane.reading = True
        tasks.create_task(self._read_ahead(lane, *found))

    async def _read_ahead(self, lane: Lane, epoch: int, after_seq: int, last_seq: int) -> None:
        """Read on one thread and pack on another, so that both work at a drain."""
        turn, count = lane.turn, 1 if lane.held else _READ_AT_ONCE
        where = lane.event_class, epoch
        in_thread = asyncio.get_running_loop().run_in_executor
        pieces = await in_thread(self._disk, self._packer.read, *where, after_seq, last_seq, count)
        if turn != lane.turn:
            return  # what was refused or learned meanwhile made it void
        if not pieces:  # not there any more; the learner will ask for it by standing still
            self._counters["unreadable"] += last_seq - after_seq
        lane.took(epoch, pieces, last_seq)
        self._work.set()
        packed = await in_thread(self._pack, self._packer.pack, *where, pieces, last_seq)
        if turn == lane.turn:
            lane.packed(packed)
        self._save_counts()
        self._work.set()

    def _save_counts(self) -> None:
        if self._withhold is not None and self._withhold.unsaved:
            self._disk.submit(self._withhold.save)

    async def _publish(self, lane: Lane, packed: Packed) -> None:
        try:
            await self._bus.publish(
                subjects.events(self._device, lane.event_class),
                packed.data,
                headers=packed.headers,
                message_id=f"{packed.name}/{self._log.epoch}.{self._attempt}",
                timeout_s=_DEADLINE_S,
            )
            self._count_stored(lane, packed)
            if packed.epoch == self._log.epoch and not packed.is_full:
                await asyncio.sleep(_LINGER_S)  # holds the lane, so that the next grows
        except CapacityError as error:
            self._counters[f"failed_{error.code}"] += 1
            lane.refused(packed.epoch, packed.after_seq)
            self._pace.hold(lane.hold_s)
        finally:
            lane.under_way -= 1
            self._work.set()

    def _count_stored(self, lane: Lane, packed: Packed) -> None:
        lane.acknowledged(packed.epoch, packed.last_seq, self._clock.monotonic_s())
        sent = {"envelopes": 1, "records": packed.records, "skipped": packed.skipped}
        self._counters.update(sent, bytes_sent=len(packed.data))

    async def _on_watermark(self, message: Message) -> None:
        marks = self._watermarks.read(message.data)
        if marks is None:
            return
        now_s = self._clock.monotonic_s()
        for lane in self._lanes.values():
            own = {mark.epoch: mark.seq for mark in marks if mark.event_class == lane.event_class}
            if not lane.learn(own, now_s):
                self._rewind()
        self._work.set()
        await self._give_back(self._watermarks.floors(marks))
        self._look_back()

    async def _give_back(self, floors: list[Floor]) -> None:
        if floors:
            in_thread = asyncio.get_running_loop().run_in_executor
            await in_thread(self._disk, self._watermarks.give_back, floors)

    def _look_back(self) -> None:
        """Ask the log which earlier epochs it owes; that changes only with a watermark."""
        for lane in self._lanes.values():
            owed = self._log.owed(lane.event_class)
            lane.earlier = [(epoch, last) for epoch, last in owed if epoch != self._log.epoch]
