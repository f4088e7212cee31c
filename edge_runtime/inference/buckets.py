"""Buckets: rows that end in padding are run on their first columns alone.

Why: of a text of ten tokens in a row of 64, a transformer would compute five sixths for nothing. A
row is cut to the smallest bucket that holds it, so that shapes stay few, and rows of one bucket
are run together. There are four for each doubling: of a row of 8 tokens or more, less than a fifth
of what is run is padding.

Invariants: answers stand in the order of the rows. A row of nothing but padding is run whole.

Knows nothing about files and sessions. A package says in its metadata how its rows end:
proto/package.md (the graph).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.errors import PackageError
from edge_runtime.features.feature import Padding
from edge_runtime.features.rules import TOKENS_MAX
from edge_runtime.inference.signature import EMBEDDING, INPUT, OUTPUT
from edge_runtime.inference.tensors import Tensor

KEY = "headwater.padding"
SMALLEST = 8
PAD_MAX = 1 << 24
"""Up to here, float32 holds every integer."""

TOKENS_AT_ONCE = 512
"""So many columns of all rows together are run at most: for each, a transformer holds kilobytes."""

Matrix = npt.NDArray[np.float32]
Run = Callable[[Matrix], list[Matrix]]


def noted(padding: Padding | None) -> dict[str, str]:
    """What `padding_in` reads, to be put into a file's metadata."""
    return {} if padding is None else {KEY: msgspec.json.encode(padding).decode()}


def padding_in(metadata: Mapping[str, str]) -> Padding | None:
    """How the rows of a package end, if it says so. Raises: PackageError `bad_metadata`."""
    if KEY not in metadata:
        return None
    try:
        told = msgspec.json.decode(metadata[KEY], type=Padding)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise PackageError("bad_metadata", f"{KEY!r} cannot be used: {error}") from error
    if not 1 <= told.length <= TOKENS_MAX:
        raise PackageError("bad_metadata", f"{KEY!r}: length {told.length} is no number of tokens")
    if not 0 <= told.pad <= PAD_MAX:
        raise PackageError("bad_metadata", f"{KEY!r}: pad is not from 0 to {PAD_MAX}")
    return told


def in_buckets(
    inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], metadata: Mapping[str, str]
) -> tuple[tuple[Tensor, ...], Buckets | None]:
    """The inputs of a model at full length, and the buckets of its rows; None where its columns are
    not free, nothing says how its rows end, or it gives more than answers and embeddings, whose
    independence of padding nobody proves.

    Raises: PackageError `bad_metadata`.
    """
    padding = padding_in(metadata)
    if padding is None or inputs != (Tensor(INPUT, "FP32", (-1, -1)),):
        return inputs, None
    proven = all(
        each.name in (OUTPUT, EMBEDDING) and each.has_rows and min(each.shape[1:], default=0) > 0
        for each in outputs
    )
    return (Buckets.input_of(padding.length),), Buckets(padding) if proven else None


class Buckets:
    """Of rows as `padding` says: `sizes` are the numbers of columns that are run, ascending."""

    def __init__(self, padding: Padding) -> None:
        doubled = (SMALLEST << step for step in range(TOKENS_MAX.bit_length()))
        sizes = (start + part * start // 4 for start in doubled for part in range(4))
        self.sizes = [*(size for size in sizes if size < padding.length), padding.length]
        self._length, self._pad = padding.length, np.float32(padding.pad)
        at = np.searchsorted(self.sizes, np.arange(padding.length + 1))
        self._fitting = np.array(self.sizes)[at]

    @staticmethod
    def input_of(size: int) -> Tensor:
        """What the model takes in the bucket of that size."""
        return Tensor(INPUT, "FP32", (-1, size))

    @property
    def least(self) -> int:
        """How many of the longest rows are run together."""
        return _rows_of(self._length)

    def sizes_of(self, x: Matrix) -> npt.NDArray[np.int64]:
        """The bucket of each row of `x`, (rows, length); (rows,)."""
        ends = self._length - (x[:, ::-1] != self._pad).argmax(1)
        found: npt.NDArray[np.int64] = self._fitting[ends]
        return found

    def run(self, run: Run, x: Matrix) -> list[Matrix]:
        """What `run` gives for the rows of `x`, (rows, length), asked once for each bucket."""
        if not len(x):
            nobody = run(np.full((1, self.sizes[0]), self._pad))
            return [each[:0] for each in nobody]
        sizes = self.sizes_of(x)
        if len(x) == 1:
            return run(np.ascontiguousarray(x[:, : sizes[0]]))
        order = np.argsort(sizes, kind="stable")
        cuts = np.flatnonzero(np.diff(sizes[order])) + 1
        parts = [
            same[at : at + most]
            for same in np.split(order, cuts)
            for most in [_rows_of(int(sizes[same[0]]))]
            for at in range(0, len(same), most)
        ]
        runs = [run(x[part, : sizes[part[0]]]) for part in parts]
        if any(len(each) != len(p) for p, given in zip(parts, runs, strict=True) for each in given):
            raise PackageError("run_failed", "the model gave other rows than it was asked for")
        back = np.argsort(order, kind="stable")
        return [np.concatenate(each)[back] for each in zip(*runs, strict=True)]

    def proofs(self, indices: int) -> list[tuple[Matrix, list[int]]]:
        """Rows, (1, length), of ids from all of a vocabulary of `indices`, each with the buckets in
        which it must come out as it does whole: one token, and in each doubling a row that fills
        its first bucket and one that just does not, in all those up to the next.
        """
        cut = self.sizes[:-1]
        wanted = [(1, cut[:1])]
        for at in range(0, len(cut), 4):
            wanted += [(cut[at], cut[at : at + 1]), (cut[at] + 1, cut[at + 1 : at + 5])]
        return [(self._row(end, indices), sizes) for end, sizes in wanted if sizes]

    def _row(self, end: int, indices: int) -> Matrix:
        """A row of `end` tokens."""
        ids = np.linspace(indices - 1, 0, end).round().astype(np.float32)
        x = np.full((1, self._length), self._pad, np.float32)
        x[0, :end] = np.where(ids == self._pad, 0 if self._pad else indices - 1, ids)
        return x


def _rows_of(size: int) -> int:
    """How many rows of so many columns are run together."""
    return max(1, TOKENS_AT_ONCE // size)
