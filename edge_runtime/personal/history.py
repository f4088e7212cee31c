"""The own history of a session: its last feature rows with their labels, within few bytes.

Why: a new release has another embedding, in which the old weights mean nothing; what a person did
still means the same. Rows are replayed, weights are never translated.

Invariants: never more than `BYTES_MAX`, however many columns; the oldest goes first; rows come out
in the order in which they came in, bit for bit.

Knows nothing about heads, embeddings or releases.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.personal.prior import Matrix, Vector

BYTES_MAX = 4096
ROWS_MAX = 48


class Kept(msgspec.Struct, array_like=True, frozen=True):
    """A history as bytes, oldest first."""

    columns: int
    rows: bytes
    labels: bytes


class History:
    """The last rows of `columns` features each; none are kept where there are no columns."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        capacity = min(ROWS_MAX, BYTES_MAX // (4 * columns + 8)) if columns else 0
        self._rows = np.empty((capacity, columns), np.float32)
        self._labels = np.empty(capacity, np.float64)
        self._capacity, self._count = capacity, 0

    def __len__(self) -> int:
        return min(self._count, self._capacity)

    @property
    def nbytes(self) -> int:
        """What it takes, however full it is."""
        return self._rows.nbytes + self._labels.nbytes

    def add(self, row: Vector, label: float) -> None:
        """Keep `row`, of shape (columns,), and forget the oldest if need be."""
        if self._capacity:
            place = self._count % self._capacity
            self._rows[place], self._labels[place] = row, label
            self._count += 1

    def ordered(self) -> tuple[Matrix, npt.NDArray[np.float64]]:
        """Rows (count, columns) and labels (count,), oldest first, as copies."""
        first = max(self._count - self._capacity, 0)
        order = [number % self._capacity for number in range(first, self._count)]
        return self._rows[order], self._labels[order]

    def clear(self) -> None:
        """Forget all rows."""
        self._count = 0

    def keep(self) -> Kept:
        """The history as bytes."""
        rows, labels = self.ordered()
        return Kept(self.columns, rows.astype("<f4").tobytes(), labels.astype("<f8").tobytes())

    @classmethod
    def of(cls, kept: Kept) -> History:
        """The history that was kept. Raises: ValueError when it fits no bounds."""
        if not 0 <= kept.columns <= BYTES_MAX:
            raise ValueError(f"a history of {kept.columns} columns")
        history = cls(kept.columns)
        labels = np.frombuffer(kept.labels, "<f8")
        rows = np.frombuffer(kept.rows, "<f4").reshape(len(labels), kept.columns)
        if len(labels) > history._capacity:
            raise ValueError(f"a history of {len(labels)} rows")
        for row, label in zip(rows, labels, strict=True):
            history.add(row, float(label))
        return history
