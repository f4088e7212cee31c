"""The root of the learning trust domain: one ingest, and a course for each family.

Why: somebody must bring the stream to the trainer without either waiting for the other's disk or
gradient; ingest runs on the loop and its thread, training in a thread of its own.

Invariants: every batch that ingest committed is dealt with exactly once, in order, by its family;
after a restart those above the checkpoint are read again from the ingest database. Families take
turns, a batch each, so none waits for more than one batch of each other. When several batches of a
family wait, one of them makes a candidate every half second, and so does the last; the others are
counted as skipped.

Knows nothing about gates, releases and plans: `submit` does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from cloud_learner.config import Home
from cloud_learner.course import Course
from cloud_learner.cycle import Candidate
from cloud_learner.ingest.consumer import Ingest
from cloud_learner.ingest.intake import Commit, Intake, Released, Strand
from cloud_learner.pooling import NOTHING, Served
from cloud_learner.rules import batcher, label_rules
from cloud_learner.store.archive import Archive
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.raw import RawLog
from cloud_learner.train.family import Family
from edge_runtime.bus.base import Bus
from edge_runtime.clock import Clock
from edge_runtime.errors import ConfigError, HeadwaterError
from edge_runtime.wire.messages import Report

IDLE_S = 5.0  # wall time after which a silent device no longer holds event time
WAITING_BATCHES_MAX = 400  # that ingest may be ahead of the trainer; they are in memory

Submit = Callable[[str, Candidate], Awaitable[object]]
OnReleased = Callable[[str, Released], Awaitable[None]]
Serving = Callable[[str], Served]


class Learner:
    """Ingests and learns for as long as `run` runs; `on_released` sees all that came out, and
    `serving` names the release of a family that serves.
    """

    def __init__(
        self,
        home: Home,
        families: Sequence[Family],
        lineage: Lineage,
        bus: Bus,
        clock: Clock,
        *,
        submit: Submit,
        on_released: OnReleased,
        serving: Serving = lambda _family: NOTHING,
    ) -> None:
        self._submit, self._on_released, self._clock = submit, on_released, clock
        self._serving = serving
        self.courses = {
            family.name: Course(family, home.of(family.name), lineage.of(family.name))
            for family in families
        }
        make = partial(open_intake, home, families, clock)
        self.ingest = Ingest(bus, make, clock, on_commit=self._on_commit)
        intake = self.ingest.intake
        assert intake is not None
        for name, course in self.courses.items():
            course.take(intake.batches_after(name, course.number), intake.clock_s(name))
            self.ingest.learned[name] = course.saved
        self._wake, self._learned = asyncio.Event(), asyncio.Event()
        self.progress = asyncio.Event()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="trainer")
        self.progress.set()

    async def run(self) -> None:
        """Ingest and train until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.ingest.run())
                group.create_task(self._train())
        finally:
            self.thread.shutdown()
            for course in self.courses.values():
                course.save()

    def hear(self, report: Report) -> None:
        """Take what a device says of its log and of its sessions."""
        self.ingest.hear(report)
        for course in self.courses.values():
            course.hear(report)

    @property
    def archived(self) -> int:
        """Records that were taken for facts, of all starts."""
        return self.ingest.totals["archived"]

    @property
    def clock_s(self) -> float:
        """The event time that every family has reached."""
        return min(course.clock_s for course in self.courses.values())

    def statistics(self) -> dict[str, int]:
        """Counters of ingest and training, over all families."""
        trained: Counter[str] = Counter()
        for course in self.courses.values():
            trained.update(course.statistics())
        return {**self.ingest.totals, **self.ingest.statistics(), **trained}

    def statistics_of(self, family: str) -> dict[str, int]:
        """The same of one family, where a number is a family's."""
        return {**self.ingest.numbers_of(family), **self.courses[family].statistics()}

    async def _on_commit(self, commit: Commit) -> None:
        for name, released in commit.families.items():
            self.courses[name].take(released.batches, released.clock_s)
        self.progress.set()
        self._wake.set()
        for name, released in commit.families.items():
            await self._on_released(name, released)
        while any(len(each.waiting) > WAITING_BATCHES_MAX for each in self.courses.values()):
            self._learned.clear()
            await self._learned.wait()

    async def _train(self) -> None:
        while True:
            self._wake.clear()
            waiting = [course for course in self.courses.values() if course.waiting]
            for course in waiting:
                await self._turn(course)
            if not waiting:
                await self._wake.wait()

    async def _turn(self, course: Course) -> None:
        """One batch of a family, a candidate if one is due, and then a checkpoint if one is."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.thread, course.learn)
        if course.done(self._clock.monotonic_s()):
            said = self._serving(course.family.name), self._clock.monotonic_s()
            candidate = await loop.run_in_executor(self.thread, course.candidate, *said)
            if candidate is not None:
                try:
                    await self._submit(course.family.name, candidate)
                except HeadwaterError as error:
                    course.note(error)
        await loop.run_in_executor(self.thread, course.keep)
        self.ingest.learned[course.family.name] = course.saved
        self.progress.set()
        self._learned.set()


def strand(home: Home, family: Family) -> Strand:
    """How a family's labels count and how its batches are cut. Raises: ConfigError."""
    learn_from_s = home.of(family.name).origin().learned_through_s
    rules = label_rules(family.config, idle_s=IDLE_S, learn_from_s=learn_from_s)
    return Strand(rules, batcher(family.config, rules))


def open_intake(home: Home, families: Sequence[Family], clock: Clock) -> Intake:
    """Ingest over what lies in `home`, as its last commit left it.

    Raises: ConfigError, CapacityError; then nothing stays open.
    """
    if (home.root / "ingest.sqlite").exists() and not home.ingest_db.exists():
        raise ConfigError(
            "bad_version",
            f"{home.root} holds an ingest database of an earlier release; nothing was changed",
            "bootstrap a new home: the devices send again what they still hold",
        )
    raw_days = max(family.config.archive.raw_days for family in families)
    with contextlib.ExitStack() as stack:
        db = IngestDb(home.ingest_db, [family.name for family in families])
        stack.callback(db.close)
        archive = Archive(home.archive)
        stack.callback(archive.close)
        raw = RawLog(home.raw, keep_s=86400.0 * raw_days)
        stack.callback(raw.close)
        strands = [strand(home, family) for family in families]
        specs = [family.spec for family in families]
        indices = {spec.hash: [column.indices for column in spec.columns] for spec in specs}
        intake = Intake(db, raw, archive, strands, clock=clock, indices=indices)
        stack.pop_all()
        return intake
