"""The intake: one commit, from messages as they came to facts on disk; synchronous, in one thread.

Why: decoding, joining and writing together take longer than an event loop may wait.

Invariants: state moves in memory first, then the messages are appended to the raw log, now and then
released examples are written to Parquet, then one transaction of the ingest database is the commit
point for all of it. If any step raises, memory is ahead of the disk and the intake must be thrown
away; a new one goes on from what was committed, and what no transaction names is removed. A lane
carries the records of all families; each family's joiner sees its own, so what comes out for a
family does not depend on which others there are.

Knows nothing about the broker: a message's subject, headers and bytes, and an opaque token for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from cloud_learner.ingest.accounting import Accounting
from cloud_learner.ingest.arrivals import Arrivals
from cloud_learner.ingest.guard import Batcher, Indices
from cloud_learner.ingest.joiner import Joiner, Portion, Rules
from cloud_learner.ingest.opening import Incoming
from cloud_learner.ingest.outlet import Outlet
from cloud_learner.store.archive import Archive
from cloud_learner.store.examples import Batch, Example
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.raw import Position, RawLog
from cloud_learner.store.rocks import Transaction
from edge_runtime.clock import Clock
from edge_runtime.wire.messages import Mark, Watermark

EXPIRE_S = 600.0


class Strand(NamedTuple):
    """What a family brings to the intake: how its labels count and how its batches are cut."""

    rules: Rules
    guard: Batcher


class Released(msgspec.Struct):
    """What came out for one family.

    `clock_s` is the joint event time up to which all mature examples are released; `batches` are
    new ones, `examples` all that were released, batched or not, and `amended` those that came out
    once more. `answers` are outputs that were served to predictions that came in, a few of the
    newest of each portion, whether or not labels have come. `counters` are this family's part of
    the commit's.
    """

    clock_s: float
    examples: list[Example]
    amended: list[Example]
    batches: list[Batch]
    answers: list[tuple[float, ...]] = []
    counters: dict[str, int] = {}


class Commit(msgspec.Struct):
    """What one commit made true.

    `families` holds what came out for each; `counters` count since the learner's first start, over
    all families, and also hold what waits now; `totals` are sums over the accounts.
    """

    number: int
    records: int
    families: dict[str, Released]
    counters: dict[str, int]
    totals: dict[str, int]
    watermarks: list[Watermark]
    done: list[Any]


class Reached(NamedTuple):
    """The number of each family's last batch, and of what was released last."""

    batches: dict[str, int]
    released: int


