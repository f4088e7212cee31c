"""Rows in memory: what the replicas learn from, and the reservoir that remembers the past.

Why: a micro-batch alone makes a network forget; a uniform sample of everything seen is the cheapest
memory there is (Vitter's reservoir sampling).

Invariants: same rows and same seed give the same reservoir; its size never passes its bound.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.store.examples import Example
from edge_runtime.wire.messages import Value

Matrix = npt.NDArray[np.float32]
Groups = npt.NDArray[np.int64]
_NONE: Matrix = np.empty(0, np.float32)
_NO_GROUPS: Groups = np.empty(0, np.int64)


class Rows(msgspec.Struct, frozen=True):
    """`features` of shape (rows, features) and `labels` of shape (rows,), both float32.

    `weights` (rows,) float32 say how much a row counts, 1 where they are not given; `groups`, of
    shape (rows,) and int64, which rows compete in a ranking.
    """

    features: Matrix
    labels: Matrix
    weights: Matrix = _NONE
    groups: Groups = _NO_GROUPS

    def __post_init__(self) -> None:
        count = len(self.labels)
        if len(self.weights) != count:
            msgspec.structs.force_setattr(self, "weights", np.ones(count, np.float32))
        if len(self.groups) != count:
            msgspec.structs.force_setattr(self, "groups", np.zeros(count, np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: npt.NDArray[np.intp]) -> Rows:
        """The rows at these positions."""
        return Rows(
            self.features[index], self.labels[index], self.weights[index], self.groups[index]
        )


def concatenate(parts: Sequence[Rows]) -> Rows:
    """All rows, in order."""
    return Rows(
        np.concatenate([part.features for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.weights for part in parts]),
        np.concatenate([part.groups for part in parts]),
    )


def rows_of(examples: Sequence[Example], columns: Sequence[int], group: str = "") -> Rows:
    """The logged feature values of the examples and their labels; `columns` selects features.

    `group` names the field by which rows compete. All examples are of one feature spec.
    """
    features = np.frombuffer(b"".join(e.features for e in examples), dtype="<f4")
    features = features.reshape(len(examples), -1).astype(np.float32)
    return Rows(
        np.ascontiguousarray(features[:, columns]),
        np.array([e.label for e in examples], dtype=np.float32),
        np.array([e.weight for e in examples], dtype=np.float32),
        groups_of([e.fields for e in examples], group) if group else _NO_GROUPS,
    )


def groups_of(fields: Sequence[Mapping[str, Value]], group: str) -> Groups:
    """A number for each row, alike where the field `group` is; (rows,) int64."""
    names = [f"{each.get(group, '')}".encode() for each in fields]
    return np.array([zlib.crc32(name) << 31 | zlib.adler32(name) >> 1 for name in names], np.int64)


class Reservoir:
    """A uniform sample of all rows ever added, at most `bound` of them."""

    def __init__(self, bound: int, width: int, seed: int) -> None:
        self._features = np.zeros((bound, width), np.float32)
        self._labels = np.zeros(bound, np.float32)
        self._random = np.random.default_rng(seed)
        self.seen = 0

    def __len__(self) -> int:
        return min(self.seen, len(self._labels))

    def add(self, rows: Rows) -> None:
        """Give each new row the chance that is its due."""
        bound = len(self._labels)
        places = np.arange(self.seen, self.seen + len(rows))
        drawn = self._random.integers(0, places + 1)
        places = np.where(places < bound, places, drawn)
        kept = places < bound
        self._features[places[kept]] = rows.features[kept]
        self._labels[places[kept]] = rows.labels[kept]
        self.seen += len(rows)

    def draw(self, count: int) -> Rows:
        """`count` rows, with replacement; none while it is empty."""
        index = self._random.integers(0, len(self), size=count if len(self) else 0)
        return Rows(self._features[index], self._labels[index])

    def spread(self, count: int) -> Matrix:
        """Features of at most `count` rows, evenly spaced; looking changes no later draw."""
        places = np.linspace(0, len(self) - 1, min(count, len(self)))
        return self._features[places.astype(np.intp)]

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        size = len(self)
        return {
            "features": self._features[:size].copy(),
            "labels": self._labels[:size].copy(),
            "seen": self.seen,
            "random": self._random.bit_generator.state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises: ValueError when it is of another bound or width."""
        size = len(state["labels"])
        if size != min(state["seen"], len(self._labels)):
            raise ValueError(f"{size} rows kept of {state['seen']} are no reservoir of this bound")
        self._features[:size] = state["features"]
        self._labels[:size] = state["labels"]
        self.seen = state["seen"]
        self._random.bit_generator.state = state["random"]
