"""The archive: every released example in Parquet, for queries and for training elsewhere.

Why: what was learned must stay open to any tool, not only to ours, and for longer than a batch.

How: `<directory>/family=<family>/day=<YYYY-MM-DD>/<number>.parquet`, by the UTC day of the event
time, the layout that Hive gave its name. What is unfinished stands beside it on the same file
system, in `.<directory>.unfinished`, so whoever reads `**/*.parquet` finds only whole files.

Invariants: a file holds examples of exactly one commit, or is a day that was compacted, and is
never changed. Commit point: the caller's transaction that names the files which `write` returned,
or takes `Compaction.new` for `Compaction.gone`; what no transaction names is removed by `adopt`.
So a reader may see the examples of a commit a moment early, never a part of a file.

`write`, `adopt` and `settle` belong to one thread at a time; `compact` may run in another, `query`
in any. Knows nothing about envelopes, joins or batches.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import quote

import duckdb
import numpy as np

from cloud_learner.store import parquet
from cloud_learner.store.compaction import Compaction, Compactor, exchange, fsync, make_durable
from cloud_learner.store.examples import Example
from edge_runtime.errors import CapacityError, ConfigError
from edge_runtime.files import fsync_directory

_OURS = re.compile(r"family=[^/]+/day=\d{4}-\d\d-\d\d/\d{12}(-day)?\.parquet")
DAYS_AT_ONCE_MAX = 400
_EPOCH = date(1970, 1, 1).toordinal()


def _no_step(_name: str) -> None:
    """Nothing happens between two steps."""


class Archive:
    """Parquet files in `directory`; `at` is called with the name of each step that was done.

    Raises: ConfigError `archive_apart` when the folder beside it is on another file system.
    """

    def __init__(
        self,
        directory: Path,
        at: Callable[[str], None] = _no_step,
        swap: Callable[[Path, Path], None] = exchange,
    ) -> None:
        self._directory, self._at = directory.resolve(), at
        directory = self._directory
        self._unfinished = directory.with_name(f".{directory.name}.unfinished")
        for folder in (directory, self._unfinished):
            folder.mkdir(parents=True, exist_ok=True)
        if directory.stat().st_dev != self._unfinished.stat().st_dev:
            raise ConfigError(
                "archive_apart",
                f"{directory} and {self._unfinished} are on two file systems; nothing was written",
                "mount the folder that holds both of them",
            )
        self._compactor = Compactor(directory, self._unfinished, at, swap)
        self._lock = threading.Lock()  # a file enters a day, or a day is exchanged
        self._writer = parquet.connect()
        self._known: set[Path] = set()  # folders whose names are durable
        self._compacts: bool | None = None
        self._counts: Counter[str] = Counter()

    def write(self, examples: Sequence[Example], number: int) -> list[str]:
        """Write the examples of commit `number`, durable on return; returns the files' names.

        Raises: CapacityError `disk_full`, with nothing of the commit left.
        """
        names: list[str] = []
        try:
            for folder, part in _by_day(examples).items():
                names.append(f"{folder}/{number:012d}.parquet")
                self._write(names[-1], part)
        except (OSError, duckdb.Error) as error:
            for name in names:
                with contextlib.suppress(OSError):
                    (self._directory / name).unlink(missing_ok=True)
            raise CapacityError(
                "disk_full",
                f"{self._directory}: commit {number}, {len(examples)} examples were not archived: "
                f"{error}",
            ) from error
        self._counts["archive_files_written"] += len(names)
        self._counts["archive_examples_written"] += len(examples)
        return names

    def _write(self, name: str, examples: Sequence[Example]) -> None:
        temporary, path = self._unfinished / f"{Path(name).name}.tmp", self._directory / name
        try:
            parquet.copy(self._writer, examples, temporary)
            self._at("written")
            fsync(temporary)
            self._at("synced")
            with self._lock:
                if path.parent not in self._known:
                    make_durable(path.parent)
                    self._known.add(path.parent)
                self._at("place made")
                os.replace(temporary, path)
                self._at("renamed")
                fsync_directory(path.parent)
        except (OSError, duckdb.Error):
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def adopt(self, names: Collection[str]) -> list[str]:
        """Finish a compaction whose transaction was committed, and forget one whose was not; then
        remove the files that no transaction names, and return which those were.

        Raises: ConfigError `archive_incomplete` when a named file is absent; then nothing was
        changed. CapacityError `disk_full` when a compaction cannot be finished.
        """
        named = set(names)
        absent = named - set(self._files(self._directory))
        if lost := sorted(absent - set(self._files(self._unfinished))):
            raise ConfigError(
                "archive_incomplete",
                f"{self._directory} lacks {len(lost)} files, the first of them {lost[0]}",
                "archive and ingest database belong together: restore both from one copy",
            )
        for name in sorted(absent):
            self._settle(name, named.__contains__)
        orphans = sorted(set(self._files(self._directory)) - named)
        for name in orphans:
            (self._directory / name).unlink()
        for folder in {(self._directory / name).parent for name in orphans}:
            fsync_directory(folder)
        self._forget_unfinished()
        return orphans

    def _forget_unfinished(self) -> None:
        """Also what an exchange gave back: first the exchange has to be durable."""
        for path in self._unfinished.iterdir():
            if (shown := self._directory / path.name).exists():
                fsync_directory(shown)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        fsync_directory(self._unfinished)

    def compact(self, names: Collection[str], number: int) -> Compaction | None:
        """Make one file of the files of a day that is over; None when no day is worth it.

        What comes back is durable and not yet visible. The caller names `new` and no longer `gone`
        in one transaction, the commit point, and then calls `settle`; until then nobody reads the
        day in another way. `number` is larger than that of every commit that `names` come from.

        Raises: CapacityError `disk_full`, with nothing changed.
        """
        try:
            gone = self._compactor.choose(names) if self._can_compact() else []
            if not gone:
                return None
            new = f"{os.path.dirname(gone[0])}/{number:012d}-day.parquet"
            rows = self._compactor.prepare(new, gone)
        except (OSError, duckdb.Error) as error:
            raise CapacityError(
                "disk_full", f"{self._directory}: a day was not compacted: {error}"
            ) from error
        self._counts["archive_days_compacted"] += 1
        self._counts["archive_files_compacted"] += len(gone)
        self._counts["archive_examples_compacted"] += rows
        return Compaction(new, gone)

    def settle(self, done: Compaction) -> None:
        """After the transaction: show the day as one file, all at once. May be called again.

        Raises: CapacityError `disk_full`; the day is shown as it was, and `adopt` finishes it.
        """
        self._settle(done.new, lambda name: name not in done.gone)

    def _settle(self, new: str, is_kept: Callable[[str], bool]) -> None:
        """Exchange a day for the one that holds `new`, and those of its other files to be kept."""
        folder = os.path.dirname(new)
        with self._lock:
            present = [n for n in self._files(self._directory) if os.path.dirname(n) == folder]
            kept = list(filter(is_kept, present))
            try:
                self._compactor.settle(new, kept)
            except OSError as error:
                raise CapacityError(
                    "disk_full", f"{self._directory}/{folder} was not settled: {error}"
                ) from error

    def _can_compact(self) -> bool:
        """Whether this file system can exchange two folders; looked at once."""
        if self._compacts is None:
            self._compacts = self._compactor.is_possible()
            self._counts["archive_compaction_refused"] = int(not self._compacts)
        return self._compacts

    def query(self, sql: str, names: Collection[str] | None = None) -> Any:
        """A duckdb relation of `sql`, which reads the view `examples`: the rows of the named files,
        or of all that a glob finds now.

        Raises: duckdb.Error for a wrong query, and where a day is compacted under its eyes: a file
        is gone then, and asking again helps.
        """
        names = self._files(self._directory) if names is None else names
        source = f"({parquet.EMPTY})"
        if names:
            source = parquet.read([self._path(name) for name in sorted(names, key=_by_number)])
        connection = parquet.connect()
        connection.execute(f"CREATE VIEW examples AS SELECT * FROM {source}")
        return connection.sql(sql)

    def _path(self, name: str) -> Path:
        """Where a named file lies: that of a compaction is not visible before it is settled."""
        path = self._directory / name
        return path if path.exists() else self._unfinished / name

    def statistics(self) -> dict[str, int]:
        """Counts since the start."""
        return dict(self._counts)

    def close(self) -> None:
        """Give the writer's memory back."""
        self._writer.close()

    def _files(self, root: Path) -> list[str]:
        """Our files below `root`, by name."""
        names = (path.relative_to(root).as_posix() for path in root.glob("*/*/*.parquet"))
        return sorted(name for name in names if _OURS.fullmatch(name))


def _by_day(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """The examples by the folder that they belong to, each in its order.

    Whoever sends events of as many days as events must not have as many files made: beyond
    DAYS_AT_ONCE_MAX days, the later ones go with the last of those.
    """
    parts: dict[tuple[int, str], list[Example]] = defaultdict(list)
    days = parquet.days_of(examples)
    first = np.unique(days)[:DAYS_AT_ONCE_MAX]
    days = np.minimum(days, first[-1]) if len(first) else days
    for day, example in zip(days.tolist(), examples, strict=True):
        parts[day, example.family].append(example)
    return {_folder(*key): part for key, part in parts.items()}


def _folder(day: int, family: str) -> str:
    name = quote(family, safe="")
    return f"family={name}/day={date.fromordinal(day + _EPOCH).isoformat()}"


def _by_number(name: str) -> str:
    return Path(name).name
