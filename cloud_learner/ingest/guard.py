"""The guard: what may enter learning at all, and how much of it from one device at a time.

Why: one value that is not a number ruins a network, and one device that floods steers it; a cap on
each device's share of a micro-batch bounds what k hostile devices can do to k * cap / size.

Invariants: a batch holds exactly `size` examples, at most `cap` of one device, in release order.
What is over the cap waits for the next batch and is counted once. Which batches come out depends
only on the order in which examples come in. Waiting is bounded for each device; what exceeds the
bound is handed back to be marked as dropped, never lost silently.

Knows nothing about envelopes, databases or labels to come.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from cloud_learner.store.examples import Batch, Example
from edge_runtime.errors import ConfigError
from edge_runtime.wire.messages import (
    OMITTED,
    EventClass,
    LabelRecord,
    ObservationRecord,
    PredictionRecord,
    Record,
)

NUMBER_MAX = (1 << 53) - 1
"""The largest epoch or sequence number: what every language's numbers hold exactly."""
TIME_S_MIN, TIME_S_MAX = -62_135_596_800.0, 253_402_300_800.0  # the years 1 to 9999
WAITING_BATCHES = 40


def refusal(record: Record, event_class: EventClass, widths: Mapping[str, int]) -> str:
    """Why `record` must not be taken for a fact: a stable code, or "" when it may.

    `widths` are the numbers of features of the known specs, by hash.
    """
    if isinstance(record, LabelRecord) != (event_class == "label"):
        return "wrong_class"
    if not TIME_S_MIN <= record.time_s < TIME_S_MAX:
        return "bad_time"
    if isinstance(record, LabelRecord):
        return _label_refusal(record)
    if isinstance(record, ObservationRecord):
        return ""
    return _prediction_refusal(record, widths)


def all_fine(
    records: Sequence[Record | int], event_class: EventClass, widths: Mapping[str, int]
) -> bool:
    """Whether `refusal` would refuse none of these; False may also mean that it is not sure.

    An omitted record is fine when its key is known.
    """
    kinds = set(map(type, records))
    if int in kinds:
        if not OMITTED.keys() >= {record for record in records if type(record) is int}:
            return False
        records = [record for record in records if type(record) is not int]
        kinds.discard(int)
    if event_class == "label":
        return not kinds or (kinds == {LabelRecord} and _labels_fine(records))
    if LabelRecord in kinds:
        return False
    if ObservationRecord in kinds:
        seen = [record for record in records if type(record) is ObservationRecord]
        records = [record for record in records if type(record) is PredictionRecord]
        if not _times_fine([record.time_s for record in seen]):
            return False
    return not records or _predictions_fine(records, widths)


def _times_fine(times: Sequence[float]) -> bool:
    # A sum shows a NaN, which the comparisons of min and max may pass over.
    return math.isfinite(sum(times)) and min(times) >= TIME_S_MIN and max(times) < TIME_S_MAX


def _labels_fine(labels: Sequence[Any]) -> bool:
    numbers = [label.seq for label in labels] + [label.epoch for label in labels]
    return (
        _times_fine([label.time_s for label in labels])
        and math.isfinite(sum([label.value for label in labels]))
        and min(numbers) > 0
        and max(numbers) <= NUMBER_MAX
    )


def _predictions_fine(asked: Sequence[Any], widths: Mapping[str, int]) -> bool:
    features = [record.features for record in asked]
    scored = [record.scored for record in asked]
    chances = {record.propensity for record in asked}  # few, most often
    specs = {record.spec for record in asked}
    if len(specs) > 1:
        sizes = {(record.spec, len(record.features)) for record in asked}
    else:
        sizes = {(spec, size) for spec in specs for size in set(map(len, features))}
    if not _widths_fine(sizes, widths):
        return False
    outputs = [arm.outputs for arms in scored for arm in arms]
    return (
        _times_fine([record.time_s for record in asked])
        and bool(np.isfinite(np.frombuffer(b"".join(features), "<f4")).all())
        and min(chances) > 0
        and max(chances) <= 1
        and math.isfinite(sum(chances))
        and all(scored)
        and all(outputs)
        and math.isfinite(sum(chain.from_iterable(outputs)))
    )


