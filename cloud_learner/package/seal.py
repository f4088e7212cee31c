"""Sealing: the golden samples and all that a device must know, written into the file.

Why: the golden answers are those of the very bytes that are sealed, computed by the device's code.

Invariants: same model and facts give the same bytes. A sealed model holds no denormal weight, which
some processors multiply up to 60 times slower, and its answer to a row, and its embedding of it, do
not depend on the rows beside it, as they would if it took its ranges from the batch (dynamic
quantization).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, numpy_helper

from edge_runtime.errors import PackageError
from edge_runtime.features.spec import Spec
from edge_runtime.inference.buckets import noted
from edge_runtime.inference.package import Interface, metadata_of
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.signature import EMBEDDING, INPUT
from edge_runtime.personal.policy import Policy

TOLERANCE = 0.03  # int8 kernels of other processors round differently
ROUNDING = 1e-5  # of the same processor, between a row alone and among others
SMALLEST = np.finfo(np.float32).smallest_normal

Matrix = npt.NDArray[np.float32]


def sealed(
    model: ModelProto,
    interface: Interface,
    spec: Spec,
    golden_inputs: Matrix,
    provenance: Mapping[str, Any],
    *,
    policy: Policy | None = None,
) -> bytes:
    """The package's bytes; `policy` is for its sessions.

    Raises: PackageError (batch_dependent, or the model cannot run here).
    """
    flush_denormals(model)
    _note(model, noted(spec.padding))  # so that it is run here as a device runs it
    golden_outputs = _answers(runner_of(model), np.ascontiguousarray(golden_inputs))
    metadata = metadata_of(
        interface,
        spec,
        golden_inputs=golden_inputs,
        golden_outputs=golden_outputs,
        tolerance=TOLERANCE,
        provenance=provenance,
        policy=policy,
    )
    _note(model, metadata)
    return bytes(model.SerializeToString(deterministic=True))


def _note(model: ModelProto, metadata: Mapping[str, str]) -> None:
    """Let this be all of its metadata, in the order of the keys."""
    del model.metadata_props[:]
    for key in sorted(metadata):
        model.metadata_props.add(key=key, value=metadata[key])


def runner_of(model: ModelProto) -> Runner:
    """The model as a device runs it. Raises: PackageError."""
    with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return Runner(path)


def flush_denormals(model: ModelProto) -> None:
    """Replace the weights that are too small for a normal number by zero."""
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        weights = numpy_helper.to_array(tensor)
        denormal = (weights != 0) & (np.abs(weights) < SMALLEST)
        if denormal.any():
            flushed = np.where(denormal, np.float32(0), weights)
            tensor.CopyFrom(numpy_helper.from_array(flushed, tensor.name))


def _answers(runner: Runner, rows: Matrix) -> Matrix:
    together = _given(runner, rows)
    alone = [_given(runner, row[None]) for row in rows]
    for number, whole in enumerate(together):
        parts = np.concatenate([given[number] for given in alone])
        if not np.allclose(whole, parts, rtol=0, atol=ROUNDING, equal_nan=True):
            gap = float(np.abs(whole - parts).max())
            raise PackageError(
                "batch_dependent",
                f"a row's answer changes by {gap:.2g} with the rows beside it; the model is not"
                " sealed",
                "quantize with static ranges, or a range for each row: a tensor's is the batch's",
            )
    return together[0]


def _given(runner: Runner, rows: Matrix) -> list[Matrix]:
    """All that a device reads of the rows, in one run: answers, and embeddings if there are any."""
    found = [runner.run(rows)]
    if runner.width:
        found.append(runner.infer({INPUT: rows}, [EMBEDDING])[EMBEDDING])
    return found
