"""The event log: what a device saw, answered and was told, durable on its own disk.

Why: the network may be away for days and the process may be killed at any moment; an append costs
the hot path a microsecond, because a thread gathers what came within the linger and makes it
durable with one sync. While records come it needs no waking, and lingers by their rate.

Commit points: the sync of a group; the tally's two renames for epochs, losses and what is learned.
Recovery cuts the newest segment after its last frame that proves itself.

Invariants: the epoch rises at every open, durably and by a random step, before a sequence number is
handed out, so (epoch, class, seq) is never handed out twice, not even by a disk that was restored,
cloned or wiped. `durable` never names a record that has not survived a sync that succeeded: after
an error the file is left alone for good, and what was not durable is written again, from memory,
into a new file. A number that was durable, or lies before one, comes out of `piece`: as its record,
or in a range that is lost and says why. Only one process and one open log per directory.

Disk and memory are bounded, and `append` never refuses for it. Over `bytes_max` the oldest segment
goes, events before labels, once the tally says so; the newest of the running epoch stays. While
the disk takes nothing, the oldest events in memory go, then labels.

One producer thread appends; everything else may be called from any thread.

Knows nothing about what a record means, nor about who reads it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from edge_runtime.clock import Clock, SystemClock
from edge_runtime.errors import CapacityError, RequestError
from edge_runtime.events import recovery, tally
from edge_runtime.events.linger import Doorbell, Linger
from edge_runtime.events.reader import Piece, Reader
from edge_runtime.events.recent import LENGTH_BYTES, within
from edge_runtime.events.recovery import random_step
from edge_runtime.events.space import Space
from edge_runtime.events.stream import Stream
from edge_runtime.events.usage import Usage
from edge_runtime.files import Files, OsFiles
from edge_runtime.wire.messages import EventClass

__all__ = ["CLASSES", "RECORD_BYTES_MAX", "EventLog", "Piece", "random_step"]

CLASSES = tally.CLASSES
RECORD_BYTES_MAX = 512 * 1024
PENDING_BYTES_MAX = 32 << 20
_DROP_BYTES = PENDING_BYTES_MAX // 32
_SEGMENTS_MIN = 16
_RETRY_S = 0.25
_SLOW_S = 0.5


class EventLog:
    """The log of `device` in `directory`; opening it starts a new epoch, `step()` above the last.

    `epochs`, `owed`, `piece`, `read` and `tail` are those of its `Reader`, `learned` is that of its
    `Space`, `prior` and `reason` of its `Tally`.

    Records wait `linger_ms` to be made durable together, up to `linger_max_ms` where that saves
    commits. All files together take `bytes_max` at most. `on_commit`, once set, is called on the
    commit thread after each group; it must not raise.

    Raises: ConfigError `already_owned`, `other_device`, `log_version`, `log_unusable`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        device: str,
        linger_ms: float = 5.0,
        linger_max_ms: float = 0.0,
        segment_bytes: int = 8 << 20,
        bytes_max: int = 1 << 30,
        files: Files | None = None,
        clock: Clock | None = None,
        step: Callable[[], int] = random_step,
    ) -> None:
        self.directory, self.device = directory, device
        self.on_commit: Callable[[], None] | None = None
        self._files = files = files or OsFiles()
        self._linger = Linger(linger_ms / 1000, linger_max_ms / 1000)
        since = files.written
        found = recovery.open_directory(files, directory, device, step())
        self._found, self._tally, self.epoch = found, found.tally, found.tally.epoch
        segment_bytes = min(segment_bytes, bytes_max // _SEGMENTS_MIN)
        self._space = Space(files, found.tally, bytes_max, segment_bytes)
        self._lock = threading.Lock()
        self._streams = {
            name: Stream(
                files,
                directory,
                device=device,
                event_class=name,
                epoch=self.epoch,
                segments=found.segments[name],
                segment_bytes=segment_bytes,
                tally=found.tally,
                lock=self._lock,
                make_space=self._make_space,
            )
            for name in CLASSES
        }
        self._space.streams = self._streams
        self._reader = reader = Reader(files, directory, self._streams, found.tally, self.epoch)
        self.epochs, self.owed, self.piece = reader.epochs, reader.owed, reader.piece
        self.read, self.tail = reader.read, reader.tail
        self.learned = self._space.learned
        self.prior, self.reason = found.tally.prior, found.tally.reason
        self._usage = Usage(files, directory / "usage", clock or SystemClock(), since)
        self._accepted, self._allowed = 0, PENDING_BYTES_MAX
        self._failing, self._began_s = False, 0.0
        self._doorbell = Doorbell()
        self._closing, self._idle = threading.Event(), True
        self._thread = threading.Thread(target=self._run, name="log-commit", daemon=True)
        self._thread.start()

    # The hot path.

    def append(self, event_class: EventClass, data: bytes) -> int:
        """Accept a record; returns its sequence number, from 1 in each epoch. Not yet durable.

        Raises: CapacityError `log_closed`; RequestError `too_large`.
        """
        stream = self._streams[event_class]
        size = len(data)
        accepted = self._accepted + size + LENGTH_BYTES
        if accepted > self._allowed or size > RECORD_BYTES_MAX:
            self._drop_or_refuse(event_class, size)
        self._accepted = accepted
        stream.last_seq = seq = stream.last_seq + 1
        stream.pending.append(data)
        if self._idle:
            self._idle = False
            self._doorbell.ring()
        return seq

    def _drop_or_refuse(self, event_class: EventClass, size: int) -> None:
        """Make room in memory, which the disk does not take: the oldest that is pending goes."""
        what = f"a record of {size} bytes, class {event_class}, was not logged"
        if size > RECORD_BYTES_MAX:
            raise RequestError("too_large", f"{what}: the bound is {RECORD_BYTES_MAX} bytes")
        if self._closing.is_set():
            raise CapacityError("log_closed", f"{what}: the log is closed")
        with self._lock:
            self._allow()  # what a commit in progress has settled counts
            if self._accepted + size + LENGTH_BYTES <= self._allowed:
                return
            wanted = max(_DROP_BYTES, size + LENGTH_BYTES)
            wanted -= self._streams["event"].drop_pending(wanted)
            if wanted > 0:
                self._streams["label"].drop_pending(wanted)
            self._allow()

    def _allow(self) -> None:
        settled = sum(stream.settled for stream in self._streams.values())
        self._allowed = settled + PENDING_BYTES_MAX

    # What is durable.

    def durable(self, event_class: EventClass) -> tuple[int, int]:
        """(epoch, seq) of the last durable number of this epoch; seq 0 when there is none."""
        return self.epoch, self._streams[event_class].durable_seq

    def handed_out(self, event_class: EventClass) -> int:
        """The last sequence number that `append` returned in this epoch; 0 when none."""
        return self._streams[event_class].last_seq

    def ends(self, event_class: EventClass) -> list[tuple[int, int]]:
        """(epoch, last surviving seq) of the newest earlier epochs, oldest first, also when
        their records were trimmed. An id of such an epoch above its end was lost in a crash.
        """
        return [(lane.epoch, lane.end) for lane in self._tally.lanes(event_class) if lane.end >= 0]

    async def wait_durable(self, event_class: EventClass, seq: int) -> None:
        """Return once record `seq` of this epoch is durable; what lingers is committed now.

        Raises: CapacityError `log_closed` when the log closes before it is, `record_dropped` when
        the disk took nothing for so long that the record had to go.
        """
        stream = self._streams[event_class]
        assert seq <= stream.last_seq, f"seq {seq} was never handed out"
        if seq > stream.durable_seq:
            self._doorbell.ring()
        await stream.wait_durable(seq)

    def recent(
        self, event_class: EventClass, after_seq: int, max_bytes: int, max_records: int
    ) -> list[tuple[int, bytes]] | None:
        """As `read`, of the running epoch and from memory; None when it has to be read."""
        records = self._streams[event_class].recent.after(after_seq)
        return None if records is None else within(records, max_bytes, max_records)

    def statistics(self) -> dict[str, int]:
        """Counters and gauges; `failing` is 1 while the disk refuses what must become durable, or
        takes long. Written over payload bytes is the write amplification.
        """
        streams = self._streams.values()
        is_slow = self._began_s and time.monotonic() - self._began_s > _SLOW_S
        numbers = {**self._found.counters, "epoch": self.epoch}
        numbers["failing"] = int(self._failing or bool(is_slow))
        for name, stream in self._streams.items():
            numbers[f"{name}_appended"] = stream.last_seq
            numbers[f"{name}_durable"] = stream.durable_seq
            numbers[f"{name}_segments"] = len(stream.segments)
            numbers[f"{name}_dropped"] = self._space.dropped[name]
            numbers[f"{name}_stalled"] = stream.stalled
            numbers[f"{name}_damaged"] = self._reader.damaged[name]
        numbers["linger_ms"] = round(1000 * self._linger.seconds)
        numbers["commits"] = self._commits()
        numbers["sync_errors"] = sum(stream.sync_errors for stream in streams)
        numbers["unlink_errors"] = self._space.unlink_errors
        numbers["bytes"] = self._space.held_bytes()
        numbers["pending"] = sum(stream.waiting for stream in streams)
        numbers["pending_bytes"] = self._accepted - sum(stream.settled for stream in streams)
        numbers["payload_bytes"] = sum(stream.payload_bytes for stream in streams)
        numbers["written_bytes"] = self._files.written
        return numbers | self._usage.statistics()

    # The commit thread.

    def _run(self) -> None:
        while not self._closing.is_set():
            self._idle = True
            if not any(stream.pending for stream in self._streams.values()):
                self._linger.was_idle(self._doorbell.wait())
            self._idle = False
            rung = self._closing.is_set() or self._doorbell.pause(self._linger.seconds)
            waiting = sum(len(stream.pending) for stream in self._streams.values())
            while not self._commit() and not self._closing.is_set():
                self._doorbell.pause(_RETRY_S)
            if not rung:
                self._linger.took(waiting)
        self._commit()

    def _commit(self) -> bool:
        before, self._began_s = self._commits(), time.monotonic()
        refused = [stream for stream in self._streams.values() if not stream.commit()]
        self._failing, self._began_s = bool(refused), 0.0
        with self._lock:
            self._allow()
        self._usage.follow()
        if self.on_commit is not None and self._commits() > before:
            self.on_commit()
        return not refused

    def _make_space(self) -> None:
        self._space.make()
        self._usage.save()

    def _commits(self) -> int:
        return sum(stream.commits for stream in self._streams.values())

    # The end.

    def close(self) -> None:
        """Make everything durable and give the directory back; closing twice is no error.

        Raises: CapacityError `log_not_durable` when the disk refused the last records.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        self._doorbell.ring()
        self._thread.join()
        self._allowed = -1
        closed = CapacityError("log_closed", f"the event log in {self.directory} was closed")
        for stream in self._streams.values():
            stream.shut(closed)
        with contextlib.suppress(OSError):  # then the next open looks for itself where it ended
            self._tally.end({name: each.durable_seq for name, each in self._streams.items()})
        self._usage.save()
        self._files.close(self._found.owner)
        if lost := sum(stream.waiting for stream in self._streams.values()):
            raise CapacityError(
                "log_not_durable",
                f"the disk of {self.directory} refused the last {lost} records; they are lost",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
