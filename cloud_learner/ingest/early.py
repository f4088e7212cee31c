"""Early labels: those that overtook their predictions, and wait for them on disk.

Why: labels travel first, so after an outage a device's labels are all in before the predictions
that they speak of.

Invariants: a label waits until the lane of its prediction has passed its number; then it joins, or
is of no prediction. Those of one prediction come back in the order in which they came. Bounded for
each device and each prediction; what exceeds the bound of a device is counted and dropped, and of
what exceeds that of a prediction stays what stands. Memory holds a count for each lane, not the
labels.

Knows nothing about when a label counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from cloud_learner.store.ingest_state import Label, id_of, lane_prefix
from cloud_learner.store.runs import Waiting

EARLY_LABELS_MAX = 1_000_000
EARLY_OF_ONE_MAX = 16

Log = tuple[str, int]  # a device and its epoch


class EarlyLabels:
    """The early labels in `waiting`; counts into `counters`."""

    def __init__(self, waiting: Waiting, counters: Counter[str]) -> None:
        self._waiting, self._counters = waiting, counters
        self._of_log: Counter[Log] = Counter()
        self._of_device: Counter[str] = Counter()
        self._passed: dict[Log, int] = {}
        for key in waiting.all_early():
            device, epoch, _ = id_of(key)
            self._note((device, epoch), 1)

    @property
    def count(self) -> int:
        """How many predictions they wait for."""
        return sum(self._of_device.values())

    def keep(self, key: bytes, label: Label) -> None:
        """Let a label wait for the prediction with this key."""
        device, epoch, _ = id_of(key)
        if self._of_device[device] >= EARLY_LABELS_MAX:
            self._counters["labels_early_dropped"] += 1
            return
        self._counters["labels_early"] += 1
        known = self._waiting.early_labels(key)
        if not known:
            self._note((device, epoch), 1)
        if len(known) < EARLY_OF_ONE_MAX:
            self._waiting.set_early(key, [*known, label])
        elif not stands(known[-1], label):
            self._waiting.set_early(key, [*known[:-1], label])

    def passed(self, log: Log, seq: int) -> Iterator[tuple[bytes, list[Label]]]:
        """The labels that wait no longer, by prediction, now that the lane has come to `seq`."""
        above = self._passed.get(log, 0)
        self._passed[log] = seq
        if not self._of_log[log]:
            return
        for key, labels in self._waiting.early(lane_prefix(*log), above, seq):
            self._waiting.delete_early(key)
            self._note(log, -1)
            yield key, labels

    def _note(self, log: Log, number: int) -> None:
        self._of_log[log] += number
        self._of_device[log[0]] += number
        if not self._of_log[log]:
            del self._of_log[log]


def stands(old: Label | None, new: Label) -> bool:
    """Whether `old` stays when `new` comes: a final label beats provisional ones, and of equals the
    newest wins, by its own time and then as it came.
    """
    return old is not None and (old.final, old.time_s) > (new.final, new.time_s)


def contradict(old: Label | None, new: Label) -> bool:
    """Whether two labels that both claim to be final say something else."""
    return old is not None and old.final and new.final and old.value != new.value
