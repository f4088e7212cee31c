"""The trial: what a model costs, and whether its rows are independent, found by running it.

Why: which thread runs a model, and whether requests may share a run, is decided by what this
machine measured, not by what a file says of itself.

Invariants: a model that will not run a made-up sample is not refused for that; it is only taken to
be slow, and never to be batchable.

Knows nothing about files and sessions: a model is a function from arrays to arrays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edge_runtime.errors import PackageError
from edge_runtime.inference.tensors import Array, Tensor

_TRIES, _TRY_S = 9, 0.05
_WARM_S, _WARM_BYTES = 0.5, 16 << 20

Run = Callable[[Mapping[str, Array]], list[Array]]


def sample(inputs: Sequence[Tensor], rows: int) -> dict[str, Array]:
    """Made-up arrays for `inputs`, of so many rows where the first dimension is free."""
    return {tensor.name: tensor.sample(rows) for tensor in inputs}


def usual_us(run: Run, inputs: Sequence[Tensor]) -> float | None:
    """The lower quartile of the times of one row after the first, in µs, since a busy machine only
    adds to them; None when no sample will run.
    """
    feed, until_s = sample(inputs, 1), time.perf_counter() + _TRY_S
    times: list[float] = []
    try:
        run(feed)
        while len(times) < _TRIES and (not times or time.perf_counter() < until_s):
            started_ns = time.perf_counter_ns()
            run(feed)
            times.append((time.perf_counter_ns() - started_ns) / 1000)
    except PackageError:
        return None
    return sorted(times)[len(times) // 4]


def warm(run: Run, inputs: Sequence[Tensor], rows_max: int) -> None:
    """Run each size of batch from 2 on that is used, as far as a short time goes."""
    rows, until_s = 2, time.perf_counter() + _WARM_S
    row_bytes = sum(array.nbytes for array in sample(inputs, 1).values())
    most = min(rows_max, _WARM_BYTES // max(row_bytes, 1))
    while rows <= most and time.perf_counter() < until_s:
        run(sample(inputs, rows))
        rows *= 2


def is_batchable(run: Run, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether three rows together get the answers that each of them gets alone.

    They do not where a graph quantizes dynamically: its scale is that of the whole batch.
    """
    if not all(tensor.has_rows for tensor in (*inputs, *outputs)):
        return False
    three = sample(inputs, 3)
    try:
        together = run(three)
        alone = [
            run({name: value[row : row + 1] for name, value in three.items()}) for row in range(3)
        ]
    except PackageError:
        return False
    return all(
        _is_same(answer, [each[index] for each in alone]) for index, answer in enumerate(together)
    )


def _is_same(together: Array, alone: list[Array]) -> bool:
    stacked = np.concatenate(alone)
    if stacked.shape != together.shape:
        return False
    if together.dtype.kind != "f":
        return bool((stacked == together).all())
    return bool(np.allclose(stacked, together, rtol=1e-4, atol=1e-6, equal_nan=True))
