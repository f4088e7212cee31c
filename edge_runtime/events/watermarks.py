"""What the learner says that it holds of a device, and what the device makes of it.

Why: only what the learner holds for ever may be given back on the device, and only the learner can
tell a device that another one has its name.

Invariants: nothing above a mark is given back, and of class event nothing that the next restart
needs for its windows. An epoch that this log never had is counted once and changes nothing else:
no id of it is an id of this log.

A learner that was put back to a copy of before an epoch does not name that epoch, and nothing else
would ever tell. So an epoch of this log that a watermark could name and does not is not held: mark
0. A watermark names at most EPOCHS_NAMED epochs, those that were heard last, with all that was ever
heard of them. So where fewer are named, that is each epoch above the oldest named, as what is older
may be forgotten there; where as many are named, only one above all of them. This comes to an end:
what is sent again is heard, so it is named next, and an epoch counts as absent again only after
it was named since. Where all names are taken, it needs as many other epochs, all older and all
heard later, and a log sends an older epoch again only once by this rule. A class of an epoch that
never had a number owes nothing, and a watermark that names nothing says nothing.

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

EPOCHS_NAMED = 64

Floor = tuple[EventClass, int, int]


class Watermarks:
    """Reads the watermarks of `device` and tells its log; counts into `counters`.

    `trim_floor` tells the (epoch, seq) of class event that the last window snapshot covers.
    `refused` is what the disk did not let the log take in when it was told last.
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
        self.refused: list[Floor] = []
        self._known = _epochs_of(log)
        # What came before the oldest that is remembered may have been this log's own.
        oldest = min(self._known)
        self._own_below = oldest if log.prior(oldest) else 0
        self._known |= {epoch for name in CLASSES for epoch, _ in log.ends(name)}
        self._absent: set[tuple[EventClass, int]] = set()
        self._strange: set[int] = set()
        self._given: dict[tuple[EventClass, int], int] = {}

    def read(self, data: bytes) -> list[Mark] | None:
        """The marks in `data`, and mark 0 for what it should name and does not; None, and counted,
        for what is no watermark of this device.
        """
        try:
            watermark = codec.decode_watermark(data)
        except RequestError:
            watermark = None
        if watermark is None or watermark.device != self._device:
            self._counters["bad_watermarks"] += 1
            return None
        self._find_strangers(watermark.marks)
        return [*watermark.marks, *self._missing(watermark.marks)]

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
        before, self.refused = self.refused, []
        for floor in floors:
            event_class, epoch, seq = floor
            try:
                self._log.learned(event_class, epoch, seq)
            except OSError as error:
                self.refused.append(floor)
                self._counters["give_back_errors"] += 1
                level = logging.DEBUG if floor in before else logging.WARNING
                log.log(level, "%s: the log keeps what the learner holds: %s", self._device, error)
            else:
                self._given[event_class, epoch] = seq

    def _missing(self, marks: list[Mark]) -> list[Mark]:
        """Mark 0 for each lane of this log that `marks` should name and does not."""
        named = {(mark.event_class, mark.epoch) for mark in marks}
        self._absent -= named
        epochs = {epoch for _, epoch in named}
        if not epochs:
            return []
        above = min(epochs) if len(epochs) < EPOCHS_NAMED else max(epochs)
        absent = {
            (name, epoch)
            for name in CLASSES
            for epoch, last_seq in (*self._log.ends(name), self._log.durable(name))
            if epoch > above and last_seq > 0
        } - named
        found = [Mark(epoch, name, 0) for name, epoch in sorted(absent - self._absent)]
        self._absent |= absent
        return found

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
    """The epochs from the running one back to the first that is forgotten."""
    epoch, known = log.epoch, set[int]()
    while epoch > 0 and epoch not in known:
        known.add(epoch)
        epoch = log.prior(epoch)
    return known


def _below(floor: tuple[int, int], epoch: int, seq: int) -> int:
    if epoch == floor[0]:
        return min(seq, floor[1])
    return seq if epoch < floor[0] else 0