class Intake:
    """Turns messages into commits; made once for each start. Raises: ConfigError, CapacityError."""

    def __init__(
        self,
        db: IngestDb,
        raw: RawLog,
        archive: Archive,
        strands: Sequence[Strand],
        *,
        clock: Clock,
        indices: Indices,
    ) -> None:
        self._db, self._raw, self._archive, self._clock = db, raw, archive, clock
        rules = {strand.rules.family: strand.rules for strand in strands}
        self._guards = {strand.rules.family: strand.guard for strand in strands}
        state = db.load()
        self._meta, self._base = state.meta, state.counters
        raw.adopt(Position(*state.meta.raw) if state.meta.raw else None)
        self.orphans = archive.adopt(state.files)
        self.accounting = Accounting(state.accounts)
        ahead_s_max = {family: each.ahead_s_max for family, each in rules.items()}
        tasks = {family: each.task for family, each in rules.items()}
        self._arrivals = Arrivals(self.accounting, state.meta, ahead_s_max, indices, tasks)
        accounts, now_s = self.accounting.accounts, clock.monotonic_s()
        self.joiners = {
            family: Joiner(each, db, accounts, state.meta.families[family].clock_s, now_s)
            for family, each in rules.items()
        }
        self._outlet = Outlet(db, archive, self._guards, state, now_s)
        self._expire_at_s = float("-inf")

    def clock_s(self, family: str) -> float:
        """The joint event time of a family at the last commit."""
        return self._meta.families[family].clock_s

    @property
    def reached(self) -> Reached:
        """What was committed last."""
        batches = {name: each.batch for name, each in self._meta.families.items()}
        return Reached(batches, self._meta.released)

    def commit(
        self,
        messages: Iterable[Incoming],
        reported: Mapping[str, list[Mark]] | None = None,
        *,
        learned: Mapping[str, int] = {},
        flush: bool = False,
    ) -> Commit:
        """Take in messages, durable on return.

        `reported` is where lanes end by the devices' last reports; batches up to those that are
        `learned` are kept for a while only; `flush` writes what was released to files now.
        Raises: CapacityError; then make a new intake.
        """
        change = self._db.begin()
        self._meta.commit += 1
        taken = self._arrivals.take(messages, change)
        now_s, wall_s = self._clock.monotonic_s(), self._clock.now_s()
        for device, marks in (reported or {}).items():
            self.accounting.hear(device, marks)
            for joiner in self.joiners.values():
                joiner.hear(device, marks, now_s)
        families = {
            family: self._released(family, portions, change, wall_s, now_s)
            for family, portions in taken.portions.items()
        }
        if taken.kept:
            self._meta.raw = self._raw.append(taken.kept)
        self._outlet.tidy(self._meta, change, now_s, learned=learned, flush=flush)
        self.accounting.write(change)
        counts = self._counts()
        self._db.commit(change, self._meta, counts)
        self._outlet.settle()
        self._expire_raw(now_s, wall_s)
        for family, released in families.items():
            released.counters = counts[family] | self._waiting_of(family)
        return Commit(
            number=self._meta.commit,
            records=taken.records,
            families=families,
            counters=_sum(*counts.values()) | self.waiting(),
            totals=self.accounting.totals(),
            watermarks=[self.accounting.watermark(device) for device in sorted(taken.devices)],
            done=self._arrivals.done(),
        )

    def _released(
        self,
        family: str,
        portions: list[Portion],
        change: Transaction,
        wall_s: float,
        now_s: float,
    ) -> Released:
        """What comes out for a family, now that these portions came and lanes moved."""
        joiner = self.joiners[family]
        joiner.join(portions, self.accounting.moved, change, now_s)
        examples = joiner.settle(wall_s, now_s)
        others = joiner.for_files_only
        batches = self._outlet.put(family, examples, others, self._meta, change, now_s=now_s)
        self._meta.families[family].clock_s = joiner.clock_s
        answers = list(joiner.answers)
        return Released(joiner.clock_s, examples, joiner.amended, batches, answers)

    @property
    def is_behind(self) -> bool:
        """Whether a commit without messages should follow at once: more is there to be settled."""
        return any(joiner.is_behind for joiner in self.joiners.values())

    def is_due(self) -> bool:
        """Whether a commit without messages would settle something, or write a file."""
        return self.is_behind or self._outlet.is_due(self._clock.monotonic_s())

    def catch_up(self, commit: Commit, since: Reached) -> None:
        """Put into a commit all batches, and the examples for batches, that came after `since`."""
        examples = self._db.examples_after(since.released)
        for family, released in commit.families.items():
            released.batches = list(self.batches_after(family, since.batches[family]))
            released.examples = [each for each in examples if each.family == family]

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """The rows of a query of the view `examples`: of what lies in files."""
        rows: list[tuple[Any, ...]] = self._archive.query(sql, self._db.files()).fetchall()
        return rows

    def batches_after(self, family: str, number: int) -> Iterator[Batch]:
        """The committed batches of a family above `number`, in order."""
        return self._db.batches_after(family, number)

    def close(self) -> None:
        """Write to files what was released, and close everything. Raises: CapacityError."""
        try:
            if self._outlet.holds_any:
                self.commit([], flush=True)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close everything as it is: what was committed is kept."""
        self._outlet.close()
        self._raw.close()
        self._archive.close()
        self._db.close()

    def watermarks(self) -> list[Watermark]:
        """What is held of every known device."""
        return [self.accounting.watermark(device) for device in self.accounting.devices()]

    def counters(self, family: str | None = None) -> dict[str, int]:
        """Counts since the learner's first start, over all families or of one."""
        counts = self._counts()
        return _sum(*counts.values()) if family is None else counts[family]

    def waiting(self) -> dict[str, int]:
        """How much waits now, and what this run wrote to files."""
        return {
            **self._archive.statistics(),
            **_sum(*map(self._waiting_of, self.joiners)),
            **self._outlet.waiting(),
            "beyond_gap": self._arrivals.statistics()["beyond_gap"],
        }

    def _waiting_of(self, family: str) -> dict[str, int]:
        unbatched = self._guards[family].statistics()["unbatched"]
        return {**self.joiners[family].waiting(), "unbatched": unbatched}

    def _counts(self) -> dict[str, dict[str, int]]:
        """The counts of each family, and under "" those of none."""
        common = (self._arrivals.counters, self.accounting.counters, self._outlet.counters)
        found = {"": _sum(self._base.get("", {}), *common)}
        for family, joiner in self.joiners.items():
            guard = self._guards[family]
            found[family] = _sum(self._base.get(family, {}), joiner.counters, guard.counters)
        return found

    def _expire_raw(self, now_s: float, wall_s: float) -> None:
        """Let go of raw messages that were kept long enough."""
        if now_s >= self._expire_at_s:
            self._expire_at_s = now_s + EXPIRE_S
            self._raw.expire(wall_s)


def _sum(*counts: Mapping[str, int]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)
