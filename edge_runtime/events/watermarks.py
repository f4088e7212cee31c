"""What the learner says that it holds of a device, and what the device makes of it.

Why: only what the learner holds for ever may be given back on the device, and only the learner can
tell a device that another one has its name.

Invariants: nothing above a mark is given back, and of class event nothing that the next restart
needs for its windows. An epoch that this log never had is counted once and changes nothing else:
no id of it is an id of this log.

Knows nothing about how envelopes get to the learner.
Implements proto/asyncapi.yaml (channel watermark, device side).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from edge_runtime.errors import RequestError
from edge_runtime.events.log import CLASSES, EventLog
from edge_runtime.wire import codec
from edge_runtime.wire.messages import EventClass, Mark

log = logging.getLogger("edge_runtime")

Floor = tuple[EventClass, int, int]


class Watermarks:
    """Reads the watermarks of `device` and tells its log; counts into `counters`.

    `trim_floor` tells the (epoch, seq) of class event that the last window snapshot covers.
    """

    def __init__(
        self,
        log: EventLog,
        device: str,
        trim_floor: Callable[[], tuple[int, int]] | None,
        counters: Counter[str],
    ) -> None:
        self._log, self._device, self._counters = log, device, counters
        self._trim_floor = trim_floor
        self._known = _epochs_of(log)
        # What came before the oldest that is remembered may have been this log's own.
        oldest = min(self._known)
        self._own_below = oldest if log.prior(oldest) else 0
        self._strange: set[int] = set()
        self._given: dict[tuple[EventClass, int], int] = {}

    def read(self, data: bytes) -> list[Mark] | None:
        """The marks in `data`; None, and counted, for what is no watermark of this device."""
        try:
            watermark = codec.decode_watermark(data)
        except RequestError:
            watermark = None
        if watermark is None or watermark.device != self._device:
            self._counters["bad_watermarks"] += 1
            return None
        self._find_strangers(watermark.marks)
        return watermark.marks

    def floors(self, marks: list[Mark]) -> list[Floor]:
        """What of `marks` is news to the log: all that the learner holds, events only below the
        snapshot.
        """
        floor = self._trim_floor() if self._trim_floor else None
        found: list[Floor] = [
            (mark.event_class, mark.epoch, _below(floor, mark.epoch, mark.seq))
            if mark.event_class == "event" and floor
            else (mark.event_class, mark.epoch, mark.seq)
            for mark in marks
        ]
        return [floor for floor in found if self._given.get(floor[:2]) != floor[2]]

    def give_back(self, floors: list[Floor]) -> None:
        """Tell the log what the learner holds; what the disk refuses is told again next time."""
        for event_class, epoch, seq in floors:
            try:
                self._log.learned(event_class, epoch, seq)
            except OSError as error:
                self._counters["give_back_errors"] += 1
                log.warning("%s: what the learner holds stays in the log: %s", self._device, error)
            else:
                self._given[event_class, epoch] = seq

    def _find_strangers(self, marks: list[Mark]) -> None:
        strangers = {mark.epoch for mark in marks if mark.epoch > self._own_below} - self._known
        for epoch in sorted(strangers - self._strange):
            self._strange.add(epoch)
            self._counters["duplicate_identity"] += 1
            log.warning(
                "%s: the learner holds epoch %d, which this log never had: another device has this"
                " name, or this disk was wiped, or an older copy of it was put back",
                self._device,
                epoch,
            )


def ends(log: EventLog) -> list[Mark]:
    """Where each epoch and class ends on the device that the learner may not hold whole."""
    return [Mark(epoch, name, last_seq) for name in CLASSES for epoch, last_seq in log.owed(name)]


def _epochs_of(log: EventLog) -> set[int]:
    """The epochs that the log remembers to have had."""
    epoch, known = log.epoch, set[int]()
    while epoch > 0 and epoch not in known:
        known.add(epoch)
        epoch = log.prior(epoch)
    return known


def _below(floor: tuple[int, int], epoch: int, seq: int) -> int:
    if epoch == floor[0]:
        return min(seq, floor[1])
    return seq if epoch < floor[0] else 0
