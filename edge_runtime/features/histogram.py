"""What the values of a column look like: counts in buckets that are the same everywhere.

Why: a device tells the shape of what its model is given in a few hundred bytes, and whoever adds up
what many devices tell has the shape of the whole. So the buckets depend on the value alone, never
on the data.

A number x with |x| >= 2^-10 lies in one of four buckets of its octave: with e = floor(log2 |x|) and
m = floor(4 (|x| / 2^e - 1)), in bucket 4 (e + 10) + m + 1, negative where x is. Smaller numbers lie
in bucket 0. An index lies in the bucket of its number; 0 is the word that is unknown. A token lies
in bucket 1 and padding in 0: what adds up is how long texts are. Buckets rise with the values.

Invariants: adding up histograms is the histogram of all rows. Pure.

Implements the sketches of proto/schemas/report.json.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_runtime.features.feature import Column
from edge_runtime.wire.messages import ColumnSketch

Matrix = npt.NDArray[np.float32]
Counts = dict[int, int]

_LEAST_BITS = (127 - 10) << 2  # of 2^-10: its exponent and the first two digits of its fraction
INDEX_MAX = 1 << 24
"""No float32 holds the indices beyond it; no number has so large a bucket."""


def buckets_of(values: Matrix, column: Column) -> npt.NDArray[np.int64]:
    """The bucket of each value, of shape (rows,). What is no index lies in the nearest one's."""
    if column.pad is not None:
        return np.asarray(values != column.pad, np.int64)
    if column.indices:
        return np.clip(np.nan_to_num(values), 0, INDEX_MAX).astype(np.int64)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    size = np.maximum(((bits >> 21) & 0x3FF).astype(np.int64) - (_LEAST_BITS - 1), 0)
    return np.where(bits >> 31, -size, size)


class Histograms:
    """One histogram for each of `columns`, over the same `rows` rows."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = columns
        self.rows = 0
        self.counts: list[Counts] = [{} for _ in columns]

    def add(self, features: Matrix) -> None:
        """Count rows of shape (rows, columns)."""
        self.rows += len(features)
        for column, counts, values in zip(self.columns, self.counts, features.T, strict=True):
            found, times = np.unique(buckets_of(values, column), return_counts=True)
            for bucket, count in zip(found.tolist(), times.tolist(), strict=True):
                counts[bucket] = counts.get(bucket, 0) + count

    def sketches(self) -> list[ColumnSketch]:
        """As they travel: buckets as steps from the one before, the first from 0."""
        return [
            _sketch(column.name, counts)
            for column, counts in zip(self.columns, self.counts, strict=True)
        ]


def _sketch(name: str, counts: Counts) -> ColumnSketch:
    buckets = sorted(counts)
    steps = [after - before for before, after in zip([0, *buckets], buckets, strict=False)]
    return ColumnSketch(name, steps, [counts[bucket] for bucket in buckets])


def counts_of(sketch: ColumnSketch, rows: int) -> Counts:
    """The counts that a sketch of `rows` rows tells. Raises: ValueError for what cannot be one."""
    if len(sketch.steps) != len(sketch.counts) or any(step <= 0 for step in sketch.steps[1:]):
        raise ValueError(f"{sketch.name!r:.64} has buckets that do not rise, one for each count")
    if sum(sketch.counts) != rows or min(sketch.counts, default=0) < 0:
        raise ValueError(f"{sketch.name!r:.64} does not count the {rows} rows")
    found, bucket = {}, 0
    for step, count in zip(sketch.steps, sketch.counts, strict=True):
        bucket += step
        found[bucket] = count
    if found and not -INDEX_MAX <= min(found) <= max(found) <= INDEX_MAX:
        raise ValueError(f"{sketch.name!r:.64} has a bucket that no value lies in")
    return found
