"""The root of the learning trust domain: ingest, joiner and cycle, one family.

Why: somebody must bring the stream to the trainer without either waiting for the other's disk or
gradient; ingest runs on the loop and its thread, training in a thread of its own.

Invariants: every batch that ingest committed is learned exactly once, in order; after a restart
those above the checkpoint are read again from the ingest database. When several batches wait, only
the last of them makes a candidate; the others are counted as skipped. `clock_s` never claims what
was not learned.

Knows nothing about gates, releases and plans: `submit` does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from cloud_learner.config import Home
from cloud_learner.cycle import Candidate, Cycle
from cloud_learner.evaluate.offline import load_set
from cloud_learner.ingest.consumer import Ingest
from cloud_learner.ingest.guard import Batcher
from cloud_learner.ingest.intake import Commit, Intake
from cloud_learner.ingest.joiner import Rules
from cloud_learner.store.archive import Archive
from cloud_learner.store.examples import Batch, Example
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.raw import RawLog
from cloud_learner.train.family import Family
from edge_runtime.bus.base import Bus
from edge_runtime.clock import Clock
from edge_runtime.errors import ConfigError

IDLE_S = 5.0  # wall time after which a silent device no longer holds event time
CHECKPOINT_CYCLES = 10
WAITING_BATCHES_MAX = 400  # that ingest may be ahead of the trainer; they are in memory

Submit = Callable[[Candidate], Awaitable[object]]
OnExamples = Callable[[list[Example]], Awaitable[None]]


class Learner:
    """Ingests and learns for as long as `run` runs; `on_examples` sees all released examples."""

    def __init__(
        self,
        home: Home,
        family: Family,
        bus: Bus,
        clock: Clock,
        *,
        submit: Submit,
        on_examples: OnExamples,
    ) -> None:
        origin, config = home.origin(), family.config
        self._home, self._clock = home, clock
        self._submit, self._on_examples = submit, on_examples
        self.cycle = Cycle(family, load_set(home.reference).features)
        self.cycle.restore(home.checkpoint)
        self.cycle.take_graph(home.graph)
        self._label_window_s = config.label.window_s
        rules = Rules(
            family=family.name,
            label_window_s=config.label.window_s,
            idle_s=IDLE_S,
            expiry=config.label.expiry,
            amend_s=config.label.amend_s,
            learn_from_s=origin.learned_through_s,
            ahead_s_max=config.skew_s_max if config.clock == "wall" else float("inf"),
        )
        make = partial(open_intake, home, rules, family, clock)
        self.ingest = Ingest(bus, make, clock, on_commit=self._on_commit)
        self.ingest.learned = self.cycle.number
        intake = self.ingest.intake
        assert intake is not None
        self._waiting: deque[Batch] = deque(intake.batches_after(self.cycle.number))
        last = self._waiting[-1].number if self._waiting else self.cycle.number
        self._commits = deque([(last, intake.clock_s)])
        self._wake, self._learned = asyncio.Event(), asyncio.Event()
        self.progress = asyncio.Event()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="trainer")
        self.clock_s = float("-inf")
        self.candidates = 0
        self.skipped = 0
        self._settle_clock()

    async def run(self) -> None:
        """Ingest and train until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.ingest.run())
                group.create_task(self._train())
        finally:
            self.thread.shutdown()
            if self.cycle.whole:
                self.cycle.save(self._home.checkpoint)

    @property
    def archived(self) -> int:
        """Records that were taken for facts, of all starts."""
        return self.ingest.totals["archived"]

    def statistics(self) -> dict[str, int]:
        """Counters of ingest and training."""
        return {
            **self.ingest.totals,
            **self.ingest.statistics(),
            "cycles": self.cycle.number,
            "candidates": self.candidates,
            "micro_batches_skipped": self.skipped,
            "examples_learned": self.cycle.examples_learned,
            "learned_twice": self.cycle.ledger.learned_twice,
            "other_spec": self.cycle.ledger.other_spec,
            "batches_waiting": len(self._waiting),
        }

    async def _on_commit(self, commit: Commit) -> None:
        self._waiting.extend(commit.batches)
        last = self._waiting[-1].number if self._waiting else self.cycle.number
        self._commits.append((last, commit.clock_s))
        self._settle_clock()
        self._wake.set()
        await self._on_examples(commit.examples)
        while len(self._waiting) > WAITING_BATCHES_MAX:
            self._learned.clear()
            await self._learned.wait()

    async def _train(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while self._waiting:
                await loop.run_in_executor(self.thread, self.cycle.learn, self._waiting[0])
                matured_s = self._waiting.popleft().examples[-1].time_s + self._label_window_s
                self.clock_s = max(self.clock_s, matured_s)
                if self._waiting:
                    self.skipped += 1
                else:
                    candidate = await loop.run_in_executor(self.thread, self.cycle.candidate)
                    self.candidates += 1
                    await self._submit(candidate)
                self._settle_clock()
                self._learned.set()
                if self.cycle.number % CHECKPOINT_CYCLES == 0:
                    save = self.cycle.save
                    await loop.run_in_executor(self.thread, save, self._home.checkpoint)
                    self.ingest.learned = self.cycle.number
            self._wake.clear()
            await self._wake.wait()

    def _settle_clock(self) -> None:
        """Event time is that of a commit when every batch that it brought has been learned."""
        done = self._waiting[0].number - 1 if self._waiting else self.cycle.number
        while self._commits and self._commits[0][0] <= done:
            self.clock_s = max(self.clock_s, self._commits.popleft()[1])
        self.progress.set()


def open_intake(home: Home, rules: Rules, family: Family, clock: Clock) -> Intake:
    """Ingest over what lies in `home`, as its last commit left it.

    Raises: ConfigError, CapacityError; then nothing stays open.
    """
    if (home.root / "ingest.sqlite").exists() and not home.ingest_db.exists():
        raise ConfigError(
            "bad_version",
            f"{home.root} holds an ingest database of an earlier release; nothing was changed",
            "bootstrap a new home: the devices send again what they still hold",
        )
    learning = family.config.learning
    with contextlib.ExitStack() as stack:
        db = IngestDb(home.ingest_db)
        stack.callback(db.close)
        archive = Archive(home.archive)
        stack.callback(archive.close)
        raw = RawLog(home.raw, keep_s=86400.0 * family.config.archive.raw_days)
        stack.callback(raw.close)
        guard = Batcher(learning.batch_size, learning.device_cap)
        widths = {family.spec.hash: family.spec.size}
        intake = Intake(db, raw, archive, rules, guard, clock=clock, widths=widths)
        stack.pop_all()
        return intake
