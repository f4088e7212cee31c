"""int8: the float package with static ranges, so that an answer never depends on its batch.

Why: dynamic quantization takes its ranges from the batch it meets; static ones are calibrated once
on recent rows and travel in the file.

Activations are unsigned and weights signed with one bit less than int8 has, the one choice that
does not saturate on x86 without VNNI and is right on ARM too (docs/adr/0003-int8.md). Tables that
are gathered from, embeddings, are weights too: in float they were most of what two releases differ
in (docs/adr/0016-patches.md).

Invariants: same package and rows give the same bytes; metadata survives.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from edge_runtime.inference.signature import INPUT

Matrix = npt.NDArray[np.float32]


class _Once(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
    """Hands out all calibration rows as one batch."""

    def __init__(self, rows: Matrix) -> None:
        self._feeds: list[dict[str, Any]] = [{INPUT: rows}]

    def get_next(self) -> dict[str, Any] | None:
        return self._feeds.pop() if self._feeds else None


def quantized(model: ModelProto, rows: Matrix) -> ModelProto:
    """The int8 form of a float package, ranges calibrated on `rows` (rows, features)."""
    with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save_model(model, str(source))
        # quantize_static advises a pre-processing pass on the root logger; the graph is clean.
        logging.disable(logging.WARNING)
        try:
            quantize_static(
                str(source),
                str(target),
                _Once(rows),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Gemm", "MatMul", "Relu", "Gather"],
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                reduce_range=True,
                per_channel=False,
            )
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load_model(str(target))
