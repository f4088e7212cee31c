"""The joiner: predictions meet the labels that life brings later, and become examples.

Why: labels in order of arrival bias a learner (quick outcomes come first), so every prediction gets
the same time to be labelled, and is judged when that time is over.

Invariants: a prediction settles once (see `cloud_learner.ingest.settling`). A label counts if its
own event time lies in the window; a final label beats a provisional one, and of equals the newest
wins. A label that comes after its example was released, in the time that the family allows for
that, amends it: the example comes out once more, its revision raised. Memory does not grow with the
number of predictions that wait: they lie in the ingest database.

Labels may overtake their predictions (they travel first): they wait, bounded for each device.
Knows nothing about envelopes, databases or batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from cloud_learner.ingest.early import EarlyLabels, stands
from cloud_learner.ingest.joint_clock import JointClock
from cloud_learner.ingest.settling import AT_ONCE, Settling, example
from cloud_learner.store.examples import Example
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.ingest_state import (
    EXPIRED,
    PENDING,
    RELEASED,
    Account,
    Label,
    Lane,
    Row,
    id_of,
    is_unlabelled,
    labelled,
    lane_prefix,
    pending_rows,
    prediction_key,
    time_of,
)
from cloud_learner.store.rocks import Transaction
from cloud_learner.store.runs import SETTLE, Waiting
from edge_runtime.wire.messages import LabelRecord, PredictionRecord, Record

KEPT_WINDOWS = 3  # how long what is settled is known as settled, not as unknown
_NEVER_S = float("-inf")


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What a family says about its labels; what was predicted before `learn_from_s` is not learned.

    `idle_s` is how long (wall time) a silent device holds the others; `awaited` names the devices
    that must be heard before time starts to pass. An event may take its device's time to
    `ahead_s_max` after its arrival, no further. `amend_s` is how long after its window (event
    time) a label may still amend an example.
    """

    family: str
    label_window_s: float
    idle_s: float
    expiry: Literal["drop", "negative"] = "drop"
    amend_s: float = 0.0
    learn_from_s: float = _NEVER_S
    ahead_s_max: float = float("inf")
    awaited: tuple[str, ...] = ()


class Portion(msgspec.Struct):
    """Consecutive records of one lane that were accepted; an omitted or refused one is an int.

    `envelope` decodes to the records of the whole envelope that they came in.
    """

    lane: Lane
    first_seq: int
    records: Sequence[Record | int]
    envelope: bytes
    arrived_s: float


