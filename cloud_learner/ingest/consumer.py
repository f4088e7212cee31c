"""The consumer: pulls envelopes off the broker and commits them, as fast as commits go.

Why: the broker's memory of what it delivered is a convenience; what the learner holds is decided by
its own transaction, and only after that does it acknowledge and tell the device.

Invariants: an envelope is acknowledged, and a watermark published, only for what is committed. The
loop never waits for disk: commits run in the thread "ingest". A commit takes what is there a moment
after the one before it, and at once where much is, as much as it can in its time. When the disk
takes nothing, ingest pauses: it begins anew at the last commit, again and again, acknowledges
nothing meanwhile, and goes on by itself. An unreachable broker is waited out and counted.

Knows nothing about how examples are learned: whoever wants them gets each commit.
Implements proto/asyncapi.yaml (channels events and watermark, learner side).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from itertools import starmap

from cloud_learner.ingest.fair import FairQueue
from cloud_learner.ingest.intake import Commit, Intake
from cloud_learner.ingest.opening import Incoming
from edge_runtime.bus.base import Bus, Message, PullSubscription
from edge_runtime.clock import Clock
from edge_runtime.errors import CapacityError, TransportError
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import Report, Watermark

DURABLE = "learner"
COMMIT_BYTES_MIN, COMMIT_BYTES_MAX = 64 << 10, 4 << 20
GATHER_S = 0.015
"""How long the next commit waits for more when little is there: each has a price of its own, here,
at the broker and at those who hear of it."""
COMMIT_S = 0.01
"""How long a commit should take, however much waits: no device waits longer for its turn than for
the commit that is under way and its own."""
_IDLE_S = 1.0
_MESSAGES = 64
_RETRY_S = 0.25
_PAUSE_S_MAX = 10.0
_PURGE_S = TELL_S = 0.1

OnCommit = Callable[[Commit], Awaitable[None]]
MakeIntake = Callable[[], Intake]


class Ingest:
    """Consumes the events stream for as long as `run` runs, and closes its intake at the end.

    `make_intake` opens what is on disk: at once, and again after the disk was full. `on_commit` is
    awaited after each commit: a slow one slows the reading, and nothing is lost. Who reads beside
    the learner has a `durable` of its own, and `tells` devices nothing: they trim by the learner.
    Raises: ConfigError, CapacityError.
    """

    def __init__(
        self,
        bus: Bus,
        make_intake: MakeIntake,
        clock: Clock,
        *,
        on_commit: OnCommit | None = None,
        durable: str = DURABLE,
        tells: bool = True,
    ) -> None:
        self._bus, self._clock, self._on_commit = bus, clock, on_commit
        self._make_intake, self._durable, self._tells = make_intake, durable, tells
        self.intake: Intake | None = make_intake()
        self.learned: dict[str, int] = {}
        self.paused = ""
        self.totals = self.intake.accounting.totals()
        self.duplicates: list[str] = []
        self._delivered = self.intake.reached
        self._numbers = self.intake.counters() | self.intake.waiting()
        self._numbers_of: dict[str, dict[str, int]] = {}
        self._untold = {each.device: each for each in self.intake.watermarks()}
        self._reported: dict[str, Report] = {}
        self._reported_at_s = float("-inf")
        self._queue = FairQueue()
        self._share = COMMIT_BYTES_MIN
        self._news = asyncio.Event()
        self._counters: Counter[str] = Counter(commits=0)

    async def run(self) -> None:
        """Consume until cancelled."""
        async with AsyncExitStack() as stack:
            thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="ingest"))
            stack.push_async_callback(self._close, thread)
            pull = await self._opened(stack)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(pull))
                group.create_task(self._write(thread))
                if self._tells:
                    group.create_task(self._tell())
                    group.create_task(self._purge())

    def hear(self, report: Report) -> None:
        """What a device says of itself: where its lanes end goes into the accounts."""
        self._reported[report.device] = report

    def statistics(self) -> dict[str, int]:
        """Counters since the learner's first start, what waits now, and this run's own counts."""
        return {
            **self._numbers,
            **self._counters,
            "ahead_bytes": self._queue.bytes,
            "paused": int(bool(self.paused)),
        }

    def numbers_of(self, family: str) -> dict[str, int]:
        """Counters of one family since the learner's first start, and what waits of it now."""
        return self._numbers_of.get(family, {})

    async def _opened(self, stack: AsyncExitStack) -> PullSubscription:
        """The reader; the broker and its stream are waited for."""
        while True:
            pull = self._bus.pull(subjects.EVENTS_STREAM, self._durable, subjects.EVENTS_ALL)
            try:
                return await stack.enter_async_context(pull)
            except TransportError as error:
                self._counters[f"unopened_{error.code}"] += 1
                await asyncio.sleep(_RETRY_S)

    async def _read(self, pull: PullSubscription) -> None:
        """Read ahead, as far as the queue has room."""
        while True:
            messages = await pull.next_batch(_MESSAGES, _IDLE_S)
            if messages:
                await self._queue.put(self._incoming(messages))

    def _incoming(self, messages: list[Message]) -> list[Incoming]:
        now_s = self._clock.now_s()
        return [Incoming(each.subject, each.data, now_s, each, each.headers) for each in messages]

    async def _write(self, thread: ThreadPoolExecutor) -> None:
        while True:
            assert self.intake is not None
            wait_s = 0.0 if self.intake.is_behind else _IDLE_S
            messages = await self._queue.take(self._share, wait_s)
            reported = self._due_reports()
            if messages or reported or self.intake.is_due():
                began_s = self._clock.monotonic_s()
                await self._commit(messages, reported, thread)
                took_s = self._clock.monotonic_s() - began_s
                self._pace(sum(message.size for message in messages), took_s)
                if self._queue.bytes < self._share:
                    await asyncio.sleep(GATHER_S)

    def _pace(self, size: int, took_s: float) -> None:
        """Let commits become as large as they can be in COMMIT_S."""
        fits = int(max(size, COMMIT_BYTES_MIN) * COMMIT_S / max(took_s, COMMIT_S / 4))
        self._share = min(max((self._share + fits) // 2, COMMIT_BYTES_MIN), COMMIT_BYTES_MAX)

    def _due_reports(self) -> dict[str, Report]:
        """What devices reported, about once a second."""
        now_s = self._clock.monotonic_s()
        if not self._reported or now_s - self._reported_at_s < _IDLE_S:
            return {}
        reported, self._reported, self._reported_at_s = self._reported, {}, now_s
        return reported

    async def _commit(
        self, messages: list[Incoming], reported: dict[str, Report], thread: ThreadPoolExecutor
    ) -> None:
        """Commit in the thread, then let the world know, the learner before the devices."""
        loop = asyncio.get_running_loop()
        marks = {device: report.durable for device, report in reported.items()}
        pause_s = _RETRY_S
        while True:
            try:
                if self.intake is None:
                    await loop.run_in_executor(thread, self._renew)
                intake = self.intake
                assert intake is not None
                work = partial(intake.commit, messages, marks, learned=dict(self.learned))
                commit = await loop.run_in_executor(thread, work)
                break
            except (CapacityError, OSError) as error:
                self.paused = str(error)
                self._counters[f"paused_{getattr(error, 'code', 'disk_error')}"] += 1
                await loop.run_in_executor(thread, self._abandon)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_S_MAX)
        await self._deliver(commit, intake, thread)

    async def _deliver(self, commit: Commit, intake: Intake, thread: ThreadPoolExecutor) -> None:
        if self.paused:  # a commit that failed may have been made true after all
            loop = asyncio.get_running_loop()
            missed = partial(intake.catch_up, commit, self._delivered)
            await loop.run_in_executor(thread, missed)
        self.paused = ""
        self._delivered = intake.reached
        self._numbers, self.totals = commit.counters, commit.totals
        self._numbers_of = {name: each.counters for name, each in commit.families.items()}
        self.duplicates = sorted(intake.accounting.duplicates)
        self._counters["commits"] += 1
        self._untold |= {watermark.device: watermark for watermark in commit.watermarks}
        self._news.set()
        for message in commit.done:
            await message.ack()
        if self._on_commit is not None:
            await self._on_commit(commit)

    def _renew(self) -> None:
        """Begin anew at the last commit. Raises: CapacityError."""
        self.intake = self._make_intake()

    def _abandon(self) -> None:
        """Memory is ahead of the disk: let go of both."""
        intake, self.intake = self.intake, None
        if intake is not None:
            intake.abandon()

    async def _close(self, thread: ThreadPoolExecutor) -> None:
        """After a commit that is still under way, and with what was released in files."""
        if self.intake is not None:
            with contextlib.suppress(CapacityError):  # the next start writes them
                await asyncio.get_running_loop().run_in_executor(thread, self.intake.close)

    async def _tell(self) -> None:
        """Publish the watermarks that devices have not been told yet."""
        while True:
            untold = list(self._untold.items())
            told = await asyncio.gather(*starmap(self._tell_one, untold))
            for (device, watermark), success in zip(untold, told, strict=True):
                if success and self._untold[device] is watermark:
                    del self._untold[device]
            await asyncio.sleep(TELL_S)  # a device trims no better for hearing of each commit
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_S if self._untold else None):
                    await self._news.wait()
                    self._news.clear()

    async def _tell_one(self, device: str, watermark: Watermark) -> bool:
        try:
            await self._bus.publish(subjects.watermark(device), codec.encode(watermark))
        except (TransportError, CapacityError) as error:
            self._counters[f"untold_{error.code}"] += 1
            return False
        return True

    async def _purge(self) -> None:
        """Let the broker drop what is acknowledged, so that devices have room."""
        seen = 0
        while True:
            await asyncio.sleep(_PURGE_S)
            if self._counters["commits"] == seen:
                continue
            seen = self._counters["commits"]
            try:
                self._counters["purged"] += await self._bus.purge(subjects.EVENTS_STREAM)
            except TransportError as error:
                self._counters[f"unpurged_{error.code}"] += 1
