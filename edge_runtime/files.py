"""Durable file operations: the seam to the disk, and how a file survives a power cut.

Why: a rename without `fsync` of file and directory is not a commit point; and what a crash may
leave behind can only be tried where each operation is a call that a test can record.

Invariants: after `write_atomic` returns, the path holds the new bytes whole, on disk; if it raises,
the path holds what it held before. What is not synced may be lost, in part and in any order.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from pathlib import Path
from typing import BinaryIO, Protocol


class Files(Protocol):
    """What the event log asks of a disk; `fd` is an open file. Everything may raise OSError.

    `written` is how many bytes were written since the start.
    """

    written: int

    def own(self, directory: Path) -> int: ...  # made if missing; BlockingIOError: another's

    def names(self, directory: Path) -> list[str]: ...

    def size(self, path: Path) -> int: ...

    def reader(self, path: Path) -> BinaryIO: ...

    def create(self, path: Path, mode: int = 0o600) -> int: ...  # FileExistsError where one is

    def open(self, path: Path) -> int: ...  # what is there, to write to

    def allocate(self, fd: int, size: int) -> None: ...  # zeros up to `size`, so that they fit

    def write(self, fd: int, data: bytes, offset: int) -> None: ...  # the whole of `data`

    def truncate(self, fd: int, size: int) -> None: ...

    def sync(self, fd: int) -> None: ...

    def close(self, fd: int) -> None: ...

    def replace(self, source: Path, target: Path) -> None: ...

    def unlink(self, path: Path) -> None: ...  # what is missing is no error

    def sync_directory(self, path: Path) -> None: ...


class OsFiles:
    """The machine's own disk."""

    def __init__(self) -> None:
        self.written = 0
        self._counting = threading.Lock()  # several threads write

    def own(self, directory: Path) -> int:
        make_directory(directory, mode=0o700)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return fd

    def names(self, directory: Path) -> list[str]:
        return sorted(os.listdir(directory))

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def reader(self, path: Path) -> BinaryIO:
        return path.open("rb")

    def create(self, path: Path, mode: int = 0o600) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)

    def open(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY)

    def allocate(self, fd: int, size: int) -> None:
        os.posix_fallocate(fd, 0, size)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(fd, view, offset)
            with self._counting:
                self.written += count
            view, offset = view[count:], offset + count

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def sync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


_DISK = OsFiles()
fsync_directory = _DISK.sync_directory
"""Make the names in a directory durable."""


def make_directory(path: Path, files: Files | None = None, *, mode: int = 0o777) -> None:
    """Make `path` and its parents if missing, durably where the disk takes a sync: what is synced
    in a directory is lost with it where the directory's own name was not. Raises: OSError.
    """
    missing = [each for each in path.parents if not each.exists()]
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    for each in dict.fromkeys((path, path.parent, *missing)):  # made, perhaps, before a kill
        with contextlib.suppress(OSError):
            (files or _DISK).sync_directory(each.parent)


def write_atomic(path: Path, data: bytes, mode: int = 0o644, files: Files | None = None) -> None:
    """Replace `path` by `data` in one commit point. Raises: OSError, with `path` unchanged."""
    if files is None and not path.parent.exists():
        make_directory(path.parent)
    files = files or _DISK
    replace_whole(path, data, mode, files)
    files.sync_directory(path.parent)


def remove_strays(directory: Path) -> None:
    """Remove what `write_atomic` left half written below `directory` when it was killed.

    For the one owner of the directory, before it writes. What cannot be removed stays.
    """
    for stray in directory.rglob(".*.tmp"):
        with contextlib.suppress(OSError):
            stray.unlink()


def replace_whole(path: Path, data: bytes, mode: int, files: Files) -> None:
    """Replace `path` by `data`; a crash leaves the one or the other until the directory is synced.

    Raises: OSError, with `path` unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        files.unlink(temporary)
        _write_durably(temporary, data, mode, files)
        files.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            files.unlink(temporary)
        raise


def _write_durably(path: Path, data: bytes, mode: int, files: Files) -> None:
    fd = files.create(path, mode)
    try:
        files.write(fd, data, 0)
        files.sync(fd)
    finally:
        files.close(fd)
