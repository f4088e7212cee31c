"""The books: what became of everything that an application said to one device.

Why: a run must be able to say that what was answered is what was archived, exactly, although a
device may be killed at any moment; so its other end keeps books of its own.

How: a device numbers what it accepts without gaps, per epoch and class, in the order of sending.
So after a crash the last number that survived decides for each request:
- acknowledged and numbered above it: lost in the linger, counted, to be sent again;
- in flight and numbered up to it: it was logged, only its answer is missing. It counts as answered,
  and a prediction's id follows from its number;
- in flight and numbered above it: it never was; to be sent again.
A label whose prediction was lost is to be sent again for the prediction's new id.

Invariants: answered - lost = records in the device's log. This holds while one application alone
writes to the device, and while nothing that is in flight at a crash would be refused.

Pure: knows nothing about sockets. Rests on what proto/socket.md says about restarts.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping

from cloud_learner.experiment.replay import DataRow
from edge_runtime.api.frames import Done, Predicted
from edge_runtime.errors import CapacityError, HeadwaterError
from edge_runtime.wire.messages import EventClass

REMEMBERED_MAX = 1 << 14
"""So many acknowledged requests can be sent again; the linger takes a few hundred at most."""

_COUNTS = (
    *("asked_again", "answers_recovered", "dones_recovered"),
    *("labels_orphaned", "labels_unasked"),
)


class Question:
    """A row that asks for a prediction; `id` is empty until the answer came."""

    __slots__ = ("id", "row")

    def __init__(self, row: DataRow) -> None:
        self.row = row
        self.id = ""


class Label:
    """What turned out to be true of the prediction that answered `question`."""

    __slots__ = ("question",)

    def __init__(self, question: Question) -> None:
        self.question = question


Item = DataRow | Question | Label
Ends = Mapping[EventClass, int]
_PLURAL = {DataRow: "observations", Question: "predictions", Label: "labels"}


class Books:
    """The books on `device`; `answered` and `lost` count by kind, `refused` by error code."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.epoch = 0
        self.answered: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.last: dict[EventClass, int] = {"event": 0, "label": 0}
        self._kept: deque[tuple[Item, int]] = deque(maxlen=REMEMBERED_MAX)

    def answer(self, item: Item, answer: Predicted | Done) -> None:
        """Book the answer to the next item, in the order of sending."""
        if isinstance(answer, Predicted):
            assert type(item) is Question
            item.id = answer.id
            seq = int(answer.id[answer.id.rindex(".") + 1 :])
        else:
            seq = answer.seq
        self.last["label" if type(item) is Label else "event"] = seq
        self.answered[_PLURAL[type(item)]] += 1
        self._kept.append((item, seq))

    def refuse(self, error: HeadwaterError) -> None:
        """Book that an item was refused: it left no trace on the device."""
        self.refused[error.code] += 1

    def is_pointless(self, item: Item) -> bool:
        """Whether `item` is a label for a question that was refused; if so it is counted."""
        if type(item) is Label and not item.question.id:
            self.counts["labels_unasked"] += 1
            return True
        return False

    def begin(self, epoch: int, last: Ends) -> None:
        """The device is met in `epoch`, where it has handed out the numbers up to `last`."""
        if epoch != self.epoch:
            self._kept.clear()  # what survived a restart is durable
        self.epoch, self.last = epoch, dict(last)

    def judge(self, in_flight: Iterable[Item], ends: Ends) -> list[Item]:
        """Decide what became of what was acknowledged, and of what is `in_flight`.

        `ends` are the last numbers that are left of the epoch. Returns what is to be sent again,
        in the original order. Raises: CapacityError `too_much_lost`.
        """
        if len(self._kept) == REMEMBERED_MAX and _is_above(*self._kept[0], ends):
            raise CapacityError(
                "too_much_lost", f"{self.device} lost more than {REMEMBERED_MAX} requests"
            )
        again = [item for item, seq in self._kept if self._is_gone(item, seq, ends, heard=True)]
        for item in in_flight:
            name = _class_of(item)
            self.last[name] = seq = self.last[name] + 1
            if not _is_above(item, seq, ends):
                self._answer_unheard(item, seq)
            if self._is_gone(item, seq, ends, heard=False):
                again.append(item)
        return again

    def _is_gone(self, item: Item, seq: int, ends: Ends, *, heard: bool) -> bool:
        """Count what became of `item`; True when it has to be sent again."""
        if _is_above(item, seq, ends):
            if heard:
                self.lost[_PLURAL[type(item)]] += 1
            else:
                self.counts["asked_again"] += 1
            if type(item) is Question:
                item.id = ""
            return True
        if type(item) is Label and not item.question.id:  # it survived its prediction
            self.counts["labels_orphaned"] += 1
            return True
        return False

    def _answer_unheard(self, item: Item, seq: int) -> None:
        if type(item) is Question:
            item.id = f"{self.device}.{self.epoch}.{seq}"
            self.counts["answers_recovered"] += 1
        else:
            self.counts["dones_recovered"] += 1
        self.answered[_PLURAL[type(item)]] += 1
        self._kept.append((item, seq))


def _class_of(item: Item) -> EventClass:
    return "label" if type(item) is Label else "event"


def _is_above(item: Item, seq: int, ends: Ends) -> bool:
    return seq > ends[_class_of(item)]
