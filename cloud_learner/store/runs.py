"""Predictions that wait, as runs on disk: what belongs together comes and goes together.

Why: ten million predictions wait for their labels; one entry of a calendar for each of them would
cost more than the predictions. Consecutive records of one envelope mature together, more or less,
so the calendar names runs.

Invariants: a run is named by the key of its first prediction, and lies beside the rows of its
predictions. What a transaction has not yet written is seen here as if it were: `Waiting` lays the
rows and runs of the present commit over the committed ones. An entry of the calendar may be stale;
whoever follows it looks at the rows, which decide.

| entry of `due` | means |
|---|---|
| `s` moment, run | the earliest prediction of the run that has not matured happened then |
| `w` device, moment, run | it has matured, has no label, and waits for the device's own time |
| `f` moment, run | the run is settled, and is forgotten then |
| `l` moment, prediction, number of the label | the label speaks of the prediction from then on |
| `n` name | a note that is kept with the commit, and belongs to no moment |

The value is the last number of the run, the label, or the note.

Knows nothing about what a label means or when something matures.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import msgspec

from cloud_learner.store.ingest_state import Label, Row, id_of, moment_key, moment_of, number_key
from cloud_learner.store.part import Part
from cloud_learner.store.rocks import Transaction
from edge_runtime.wire.messages import Record

Due = Literal[b"s", b"f"]
SETTLE: Due = b"s"
FORGET: Due = b"f"
_WAIT, _LABEL, _NOTE = b"w", b"l", b"n"
_LABEL_NUMBER_BYTES = 16

LabelNumber = tuple[int, int]
"""Of a label record: its epoch and its sequence number; what came in one lane sorts as it came."""


class _Envelope(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """An envelope as it lies in a run; what may not be used of it has no row."""

    version: int
    device: str
    epoch: int
    event_class: str
    base_seq: int
    records: list[Record | int]


_envelope = msgspec.msgpack.Decoder(_Envelope).decode


class StoredRun:
    """A run: its last number, and its records, which are decoded when one is asked for."""

    def __init__(self, last_seq: int, data: memoryview) -> None:
        self.last_seq, self._data = last_seq, data
        self._decoded: _Envelope | None = None

    def record(self, seq: int) -> Record | int:
        """The record with this number."""
        if self._decoded is None:
            self._decoded = _envelope(self._data)
        return self._decoded.records[seq - self._decoded.base_seq]


class Taken(NamedTuple):
    """Runs and their last numbers: all that stood before `before_s`, which is the moment asked for
    if they are all that stood before that.
    """

    runs: dict[bytes, int]
    before_s: float
    is_all: bool


class TakenLabels(NamedTuple):
    """Labels and the keys of their predictions, by moment, prediction and number of the label; all
    that stood before `before_s`, as of `Taken`.
    """

    labels: list[tuple[bytes, Label]]
    before_s: float
    is_all: bool


class Waiting:
    """Rows, runs, early labels and the calendar of one family, and the commit in the making."""

    def __init__(self, part: Part) -> None:
        self._rocks = part
        self._change = part.begin()
        self.fresh: dict[bytes, bytes] = {}
        self._fresh_runs: dict[bytes, bytes] = {}
        self._fresh_due: defaultdict[bytes, dict[bytes, bytes]] = defaultdict(dict)
        self._fresh_early: dict[bytes, list[Label]] = {}
        self._floors: dict[bytes, bytes] = {}

    def begin(self, change: Transaction) -> None:
        """From now on everything belongs to `change`."""
        self._change = self._rocks.within(change)
        self.fresh, self._fresh_runs, self._fresh_early = {}, {}, {}
        self._fresh_due = defaultdict(dict)

    def finish(self) -> None:
        """Hand over to the transaction what was collected."""
        self._change.put_many("rows", self.fresh.items())
        self._change.put_many("runs", self._fresh_runs.items())
        for entries in self._fresh_due.values():
            self._change.put_many("due", entries.items())
        for key, labels in self._fresh_early.items():
            self._change.put("early", key, b"".join([label.packed() for label in labels]))

    def rows(self, keys: list[bytes]) -> dict[bytes, bytes]:
        """Those rows of these keys that exist."""
        found = {key: row for key in keys if (row := self.fresh.get(key)) is not None}
        asked = sorted(set(keys) - found.keys())
        values = self._rocks.get_many("rows", asked)
        found.update((k, v) for k, v in zip(asked, values, strict=True) if v is not None)
        return found

    def set_row(self, key: bytes, row: Row) -> None:
        """Set the row of a prediction."""
        self.fresh[key] = row.packed()

    def add_run(self, key: bytes, last_seq: int, envelope: bytes) -> None:
        """Keep a run; its rows are in `fresh`."""
        self._fresh_runs[key] = number_key(last_seq) + envelope

    def run(self, key: bytes) -> StoredRun | None:
        """The run with this key; None when it is forgotten."""
        value = self._fresh_runs.get(key) or self._rocks.get("runs", key)
        if value is None:
            return None
        return StoredRun(int.from_bytes(value[:8], "big"), memoryview(value)[8:])

    def rows_between(self, key: bytes, last_seq: int) -> list[tuple[bytes, Row]]:
        """The rows of the predictions of a run, in order."""
        prefix, first = key[:-8], int.from_bytes(key[-8:], "big")
        found: dict[bytes, bytes] = {}
        if key not in self._fresh_runs:
            found.update(self._rocks.scan("rows", key, prefix + number_key(last_seq + 1)))
        if self.fresh:
            keys = (prefix + number_key(seq) for seq in range(first, last_seq + 1))
            found.update((each, self.fresh[each]) for each in keys if each in self.fresh)
        return [(each, Row.unpacked(found[each])) for each in sorted(found)]

    def file(self, kind: Due, time_s: float, run: bytes, last_seq: int) -> None:
        """Enter a run in the calendar."""
        self._enter(kind, kind + moment_key(time_s) + run, number_key(last_seq))

    def file_for_device(self, time_s: float, run: bytes, last_seq: int) -> None:
        """Enter a run that waits for its device's own time."""
        prefix = _device_prefix(id_of(run)[0])
        self._enter(prefix, prefix + moment_key(time_s) + run, number_key(last_seq))

    def stash(self, time_s: float, key: bytes, number: LabelNumber, label: Label) -> None:
        """Keep a label of a prediction until its moment."""
        epoch, seq = number
        entry = _LABEL + moment_key(time_s) + key + number_key(epoch) + number_key(seq)
        self._enter(_LABEL, entry, label.packed())

    def take_labels(self, before_s: float, labels_max: int) -> TakenLabels:
        """Take stashed labels whose moment is before another, about so many, the earliest first."""
        entries, end_s, is_all = self._take(_LABEL, before_s, labels_max, _one)
        labels = [(rest[:-_LABEL_NUMBER_BYTES], Label.unpacked(value)) for rest, value in entries]
        return TakenLabels(labels, end_s, is_all)

    def note(self, name: bytes) -> bytes | None:
        """What was noted under this name by the last commit."""
        return self._rocks.get("due", _NOTE + name)

    def set_note(self, name: bytes, value: bytes) -> None:
        """Note something with the commit."""
        self._change.put("due", _NOTE + name, value)

    def take(self, kind: Due, before_s: float, records_max: int) -> Taken:
        """Take runs out of the calendar that stand before a moment, the earliest first.

        They hold `records_max` records or a little more; `Taken.before_s` says how far that went.
        """
        return self._take_runs(kind, before_s, records_max)

    def take_for_device(self, device: str, before_s: float, records_max: int) -> Taken:
        """The same of those that wait for a device's own time."""
        return self._take_runs(_device_prefix(device), before_s, records_max)

    def devices_waited_for(self) -> set[str]:
        """The devices for whose own time a committed run waits."""
        found: set[str] = set()
        at = _WAIT
        while entry := next(self._rocks.scan("due", at, b"x"), None):
            name = entry[0][1 : entry[0].index(b"\0")]
            found.add(name.decode())
            at = _WAIT + name + b"\1"
        return found

    def forget(self, run: bytes, last_seq: int) -> None:
        """Delete a run and its rows."""
        first = int.from_bytes(run[-8:], "big")
        for key, _ in self._rocks.scan("rows", run, run[:-8] + number_key(last_seq + 1)):
            self._change.delete("rows", key)
        for seq in range(first, last_seq + 1) if self.fresh else ():
            self.fresh.pop(run[:-8] + number_key(seq), None)
        self.forget_records(run)

    def forget_records(self, run: bytes) -> None:
        """Delete the records of a run; its rows stay."""
        if self._fresh_runs.pop(run, None) is None:
            self._change.delete("runs", run)

    def early(self, prefix: bytes, above: int, through: int) -> Iterator[tuple[bytes, list[Label]]]:
        """The committed early labels of a lane between two numbers, in order."""
        start, end = prefix + number_key(above + 1), prefix + number_key(through + 1)
        for key, value in self._rocks.scan("early", start, end):
            yield key, Label.all_unpacked(value)

    def early_labels(self, key: bytes) -> list[Label]:
        """The labels that wait for a prediction, in the order in which they came."""
        fresh = self._fresh_early.get(key)
        data = self._rocks.get("early", key) if fresh is None else None
        return Label.all_unpacked(data or b"") if fresh is None else fresh

    def set_early(self, key: bytes, labels: list[Label]) -> None:
        """Let labels wait for their prediction."""
        self._fresh_early[key] = labels

    def delete_early(self, key: bytes) -> None:
        """The labels of a prediction wait no longer."""
        self._change.delete("early", key)

    def all_early(self) -> Iterator[bytes]:
        """The keys of all committed early labels."""
        return (key for key, _ in self._rocks.scan("early", b"", b"\xff"))

    def _enter(self, prefix: bytes, entry: bytes, value: bytes) -> None:
        self._fresh_due[prefix][entry] = value
        floor = self._floors.get(prefix)
        if floor is not None and entry < floor:
            self._floors[prefix] = entry

    def _take_runs(self, prefix: bytes, before_s: float, records_max: int) -> Taken:
        entries, end_s, is_all = self._take(prefix, before_s, records_max, _records_of)
        runs = {run: int.from_bytes(value, "big") for run, value in entries}
        return Taken(runs, end_s, is_all)

    def _take(
        self, prefix: bytes, before_s: float, weight_max: int, weigh: Callable[[bytes, bytes], int]
    ) -> tuple[list[tuple[bytes, bytes]], float, bool]:
        """What follows the moment in the keys, and the values; how far it went, and if to the end.

        From the first entry that may exist: what was taken leaves graves that slow a scan.
        """
        end, start = prefix + moment_key(before_s), self._floors.get(prefix, prefix)
        entries = self._fresh_due[prefix]
        fresh = sorted(each for each in entries.items() if each[0] < end)
        taken: list[tuple[bytes, bytes]] = []
        weight, moment = 0, b""
        for entry, value in heapq.merge(self._rocks.scan("due", start, end), fresh):
            at, rest = entry[len(prefix) : len(prefix) + 8], entry[len(prefix) + 8 :]
            if weight >= weight_max and at != moment:
                self._floors[prefix] = entry
                return taken, math.nextafter(moment_of(moment), math.inf), False
            if entries.pop(entry, None) is None:
                self._change.delete("due", entry)
            taken.append((rest, value))
            weight += weigh(rest, value)
            moment = at
        self._floors[prefix] = end
        return taken, before_s, True


def _records_of(run: bytes, last_seq: bytes) -> int:
    return int.from_bytes(last_seq, "big") + 1 - int.from_bytes(run[-8:], "big")


def _one(_rest: bytes, _value: bytes) -> int:
    return 1


def _device_prefix(device: str) -> bytes:
    return b"%s%s\0" % (_WAIT, device.encode())
