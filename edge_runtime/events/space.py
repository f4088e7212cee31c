"""The space that a log takes: what the learner holds is given back, and at the cap the oldest goes.

Why: a device that is offline for long must neither stop nor fill its disk, and what it drops has to
be accounted for before it is gone.

Invariants: a segment is unlinked only after the tally, durably, says what became of its numbers; a
file that cannot be unlinked is tried again, here and at the next open. Events go before labels,
whole segments, oldest first.

Knows nothing about how records are written or read.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping

from edge_runtime.events.segment import Segment
from edge_runtime.events.stream import Stream
from edge_runtime.events.tally import Tally
from edge_runtime.files import Files
from edge_runtime.wire.messages import EventClass

log = logging.getLogger("edge_runtime")

_DROP_ORDER: tuple[EventClass, EventClass] = ("event", "label")


class Space:
    """Keeps all `streams` within `bytes_max`; `dropped` counts numbers by class."""

    def __init__(self, files: Files, tally: Tally, bytes_max: int, segment_bytes: int) -> None:
        self._files, self._tally = files, tally
        self._bytes_max, self._segment_bytes = bytes_max, segment_bytes
        self._lock = threading.Lock()
        self._doomed: list[Segment] = []
        self.streams: Mapping[EventClass, Stream] = {}
        self.dropped: Counter[EventClass] = Counter()
        self.unlink_errors = 0

    def held_bytes(self) -> int:
        """The bytes of all segments that are not given back."""
        return sum(part.size for stream in self.streams.values() for part in stream.segments)

    def make(self) -> None:
        """Drop the oldest segments until one more fits. Raises: OSError, the tally's."""
        with self._lock:
            self._remove([])
            while self._disk_bytes() + self._segment_bytes > self._bytes_max:
                if not self._drop_oldest():
                    break

    def learned(self, event_class: EventClass, epoch: int, seq: int) -> None:
        """The learner holds all of `epoch` up to `seq`: give back segments with nothing above it.

        The newest segment of the running epoch stays: the next open finds there where it ended.
        Raises: OSError, the tally's, with nothing given back.
        """
        stream = self.streams[event_class]
        with self._lock:
            gone = stream.covered(epoch, seq)
            self._tally.learn(event_class, epoch, seq, gives_back=bool(gone))
            stream.forget(gone)
            self._remove(gone)

    def _disk_bytes(self) -> int:
        streams = self.streams.values()
        return sum(part.disk_bytes for stream in streams for part in stream.segments)

    def _drop_oldest(self) -> bool:
        for name in _DROP_ORDER:
            stream = self.streams[name]
            part = stream.oldest()
            if part is not None:
                self.dropped[name] += self._account_for(part)
                stream.forget([part])
                self._remove([part])
                return True
        return False

    def _account_for(self, part: Segment) -> int:
        name, epoch = part.event_class, part.epoch
        mark = self._tally.mark(name, epoch)
        if mark >= part.base_seq:
            self._tally.learn(name, epoch, mark, gives_back=True)
        first = max(part.base_seq, mark + 1)
        if first > part.last_seq:
            return 0
        return self._tally.lose([(name, epoch, first, part.last_seq, "dropped")])

    def _remove(self, parts: list[Segment]) -> None:
        """Unlink `parts`, and what could not be unlinked before."""
        left = []
        for part in [*self._doomed, *parts]:
            try:
                self._files.unlink(part.path)
            except OSError as error:
                left.append(part)
                if part not in self._doomed:
                    self.unlink_errors += 1
                    log.warning("what nobody needs stays on the disk: %s", error)
        self._doomed = left
