"""The event log: what a device saw, answered and was told, durable on its own disk.

Why: the network may be away for days and the process may be killed at any moment; an append costs
the hot path a microsecond, because a thread gathers what came within the linger and makes it
durable with one `fdatasync`. While records come it needs no waking, and lingers by their rate.

Commit point: the `fdatasync` of a group. Recovery cuts the newest segment after its last whole
frame, so a group is there whole up to a frame, or not at all.

Invariants: the epoch rises by one at every open, durably, before a sequence number is handed out,
so (epoch, class, seq) is never handed out twice. `durable` never names a record that has not
survived an `fdatasync` that succeeded: after an error the file is left alone for good, and what
was not durable is written again, from memory, into a new file. Classes share nothing but the
thread: own segments, own numbers, own share of the bytes (labels 1/8, so events cannot crowd
them out). Only one process and one open log per directory. Disk and memory are bounded: beyond
a bound `append` refuses.

One producer thread appends; `read`, `tail` and `trim` may be called from any thread.

Knows nothing about what a record means, nor about who reads it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from edge_runtime.errors import CapacityError, RequestError
from edge_runtime.events import recovery, segment
from edge_runtime.events.linger import Doorbell, Linger
from edge_runtime.events.stream import LENGTH_BYTES, PENDING_BYTES_MAX, Stream, within
from edge_runtime.wire.messages import EventClass

CLASSES = recovery.CLASSES
RECORD_BYTES_MAX = 512 * 1024
_LABEL_SHARE = 8
_RETRY_S = 0.25


class Piece(NamedTuple):
    """SHIM."""

    skipped: int
    reason: str
    base_seq: int
    records: list[bytes]


class EventLog:
    """The log of `device` in `directory`; opening it starts a new epoch.

    Records wait `linger_ms` to be made durable together, up to `linger_max_ms` where that saves
    commits. `sync` makes a file's bytes durable; tests let it fail.
    `on_commit`, once set, is called on the commit thread after each group; it must not raise.

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
        sync: Callable[[int], None] = os.fdatasync,
    ) -> None:
        self.directory, self.device = directory, device
        self.on_commit: Callable[[], None] | None = None
        self._linger = Linger(linger_ms / 1000, linger_max_ms / 1000)
        self._owner, found = recovery.open_directory(directory, device, sync)
        self.epoch, self._ends = found.epoch, found.ends
        label_bytes = bytes_max // _LABEL_SHARE
        bounds: dict[EventClass, int] = {"label": label_bytes, "event": bytes_max - label_bytes}
        self._streams = {
            name: Stream(
                directory,
                device=device,
                event_class=name,
                epoch=found.epoch,
                segments=found.segments[name],
                segment_bytes=segment_bytes,
                bytes_max=bounds[name],
                sync=sync,
            )
            for name in CLASSES
        }
        self._counters, self._failing = found.counters, False
        self._damaged: set[Path] = set()
        self._doorbell = Doorbell()
        self._closing, self._idle = threading.Event(), True
        self._thread = threading.Thread(target=self._run, name="log-commit", daemon=True)
        self._thread.start()

    # The hot path.

    def append(self, event_class: EventClass, data: bytes) -> int:
        """Accept a record; returns its sequence number, from 1 in each epoch. Not yet durable.

        Raises: CapacityError `log_full`, `log_stalled`, `log_closed`; RequestError `too_large`.
        """
        stream = self._streams[event_class]
        size = len(data)
        appended = stream.appended + size + LENGTH_BYTES
        if appended > stream.allowed or size > RECORD_BYTES_MAX:
            self._refuse(stream, event_class, size)
        stream.appended = appended
        stream.last_seq = seq = stream.last_seq + 1
        stream.pending.append(data)
        if self._idle:
            self._idle = False
            self._doorbell.ring()
        return seq

    def _refuse(self, stream: Stream, event_class: EventClass, size: int) -> None:
        what = f"a record of {size} bytes, class {event_class}, was not logged"
        if size > RECORD_BYTES_MAX:
            raise RequestError("too_large", f"{what}: the bound is {RECORD_BYTES_MAX} bytes")
        if self._closing.is_set():
            raise CapacityError("log_closed", f"{what}: the log is closed")
        if stream.appended - stream.committed + size > PENDING_BYTES_MAX - LENGTH_BYTES:
            raise CapacityError(
                "log_stalled",
                f"{what}: {stream.appended - stream.committed} bytes wait for the disk",
                f"see what the disk of {self.directory} is doing",
            )
        raise CapacityError(
            "log_full",
            f"{what}: the learner has not confirmed what fills {stream.bytes_max} bytes",
            "bring the connection to the learner back, or raise log.bytes_max_mb",
        )

    def room(self, event_class: EventClass) -> int:
        """How many bytes `append` is sure to take now, LENGTH_BYTES of each record included."""
        return self._streams[event_class].room

    # What is durable.

    def durable(self, event_class: EventClass) -> tuple[int, int]:
        """(epoch, seq) of the last durable record of this epoch; seq 0 when there is none."""
        return self.epoch, self._streams[event_class].durable_seq

    def handed_out(self, event_class: EventClass) -> int:
        """The last sequence number that `append` returned in this epoch; 0 when none."""
        return self._streams[event_class].last_seq

    def ends(self, event_class: EventClass) -> list[tuple[int, int]]:
        """(epoch, last surviving seq) of the newest earlier epochs, oldest first, also when
        their records were trimmed. An id of such an epoch above its end was lost in a crash.
        """
        return [(epoch, last) for epoch, name, last in self._ends if name == event_class]

    async def wait_durable(self, event_class: EventClass, seq: int) -> None:
        """Return once record `seq` of this epoch is durable; what lingers is committed now.

        Raises: CapacityError `log_closed` when the log closes before it is.
        """
        stream = self._streams[event_class]
        assert seq <= stream.last_seq, f"seq {seq} was never handed out"
        if seq > stream.durable_seq:
            self._doorbell.ring()
        await stream.wait_durable(seq)

    # Reading and trimming.

    def epochs(self, event_class: EventClass) -> list[tuple[int, int, int]]:
        """(epoch, first seq, last durable seq) of what is on disk, oldest first."""
        found: dict[int, tuple[int, int]] = {}
        stream = self._streams[event_class]
        with stream.lock:
            for part in stream.segments:
                if part.last_seq >= part.base_seq:
                    first, _ = found.get(part.epoch, (part.base_seq, 0))
                    found[part.epoch] = (first, part.last_seq)
        return [(epoch, first, last) for epoch, (first, last) in found.items()]

    def read(
        self,
        event_class: EventClass,
        epoch: int,
        after_seq: int,
        max_bytes: int,
        max_records: int,
    ) -> list[tuple[int, bytes]]:
        """Durable (seq, record) of `epoch` above `after_seq`, in order; at least one if there is.

        A gap in the numbers means that a frame was damaged on disk or trimmed.
        """
        return within(self._records(event_class, epoch, after_seq), max_bytes, max_records)

    def recent(
        self, event_class: EventClass, after_seq: int, max_bytes: int, max_records: int
    ) -> list[tuple[int, bytes]] | None:
        """As `read`, of the running epoch and from memory; None when it has to be read."""
        records = self._streams[event_class].recent_after(after_seq)
        return None if records is None else within(records, max_bytes, max_records)

    def piece(
        self, event_class: EventClass, epoch: int, after_seq: int, max_bytes: int, max_records: int
    ) -> Piece | None:
        found = self.read(event_class, epoch, after_seq, max_bytes, max_records)
        if not found:
            return None
        first = found[0][0]
        records = [data for at, (seq, data) in enumerate(found) if seq == first + at]
        skipped = first - after_seq - 1
        return Piece(skipped, "damaged" if skipped else "", first, records)

    def owed(self, event_class: EventClass) -> list[tuple[int, int]]:
        return [(epoch, last) for epoch, _, last in self.epochs(event_class)]

    def learned(self, event_class: EventClass, epoch: int, seq: int) -> None:
        self.trim(event_class, epoch, seq)

    def prior(self, epoch: int) -> int:
        return max(epoch - 1, 0)

    def tail(
        self, event_class: EventClass, epoch: int, seq: int
    ) -> Iterator[tuple[int, int, bytes]]:
        """Durable (epoch, seq, record) after that position, all later epochs included."""
        for present, _, _ in self.epochs(event_class):
            if present >= epoch:
                after_seq = seq if present == epoch else 0
                for found, data in self._records(event_class, present, after_seq):
                    yield present, found, data

    def _records(
        self, event_class: EventClass, epoch: int, after_seq: int
    ) -> Iterator[tuple[int, bytes]]:
        for part, view in self._streams[event_class].views(epoch, after_seq):
            try:
                segment.ensure_index(part, view)
                yield from segment.records(view, after_seq)
            except FileNotFoundError:
                continue  # trimmed since: the learner holds it
            except (segment.DamagedError, OSError):
                self._damaged.add(view.path)

    def trim(self, event_class: EventClass, epoch: int, seq: int) -> None:
        """Give back whole segments of `epoch` that hold nothing above `seq`.

        The newest segment of the running epoch stays: the next open finds there where it ended.
        """
        for path in self._streams[event_class].release(epoch, seq):
            path.unlink(missing_ok=True)

    def statistics(self) -> dict[str, int]:
        """Counters and gauges; `failing` is 1 while the disk refuses what must become durable."""
        streams = self._streams.values()
        numbers = {**self._counters, "epoch": self.epoch, "failing": int(self._failing)}
        numbers["damaged_segments"] = len(self._damaged)
        for name, stream in self._streams.items():
            numbers[f"{name}_appended"] = stream.last_seq
            numbers[f"{name}_durable"] = stream.durable_seq
            numbers[f"{name}_segments"] = len(stream.segments)
        numbers["linger_ms"] = round(1000 * self._linger.seconds)
        numbers["commits"] = self._commits()
        numbers["sync_errors"] = sum(stream.sync_errors for stream in streams)
        numbers["bytes"] = sum(stream.committed - stream.freed for stream in streams)
        numbers["pending"] = sum(stream.last_seq - stream.durable_seq for stream in streams)
        numbers["pending_bytes"] = sum(stream.appended - stream.committed for stream in streams)
        return numbers

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
        before = self._commits()
        refused = [stream for stream in self._streams.values() if not stream.commit()]
        self._failing = bool(refused)
        if self.on_commit is not None and self._commits() > before:
            self.on_commit()
        return not refused

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
        closed = CapacityError("log_closed", f"the event log in {self.directory} was closed")
        for stream in self._streams.values():
            stream.shut(closed)
        os.close(self._owner)
        if lost := self.statistics()["pending"]:
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
