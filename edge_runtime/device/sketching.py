"""Sketches: what this device's models are given, summed up for the learner once a minute.

Why: the learner sees features only of predictions whose records have come, and knows that they are
odd only once labels are due. A device can say at once that what it sees has changed.

The records are read back from the log, a few at each report, by the thread that calls: a prediction
does nothing for it, and what is summed up is what was logged.

Invariants: at most `RECORDS_MAX` records are read at a time, those logged last, so that the cost
does not grow with the traffic; at most `SPECS_MAX` histograms are in memory. A sketch is told once,
and is of `ROWS_MIN` rows or more. What cannot be read now is left out.

Knows nothing about reports and the network. One thread at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from edge_runtime.clock import Clock
from edge_runtime.device.family import Family
from edge_runtime.errors import CapacityError, RequestError
from edge_runtime.events.log import EventLog
from edge_runtime.features.histogram import Histograms
from edge_runtime.features.spec import Spec
from edge_runtime.wire import codec
from edge_runtime.wire.messages import FeatureSketch, PredictionRecord

EVERY_S = 60.0
ROWS_MIN = 500
RECORDS_MAX = 32
FOLD_ROWS = 256
READ_BYTES_MAX = 1 << 18
SPECS_MAX = 8

Key = tuple[str, str]


class Sketcher:
    """Sums up the predictions of `families` that `log` takes from now on."""

    def __init__(self, log: EventLog, families: Mapping[str, Family], clock: Clock) -> None:
        self._log, self._families, self._clock = log, families, clock
        self._seen = log.durable("event")[1]
        self._open: dict[Key, _Open] = {}
        self._due_s = clock.now_s() + EVERY_S
        self._counts = {"sketched_rows": 0, "sketches": 0}

    def look(self) -> list[FeatureSketch]:
        """Take the newest records in; once a minute, the sketches that have rows enough.

        Reads the disk.
        """
        self._read()
        now_s = self._clock.now_s()
        if now_s < self._due_s:
            return []
        self._due_s = now_s + EVERY_S
        full = [key for key, each in self._open.items() if each.rows >= ROWS_MIN]
        self._counts["sketches"] += len(full)
        return [self._open.pop(key).sketch(*key) for key in full]

    def statistics(self) -> dict[str, int]:
        """Rows that were summed up, and sketches that were made of them."""
        return dict(self._counts)

    def _read(self) -> None:
        epoch, last = self._log.durable("event")
        start = max(self._seen, last - RECORDS_MAX)
        try:
            found = self._log.read("event", epoch, start, READ_BYTES_MAX, RECORDS_MAX)
        except CapacityError:
            return
        self._seen = last
        rows: dict[Key, list[PredictionRecord]] = {}
        for _, data in found:
            record = _prediction(data)
            if record is not None:
                rows.setdefault((record.family, record.spec), []).append(record)
        for key, records in rows.items():
            self._add(key, records)

    def _add(self, key: Key, records: list[PredictionRecord]) -> None:
        each = self._open.get(key) or self._opened(key)
        if each is not None:
            each.add(records)
            self._counts["sketched_rows"] += len(records)

    def _opened(self, key: Key) -> _Open | None:
        """A new histogram; None for a spec that no longer serves. The oldest makes room."""
        family, spec_hash = key
        engines = self._families[family].pipeline.engines if family in self._families else {}
        if spec_hash not in engines:
            return None
        if len(self._open) >= SPECS_MAX:
            del self._open[next(iter(self._open))]
        made = self._open[key] = _Open(engines[spec_hash].spec)
        return made


class _Open:
    """The histogram of a spec in the making; rows wait to be counted together, which is cheaper."""

    def __init__(self, spec: Spec) -> None:
        self._histograms = Histograms(spec.columns)
        self._waiting: list[bytes] = []
        self._until_s = -math.inf

    @property
    def rows(self) -> int:
        return self._histograms.rows + len(self._waiting)

    def add(self, records: list[PredictionRecord]) -> None:
        self._waiting += [record.features for record in records]
        self._until_s = max(self._until_s, *(record.time_s for record in records))
        if len(self._waiting) >= FOLD_ROWS:
            self._fold()

    def sketch(self, family: str, spec: str) -> FeatureSketch:
        self._fold()
        columns = self._histograms.sketches()
        return FeatureSketch(family, spec, self._histograms.rows, self._until_s, columns)

    def _fold(self) -> None:
        count, joined = len(self._waiting), b"".join(self._waiting)
        self._waiting = []
        if count:
            self._histograms.add(np.frombuffer(joined, "<f4").reshape(count, -1))


def _prediction(data: bytes) -> PredictionRecord | None:
    try:
        record = codec.decode_record(data)
    except RequestError:
        return None
    return record if isinstance(record, PredictionRecord) else None