def _widths_fine(sizes: Iterable[tuple[str, int]], widths: Mapping[str, int]) -> bool:
    return all(size % 4 == 0 and size == 4 * widths.get(spec, size // 4) for spec, size in sizes)


def _label_refusal(record: LabelRecord) -> str:
    if not math.isfinite(record.value):
        return "bad_label"
    named = 0 < record.epoch <= NUMBER_MAX and 0 < record.seq <= NUMBER_MAX
    return "" if named else "bad_number"


def _prediction_refusal(record: PredictionRecord, widths: Mapping[str, int]) -> str:
    size = len(record.features)
    if size % 4 or size != 4 * widths.get(record.spec, size // 4):
        return "bad_features"
    if not _all_finite(memoryview(record.features).cast("f")):
        return "bad_features"
    if not 0 < record.propensity <= 1:
        return "bad_propensity"
    if not record.scored or not all(
        scored.outputs and _all_finite(scored.outputs) for scored in record.scored
    ):
        return "bad_outputs"
    return ""


def _all_finite(values: Iterable[float]) -> bool:
    # The sum of doubles that are finite float32 values cannot overflow; other sums that do are as
    # useless as infinity.
    return math.isfinite(sum(values))


class Batcher:
    """Cuts the stream of released examples into micro-batches. Raises: ConfigError `bad_cap`."""

    def __init__(self, size: int = 500, cap: int = 250) -> None:
        if not 1 <= cap <= size:
            raise ConfigError(
                "bad_cap",
                f"a cap of {cap} examples of one device does not fit a batch of {size}",
                "the cap is between 1 and the size; a single device needs a cap equal to the size",
            )
        self.counters: Counter[str] = Counter()
        self.number = 0
        self._size, self._cap = size, cap
        self._filling: list[Example] = []
        self._shares: Counter[str] = Counter()
        self._deferred: deque[Example] = deque()
        self._waiting: Counter[str] = Counter()
        self._ready: deque[Batch] = deque()

    def restore(self, number: int, unbatched: Iterable[Example]) -> None:
        """Go on after batch `number` with the released examples that no batch holds yet."""
        self.number = number
        for example in unbatched:
            if not self._place(example):  # the cap is lower than it was; these were promised
                self._defer(example)
        self.counters.clear()  # they were counted when they came first

    def add(self, examples: Iterable[Example]) -> list[Example]:
        """Take released examples in order; returns those dropped because too many wait."""
        return [example for example in examples if not self._place(example)]

    def next(self) -> Batch | None:
        """The next full batch, if there is one."""
        return self._ready.popleft() if self._ready else None

    def statistics(self) -> dict[str, int]:
        """Counters, and how many examples wait for a batch."""
        waiting = len(self._filling) + len(self._deferred)
        return {**self.counters, "unbatched": waiting}

    def _place(self, example: Example) -> bool:
        if self._shares[example.device] < self._cap:
            self._fill(example)
        elif self._waiting[example.device] < WAITING_BATCHES * self._cap:
            self.counters["deferred_over_cap"] += 1
            self._defer(example)
        else:
            self.counters["dropped_over_cap"] += 1
            return False
        return True

    def _fill(self, example: Example) -> None:
        self._filling.append(example)
        self._shares[example.device] += 1
        while len(self._filling) == self._size:
            self._complete()

    def _complete(self) -> None:
        """Hand out the full batch, and begin the next with those that waited for it."""
        self.number += 1
        self.counters["batches"] += 1
        self._ready.append(Batch(self.number, self._filling))
        waiting, self._deferred = self._deferred, deque()
        self._filling = []
        self._shares.clear()
        self._waiting.clear()
        for example in waiting:
            fits = len(self._filling) < self._size and self._shares[example.device] < self._cap
            if fits:
                self._filling.append(example)
                self._shares[example.device] += 1
            else:
                self._defer(example)

    def _defer(self, example: Example) -> None:
        self._deferred.append(example)
        self._waiting[example.device] += 1
