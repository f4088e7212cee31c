"""The joiner: predictions meet the labels that life brings later, and become examples.

Why: labels in order of arrival bias a learner (quick outcomes come first), so every prediction gets
the same time to be labelled, and is judged when that time is over.

Invariants: a prediction settles once: as an example when it has a label, else as expired. It
matures when the joint clock has passed its time by more than the label window; strictly, because
records of that very second may still come. Examples leave in the order of (time, device, epoch,
seq), whatever order the records came in. A label counts if its own event time lies in the window;
a final label beats a provisional one, and of equals the newest wins. An unlabelled prediction of a
device that lags behind the joint clock waits until the device's own time has passed as well.

Labels may overtake their predictions (they travel first): they wait, bounded for each device.
Knows nothing about envelopes, SQL or batches: it fills in `Changes`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import msgspec

from cloud_learner.ingest.joint_clock import JointClock
from cloud_learner.store.examples import Example
from cloud_learner.store.ingest_state import (
    COVERED,
    EXPIRED,
    RELEASED,
    Changes,
    Id,
    IngestState,
    Label,
    Pending,
    example,
)
from edge_runtime.wire.messages import EventClass, LabelRecord, PredictionRecord, Record

EARLY_LABELS_MAX = 50_000
Order = tuple[float, str, int, int]
StateOf = Callable[[Id], int | None]


class ArchivedRecord(msgspec.Struct, frozen=True, gc=False):
    """A record with its identity; `raw` is `record` as it stood in the log of the device."""

    device: str
    epoch: int
    event_class: EventClass
    seq: int
    record: Record
    raw: bytes
    arrived_s: float


class Joiner:
    """Joins the predictions of `family`; what was predicted before `learn_from_s` is not learned.

    `idle_s` is how long (wall time) a silent device holds the others; `awaited` names the devices
    that must be heard before time starts to pass.
    """

    def __init__(
        self,
        family: str,
        *,
        label_window_s: float,
        idle_s: float,
        learn_from_s: float = float("-inf"),
        awaited: Iterable[str] = (),
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.clock = JointClock(label_window_s, idle_s, awaited)
        self._family = family
        self._window_s, self._learn_from_s = label_window_s, learn_from_s
        self._pending: dict[Id, Pending] = {}
        self._queue: list[Order] = []
        self._overdue: list[Order] = []
        self._early: dict[str, dict[tuple[int, int], Label]] = {}
        self._held: dict[tuple[str, int], int] = {}
        self._released = 0
        self._newest: Order = (float("-inf"), "", 0, 0)

    def restore(self, state: IngestState, monotonic_s: float) -> None:
        """Go on from what was committed."""
        self.clock.restore(state.clock_s, state.marks, monotonic_s)
        self._released = state.released
        for (device, epoch, event_class), (seq, _) in state.marks.items():
            if event_class == "event":
                self._held[device, epoch] = seq
        for (device, epoch, seq), label in state.early_labels.items():
            self._early.setdefault(device, {})[epoch, seq] = label
        for pending in state.pending:
            self._wait(pending)

    def join(
        self,
        records: Sequence[ArchivedRecord],
        changes: Changes,
        state_of: StateOf,
        monotonic_s: float,
    ) -> None:
        """Take in the records of a commit; `changes.marks` already counts them in.

        `state_of` looks up what became of a prediction that is no longer pending.
        """
        for item in records:
            if isinstance(item.record, PredictionRecord):
                self._predict(item, item.record, changes)
        self._move(changes, monotonic_s)
        for item in records:
            if isinstance(item.record, LabelRecord):
                self._label(item, item.record, changes, state_of)

    def settle(self, changes: Changes, wall_s: float, monotonic_s: float) -> list[Example]:
        """Advance the clock and release what has matured, in order."""
        changes.clock_s = self.clock.advance(monotonic_s)
        examples = []
        for order in self._mature(changes.clock_s):
            pending = self._pending[order[1:]]
            if pending.label is None:
                self._expire(order, changes, monotonic_s)
            elif pending.record.time_s < self._learn_from_s:
                self._close(order, COVERED, changes)
                self.counters["covered_by_bootstrap"] += 1
                changes.covered.append(example(pending, wall_s))
            else:
                examples.append(self._release(order, pending, changes, wall_s))
        changes.released = self._released
        return examples

    def statistics(self) -> dict[str, int]:
        """Counters, and how many predictions and early labels wait."""
        early = sum(len(labels) for labels in self._early.values())
        return {**self.counters, "pending": len(self._pending), "labels_waiting": early}

    def _predict(self, item: ArchivedRecord, record: PredictionRecord, changes: Changes) -> None:
        if record.family != self._family:
            self.counters["other_family"] += 1
            return
        pending = Pending(item.device, item.epoch, item.seq, record)
        self._wait(pending)
        changes.predictions.append((item.device, item.epoch, item.seq, item.raw))
        early = self._early.get(item.device)
        label = early.pop((item.epoch, item.seq), None) if early else None
        if label is not None:
            changes.early_joined.append((item.device, item.epoch, item.seq))
            self._attach(pending, label, changes)

    def _wait(self, pending: Pending) -> None:
        identity = (pending.device, pending.epoch, pending.seq)
        self._pending[identity] = pending
        heapq.heappush(self._queue, (pending.record.time_s, *identity))

    def _move(self, changes: Changes, monotonic_s: float) -> None:
        """Note how far each lane is; early labels below that will meet no prediction any more."""
        for (device, epoch, event_class), (seq, newest_s) in changes.marks.items():
            self.clock.hear(device, event_class, newest_s, monotonic_s)
            if event_class == "event":
                self._held[device, epoch] = seq
                early = self._early.get(device, {})
                for missed in [key for key in early if key[0] == epoch and key[1] <= seq]:
                    del early[missed]
                    changes.early_joined.append((device, *missed))
                    self.counters["labels_unknown"] += 1

    def _label(
        self, item: ArchivedRecord, record: LabelRecord, changes: Changes, state_of: StateOf
    ) -> None:
        if record.family != self._family:
            self.counters["other_family"] += 1
            return
        if not record.final:
            self.counters["labels_provisional"] += 1
        label = Label(record.value, record.time_s, record.final, item.arrived_s)
        identity = (item.device, record.epoch, record.seq)
        pending = self._pending.get(identity)
        if pending is not None:
            self._attach(pending, label, changes)
        elif record.seq > self._held.get((item.device, record.epoch), 0):
            self._keep_early(identity, label, changes)
        else:
            self.counters[_FATE[state_of(identity)]] += 1

    def _attach(self, pending: Pending, label: Label, changes: Changes) -> None:
        if label.time_s > pending.record.time_s + self._window_s:
            self.counters["labels_late"] += 1
            return
        if not _stands(pending.label, label):
            self.counters["labels_joined" if pending.label is None else "labels_replaced"] += 1
            pending.label = label
            row = (label.value, label.time_s, label.final, label.arrived_s)
            changes.labels.append((*row, pending.device, pending.epoch, pending.seq))

    def _keep_early(self, identity: Id, label: Label, changes: Changes) -> None:
        early = self._early.setdefault(identity[0], {})
        if len(early) >= EARLY_LABELS_MAX:
            self.counters["labels_early_dropped"] += 1
            return
        self.counters["labels_early"] += 1
        if not _stands(early.get(identity[1:]), label):
            early[identity[1:]] = label
            changes.early_labels[identity] = label

    def _mature(self, clock_s: float) -> list[Order]:
        mature, self._overdue = self._overdue, []
        while self._queue and self._queue[0][0] + self._window_s < clock_s:
            mature.append(heapq.heappop(self._queue))
        return sorted(mature)

    def _expire(self, order: Order, changes: Changes, monotonic_s: float) -> None:
        """Give up waiting, unless the device itself has not got that far."""
        if order[0] + self._window_s < self.clock.of(order[1], monotonic_s):
            self._close(order, EXPIRED, changes)
            self.counters["expired"] += 1
        else:
            self._overdue.append(order)

    def _release(self, order: Order, pending: Pending, changes: Changes, wall_s: float) -> Example:
        self._released += 1
        self._close(order, RELEASED, changes, wall_s, self._released)
        self.counters["examples"] += 1
        if order < self._newest:
            self.counters["released_out_of_order"] += 1
        self._newest = max(self._newest, order)
        return example(pending, wall_s)

    def _close(
        self,
        order: Order,
        state: int,
        changes: Changes,
        matured_s: float | None = None,
        released: int | None = None,
    ) -> None:
        identity = order[1:]
        del self._pending[identity]
        changes.settled.append((state, matured_s, released, *identity))


_FATE = {
    None: "labels_unknown",
    EXPIRED: "labels_late",
    RELEASED: "labels_after_release",
    COVERED: "labels_after_release",
}


def _stands(old: Label | None, new: Label) -> bool:
    """Whether `old` stays when `new` comes."""
    return old is not None and old.final and not new.final
