"""Reading an open log: what is on disk, what is owed to the learner, and what is missing.

Why: the learner has to be told of every number, as a record or as a loss with its reason; only who
reads finds out that a frame no longer proves itself.

Invariants: what `piece` says of a number it says again after any restart, unless its record is lost
in the meantime; a hole that nothing explains is written into the tally as `damaged` before it is
told. Any thread may read; files may be given back meanwhile.

Knows nothing about how records came to be durable.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from edge_runtime.errors import CapacityError
from edge_runtime.events import frames
from edge_runtime.events.recent import within
from edge_runtime.events.stream import Stream
from edge_runtime.events.tally import Tally
from edge_runtime.files import Files
from edge_runtime.wire.messages import EventClass

log = logging.getLogger("edge_runtime")


class Piece(NamedTuple):
    """What follows a number: `skipped` numbers that are lost for `reason`, then records.

    `reason` is empty when `skipped` is 0; `base_seq` is the number of the first record, which may
    be none when only a loss is known.
    """

    skipped: int
    reason: str
    base_seq: int
    records: list[bytes]


class Reader:
    """Reads the `streams` of a log whose running epoch is `epoch`; `damaged` counts by class."""

    def __init__(
        self,
        files: Files,
        directory: Path,
        streams: Mapping[EventClass, Stream],
        tally: Tally,
        epoch: int,
    ) -> None:
        self._files, self._directory, self._streams = files, directory, streams
        self._tally, self._epoch = tally, epoch
        self.damaged: Counter[EventClass] = Counter()

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

    def owed(self, event_class: EventClass) -> list[tuple[int, int]]:
        """(epoch, last durable seq) of what the learner may not hold whole, oldest first; also of
        epochs of which no segment is left.
        """
        ends = (
            (lane.epoch, self._last(event_class, lane.epoch))
            for lane in self._tally.lanes(event_class)
        )
        mark = self._tally.mark
        return [(epoch, last) for epoch, last in ends if last > mark(event_class, epoch)]

    def piece(
        self, event_class: EventClass, epoch: int, after_seq: int, max_bytes: int, max_records: int
    ) -> Piece | None:
        """What follows `after_seq` in `epoch`, of what is durable; None when nothing does.

        Reads the disk. Raises: CapacityError `log_unreadable`; it may be readable later.
        """
        last = self._last(event_class, epoch)
        if after_seq >= last:
            return None
        skipped, reason = self._lost(event_class, epoch, after_seq, last)
        start = after_seq + skipped
        records = self._run(event_class, epoch, start, max_bytes, max_records)
        if not records and not skipped:
            skipped, reason = self._hole(event_class, epoch, after_seq, last)
            start = after_seq + skipped
            records = self._run(event_class, epoch, start, max_bytes, max_records)
        return Piece(skipped, reason, start + 1, records) if skipped or records else None

    def read(
        self, event_class: EventClass, epoch: int, after_seq: int, max_bytes: int, max_records: int
    ) -> list[tuple[int, bytes]]:
        """Durable (seq, record) of `epoch` above `after_seq`, in order; at least one if there is.

        A gap in the numbers means that something is lost; `piece` says why.
        """
        return within(self._records(event_class, epoch, after_seq), max_bytes, max_records)

    def tail(
        self, event_class: EventClass, epoch: int, seq: int
    ) -> Iterator[tuple[int, int, bytes]]:
        """Durable (epoch, seq, record) after that position, all later epochs included."""
        for present, _, _ in self.epochs(event_class):
            if present >= epoch:
                after_seq = seq if present == epoch else 0
                for found, data in self._records(event_class, present, after_seq):
                    yield present, found, data

    def _last(self, event_class: EventClass, epoch: int) -> int:
        if epoch == self._epoch:
            return self._streams[event_class].durable_seq
        lane = self._tally.lane(event_class, epoch)
        return lane.end if lane else 0

    def _lost(
        self, event_class: EventClass, epoch: int, after_seq: int, last: int
    ) -> tuple[int, str]:
        """How many numbers after `after_seq` the tally knows to be lost, and why."""
        lane = self._tally.lane(event_class, epoch)
        gap = lane and lane.gap_from(after_seq + 1)
        if not gap or gap.first > after_seq + 1:
            return 0, ""
        return min(gap.last, last) - after_seq, gap.reason

    def _run(
        self, event_class: EventClass, epoch: int, after_seq: int, max_bytes: int, max_records: int
    ) -> list[bytes]:
        """The records that follow `after_seq` without a hole and before the next known loss."""
        lane = self._tally.lane(event_class, epoch)
        gap = lane and lane.gap_from(after_seq + 1)
        found = self.read(event_class, epoch, after_seq, max_bytes, max_records)
        return [
            data
            for expected, (seq, data) in enumerate(found, after_seq + 1)
            if seq == expected and not (gap and seq >= gap.first)
        ]

    def _hole(
        self, event_class: EventClass, epoch: int, after_seq: int, last: int
    ) -> tuple[int, str]:
        """What became of the numbers after `after_seq`, of which no record can be read."""
        found = self.read(event_class, epoch, after_seq, 0, 1)
        end = min(found[0][0] - 1 if found else last, last)
        if end <= after_seq:  # it could be read after all
            return 0, ""
        lane = self._tally.lane(event_class, epoch)
        learned = lane.learned if lane else 0
        if learned > after_seq:
            return min(end, learned) - after_seq, "trimmed"
        try:
            loss = event_class, epoch, after_seq + 1, end, "damaged"
            self.damaged[event_class] += self._tally.lose([loss])
        except OSError as error:
            log.warning("%s: damage cannot be written down: %s", self._directory, error)
            return end - after_seq, "damaged"
        return self._lost(event_class, epoch, after_seq, last)

    def _records(
        self, event_class: EventClass, epoch: int, after_seq: int
    ) -> Iterator[tuple[int, bytes]]:
        for part, view in self._streams[event_class].views(epoch, after_seq):
            try:
                frames.ensure_index(self._files, part, view)
                yield from frames.records(self._files, view, after_seq)
            except FileNotFoundError:
                continue  # given back since, or somebody removed it: the tally tells
            except OSError as error:
                raise CapacityError(
                    "log_unreadable", f"{view.path} cannot be read now: {error}"
                ) from error
