"""The joiner: predictions meet the labels that life brings later, and become examples.

Why: labels in order of arrival bias a learner (quick outcomes come first), so every prediction gets
the same time to be labelled, and is judged when that time is over.

Invariants: a prediction settles once (see `cloud_learner.ingest.settling`), and what a label does
follows from when it happened (see `cloud_learner.ingest.attaching`). A label that comes after its
example was released, in the time that the family allows for that, amends it: the example comes out
once more, its revision raised. The same records in any portions give the same examples in the same
order, as long as labels lag by less than the clock waits for. Memory does not grow with the number
of predictions that wait: they lie in the ingest database.

Labels may overtake their predictions (they travel first): they wait, bounded for each device.
Knows nothing about envelopes, databases or batches.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

import msgspec

from cloud_learner.ingest.attaching import Attaching
from cloud_learner.ingest.early import EarlyLabels
from cloud_learner.ingest.joint_clock import JointClock
from cloud_learner.ingest.releases import Releases
from cloud_learner.ingest.rules import Rules
from cloud_learner.ingest.settling import AT_ONCE, Settling
from cloud_learner.store.examples import Example
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.ingest_state import (
    Account,
    Label,
    Lane,
    id_of,
    lane_prefix,
    pending_rows,
    prediction_key,
)
from cloud_learner.store.rocks import Transaction
from cloud_learner.store.runs import SETTLE, LabelNumber, Waiting
from edge_runtime.wire.messages import LabelRecord, Mark, PredictionRecord, Record

__all__ = ["Joiner", "Portion", "Rules"]

ANSWERS_MAX, ANSWERS_OF_PORTION = 3000, 20
_NEVER_S = float("-inf")


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
    """Joins the predictions of one family, over the state in `db`.

    `answers` are outputs that were served to predictions of the last commit, a few of the newest of
    each portion, whether or not labels have come.
    """

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
        self.answers: deque[tuple[float, ...]] = deque(maxlen=ANSWERS_MAX)
        self.clock = JointClock(rules.label_window_s, rules.idle_s, rules.awaited)
        self.clock.restore(clock_s, rules.family, accounts, now_s)
        self._rules, self._accounts = rules, accounts
        self._waiting = Waiting(db.part(rules.family))
        self._releases = Releases(rules, self._waiting, self.counters)
        self._settling = Settling(
            rules,
            self._waiting,
            self.clock,
            self._releases,
            self.counters,
            clock_s=clock_s,
            at_once=at_once,
        )
        self._attaching = Attaching(rules, self._waiting, self._releases, self.counters)
        self._early = EarlyLabels(self._waiting, self.counters)

    def join(
        self, portions: Sequence[Portion], lanes: Iterable[Lane], change: Transaction, now_s: float
    ) -> None:
        """Take in what was accepted of this family, and what moved; all belongs to `change`.

        Predictions first, then time, then labels, so that the order within a commit is nothing.
        """
        self.answers.clear()
        self._waiting.begin(change)
        self._attaching.begin(self._settling.clock_s, self._settling.mature_s)
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
        """Advance the clock, and release what is due, in order: some thousands at once."""
        late = self._attaching.take(self._settling.advance(now_s), wall_s)
        self._settling.settle(self._attaching.touched, wall_s, now_s)
        self._attaching.take_late(late)
        self._settling.forget()
        examples = self._releases.finish()
        self._waiting.finish()
        return examples

    def hear(self, device: str, marks: Iterable[Mark], now_s: float) -> None:
        """A device said where its lanes end, and the accounts know: its labels may be under way."""
        for mark in marks:
            if mark.event_class == "label":
                self._note_labels(device, mark.epoch, now_s)

    @property
    def clock_s(self) -> float:
        """The event time up to which everything that is due is released."""
        return self._settling.clock_s

    @property
    def is_behind(self) -> bool:
        """Whether more is due than could be settled at once."""
        return self._settling.is_behind

    @property
    def for_files_only(self) -> list[Example]:
        """What the last commit brought out that nobody should learn now: amended, or covered."""
        return self._releases.covered + self.amended

    @property
    def amended(self) -> list[Example]:
        """Examples that came out once more in the last commit, for a label that came after them."""
        return self._attaching.amended

    def waiting(self) -> dict[str, int]:
        """How many labels wait for a prediction; `pending` is a counter that goes down as well."""
        return {"labels_waiting": self._early.count}

    def _predict(self, portion: Portion) -> None:
        device, epoch, _ = portion.lane
        family = self._rules.family
        asked = {
            place: record
            for place, record in enumerate(portion.records)
            if type(record) is PredictionRecord and record.family == family
        }
        if not asked:
            return
        prefix, first, places = lane_prefix(device, epoch), portion.first_seq, list(asked)
        newest = [asked[place].scored for place in places[-ANSWERS_OF_PORTION:]]
        # copies: what was decoded goes as a whole, and nothing holds on to its memory
        self.answers.extend([tuple(scored[0].outputs) for scored in newest if scored])
        if self._rules.window_field:
            begins_s = self._rules.begins_s
            times_s = [begins_s(record.time_s, record.fields) for record in asked.values()]
        else:
            times_s = [record.time_s for record in asked.values()]
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
        if event_class == "label":
            self._note_labels(device, epoch, now_s)
            return
        for key, labels in self._early.passed((device, epoch), account.seq):
            for at, label in enumerate(labels):
                data = self._waiting.fresh.get(key)
                if data is None:
                    self.counters["labels_unknown"] += 1
                else:
                    self._attaching.hear(key, data, label, (0, at))

    def _note_labels(self, device: str, epoch: int, now_s: float) -> None:
        account = self._accounts.get((device, epoch, "label"))
        if account is not None:
            is_under_way = account.durable > account.seq
            self.clock.note(device, epoch, now_s, is_under_way=is_under_way)

    def _label(self, portions: list[Portion]) -> None:
        """Labels, all of a commit at once: one look at what they speak of, in the order of keys."""
        keys: list[bytes] = []
        labels: list[Label] = []
        numbers: list[LabelNumber] = []
        family = self._rules.family
        for portion in portions:
            start, arrived_s = portion.lane[0].encode() + b"\0", portion.arrived_s
            ours = [r for r in portion.records if type(r) is LabelRecord and r.family == family]
            keys += [start + r.epoch.to_bytes(8, "big") + r.seq.to_bytes(8, "big") for r in ours]
            labels += [Label(r.value, r.time_s, r.final, arrived_s) for r in ours]
            numbers += self._numbers(portion)
        self.counters["labels_provisional"] += sum([not label.final for label in labels])
        rows, fresh = self._waiting.rows(keys), self._waiting.fresh
        for key, label, number in zip(keys, labels, numbers, strict=True):
            data = fresh.get(key) or rows.get(key)
            if data is None:
                self._keep_early(key, label)
            else:
                self._attaching.hear(key, data, label, number)

    def _numbers(self, portion: Portion) -> list[LabelNumber]:
        """The numbers of the labels of this family, in order."""
        epoch, first, family = portion.lane[1], portion.first_seq, self._rules.family
        return [
            (epoch, first + at)
            for at, record in enumerate(portion.records)
            if type(record) is LabelRecord and record.family == family
        ]

    def _keep_early(self, key: bytes, label: Label) -> None:
        """A label without a prediction: of one that is still to come, or of none."""
        device, epoch, seq = id_of(key)
        account = self._accounts.get((device, epoch, "event"))
        if account is not None and seq <= account.seq:
            self.counters["labels_unknown"] += 1
            return
        self._early.keep(key, label)
