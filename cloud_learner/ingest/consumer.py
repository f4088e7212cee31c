"""The consumer: pulls envelopes off the broker and commits them, a tenth of a second at a time.

Why: the broker's memory of what it delivered is a convenience; what the learner holds is decided by
its own transaction, and only after that does it acknowledge and tell the device.

Invariants: an envelope is acknowledged, and a watermark published, only for what is committed. The
loop never waits for disk: commits run in the thread "ingest". When a commit fails, `run` raises and
this object is done with; a new one goes on from what was committed, and the broker and the devices
send again what was not. An unreachable broker is waited out and counted.

Knows nothing about how examples are learned: whoever wants them gets each commit.
Implements proto/asyncapi.yaml (channels events and watermark, learner side).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from itertools import starmap

from cloud_learner.ingest.guard import Batcher
from cloud_learner.ingest.intake import Commit, Incoming, Intake
from cloud_learner.ingest.joiner import Joiner
from cloud_learner.store.archive import Archive
from cloud_learner.store.ingest_db import IngestDb
from edge_runtime.bus.base import Bus, Message, PullSubscription
from edge_runtime.clock import Clock
from edge_runtime.errors import CapacityError, TransportError
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import Watermark

DURABLE = "learner"
COMMIT_BYTES = 1 << 20
LINGER_S = 0.1
_IDLE_S = 1.0
_MESSAGES = 64
_RETRY_S = 0.25

OnCommit = Callable[[Commit], Awaitable[None]]


class Ingest:
    """Consumes the events stream into `db` and `archive` for as long as `run` runs.

    `on_commit` is awaited after each commit: a slow one slows the reading, and nothing is lost.
    `widths` are the numbers of features of the known specs, by hash: predictions that claim such a
    spec and differ are quarantined. Reads back the last state at once. Raises: ConfigError.
    """

    def __init__(  # noqa: PLR0917 - its rooms, each once, in the order of the flow
        self,
        bus: Bus,
        db: IngestDb,
        archive: Archive,
        joiner: Joiner,
        guard: Batcher,
        clock: Clock,
        *,
        on_commit: OnCommit | None = None,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        self._bus, self._clock, self._on_commit = bus, clock, on_commit
        self._intake = Intake(db, archive, joiner, guard, clock=clock, widths=widths or {})
        self._numbers = self._intake.counters() | self._intake.waiting()
        self._untold = {each.device: each for each in self._intake.watermarks()}
        self._counters: Counter[str] = Counter(commits=0)

    async def run(self) -> None:
        """Consume until cancelled. Raises: CapacityError when a commit failed."""
        async with AsyncExitStack() as stack:
            thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="ingest"))
            pull = await self._opened(stack)
            while True:
                await self._tell()
                messages = await self._gather(pull)
                if messages:
                    await self._commit(messages, thread)

    def statistics(self) -> dict[str, int]:
        """Counters since the learner's first start, what waits now, and this run's own counts."""
        return {**self._numbers, **self._counters}

    async def _opened(self, stack: AsyncExitStack) -> PullSubscription:
        """The reader; the broker and its stream are waited for."""
        while True:
            pull = self._bus.pull(subjects.EVENTS_STREAM, DURABLE, subjects.EVENTS_ALL)
            try:
                return await stack.enter_async_context(pull)
            except TransportError as error:
                self._counters[f"unopened_{error.code}"] += 1
                await asyncio.sleep(_RETRY_S)

    async def _gather(self, pull: PullSubscription) -> list[Incoming]:
        """What comes within the linger after the first message, or until it is enough."""
        gathered = self._incoming(await pull.next_batch(_MESSAGES, _IDLE_S))
        until_s = self._clock.monotonic_s() + LINGER_S
        size = sum(len(message.data) for message in gathered)
        while gathered and size < COMMIT_BYTES:
            left_s = until_s - self._clock.monotonic_s()
            more = self._incoming(await pull.next_batch(_MESSAGES, left_s)) if left_s > 0 else []
            if not more:
                break
            gathered += more
            size += sum(len(message.data) for message in more)
        return gathered

    def _incoming(self, messages: list[Message]) -> list[Incoming]:
        now_s = self._clock.now_s()
        return [Incoming(each.subject, each.data, now_s, each) for each in messages]

    async def _commit(self, messages: list[Incoming], thread: ThreadPoolExecutor) -> None:
        """Commit in the thread, then let the world know, the learner before the devices."""
        loop = asyncio.get_running_loop()
        commit = await loop.run_in_executor(thread, self._intake.commit, messages)
        self._numbers = commit.counters
        self._counters["commits"] += 1
        self._untold |= {watermark.device: watermark for watermark in commit.watermarks}
        for message in commit.done:
            await message.ack()
        if self._on_commit is not None:
            await self._on_commit(commit)

    async def _tell(self) -> None:
        """Publish the watermarks that devices have not been told yet."""
        untold = list(self._untold.items())
        told = await asyncio.gather(*starmap(self._tell_one, untold))
        for (device, watermark), success in zip(untold, told, strict=True):
            if success and self._untold[device] is watermark:
                del self._untold[device]

    async def _tell_one(self, device: str, watermark: Watermark) -> bool:
        try:
            await self._bus.publish(subjects.watermark(device), codec.encode(watermark))
        except (TransportError, CapacityError) as error:
            self._counters[f"untold_{error.code}"] += 1
            return False
        return True
