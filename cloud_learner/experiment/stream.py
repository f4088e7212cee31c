"""A data file as the stream that a learner would have had: examples and micro-batches, in time.

Why: how a label policy, a cap or a batch size changes what is learned shows only when the stream
goes through what serves: features by the device's engine, the joiner and the batcher of ingest.

Time is that of the file: whatever happened before a moment, every device has told by then. An
example is released at the event time at which the joint clock passes what its label policy waits
for; a micro-batch with the example that completes it.

Invariants: the same predictions give the same arrays; how much goes through the joiner at once
changes nothing. Nothing is kept on disk. Rows are predictions in the order of the file; positions
are examples in order of release.

Knows nothing about learning or scoring.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.experiment.asked import Asked, Floats, Index
from cloud_learner.ingest.joiner import Joiner, Portion
from cloud_learner.rules import batcher, label_rules
from cloud_learner.store.examples import Batch, Example
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.ingest_state import Account, Lane
from cloud_learner.train.dataset import Matrix, Rows, groups_of
from cloud_learner.train.declaration import FamilyConfig
from cloud_learner.train.family import Family
from edge_runtime.wire import codec
from edge_runtime.wire.messages import (
    WIRE_VERSION,
    EventClass,
    LabelRecord,
    PredictionRecord,
    Scored,
)

AT_ONCE = 5000  # rows that one commit takes in
ENVELOPE_RECORDS = 50
_EPOCH = 1
_NOBODY = [Scored("", "stable", [0.0])]  # a record must have been scored; by whom is nothing here


class Released(msgspec.Struct, frozen=True):
    """The examples that the joiner released, in order; arrays share the first dimension."""

    rows: Index
    released_s: Floats
    known_s: Floats
    labels: Matrix
    weights: Matrix
    early: npt.NDArray[np.bool_]


class Cut(msgspec.Struct, frozen=True):
    """A micro-batch: when it was full, and the positions of its examples."""

    released_s: float
    positions: Index


class Stream(msgspec.Struct, frozen=True):
    """What was asked, and what the joiner made of it for one family."""

    family: str
    spec: str
    group: str
    asked: Asked
    released: Released

    def cuts(self, config: FamilyConfig, after_s: float) -> list[Cut]:
        """The micro-batches of what is released after `after_s`, by the batcher of ingest."""
        guard, cuts = batcher(config, label_rules(config, idle_s=math.inf)), []
        first = int(np.searchsorted(self.released.released_s, after_s, side="right"))
        places: dict[tuple[int, bool], int] = {}
        for position in range(first, len(self.released.rows)):
            example = self.example(position)
            places[example.seq, example.early] = position
            guard.add([example])
            while (batch := guard.next()) is not None:
                found = [places.pop((each.seq, each.early)) for each in batch.examples]
                cuts.append(Cut(float(self.released.released_s[position]), np.array(found)))
        return cuts

    def batch(self, number: int, cut: Cut) -> Batch:
        """A micro-batch as the learner gets it."""
        return Batch(number, [self.example(int(position)) for position in cut.positions])

    def known_before(self, time_s: float) -> Index:
        """Positions of what was released up to `time_s`, mature."""
        end = int(np.searchsorted(self.released.released_s, time_s, side="right"))
        return np.flatnonzero(~self.released.early[:end])

    def rows_at(self, positions: Index) -> Rows:
        """Examples as rows to learn from."""
        rows = self.released.rows[positions]
        fields = [self.asked.fields[row] for row in rows] if self.group else []
        return Rows(
            self.asked.features[rows],
            self.released.labels[positions],
            self.released.weights[positions],
            groups_of(fields, self.group),
        )

    def example(self, position: int) -> Example:
        """A released example, but for what never orders or trains."""
        asked, released = self.asked, self.released
        row = int(released.rows[position])
        return Example(
            device=asked.devices[row],
            epoch=_EPOCH,
            seq=row + 1,
            family=self.family,
            time_s=float(asked.times_s[row]),
            label_time_s=float(released.known_s[position]),
            features=asked.features[row].astype("<f4").tobytes(),
            spec=self.spec,
            label=float(released.labels[position]),
            propensity=1.0,
            scored=[],
            arrived_s=0.0,
            matured_s=0.0,
            fields=asked.fields[row] if asked.fields else {},
            weight=float(released.weights[position]),
            early=bool(released.early[position]),
        )


def streamed(family: Family, asked: Asked, *, at_once: int = AT_ONCE) -> Stream:
    """What the joiner releases of `asked`, under the label policy of the family."""
    config = family.config
    with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
        joining = _Joining(config, asked, family.spec.hash, Path(folder))
        try:
            found = list(joining.released(at_once))
        finally:
            joining.close()
    rows, released_s, known_s, labels, weights, early = (
        zip(*found, strict=True) if found else ((), (), (), (), (), ())
    )
    released = Released(
        np.array(rows, np.intp),
        np.array(released_s, np.float64),
        np.array(known_s, np.float64),
        np.array(labels, np.float32),
        np.array(weights, np.float32),
        np.array(early, np.bool_),
    )
    return Stream(family.name, family.spec.hash, config.task.group, asked, released)


class _Joining:
    """Drives a joiner over a database of its own, from arrays in the order of time."""

    def __init__(self, config: FamilyConfig, asked: Asked, spec: str, folder: Path) -> None:
        self._config, self._asked, self._spec = config, asked, spec
        self._accounts: dict[Lane, Account] = {
            (device, _EPOCH, event_class): Account()
            for device in dict.fromkeys(asked.devices)
            for event_class in ("event", "label")
        }
        self._db = IngestDb(folder / "ingest", [config.name])
        self._rules = label_rules(config, idle_s=math.inf)
        self._joiner = Joiner(self._rules, self._db, self._accounts, -math.inf, 0.0)
        self._rows: defaultdict[str, list[int]] = defaultdict(list)
        self._seqs: list[int] = []
        for row, device in enumerate(asked.devices):
            self._rows[device].append(row)
            self._seqs.append(len(self._rows[device]))
        order = np.argsort(asked.known_s, kind="stable")  # NaN comes last
        self._known = order[: int(np.isfinite(asked.known_s).sum())]
        self._told = 0

    def close(self) -> None:
        self._db.close()

    def released(self, at_once: int) -> Iterator[tuple[int, float, float, float, float, bool]]:
        """Row, time of release, time of the label, label, weight, and whether it is early."""
        times_s = self._asked.times_s
        for first in range(0, len(times_s), at_once):
            rows = range(first, min(first + at_once, len(times_s)))
            yield from self._commit(rows, float(times_s[rows[-1]]))
        yield from self._commit(range(0), self._asked.end_s)

    def _commit(
        self, rows: range, now_s: float
    ) -> Iterator[tuple[int, float, float, float, float, bool]]:
        portions = [*self._predictions(rows), *self._labels(now_s)]
        for (device, _, event_class), account in self._accounts.items():
            account.newest_s = {self._config.name: now_s}
            self._joiner.clock.hear(device, event_class, now_s, now_s)
        lanes = list(self._accounts)
        while True:
            change = self._db.begin()
            self._joiner.join(portions, lanes, change, now_s)
            examples = self._joiner.settle(now_s, now_s)
            self._db.commit(change, self._db.meta(), {})
            yield from map(self._entry, examples)
            if not self._joiner.is_behind:
                return
            portions = []

    def _entry(self, example: Example) -> tuple[int, float, float, float, float, bool]:
        row = self._rows[example.device][example.seq - 1]
        known_s = example.label_time_s
        when_s = self._rules.released_s(example)
        return row, when_s, known_s, example.label, example.weight, example.early

    def _predictions(self, rows: range) -> Iterator[Portion]:
        asked, config = self._asked, self._config
        kind = next(name for name, kind in config.events.items() if kind.predicts)
        records: defaultdict[str, list[PredictionRecord]] = defaultdict(list)
        for row in rows:
            device, features = asked.devices[row], asked.features[row].astype("<f4").tobytes()
            time_s, fields = float(asked.times_s[row]), asked.fields[row] if asked.fields else {}
            what = (config.name, kind, time_s, fields, self._spec, features, 1.0, _NOBODY)
            records[device].append(PredictionRecord(*what))
        for device, some in records.items():
            yield from self._portions((device, _EPOCH, "event"), some)

    def _labels(self, now_s: float) -> Iterator[Portion]:
        """The labels that became known up to now and were not told yet."""
        asked, records = self._asked, defaultdict[str, list[LabelRecord]](list)
        end = int(np.searchsorted(asked.known_s[self._known], now_s, side="right"))
        for row in self._known[self._told : end].tolist():
            value, known_s = float(asked.labels[row]), float(asked.known_s[row])
            label = LabelRecord(self._config.name, _EPOCH, self._seqs[row], value, known_s)
            records[asked.devices[row]].append(label)
        self._told = end
        for device, some in records.items():
            yield from self._portions((device, _EPOCH, "label"), some)

    def _portions(
        self, lane: tuple[str, int, EventClass], records: list[PredictionRecord] | list[LabelRecord]
    ) -> Iterator[Portion]:
        """In envelopes as short as a device's: one is looked at for each day that ends in it."""
        for first in range(0, len(records), ENVELOPE_RECORDS):
            yield self._portion(lane, records[first : first + ENVELOPE_RECORDS])

    def _portion(
        self, lane: tuple[str, int, EventClass], records: list[PredictionRecord] | list[LabelRecord]
    ) -> Portion:
        account = self._accounts[lane]
        first = account.seq + 1
        account.seq += len(records)
        account.archived = account.seq
        envelope = codec.encode((WIRE_VERSION, *lane, first, records))
        return Portion(lane, first, records, envelope, 0.0)
