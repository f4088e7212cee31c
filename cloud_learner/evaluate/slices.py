"""Slices: parts of a set that are judged apart, since a mean can hide what one of them loses.

Why: a release that is better on the whole and useless at one device, or for whoever came last, is
not better there.

Three sorts: by device, by the value of each declared field, and by whether a row names a key that
the bootstrap never saw. A key is an index that a feature gives (of a vocabulary or a hash), or the
value of a declared field.

Invariants: a slice of fewer than `rows_min` rows is counted and not scored. Knows nothing about
limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from cloud_learner.evaluate.offline import (
    Codes,
    EvaluationSet,
    Mask,
    Matrix,
    ScoredSet,
    Words,
    score,
)
from cloud_learner.stats.tasks import Task
from edge_runtime.files import write_atomic

DEVICE, KEYS = "device", "keys"
NEW, KNOWN = "new", "known"


class Keys(msgspec.Struct, frozen=True):
    """What the bootstrap saw: indices by the position of their column, words by their field."""

    indices: dict[int, list[int]]
    fields: dict[str, list[str]] = {}

    @classmethod
    def of(cls, columns: Iterable[int], rows: EvaluationSet) -> Keys:
        """The keys of the rows; `columns` are the positions of those features that are indices."""
        seen = {at: np.unique(rows.features[:, at]).astype(int).tolist() for at in columns}
        return cls(seen, {name: list(words.names) for name, words in rows.fields.items()})

    def is_new(self, rows: EvaluationSet) -> Mask:
        """Which rows have a key that is not among these; (rows,) bool."""
        new = np.zeros(len(rows), np.bool_)
        if not len(rows):  # and no columns
            return new
        for at, seen in self.indices.items():
            new |= ~np.isin(rows.features[:, at].astype(np.int64), seen)
        for name, words in rows.fields.items():
            if name in self.fields:
                known = set(self.fields[name])
                strange = np.array([word not in known for word in words.names], np.bool_)
                new |= strange[words.codes]
        return new

    def save(self, path: Path) -> None:
        """Keep them on disk. Raises: OSError."""
        write_atomic(path, msgspec.msgpack.encode(self))

    @classmethod
    def load(cls, path: Path) -> Keys | None:
        """What `save` wrote; None in a home of an earlier release, which has none.

        Raises: OSError, msgspec.DecodeError.
        """
        return msgspec.msgpack.decode(path.read_bytes(), type=cls) if path.exists() else None


class Slice(msgspec.Struct, frozen=True):
    """The rows of one value of one sort; `where` is (rows,) bool."""

    sort: str
    value: str
    where: Mask


class Slices(msgspec.Struct, frozen=True):
    """Those that are large enough, and by sort how many there are that are not."""

    large: list[Slice]
    small: dict[str, int]


def slices(rows: EvaluationSet, fields: Sequence[str], keys: Keys | None, rows_min: int) -> Slices:
    """All slices of the set: by device, by each of `fields`, and by keys where some are known."""
    sorts: dict[str, Words] = {DEVICE: rows.devices}
    sorts |= {name: rows.fields[name] for name in fields if name in rows.fields}
    if keys is not None:
        sorts[KEYS] = Words(keys.is_new(rows).astype(np.int64), [KNOWN, NEW])
    found = Slices([], {})
    for sort, words in sorts.items():
        sizes = _sizes(words)
        large = np.flatnonzero(sizes >= rows_min).tolist()
        found.large.extend(Slice(sort, words.names[at], words.codes == at) for at in large)
        found.small[sort] = int((sizes > 0).sum()) - len(large)
    return found


def score_slices(
    task: Task, rows: EvaluationSet, outputs: Matrix, parts: Iterable[Slice]
) -> dict[str, dict[str, ScoredSet]]:
    """How good the answers are on each slice, by sort and value."""
    scored: dict[str, dict[str, ScoredSet]] = {}
    for part in parts:
        scored.setdefault(part.sort, {})[part.value] = score(task, rows, outputs, part.where)
    return scored


def largest_drop(
    before: Mapping[str, ScoredSet], now: Mapping[str, ScoredSet]
) -> tuple[str, float, int]:
    """The slice that lost most quality, how much, and how many were compared; "" for none."""
    drops = {
        value: before[value].quality - scored.quality
        for value, scored in now.items()
        if value in before and np.isfinite(before[value].quality - scored.quality)
    }
    worst = max(drops, key=lambda value: drops[value], default="")
    return worst, drops.get(worst, float("nan")), len(drops)


def _sizes(words: Words) -> Codes:
    return np.bincount(words.codes, minlength=len(words.names))
