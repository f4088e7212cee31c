"""A package of a model that was made elsewhere: fitted, quantized on request, sealed.

Why: what a device must know travels in the file, whoever made the model.

Invariants: golden answers are those of the fitted file, by the device's code. A model that answers
with what is no number is refused here, before anybody judges it.

Knows nothing about families and gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from cloud_learner.package.foreign import fitted
from cloud_learner.package.provenance import NOTHING_S, origin
from cloud_learner.package.quantize import quantized
from cloud_learner.package.seal import sealed
from edge_runtime.errors import PackageError
from edge_runtime.features.spec import Spec
from edge_runtime.inference.package import Interface

GOLDEN_ROWS = 8

Matrix = npt.NDArray[np.float32]


def prepared(
    model: ModelProto,
    interface: Interface,
    spec: Spec,
    *,
    outputs: int,
    names: Mapping[str, str],
    rows: Matrix | None,
    facts: Mapping[str, Any],
    quantize: bool,
) -> tuple[bytes, bytes]:
    """The package in both forms; without `quantize` they are the same.

    `rows` (rows, features) are usual ones; without them, made-up ones serve as golden samples.
    Raises: PackageError (wrong_interface, not_finite, no_rows, ...).
    """
    fit = fitted(model, spec.names, outputs, names)
    if quantize and rows is None:
        raise PackageError(
            "no_rows", "int8 takes its ranges from usual rows", "--rows FILE.npy (rows, features)"
        )
    if rows is not None and (rows.ndim != 2 or rows.shape[1] != spec.size):
        raise PackageError(
            "no_rows", f"the rows are of shape {rows.shape}, the features are {spec.size}"
        )
    golden = _made_up(spec.size) if rows is None else rows[:GOLDEN_ROWS]
    made_of = {**origin("", NOTHING_S, spec), **facts}

    def seal(form: ModelProto, name: str) -> bytes:
        try:
            return sealed(form, interface, spec, golden, {**made_of, "form": name})
        except PackageError as error:
            if "not finite" in error.message:
                raise PackageError(
                    "not_finite",
                    "the model answers rows with what is no number; nothing was handed in",
                    "look for a division by zero or a logarithm, or give usual rows by --rows",
                ) from error
            raise

    plain = ModelProto()
    plain.CopyFrom(fit)
    float_package = seal(plain, "float32")
    if not quantize or rows is None:
        return float_package, float_package
    return seal(quantized(fit, rows), "int8"), float_package


def _made_up(features: int) -> Matrix:
    return np.random.default_rng(0).normal(size=(GOLDEN_ROWS, features)).astype(np.float32)
