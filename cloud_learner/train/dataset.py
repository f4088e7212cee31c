"""Rows in memory: what networks learn from, as arrays that share their first dimension.

Why: examples are for the ledger and the archive; arithmetic wants matrices.

Invariants: all arrays of a `Rows` have as many entries as there are labels.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

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

    @classmethod
    def none(cls, width: int) -> Rows:
        """No rows of so many features."""
        return cls(np.zeros((0, width), np.float32), _NONE)

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
