"""Compaction: the many small files of a day become one, and no reader sees it happen.

Why: a commit a second makes 86,400 files a day, and every reader opens each of them.

How, in steps that a crash may fall between:
1. `prepare` writes the one file, durably, to its place below `unfinished`, where no reader looks;
2. the caller's transaction names it instead of the small ones: the commit point;
3. `settle` links what else the day holds beside it, and exchanges the two folders of the day in one
   system call (renameat2 with RENAME_EXCHANGE);
4. the folder that came back, with the small files, is removed.
Before 2 a crash leaves the day as it was, after 2 the archive's `adopt` goes on from 3. At each
moment the folder of a day holds each example once. A reader that listed it before 3 and opens a
file after 4 gets an error, never a wrong answer.

Invariants: no file is ever changed. Where the file system cannot exchange folders, `is_possible`
says so, and the small files stay.

Knows nothing about columns or transactions.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb

from cloud_learner.store import parquet
from edge_runtime.files import fsync_directory

FILES_MAX = 64
WORTH = 8  # the small files of a day are merged into a large one when they make up an eighth of it
MEMORY_MB = 256

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_REFUSALS = {errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP}


class Compaction(NamedTuple):
    """What a transaction has to change: `new` is named from now on, those in `gone` no more."""

    new: str
    gone: list[str]


def exchange(one: Path, other: Path) -> None:
    """Let two names change places in one step. Raises: OSError; ENOSYS away from Linux."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        raise OSError(errno.ENOSYS, "this system cannot exchange two names", str(one))
    paths = os.fsencode(one), os.fsencode(other)
    if library.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))


class Compactor:
    """Compacts days of `directory`; `at` is called with the name of each step that was done."""

    def __init__(
        self,
        directory: Path,
        unfinished: Path,
        at: Callable[[str], None],
        swap: Callable[[Path, Path], None] = exchange,
    ) -> None:
        self._directory, self._unfinished = directory, unfinished
        self._at, self._swap = at, swap

    def choose(self, names: Collection[str]) -> list[str]:
        """The named files of the oldest day that is worth it, in the order of their numbers.

        A family's newest day is still being written. Others may still get late examples, a few at
        a time: a day is merged again only when they have become many, so that each example is
        rewritten a handful of times at most.
        """
        days: dict[str, list[str]] = defaultdict(list)
        for name in names:
            days[os.path.dirname(name)].append(name)
        newest = {os.path.dirname(day): day for day in sorted(days)}
        for day, files in sorted(days.items()):
            if day != newest[os.path.dirname(day)] and self._is_worth_it(files):
                return sorted(files)
        return []

    def _is_worth_it(self, files: list[str]) -> bool:
        if len(files) < 2:
            return False
        sizes = [(self._directory / name).stat().st_size for name in files]
        return len(files) > FILES_MAX or (sum(sizes) - max(sizes)) * WORTH >= max(sizes)

    def prepare(self, new: str, files: Sequence[str]) -> int:
        """Step 1: write `new` below `unfinished`, durable on return; returns the number of rows.

        Raises: OSError, duckdb.Error.
        """
        path, spill = self._unfinished / new, self._unfinished / "spill"
        shutil.rmtree(path.parent, ignore_errors=True)
        make_durable(path.parent)
        self._at("folder made")
        try:
            paths = [self._directory / name for name in files]
            rows = parquet.merge(paths, path, spill, MEMORY_MB)
            self._at("merged")
            fsync(path)
        except (OSError, duckdb.Error):
            shutil.rmtree(path.parent, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(spill, ignore_errors=True)
        fsync_directory(path.parent)
        self._at("prepared")
        return rows

    def settle(self, new: str, others: Sequence[str]) -> None:
        """Steps 3 and 4; `others` are the files that the day holds besides. May be called again.

        Raises: OSError.
        """
        day = os.path.dirname(new)
        shown, hidden = self._directory / day, self._unfinished / day
        if not (self._directory / new).exists():
            for path in hidden.iterdir():
                if path.name != os.path.basename(new):
                    path.unlink()
            for name in others:
                os.link(self._directory / name, self._unfinished / name)
            fsync_directory(hidden)
            self._at("linked")
            self._swap(shown, hidden)
            self._at("exchanged")
        fsync_directory(shown.parent)
        if hidden.exists():
            fsync_directory(hidden.parent)
            self._at("settled")
            shutil.rmtree(hidden)
        self._at("removed")

    def is_possible(self) -> bool:
        """Whether folders of these two can be exchanged. Raises: OSError, when nobody knows."""
        shown, hidden = self._directory / ".exchange", self._unfinished / ".exchange"
        try:
            for folder in (shown, hidden):
                folder.mkdir(exist_ok=True)
            self._swap(shown, hidden)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            return False
        finally:
            for folder in (shown, hidden):
                shutil.rmtree(folder, ignore_errors=True)
        return True


def make_durable(folder: Path) -> None:
    """Make a folder of a day, its family's and theirs; their names are durable on return."""
    folder.mkdir(parents=True, exist_ok=True)
    for parent in list(folder.parents)[:3]:
        fsync_directory(parent)


def fsync(path: Path) -> None:
    """Make the bytes of a file durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
