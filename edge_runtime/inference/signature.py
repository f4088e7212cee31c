"""The signature of a model that answers events: what its tensors are called, and how wide they are.

Why: runner, slot and builder must mean the same by a row, an answer and an embedding.

Knows nothing about files and runs. Implements proto/package.md (the graph).
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.inference.tensors import Tensor

INPUT = "features"
OUTPUT = "probability"
EMBEDDING = "embedding"
"""What a model gives beside its answers where sessions adapt them: float32 (batch, width)."""


def widths_of(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[int, int]:
    """The columns of a model from features to probabilities; zeros for any other."""
    given = [tensor for tensor in outputs if tensor.name == OUTPUT]
    if [tensor.name for tensor in inputs] != [INPUT] or not given:
        return 0, 0
    row, answer = inputs[0], given[0]
    for tensor in (row, answer):
        if tensor.datatype != "FP32" or len(tensor.shape) != 2 or tensor.shape[0] != -1:
            return 0, 0
    return (row.shape[1], answer.shape[1]) if min(row.shape[1], answer.shape[1]) > 0 else (0, 0)


def width_of(outputs: Sequence[Tensor]) -> int:
    """The columns of the embedding; 0 where there is none that a head can stand on."""
    for tensor in outputs:
        if tensor.name == EMBEDDING and tensor.datatype == "FP32" and len(tensor.shape) == 2:
            return tensor.shape[1] if tensor.shape[0] == -1 and tensor.shape[1] > 0 else 0
    return 0
