"""One class of records of an open log: what waits in memory, what lies on disk, who waits for it.

Why: the classes of a log are served by one thread and share its lock, its tally and nothing else.

Commit point: the `sync` in `_commit_batch`.

Invariants: the producer alone writes `last_seq` and appends to `pending`. A batch leaves `pending`
whole, under `lock`, and stays the batch in flight until it is durable; so the producer may drop
what is still pending from its front, under `lock`, too. The commit thread alone touches the file.
After an error the file is never written or synced again (its pages may be marked clean though they
never reached the disk): the batch in flight goes, from memory, into a new file. Where numbers were
dropped, the tally says so before a later number becomes durable, and a new file begins.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from edge_runtime.errors import CapacityError
from edge_runtime.events import frames, segment
from edge_runtime.events.recent import LENGTH_BYTES, Recent
from edge_runtime.events.segment import Segment
from edge_runtime.events.tally import Tally
from edge_runtime.events.waiters import Waiters
from edge_runtime.files import Files
from edge_runtime.wire.messages import EventClass

BATCH_BYTES_MAX = 1 << 20
_BATCH_RECORDS_MAX = 1 << 15

log = logging.getLogger("edge_runtime")


class Stream:
    """The state of one class. A record counts its length and LENGTH_BYTES.

    `settled` is how many bytes left memory, durable or dropped. `make_space` is called before a
    segment is begun; what it raises is an error of the disk.
    """

    def __init__(
        self,
        files: Files,
        directory: Path,
        *,
        device: str,
        event_class: EventClass,
        epoch: int,
        segments: list[Segment],
        segment_bytes: int,
        tally: Tally,
        lock: threading.Lock,
        make_space: Callable[[], None],
    ) -> None:
        self._files, self._directory, self._tally = files, directory, tally
        self._device, self._event_class, self._epoch = device, event_class, epoch
        self._segment_bytes, self._make_space = segment_bytes, make_space
        self.lock, self.segments = lock, segments
        self.pending: list[bytes] = []
        self.last_seq = self.durable_seq = 0
        self.settled = self.payload_bytes = 0
        self.stalled = self.sync_errors = self.commits = 0
        self._base, self._batch, self._batch_bytes = 1, list[bytes](), 0
        self._taken = 0  # the last number that left `pending`
        self._is_refused = False
        self._active: Segment | None = None
        self._fd = -1
        self._waiters = Waiters()
        self.recent = Recent()

    # What is not durable yet.

    @property
    def waiting(self) -> int:
        """How many records are in memory and not durable."""
        return len(self._batch) + len(self.pending)

    def drop_pending(self, wanted: int) -> int:
        """Drop the oldest records that no commit has taken, up to `wanted` bytes; how many bytes
        that were. Called by the producer, with the lock held.
        """
        count = freed = 0
        for data in self.pending:
            if freed >= wanted:
                break
            freed += len(data) + LENGTH_BYTES
            count += 1
        del self.pending[:count]
        first, self._taken = self._taken + 1, self._taken + count
        self.settled += freed
        self.stalled += count
        self._waiters.tell(first, self._taken, self._lost_error())
        return freed

    def commit(self) -> bool:
        """Make durable what is pending now; False when the disk refused and all of it is kept."""
        last_seq = self.last_seq
        while self.durable_seq < last_seq and (self._batch or self.pending):
            if not self._batch:
                self._take()
            if not self._commit_batch():
                return False
        return True

    def _take(self) -> None:
        with self.lock:
            sizes = list(accumulate(map(len, self.pending[:_BATCH_RECORDS_MAX])))
            count = max(1, bisect_right(sizes, BATCH_BYTES_MAX))
            self._batch = self.pending[:count]
            del self.pending[:count]
            self._batch_bytes = sizes[count - 1] + LENGTH_BYTES * count
            self._base, self._taken = self._taken + 1, self._taken + count

    def _commit_batch(self) -> bool:
        try:
            self._account_for_dropped()
            written = frames.encode_frames(self._base, self._batch)
            active = self._opened(len(written))
            self._files.write(self._fd, written, active.size)
            self._files.sync(self._fd)
        except OSError as error:
            self.sync_errors += 1
            self._tell(error)
            self.seal()
            return False
        self._tell(None)
        self.commits += 1
        self._advance(active, len(written))
        return True

    def _account_for_dropped(self) -> None:
        if self._base == self.durable_seq + 1:
            return
        lost = self._event_class, self._epoch, self.durable_seq + 1, self._base - 1, "stalled"
        self._tally.lose([lost])
        with self.lock:
            self.durable_seq = self._base - 1
        self.seal()

    def _tell(self, error: OSError | None) -> None:
        """Say once when the disk begins to refuse, and once when it takes records again."""
        if (error is not None) == self._is_refused:
            return
        self._is_refused = error is not None
        if error is not None:
            log.warning("%s: the disk refuses records, which wait: %s", self._directory, error)
        else:
            log.info("%s: the disk takes records again", self._directory)

    def _opened(self, size: int) -> Segment:
        """The segment that takes `size` bytes more; a new one has all its space from the start."""
        active = self._active
        if active is not None and (
            active.size + size <= self._segment_bytes or active.last_seq < active.base_seq
        ):
            return active
        self.seal()
        self._make_space()
        active = segment.new(
            self._directory, self._device, self._event_class, self._epoch, self._base
        )
        self._files.unlink(active.path)  # left by a failed commit; nothing in it is durable
        self._fd = self._files.create(active.path)
        try:
            self._files.allocate(self._fd, self._segment_bytes)
            self._files.write(self._fd, segment.encode_header(active), 0)
            self._files.sync_directory(self._directory)
        except OSError:
            self._undo_create(active.path)
            raise
        active.allocated, self._active = self._segment_bytes, active
        return active

    def _undo_create(self, path: Path) -> None:
        """Give back what a new file got of a disk that is full: others wait for it."""
        with contextlib.suppress(OSError):  # the unlink alone gives it back only with the close
            self._files.truncate(self._fd, 0)
        with contextlib.suppress(OSError):  # the next try does it
            self._files.unlink(path)

    def seal(self) -> None:
        """Let go of the file, and of the space in it; the next commit starts a new one."""
        fd, self._fd, active, self._active = self._fd, -1, self._active, None
        if fd >= 0:
            with contextlib.suppress(OSError):  # what it held is durable, or is written again
                if active is not None:
                    self._files.truncate(fd, active.size)
                    active.allocated = 0
            with contextlib.suppress(OSError):
                self._files.close(fd)

    def _advance(self, active: Segment, size: int) -> None:
        with self.lock:
            if active.last_seq < active.base_seq:
                self.segments = [*self.segments, active]
            last_seq = self._base + len(self._batch) - 1
            active.grew(active.size, self._base, last_seq, active.size + size)
            self.recent.remember(self._base, self._batch, self._batch_bytes)
            self.durable_seq = last_seq
            self.settled += self._batch_bytes
            self.payload_bytes += self._batch_bytes - LENGTH_BYTES * len(self._batch)
            self._batch = []
            self._waiters.tell(0, last_seq, None)

    async def wait_durable(self, seq: int) -> None:
        """Return once record `seq` is durable. Raises: what `shut` was given; CapacityError
        `record_dropped`.
        """
        with self.lock:
            if self._is_dropped(seq):
                raise self._lost_error()
            if self.durable_seq >= seq:
                return
            future = self._waiters.add(seq)
        await future

    def _is_dropped(self, seq: int) -> bool:
        if max(self.durable_seq, self._base + len(self._batch) - 1) < seq <= self._taken:
            return True
        return self._tally.reason(self._event_class, self._epoch, seq) == "stalled"

    def _lost_error(self) -> CapacityError:
        return CapacityError(
            "record_dropped",
            f"a record of class {self._event_class} was dropped before it was durable",
            f"see what the disk of {self._directory} is doing",
        )

    # What lies on disk.

    def views(self, epoch: int, after_seq: int) -> list[tuple[Segment, Segment]]:
        """Each segment of `epoch` with records above `after_seq`, and its copy for a reader."""
        with self.lock:
            return [
                (part, part.frozen())
                for part in self.segments
                if part.epoch == epoch and part.last_seq > after_seq
            ]

    def covered(self, epoch: int, seq: int) -> list[Segment]:
        """The segments of `epoch` that hold nothing above `seq`.

        The newest segment of the running epoch is never among them: the next open reads there where
        it ended.
        """
        with self.lock:
            newest = self.segments[-1] if self.segments else None
            return [
                part
                for part in self.segments
                if part.epoch == epoch
                and part.last_seq <= seq
                and not (part is newest and epoch == self._epoch)
            ]

    def oldest(self) -> Segment | None:
        """The segment to drop first; None when only the newest of the running epoch is left."""
        with self.lock:
            first = self.segments[0] if self.segments else None
            is_last = len(self.segments) == 1 and first is not None and first.epoch == self._epoch
            return None if is_last else first

    def forget(self, gone: list[Segment]) -> None:
        """No longer read from these segments."""
        with self.lock:
            self.segments = [part for part in self.segments if part not in gone]

    def shut(self, error: CapacityError) -> None:
        """Tell `error` to who still waits."""
        self.seal()
        with self.lock:
            self._waiters.tell(0, self.last_seq, error)