class Joiner:
    """Joins the predictions of one family, over the state in `db`."""

    def __init__(
        self,
        rules: Rules,
        db: IngestDb,
        accounts: dict[Lane, Account],
        clock_s: float,
        now_s: float,
        *,
        at_once: int = AT_ONCE,
    ) -> None:
        """`accounts` are shared with the caller, who moves them first; `now_s` is monotonic.

        `at_once` is about how many records one commit settles.
        """
        self.counters: Counter[str] = Counter()
        self.clock = JointClock(rules.label_window_s, rules.idle_s, rules.awaited)
        self.clock.restore(clock_s, rules.family, accounts, now_s)
        self._rules, self._accounts = rules, accounts
        self._waiting = Waiting(db.part(rules.family))
        self._settling = Settling(
            self._waiting,
            self.clock,
            self.counters,
            window_s=rules.label_window_s,
            keep_s=max(KEPT_WINDOWS * rules.label_window_s, rules.amend_s),
            keeps_records=rules.amend_s > 0,
            is_negative=rules.expiry == "negative",
            learn_from_s=rules.learn_from_s,
            clock_s=clock_s,
            at_once=at_once,
        )
        self._early = EarlyLabels(self._waiting, self.counters)
        self._touched: set[bytes] = set()
        self.amended: list[Example] = []

    def join(
        self, portions: Sequence[Portion], lanes: Iterable[Lane], change: Transaction, now_s: float
    ) -> None:
        """Take in what was accepted of this family, and what moved; all belongs to `change`.

        Predictions first, then time, then labels, so that the order within a commit is nothing.
        """
        self.amended = []
        self._waiting.begin(change)
        self._touched = set()
        labels = []
        for portion in portions:
            if portion.lane[2] == "event":
                self._predict(portion)
            else:
                labels.append(portion)
        spoken = {portion.lane for portion in portions}
        for lane in lanes:
            self._move(lane, now_s, spoke=lane in spoken)
        if labels:
            self._label(labels)

    def settle(self, wall_s: float, now_s: float) -> list[Example]:
        """Advance the clock, and release what has matured, in order: some thousands at once."""
        examples = self._settling.settle(self._touched, wall_s, now_s)
        self._waiting.finish()
        return examples

    @property
    def clock_s(self) -> float:
        """The event time up to which everything that has matured is released."""
        return self._settling.clock_s

    @property
    def is_behind(self) -> bool:
        """Whether more has matured than could be settled at once."""
        return self._settling.is_behind

    @property
    def for_files_only(self) -> list[Example]:
        """What the last commit brought out that nobody should learn now: amended, or covered."""
        return self._settling.covered + self.amended

    def waiting(self) -> dict[str, int]:
        """How many labels wait for a prediction; `pending` is a counter that goes down as well."""
        return {"labels_waiting": self._early.count}

    def _predict(self, portion: Portion) -> None:
        device, epoch, _ = portion.lane
        family = self._rules.family
        places = [
            place
            for place, record in enumerate(portion.records)
            if type(record) is PredictionRecord and record.family == family
        ]
        if not places:
            return
        prefix, first = lane_prefix(device, epoch), portion.first_seq
        times_s = [portion.records[place].time_s for place in places]  # type: ignore[union-attr]
        self._waiting.fresh.update(pending_rows(prefix, first, places, times_s))
        self.counters["pending"] += len(places)
        run = prediction_key(prefix, first)
        last = first + len(portion.records) - 1
        self._waiting.add_run(run, last, portion.envelope)
        self._waiting.file(SETTLE, min(times_s), run, last)

    def _move(self, lane: Lane, now_s: float, *, spoke: bool) -> None:
        """Note how far a lane is; early labels up to there join, or will meet no prediction."""
        device, epoch, event_class = lane
        account = self._accounts[lane]
        if spoke:  # of this family, not only of others in the same lane
            newest_s = account.newest_s.get(self._rules.family, _NEVER_S)
            self.clock.hear(device, event_class, newest_s, now_s)
        if event_class != "event":
            return
        for key, label in self._early.passed((device, epoch), account.seq):
            data = self._waiting.fresh.get(key)
            if data is None:
                self.counters["labels_unknown"] += 1
            else:
                self._attach(key, Row.unpacked(data), label)

    def _label(self, portions: list[Portion]) -> None:
        """Labels, all of a commit at once: one look at what they speak of, in the order of keys."""
        keys: list[bytes] = []
        labels: list[Label] = []
        family = self._rules.family
        for portion in portions:
            start, arrived_s = portion.lane[0].encode() + b"\0", portion.arrived_s
            ours = [r for r in portion.records if type(r) is LabelRecord and r.family == family]
            keys += [start + r.epoch.to_bytes(8, "big") + r.seq.to_bytes(8, "big") for r in ours]
            labels += [Label(r.value, r.time_s, r.final, arrived_s) for r in ours]
        self.counters["labels_provisional"] += sum([not label.final for label in labels])
        rows, fresh = self._waiting.rows(keys), self._waiting.fresh
        for key, label in zip(keys, labels, strict=True):
            data = fresh.get(key) or rows.get(key)
            if data is None:
                self._keep_early(key, label)
            elif is_unlabelled(data):
                self._attach_first(key, data, label)
            else:
                self._attach(key, Row.unpacked(data), label)

    def _attach_first(self, key: bytes, data: bytes, label: Label) -> None:
        """What `_attach` does for nearly all labels, without taking the row apart."""
        matures_s = time_of(data) + self._rules.label_window_s
        if label.time_s > matures_s:
            self.counters["labels_late"] += 1
            return
        self.counters["labels_joined"] += 1
        self._waiting.fresh[key] = labelled(data, label)
        if time_of(data) < self._settling.mature_s:
            self._touched.add(run_of(key, Row.unpacked(data)))

    def _attach(self, key: bytes, row: Row, label: Label) -> None:
        if row.state != PENDING:
            self._after(key, row, label)
            return
        if label.time_s > row.time_s + self._rules.label_window_s:
            self.counters["labels_late"] += 1
            return
        if stands(row.label, label):
            return
        self.counters["labels_joined" if row.label is None else "labels_replaced"] += 1
        row.label = label
        self._waiting.set_row(key, row)
        if row.time_s < self._settling.mature_s:
            self._touched.add(run_of(key, row))

    def _after(self, key: bytes, row: Row, label: Label) -> None:
        """A label for what is settled: it amends an example, or comes too late."""
        rules = self._rules
        last_s = row.time_s + rules.label_window_s + rules.amend_s
        if row.state == EXPIRED:
            self.counters["labels_late"] += 1
            return
        may_amend = row.state == RELEASED and rules.amend_s > 0
        in_time = max(label.time_s, self.clock.now_s) <= last_s
        if may_amend and in_time and not stands(row.label, label) and not _same(row.label, label):
            self._amend(key, row, label)
        else:
            self.counters["labels_after_release"] += 1

    def _amend(self, key: bytes, row: Row, label: Label) -> None:
        stored = self._waiting.run(run_of(key, row))
        assert stored is not None, "kept as long as it may be amended"
        row.label, row.revision = label, row.revision + 1
        self._waiting.set_row(key, row)
        self.counters["amended"] += 1
        self.amended.append(example(key, stored, row, label.arrived_s))

    def _keep_early(self, key: bytes, label: Label) -> None:
        """A label without a prediction: of one that is still to come, or of none."""
        device, epoch, seq = id_of(key)
        account = self._accounts.get((device, epoch, "event"))
        if account is not None and seq <= account.seq:
            self.counters["labels_unknown"] += 1
            return
        self._early.keep(key, label)


def run_of(key: bytes, row: Row) -> bytes:
    """The key of the run that a prediction lies in."""
    return prediction_key(key[:-8], int.from_bytes(key[-8:], "big") - row.place)


def _same(old: Label | None, new: Label) -> bool:
    return old is not None and old.value == new.value
