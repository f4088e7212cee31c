"""Raw envelopes: each message that brought something new, as it came, kept for a configured time.

Why: what was made of a message may be wrong, and is put right only from what came; what a lost
database held can be taken in again from here.

Invariants: messages are only appended, each in a frame of its own, in MessagePack. A file is never
appended to after a start or a failed write: the next append begins a new one. The head of a file
says when the newest message of the file before it arrived.

Commit point: the caller's transaction that names the `Position` which `append` returned; what none
names is cut by `adopt`. One thread at a time, but `replay` may run in another.

Knows nothing about what a message says.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from cloud_learner.store import raw_frames
from edge_runtime.errors import CapacityError
from edge_runtime.files import fsync_directory


class RawMessage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A message as it came; `encoding` is its Content-Encoding header, or empty."""

    subject: str
    encoding: str
    data: bytes
    arrived_s: float


class Position(NamedTuple):
    """The end of an append: the number of a file and an offset in it."""

    file: int
    offset: int


_NAME = re.compile(r"(\d{12})\.raw")
_NEVER_S = float("-inf")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(RawMessage).decode


class RawLog:
    """Files of about `file_bytes` in `directory`, each kept `keep_s` after its newest message."""

    def __init__(
        self, directory: Path, keep_s: float = 7 * 86400.0, file_bytes: int = 64 << 20
    ) -> None:
        self._directory, self._keep_s, self._file_bytes = directory, keep_s, file_bytes
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()  # the end of what is whole, which `replay` reads
        self._fd: int | None = None
        self._mark = b""
        self._newest_s: dict[int, float] = {}
        self._number = max(self._numbers(), default=0)
        self._end = self._size(self._number)
        self._torn: tuple[Path, int | None] | None = None  # to be cut to a size, or removed
        self._counts: Counter[str] = Counter()

    def append(self, messages: Sequence[RawMessage]) -> Position:
        """Append the messages, durable on return; returns where they end.

        Raises: CapacityError `disk_full`, with nothing of them ever read.
        """
        try:
            self._cut_torn()
            if self._fd is not None and self._end >= self._file_bytes:
                self._seal()
            if self._fd is None:
                self._begin(messages)
            else:
                self._extend(self._fd, messages)
        except OSError as error:
            # What the disk has of this file is unknown, and a later sync that succeeds would not
            # tell: nothing more is written to it.
            self._seal()
            with contextlib.suppress(OSError):
                self._cut_torn()
            raise CapacityError(
                "disk_full",
                f"{self._directory}: {len(messages)} raw messages were not written: {error}",
                "give the learner space; what the broker and the devices hold will come again",
            ) from error
        newest_s = max((message.arrived_s for message in messages), default=_NEVER_S)
        self._newest_s[self._number] = max(newest_s, self._newest_s[self._number])
        self._counts["raw_messages"] += len(messages)
        return Position(self._number, self._end)

    def _begin(self, messages: Sequence[RawMessage]) -> None:
        """Begin a file with these messages; without any it would say nothing."""
        number, self._mark = self._number + 1, secrets.token_bytes(raw_frames.MARK_SIZE)
        data = raw_frames.head(self._mark, self._newest_in(self._number)) + self._framed(messages)
        path = self._path(number)
        self._torn = path, None
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o644)
        _write(self._fd, data)
        fsync_directory(self._directory)
        self._torn = None
        self._newest_s[number] = _NEVER_S
        with self._lock:
            self._number, self._end = number, len(data)

    def _extend(self, fd: int, messages: Sequence[RawMessage]) -> None:
        data = self._framed(messages)
        self._torn = self._path(self._number), self._end
        _write(fd, data)
        self._torn = None
        with self._lock:
            self._end += len(data)

    def _framed(self, messages: Sequence[RawMessage]) -> bytes:
        return b"".join(raw_frames.frame(self._mark, _encode(each)) for each in messages)

    def _cut_torn(self) -> None:
        """Cut what a failed append left. Raises: OSError; then it stays to be cut."""
        if self._torn is None:
            return
        path, size = self._torn
        if size is not None:
            _truncate(path, size)
        else:
            path.unlink(missing_ok=True)
            fsync_directory(self._directory)
        self._torn = None

    def _seal(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def adopt(self, position: Position | None) -> None:
        """After a start: cut what no transaction names.

        Where none names anything the files of a lost database may be all that is left of its
        messages: they are set aside in a folder of their own, `aside-1` and so on, over which
        another RawLog replays them. What is named and absent is counted: no other state rests on
        it.
        """
        file, offset = position or Position(0, 0)
        aside = self._directory / f"aside-{1 + len(list(self._directory.glob('aside-*')))}"
        for number in sorted(number for number in self._numbers() if number > file):
            path = self._path(number)
            if position is None:
                aside.mkdir(exist_ok=True)
                path.rename(aside / path.name)
                self._counts["raw_files_aside"] += 1
            else:
                path.unlink()
        size = self._size(file)
        if size > offset:
            _truncate(self._path(file), offset)
        self._counts["raw_bytes_missing"] += max(0, offset - size)
        fsync_directory(self._directory)
        self._seal()
        self._torn = None
        self._number, self._end = file, min(size, offset)
        self._newest_s = {n: s for n, s in self._newest_s.items() if n < file}

    def replay(self, since_s: float = _NEVER_S) -> Iterator[RawMessage]:
        """What arrived since then, in order. A damaged stretch is skipped and counted."""
        with self._lock:
            last, end = self._number, self._end
        for number in sorted(number for number in self._numbers() if number <= last):
            if since_s == _NEVER_S or self._newest_in(number) >= since_s:
                for message in self._read(number, end if number == last else None):
                    if message.arrived_s >= since_s:
                        yield message

    def expire(self, now_s: float) -> int:
        """Remove the files whose newest message is older than `keep_s`, but never the current;
        returns how many. What was set aside goes by the time at which it was last written.
        """
        old_s = now_s - self._keep_s
        old = [
            self._path(number)
            for number in sorted(self._numbers())
            if number < self._number and self._newest_in(number) < old_s
        ]
        old += [
            path
            for path in sorted(self._directory.glob("aside-*/*.raw"))
            if path.stat().st_mtime < old_s
        ]
        for path in old:
            path.unlink(missing_ok=True)
        self._counts["raw_files_expired"] += len(old)
        return len(old)

    def statistics(self) -> dict[str, int]:
        """Counts since the start, and what lies on the disk now."""
        numbers = self._numbers()
        sizes = sum(self._size(number) for number in numbers)
        return {**self._counts, "raw_files": len(numbers), "raw_bytes": sizes}

    def close(self) -> None:
        """Let go of the current file."""
        self._seal()

    def _numbers(self) -> list[int]:
        names = (_NAME.fullmatch(name) for name in os.listdir(self._directory))
        return [int(name[1]) for name in names if name]

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:012d}.raw"

    def _size(self, number: int) -> int:
        try:
            return self._path(number).stat().st_size
        except FileNotFoundError:
            return 0

    def _newest_in(self, number: int) -> float:
        """When the newest message of a file arrived: as the head of the next says, or by reading
        it, if that is gone or damaged.
        """
        if number not in self._newest_s:
            head = raw_frames.read_head(self._bytes(number + 1, raw_frames.HEAD_SIZE))
            self._newest_s[number] = (
                max((each.arrived_s for each in self._read(number, None)), default=_NEVER_S)
                if head is None
                else head[1]
            )
        return self._newest_s[number]

    def _read(self, number: int, end: int | None) -> Iterator[RawMessage]:
        """The whole messages of a file, up to an offset."""
        for found in raw_frames.scan(self._bytes(number, end)):
            if isinstance(found, int):
                self._counts["raw_damaged_stretches"] += 1
                self._counts["raw_damaged_bytes"] += found
            else:
                yield _decode(found)

    def _bytes(self, number: int, end: int | None) -> bytes:
        try:
            with self._path(number).open("rb") as file:
                return file.read(end)
        except FileNotFoundError:
            return b""


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
    os.fdatasync(fd)


def _truncate(path: Path, size: int) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.ftruncate(fd, size)
        os.fsync(fd)
    finally:
        os.close(fd)
