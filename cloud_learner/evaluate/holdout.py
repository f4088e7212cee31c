"""The recent hold-out: the newest examples that nobody trains on, and that no device owns.

Why: who feeds the rows that a candidate is judged by decides what passes. A device that floods, or
lies, must not be able to fill them.

How: a device has a quota of places, its share of them all; beyond it, it pushes out its own oldest
row and no other's. What is handed out goes further: no device has more than that share of the rows
there, as long as the others bring enough. `rows_min` rows are handed out even when that leaves one
device with more; `largest_share` tells.

Invariants: an early example never enters, nor one whose label is none of the task's; with the same
examples in the same order, the same rows come out, over a `save` and `load` too.

Knows nothing about gates, files of examples or training.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path

import msgspec
import numpy as np

from cloud_learner.evaluate.offline import EvaluationSet, Words, is_held_out
from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from edge_runtime.errors import ConfigError
from edge_runtime.files import write_atomic

SHARE_MAX = 0.5  # of the rows, that one device may have, whatever the family says
PENDING_MAX = 200_000  # labels that are to come into sight, oldest first

Row = tuple[int, float, Example]  # order of arrival, the label before, the example


class _Saved(msgspec.Struct):
    rows: list[tuple[float, Example]]
    pending: list[tuple[float, int, float]]
    before: float


class HoldOut:
    """At most `bound` held-out examples; what `recent` is made of.

    `share` is what one device may have of them. `fields` are those whose values become slices. One
    thread may add while another asks for the rows. All examples are of one feature spec.
    """

    def __init__(
        self,
        bound: int,
        *,
        share: float = SHARE_MAX,
        rows_min: int = 0,
        task: Task | None = None,
        fields: Sequence[str] = (),
    ) -> None:
        self._bound, self._share = bound, min(share, SHARE_MAX)
        self._rows_min, self._task, self._fields = rows_min, task or Task(), tuple(fields)
        self._quota = max(1, int(bound * self._share))
        self._by_device: dict[str, deque[Row]] = {}
        self._size = 0
        self._order = count()
        self._lock = threading.Lock()
        self._before = math.nan
        self._pending: list[tuple[float, int, float]] = []

    def add(self, examples: Iterable[Example]) -> None:
        """Keep those of the examples, which come in release order, that are held out."""
        with self._lock:
            for example in examples:
                if not example.early and not self._task.why_unfit(example.label):
                    before = self._see(example)
                    if is_held_out(example, self._task.group):
                        self._keep(before, example)

    def rows(self) -> EvaluationSet:
        """The examples as one set, in the order in which they came."""
        with self._lock:  # at one moment: labels must stay with their features
            level = self._level()
            chosen = [row for rows in self._by_device.values() for row in list(rows)[-level:]]
        chosen.sort(key=lambda row: row[0])
        return self._as_set([row[1] for row in chosen], [row[2] for row in chosen])

    def save(self, path: Path) -> None:
        """Keep it on disk, to go on after a restart. Raises: OSError."""
        with self._lock:
            rows = sorted(row for rows in self._by_device.values() for row in rows)
            saved = _Saved([row[1:] for row in rows], self._pending[:], self._before)
        write_atomic(path, msgspec.msgpack.encode(saved))

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote; bounds may be others now.

        Raises: ConfigError `bad_hold_out`, with nothing changed.
        """
        try:
            saved = msgspec.msgpack.decode(path.read_bytes(), type=_Saved)
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(
                "bad_hold_out",
                f"{path} cannot be read, and nothing was changed: {error}",
                "remove it: the hold-out fills again from the stream, and the gate holds so long",
            ) from error
        with self._lock:
            self._by_device, self._size = {}, 0
            for before, example in saved.rows:
                self._keep(before, example)
            self._pending, self._before = saved.pending, saved.before
            self._order = count(1 + max((each[1] for each in self._pending), default=self._size))

    def _see(self, example: Example) -> float:
        """The label that was known last when the example was predicted; then its own is to come."""
        while self._pending and self._pending[0][0] <= example.time_s:
            self._before = heapq.heappop(self._pending)[2]
        if len(self._pending) < PENDING_MAX:
            due = (example.label_time_s, next(self._order), example.label)
            heapq.heappush(self._pending, due)
        return self._before

    def _keep(self, before: float, example: Example) -> None:
        rows = self._by_device.setdefault(example.device, deque())
        rows.append((next(self._order), before, example))
        self._size += 1
        if len(rows) > self._quota:
            self._drop(example.device)
        elif self._size > self._bound:
            self._drop(min(self._by_device, key=lambda device: self._by_device[device][0][0]))

    def _drop(self, device: str) -> None:
        self._by_device[device].popleft()
        self._size -= 1
        if not self._by_device[device]:
            del self._by_device[device]

    def _level(self) -> int:
        """How many rows of a device are handed out at most: as many as are fair, or needed."""
        if not self._by_device:
            return self._bound
        sizes = np.sort([len(rows) for rows in self._by_device.values()])
        share = max(self._share, 1 / len(sizes))  # no fewer than equal shares
        levels = np.arange(1, sizes[-1] + 1)
        totals = np.cumsum(len(sizes) - np.searchsorted(sizes, levels))  # of rows, at each level
        fair = int((levels <= share * totals + 1e-9).sum())  # those up to it are, too
        needed = 1 + int(np.searchsorted(totals, self._rows_min))
        return max(fair, min(needed, len(levels)))

    def _as_set(self, before: list[float], examples: list[Example]) -> EvaluationSet:
        width = len(examples[0].features) // 4 if examples else 0
        joined = b"".join(example.features for example in examples)
        features = np.frombuffer(joined, "<f4").astype(np.float32)
        fields = {name: _words(examples, name) for name in self._fields}
        group = self._task.group
        times_s = np.array([example.time_s for example in examples], np.float64)
        return EvaluationSet(
            features.reshape(-1, width) if width else features.reshape(0, 0),
            np.array([example.label for example in examples], np.float32),
            _words(examples, group).codes if group else np.zeros(len(examples), np.int64),
            times_s,
            np.array([example.label_time_s for example in examples], np.float64) - times_s,
            np.array(before, np.float32),
            Words.of(example.device for example in examples),
            fields,
        )


def largest_share(rows: EvaluationSet) -> float:
    """The share of the rows that the device with most of them has; NaN without rows."""
    if not len(rows) or not rows.devices.names:
        return math.nan
    return max(Counter(rows.devices.codes.tolist()).values()) / len(rows)


def _words(examples: Sequence[Example], field: str) -> Words:
    return Words.of(f"{example.fields.get(field, '')}" for example in examples)
