"""One class of records of an open log: what waits in memory, what lies on disk, who waits for it.

Why: the classes of a log are served by one thread and share nothing else.

Commit point: the `fdatasync` in `commit`.

Invariants: the producer alone writes `last_seq` and `appended` and appends to `pending`; the commit
thread alone takes from the front of `pending` and alone touches the file; what both sides and the
readers see (`segments`, `durable_seq`, `allowed`, `waiters`) changes under `lock`. After an error
the file is never written or synced again (its pages may be marked clean though they never reached
the disk): what was not durable goes, from memory, into a new file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from edge_runtime.errors import CapacityError
from edge_runtime.events import segment
from edge_runtime.events.segment import Segment
from edge_runtime.files import fsync_directory
from edge_runtime.wire.messages import EventClass

PENDING_BYTES_MAX = 32 << 20
LENGTH_BYTES = 4
RECENT_BYTES_MAX = 256 << 10

log = logging.getLogger("edge_runtime")

_Waiter = tuple[int, asyncio.AbstractEventLoop, asyncio.Future[None]]


class Stream:
    """The state of one class. `charge` of a record is its length and LENGTH_BYTES."""

    def __init__(
        self,
        directory: Path,
        *,
        device: str,
        event_class: EventClass,
        epoch: int,
        segments: list[Segment],
        segment_bytes: int,
        bytes_max: int,
        sync: Callable[[int], None],
    ) -> None:
        self._directory, self._segment_bytes, self._sync = directory, segment_bytes, sync
        self._device, self._event_class, self._epoch = device, event_class, epoch
        self.bytes_max = bytes_max
        self.lock = threading.Lock()
        self.segments = segments
        self.pending: list[bytes] = []
        self.last_seq = self.durable_seq = 0
        self.appended = self.committed = sum(part.charge for part in segments)
        self.freed = 0
        self.sync_errors = self.commits = 0
        self._is_refused = False
        self._active: Segment | None = None
        self._fd = -1
        self._waiters: list[_Waiter] = []
        self._recent: deque[tuple[int, list[bytes]]] = deque()
        self._recent_bytes = 0
        self.allowed = 0
        self._set_allowed()

    def _set_allowed(self) -> None:
        # One number for both bounds, disk and memory: one comparison on the hot path.
        self.allowed = min(self.bytes_max + self.freed, self.committed + PENDING_BYTES_MAX)

    @property
    def room(self) -> int:
        """How many bytes more are accepted now."""
        return self.allowed - self.appended

    def commit(self) -> bool:
        """Make durable what is pending now; False when the disk refused and all of it is kept."""
        batch = self.pending[: len(self.pending)]
        if not batch:
            return True
        try:
            active = self._opened()
            frames = segment.encode_frames(self.durable_seq + 1, batch)
            segment.write_all(self._fd, frames)
            self._sync(self._fd)
        except OSError as error:
            self.sync_errors += 1
            self._tell(error)
            self.abandon()
            return False
        self._tell(None)
        self.commits += 1
        del self.pending[: len(batch)]
        self._advance(active, batch, len(frames))
        return True

    def _tell(self, error: OSError | None) -> None:
        """Say once when the disk begins to refuse, and once when it takes records again."""
        if (error is not None) == self._is_refused:
            return
        self._is_refused = error is not None
        if error is not None:
            log.warning("%s: the disk refuses records, which wait: %s", self._directory, error)
        else:
            log.info("%s: the disk takes records again", self._directory)

    def _opened(self) -> Segment:
        if self._active is not None and self._active.size < self._segment_bytes:
            return self._active
        self.abandon()
        active = segment.new(
            self._directory, self._device, self._event_class, self._epoch, self.durable_seq + 1
        )
        active.path.unlink(missing_ok=True)  # left by a failed commit; nothing in it is durable
        self._fd = os.open(active.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        segment.write_all(self._fd, segment.encode_header(active))
        fsync_directory(self._directory)
        self._active = active
        return active

    def abandon(self) -> None:
        """Let go of the file; the next commit starts a new one."""
        fd, self._fd, self._active = self._fd, -1, None
        if fd >= 0:
            with contextlib.suppress(OSError):  # what it held is durable, or is written again
                os.close(fd)

    def _advance(self, active: Segment, batch: list[bytes], size: int) -> None:
        charge = sum(map(len, batch)) + LENGTH_BYTES * len(batch)
        with self.lock:
            if active.last_seq < active.base_seq:
                self.segments = [*self.segments, active]
            self._remember(batch, charge)
            self.durable_seq += len(batch)
            active.grew(self.durable_seq, active.size + size, charge)
            self.committed += charge
            self._set_allowed()
            ready = [waiter for waiter in self._waiters if waiter[0] <= self.durable_seq]
            self._waiters = [waiter for waiter in self._waiters if waiter[0] > self.durable_seq]
        _resolve(ready, None)

    def _remember(self, batch: list[bytes], charge: int) -> None:
        self._recent.append((self.durable_seq + 1, batch))
        self._recent_bytes += charge
        while self._recent_bytes > RECENT_BYTES_MAX:
            _, gone = self._recent.popleft()
            self._recent_bytes -= sum(map(len, gone)) + LENGTH_BYTES * len(gone)

    def recent_after(self, after_seq: int) -> Iterator[tuple[int, bytes]] | None:
        """Durable (seq, record) of this epoch above `after_seq`; None when not all are in memory.

        What is in memory are the last commits, RECENT_BYTES_MAX at most.
        """
        with self.lock:
            held = list(self._recent)
        if not held or held[0][0] > after_seq + 1:
            return None
        return (
            (seq, data)
            for base_seq, batch in held
            if base_seq + len(batch) > after_seq + 1
            for seq, data in enumerate(batch, base_seq)
            if seq > after_seq
        )

    async def wait_durable(self, seq: int) -> None:
        """Return once record `seq` is durable. Raises: what `shut` was given."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self.lock:
            if self.durable_seq >= seq:
                return
            self._waiters.append((seq, loop, future))
        await future

    def views(self, epoch: int, after_seq: int) -> list[tuple[Segment, Segment]]:
        """Each segment of `epoch` with records above `after_seq`, and its copy for a reader."""
        with self.lock:
            return [
                (part, part.frozen())
                for part in self.segments
                if part.epoch == epoch and part.last_seq > after_seq
            ]

    def release(self, epoch: int, seq: int) -> list[Path]:
        """Give up the segments of `epoch` that hold nothing above `seq`; returns their files.

        The newest segment of the running epoch stays: the next open reads there where it ended.
        """
        with self.lock:
            newest = self.segments[-1] if self.segments else None
            gone = [
                part
                for part in self.segments
                if part.epoch == epoch
                and part.last_seq <= seq
                and not (part is newest and epoch == self._epoch)
            ]
            self.segments = [part for part in self.segments if part not in gone]
            self.freed += sum(part.charge for part in gone)
            self._set_allowed()
        return [part.path for part in gone]

    def shut(self, error: CapacityError) -> None:
        """Refuse all further records, and tell `error` to who still waits."""
        self.allowed = -1
        self.abandon()
        _resolve(self._waiters, error)


def within(
    records: Iterable[tuple[int, bytes]], max_bytes: int, max_records: int
) -> list[tuple[int, bytes]]:
    """The first of `records` that keep to both bounds; at least one if there is."""
    found: list[tuple[int, bytes]] = []
    for seq, data in records:
        max_bytes -= len(data)
        if found and (max_bytes < 0 or len(found) >= max_records):
            break
        found.append((seq, data))
    return found


def _resolve(waiters: list[_Waiter], error: CapacityError | None) -> None:
    for _, loop, future in waiters:
        with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_settle, future, error)


def _settle(future: asyncio.Future[None], error: CapacityError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
