"""The outlet: where released examples go: into micro-batches, and into files.

Why: a trainer wants batches at once, an archive wants large files; both must hold each example
once, whatever is killed in between.

Invariants: released examples are numbered from 1 and kept in the ingest database until they lie in
a file and no batch needs them. A file is written before the transaction that names it. What is
amended goes into files only, for today's training has learned its first form; so does what the
bootstrap has learned. Families share the numbers and the files; each has batches of its own.

Knows nothing about how examples come about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from cloud_learner.ingest.guard import Batcher
from cloud_learner.store.archive import Archive
from cloud_learner.store.compaction import Compaction
from cloud_learner.store.examples import Batch, Example, Form
from cloud_learner.store.ingest_db import (
    IngestDb,
    put_batch,
    put_example,
    put_files,
    trim_batches,
)
from cloud_learner.store.ingest_state import IngestState, Meta, number_key
from cloud_learner.store.rocks import Transaction
from edge_runtime.errors import CapacityError

FILE_EXAMPLES = 20_000
FILE_S = 60.0
KEPT_BATCHES = 1000


class Outlet:
    """Batches, cut by the guard of each family, and files of what is released; goes on from
    `state`.
    """

    def __init__(
        self,
        db: IngestDb,
        archive: Archive,
        guards: Mapping[str, Batcher],
        state: IngestState,
        now_s: float,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._db, self._archive, self._guards = db, archive, guards
        for family, guard in guards.items():
            unbatched = [example for _, example in state.unbatched if example.family == family]
            guard.restore(state.meta.families[family].batch, unbatched)
        self._numbers: dict[Form, int] = {example.form: at for at, example in state.unbatched}
        self._unwritten = list(state.unarchived)
        self._for_files_only = list(state.for_files_only)
        self._since_s = now_s
        self._files = set(state.files)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compact")
        self._compacting: Future[Compaction | None] | None = None
        self._compaction: Compaction | None = None

    @property
    def holds_any(self) -> bool:
        """Whether something was released that lies in no file yet."""
        return bool(self._unwritten)

    def put(
        self,
        family: str,
        examples: Sequence[Example],
        others: Sequence[Example],
        meta: Meta,
        change: Transaction,
        *,
        now_s: float,
    ) -> list[Batch]:
        """Number what a family released, cut batches, and keep all of it with the commit.

        `others` are for files only.
        """
        guard = self._guards[family]
        if not self._unwritten:
            self._since_s = now_s
        dropped = {example.form for example in guard.add(examples)}
        for example in examples:
            for_batches = example.form not in dropped
            number = self._keep(example, meta, change, for_batches=for_batches)
            if for_batches:
                self._numbers[example.form] = number
        for example in others:
            self._keep(example, meta, change, for_batches=False)
        batches = []
        while (batch := guard.next()) is not None:
            batches.append(batch)
            numbers = [self._numbers.pop(example.form) for example in batch.examples]
            put_batch(change, family, batch.number, numbers)
        meta.families[family].batch = guard.number
        return batches

    def tidy(
        self,
        meta: Meta,
        change: Transaction,
        now_s: float,
        *,
        learned: Mapping[str, int],
        flush: bool,
    ) -> None:
        """Write files when it is time, and forget old batches. Raises: CapacityError."""
        if self._unwritten and (flush or self.is_due(now_s)):
            self._write(meta, change)
        for family, number in learned.items():
            if number - KEPT_BATCHES > meta.families[family].trimmed:
                trim_batches(self._db, change, meta, family, number - KEPT_BATCHES)

    def is_due(self, now_s: float) -> bool:
        """Whether what waits is enough for a file, or has waited long enough."""
        waited = bool(self._unwritten) and now_s - self._since_s >= FILE_S
        return waited or len(self._unwritten) >= FILE_EXAMPLES

    def settle(self) -> None:
        """The transaction is committed: what it no longer names may go."""
        if self._compaction is not None:
            self._archive.settle(self._compaction)
            self._compaction = None

    def close(self) -> None:
        """Wait for a compaction that runs; what no transaction names goes at the next start."""
        self._thread.shutdown()

    def waiting(self) -> dict[str, int]:
        """How many examples wait for a file."""
        return {"unwritten": len(self._unwritten)}

    def _keep(self, example: Example, meta: Meta, change: Transaction, *, for_batches: bool) -> int:
        meta.released += 1
        put_example(change, meta.released, example, for_batches=for_batches)
        self._unwritten.append((meta.released, example))
        if not for_batches:
            self._for_files_only.append(meta.released)
        return meta.released

    def _write(self, meta: Meta, change: Transaction) -> None:
        """Files of what waits; then what no batch needs is kept no longer."""
        meta.file += 1
        names = self._archive.write([example for _, example in self._unwritten], meta.file)
        self._name(change, names, ())
        meta.archived = self._unwritten[-1][0]
        for number in self._for_files_only:
            change.delete("examples", number_key(number))
        self._unwritten, self._for_files_only = [], []
        self._compact(meta, change)

    def _compact(self, meta: Meta, change: Transaction) -> None:
        """Name the day that was compacted since the last file, and begin with the next."""
        if self._compacting is not None:
            if not self._compacting.done():
                return
            try:
                self._compaction = self._compacting.result()
            except CapacityError:  # the small files are as good, and ingest needs the room more
                self.counters["archive_compactions_failed"] += 1
            self._compacting = None
        if self._compaction is not None:
            self._name(change, [self._compaction.new], self._compaction.gone)
        meta.file += 1
        files = sorted(self._files)
        self._compacting = self._thread.submit(self._archive.compact, files, meta.file)

    def _name(self, change: Transaction, new: Collection[str], gone: Collection[str]) -> None:
        put_files(change, new, gone)
        self._files = (self._files | set(new)) - set(gone)
