"""The guard: what may enter learning at all, and how much of it from one device at a time.

Why: one value that is not a number ruins a network, a label that is none of the task's stops the
training, and one device that floods steers it; a cap on each device's part of a micro-batch bounds
what k hostile devices can do to k * cap / its size.

Invariants: a batch holds `size` examples, or fewer but two where they span `batch_s` of event time;
at most `cap` of one device, early and mature ones together, in release order. What is over the cap
waits for the next batch and is counted once. Which batches come out depends only on the order in
which examples come in. Waiting is bounded for each device; what exceeds the bound is handed back to
be marked as dropped, never lost silently.

Knows nothing about envelopes, databases or labels to come.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np

from cloud_learner.stats.tasks import Task
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
_TIMED_MIN = 2  # one example says nothing about a loss without its device

Indices = Mapping[str, Sequence[int]]
"""Of each known spec, by hash, how many indices each column has; 0: it is a number."""
Tasks = Mapping[str, Task]
NO_TASKS: Tasks = MappingProxyType({})


def refusal(
    record: Record, event_class: EventClass, indices: Indices, tasks: Tasks = NO_TASKS
) -> str:
    """Why `record` must not be taken for a fact: a stable code, or "" when it may.

    An index beyond its column's would look outside of a table; `tasks` are those of the known
    families, by name: of others, any finite label is taken.
    """
    if isinstance(record, LabelRecord) != (event_class == "label"):
        return "wrong_class"
    if not TIME_S_MIN <= record.time_s < TIME_S_MAX:
        return "bad_time"
    if isinstance(record, LabelRecord):
        return _label_refusal(record, tasks)
    if isinstance(record, ObservationRecord):
        return ""
    return _prediction_refusal(record, indices)


def all_fine(
    records: Sequence[Record | int],
    event_class: EventClass,
    indices: Indices,
    tasks: Tasks = NO_TASKS,
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
        return not kinds or (kinds == {LabelRecord} and _labels_fine(records, tasks))
    if LabelRecord in kinds:
        return False
    if ObservationRecord in kinds:
        seen = [record for record in records if type(record) is ObservationRecord]
        records = [record for record in records if type(record) is PredictionRecord]
        if not _times_fine([record.time_s for record in seen]):
            return False
    return not records or _predictions_fine(records, indices)


def _times_fine(times: Sequence[float]) -> bool:
    # A sum shows a NaN, which the comparisons of min and max may pass over.
    return math.isfinite(sum(times)) and min(times) >= TIME_S_MIN and max(times) < TIME_S_MAX


def _labels_fine(labels: Sequence[Any], tasks: Tasks) -> bool:
    numbers = [label.seq for label in labels] + [label.epoch for label in labels]
    values = [label.value for label in labels]
    return (
        _times_fine([label.time_s for label in labels])
        and math.isfinite(sum(values))
        and min(numbers) > 0
        and max(numbers) <= NUMBER_MAX
        and _values_fine({label.family for label in labels}, labels, values, tasks)
    )


def _values_fine(
    families: set[str], labels: Sequence[Any], values: list[float], tasks: Tasks
) -> bool:
    """Whether all labels, finite as they are, fit the tasks of their families."""
    if len(families) == 1:
        task = tasks.get(next(iter(families)))
        return task is None or not any(map(task.why_unfit, _extremes(task, values)))
    parts = {name: [each.value for each in labels if each.family == name] for name in families}
    return all(_values_fine({name}, labels, part, tasks) for name, part in parts.items())


def _extremes(task: Task, values: list[float]) -> Iterable[float]:
    """Values of which each fits if all of them do: of a range its ends, of classes those named."""
    return set(values) if task.kind == "multiclass" else (min(values), max(values))


def _predictions_fine(asked: Sequence[Any], indices: Indices) -> bool:
    scored = [record.scored for record in asked]
    chances = {record.propensity for record in asked}  # few, most often
    specs = {record.spec for record in asked}
    outputs = [arm.outputs for arms in scored for arm in arms]
    return (
        all(
            _features_fine([r.features for r in asked if r.spec == spec], indices.get(spec))
            for spec in specs
        )
        and _times_fine([record.time_s for record in asked])
        and min(chances) > 0
        and max(chances) <= 1
        and math.isfinite(sum(chances))
        and all(scored)
        and all(outputs)
        and math.isfinite(sum(chain.from_iterable(outputs)))
    )


def _features_fine(features: Sequence[bytes], columns: Sequence[int] | None) -> bool:
    """Whether they are finite, as many as the columns, and indices within those; None: unknown."""
    sizes = set(map(len, features))
    if any(size % 4 for size in sizes) or (columns is not None and sizes != {4 * len(columns)}):
        return False
    values = np.frombuffer(b"".join(features), "<f4")
    if not np.isfinite(values).all():
        return False
    if columns is None or not any(columns):
        return True
    words = np.flatnonzero(columns)
    found = values.reshape(-1, len(columns))[:, words]
    return bool(((found >= 0) & (found < np.array(columns)[words])).all())


def _label_refusal(record: LabelRecord, tasks: Tasks) -> str:
    task = tasks.get(record.family)
    if not math.isfinite(record.value) or (task is not None and task.why_unfit(record.value)):
        return "bad_label"
    named = 0 < record.epoch <= NUMBER_MAX and 0 < record.seq <= NUMBER_MAX
    return "" if named else "bad_number"


def _prediction_refusal(record: PredictionRecord, indices: Indices) -> str:
    if not _features_fine([record.features], indices.get(record.spec)):
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


def _time_of(example: Example) -> float:
    return example.time_s


class Batcher:
    """Cuts the stream of released examples into micro-batches. Raises: ConfigError `bad_cap`.

    A batch is cut at `size` examples, or when the next of any device is due `batch_s` of event time
    after its first (0: by count alone), but never with fewer than two. `released_s` says when an
    example is due, as `Rules.released_s` does.
    """

    def __init__(
        self,
        size: int = 500,
        cap: int = 250,
        batch_s: float = 0.0,
        released_s: Callable[[Example], float] = _time_of,
    ) -> None:
        if not 1 <= cap <= size:
            raise ConfigError(
                "bad_cap",
                f"a cap of {cap} examples of one device does not fit a batch of {size}",
                "the cap is between 1 and the size; a single device needs a cap equal to the size",
            )
        self.counters: Counter[str] = Counter()
        self.number = 0
        self._size, self._cap = size, cap
        self._batch_s, self._released_s = batch_s, released_s
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
        """The next batch that was cut, if there is one."""
        return self._ready.popleft() if self._ready else None

    def statistics(self) -> dict[str, int]:
        """Counters, and how many examples wait for a batch."""
        waiting = len(self._filling) + len(self._deferred)
        return {**self.counters, "unbatched": waiting}

    def _place(self, example: Example) -> bool:
        self._cut_before(example)
        if self._shares[example.device] < self._cap:
            self._fill(example)
            self._cut_before(example)
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

    def _cut_before(self, example: Example) -> None:
        """Cut what is full, and what is over by the time at which this example is due."""
        while len(self._filling) == self._size or self._is_over(example):
            self._complete()

    def _is_over(self, example: Example) -> bool:
        if not self._batch_s or len(self._filling) < _TIMED_MIN:
            return False
        since_s = self._released_s(self._filling[0])
        return self._released_s(example) - since_s >= self._batch_s

    def _complete(self) -> None:
        """Hand out the batch, and begin the next with those that waited for it."""
        self.number += 1
        self.counters["batches"] += 1
        batch = Batch(self.number, self._filling)
        batch.certificate(self._cap)  # asserts what the guard promises
        self._ready.append(batch)
        waiting, self._deferred = self._deferred, deque()
        self._filling = []
        self._shares.clear()
        self._waiting.clear()
        for example in waiting:
            fits = len(self._filling) < self._size and self._shares[example.device] < self._cap
            if fits:
                self._fill(example)
            else:
                self._defer(example)

    def _defer(self, example: Example) -> None:
        self._deferred.append(example)
        self._waiting[example.device] += 1
