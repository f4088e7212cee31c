"""One row bound in place: a run reads its arrays and writes its answers without making any.

Why: of a run of microseconds a third is spent on naming and wrapping arrays; memory that is bound
once spares it, most of all when the caches are cold.

Invariants: the arrays belong to one run at a time, which `lock` is there for; what is handed out is
a copy.

Knows nothing about files. `session` is what ONNX Runtime makes of one, `options` are those of runs.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from edge_runtime.inference.buckets import Buckets
from edge_runtime.inference.tensors import Array, Tensor


class BoundRow:
    """The named tensors of `session`, each one row: `inputs` to fill, `outputs` to read."""

    def __init__(
        self, session: Any, inputs: Collection[Tensor], outputs: Collection[Tensor], options: Any
    ) -> None:
        self.lock = threading.Lock()
        self.inputs = {tensor.name: np.zeros(_row(tensor), tensor.dtype) for tensor in inputs}
        self.outputs = {tensor.name: np.zeros(_row(tensor), tensor.dtype) for tensor in outputs}
        self._session, self._options = session, options
        self._binding = _bound(session, self.inputs, self.outputs)

    def holds(self, arrays: Mapping[str, Array]) -> bool:
        """Whether `arrays`, which fit the model, are one row each."""
        for name, row in self.inputs.items():  # noqa: SIM110 - a generator costs as much again
            if arrays[name].shape != row.shape:
                return False
        return True

    def run(self) -> None:
        """From `inputs` to `outputs`; what ONNX Runtime raises is raised."""
        self._session.run_with_iobinding(self._binding, self._options)

    def answers(self, arrays: Mapping[str, Array], names: Collection[str]) -> dict[str, Array]:
        """The named outputs for `arrays`, which it `holds`; under the `lock`."""
        for name, row in self.inputs.items():
            row[...] = arrays[name]
        self.run()
        return {name: self.outputs[name].copy() for name in names}


class BucketedRow(BoundRow):
    """One row of which a run reads as much as its bucket holds; all buckets share the memory."""

    def __init__(
        self,
        session: Any,
        inputs: Collection[Tensor],
        outputs: Collection[Tensor],
        options: Any,
        buckets: Buckets,
    ) -> None:
        super().__init__(session, inputs, outputs, options)
        [self._row] = self.inputs.values()
        self._buckets = buckets
        self._bindings = {
            size: _bound(
                session, {name: row[:, :size] for name, row in self.inputs.items()}, self.outputs
            )
            for size in buckets.sizes
        }

    def run(self) -> None:
        [size] = self._buckets.sizes_of(self._row).tolist()
        self._session.run_with_iobinding(self._bindings[size], self._options)


def row_of(
    session: Any,
    inputs: Collection[Tensor],
    outputs: Collection[Tensor],
    options: Any,
    buckets: Buckets | None,
) -> BoundRow:
    """One row, in its bucket where there are some."""
    if buckets is None:
        return BoundRow(session, inputs, outputs, options)
    return BucketedRow(session, inputs, outputs, options, buckets)


def runs(row: BoundRow) -> bool:
    """Whether the model's answers are of the shapes that it declares."""
    try:
        row.run()
    except Exception:
        return False
    return True


def _bound(session: Any, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Any:
    binding = session.io_binding()
    for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, array in arrays.items():
            bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    return binding


def can_be_bound(tensors: Collection[Tensor]) -> bool:
    """Whether one row of each of `tensors` has a size that is known beforehand."""
    return all(
        tensor.datatype != "BYTES" and all(size > 0 for size in _row(tensor)) for tensor in tensors
    )


def _row(tensor: Tensor) -> tuple[int, ...]:
    return (1, *tensor.shape[1:]) if tensor.has_rows else tensor.shape
