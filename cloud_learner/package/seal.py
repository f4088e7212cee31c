"""Sealing: the golden samples and all that a device must know, written into the file.

Why: the golden answers are those of the very bytes that are sealed, computed by the device's code.

Invariants: same model and facts give the same bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from edge_runtime.features.spec import Spec
from edge_runtime.inference.package import Interface, metadata_of
from edge_runtime.inference.runner import Runner

TOLERANCE = 0.03  # int8 kernels of other processors round differently

Matrix = npt.NDArray[np.float32]


def sealed(
    model: ModelProto,
    interface: Interface,
    spec: Spec,
    golden_inputs: Matrix,
    provenance: Mapping[str, Any],
) -> bytes:
    """The package's bytes. Raises: PackageError when the model cannot run here."""
    with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        golden_outputs = Runner(path).run(np.ascontiguousarray(golden_inputs))
    metadata = metadata_of(
        interface,
        spec,
        golden_inputs=golden_inputs,
        golden_outputs=golden_outputs,
        tolerance=TOLERANCE,
        provenance=provenance,
    )
    del model.metadata_props[:]
    for key in sorted(metadata):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, metadata[key]
    return bytes(model.SerializeToString(deterministic=True))
