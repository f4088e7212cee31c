"""Tensors as a model declares them, and whether what a caller brings fits.

Why: every way to ask for tensors (in process, socket, HTTP) refuses the same wrong input with the
same words, before ONNX Runtime sees it.

Invariants: arrays that passed `fitting` have the declared names, element types and shapes; a free
dimension may have any length but zero in front, for a batch without rows asks for nothing.

Knows nothing about ONNX Runtime, sockets and features. The words for element types are those of the
Open Inference Protocol v2.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.errors import RequestError

Array = npt.NDArray[Any]

BATCH_ROWS_MAX = 64
"""Batches up to this size come in powers of two; larger ones as they are."""

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
"""Element types by name; BYTES holds texts, one a cell."""

ONNX_TYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
"""Element types as ONNX Runtime names them."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Tensor(msgspec.Struct, frozen=True):
    """An input or output that a model declares; a dimension of -1 is free."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of its elements."""
        return DTYPES[self.datatype]

    @property
    def has_rows(self) -> bool:
        """Whether its first dimension is free: a batch of any size."""
        return bool(self.shape) and self.shape[0] == -1

    def sample(self, rows: int) -> Array:
        """An array that fits, of small numbers or empty texts; free dimensions but rows are 1."""
        shape = [1 if size < 0 else size for size in self.shape]
        if self.has_rows:
            shape[0] = rows
        if self.datatype == "BYTES":
            return np.full(shape, "", dtype=object)
        if self.dtype.kind != "f":  # 0 and 1 in turn suit any vocabulary and any mask
            values = np.indices(shape).sum(0) % 2
        else:
            values = np.random.default_rng(1).standard_normal(shape)
        return np.asarray(values, self.dtype)


def tensors_of(nodes: Sequence[Any]) -> tuple[Tensor, ...]:
    """What a model declares, as ONNX Runtime tells it; what is no tensor is left out."""
    return tuple(
        Tensor(
            node.name,
            ONNX_TYPES[node.type],
            tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape),
        )
        for node in nodes
        if node.type in ONNX_TYPES
    )


def datatype_of(array: Array) -> str:
    """The name of an array's element type; empty when the protocol has none."""
    kind = array.dtype
    return "BYTES" if kind.kind in "SU" else _NAMES.get(kind, "")


def fitting(declared: Collection[Tensor], arrays: Mapping[str, Array]) -> Mapping[str, Array]:
    """`arrays`, if they are what `declared` asks for: one array for each name.

    Raises: RequestError (missing_input, unknown_input, wrong_type, wrong_shape, empty_batch).
    """
    for tensor in declared:
        array = arrays.get(tensor.name)
        if array is None:
            raise RequestError(
                "missing_input",
                f"input {tensor.name!r} is missing",
                f"it takes {described(tensor)}",
            )
        if not isinstance(array, np.ndarray) or array.dtype != DTYPES[tensor.datatype]:
            _check_type(tensor, array)
        elif tensor.datatype == "BYTES":
            _check_texts(tensor, array)
        shape, want = array.shape, tensor.shape
        # The usual case is decided by one look; all else is judged below.
        if not (shape and shape[0] and want and want[0] == -1 and shape[1:] == want[1:]):
            _check_shape(tensor, shape)
    if len(arrays) != len(declared):
        _refuse_unknown([tensor.name for tensor in declared], arrays)
    return arrays


def selected(declared: Collection[Tensor], wanted: Collection[str]) -> list[str]:
    """The names in `wanted`, or all when it is empty. Raises: RequestError `unknown_output`."""
    known = [tensor.name for tensor in declared]
    for name in wanted:
        if name not in known:
            raise RequestError(
                "unknown_output", f"the model has no output {name!r:.64}", _nearest(name, known)
            )
    return list(wanted) or known


def padded(rows: Array) -> Array:
    """`rows` and below them zeros up to a size of batch that was warmed, so shapes stay few."""
    count = len(rows)
    missing = (1 << (count - 1).bit_length()) - count
    if not missing or count > BATCH_ROWS_MAX:
        return rows
    filler: Any = "" if rows.dtype == object else 0
    return np.concatenate([rows, np.full((missing, *rows.shape[1:]), filler, rows.dtype)])


def described(tensor: Tensor) -> str:
    """A tensor in words for an error."""
    return f"{tensor.datatype} {list(tensor.shape)}"


def _check_shape(tensor: Tensor, shape: tuple[int, ...]) -> None:
    fits = len(shape) == len(tensor.shape) and all(
        want in (-1, size) for want, size in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise RequestError(
            "wrong_shape",
            f"input {tensor.name!r} has shape {list(shape)}; the model takes {list(tensor.shape)}",
            "-1 is a dimension of any length",
        )
    if shape and not shape[0]:
        raise RequestError("empty_batch", f"input {tensor.name!r} has no row; shape {list(shape)}")


def _check_type(tensor: Tensor, array: object) -> None:
    if isinstance(array, np.ndarray):
        if tensor.datatype == "BYTES" and array.dtype.kind == "U":
            return
        have = datatype_of(array) or str(array.dtype)
    else:
        have = type(array).__name__
    raise RequestError(
        "wrong_type",
        f"input {tensor.name!r} is {have}; the model takes {tensor.datatype}",
        f"give a numpy array of {tensor.dtype}",
    )


def _check_texts(tensor: Tensor, array: Array) -> None:
    """Other things in the cells of an object array would be sent as their names."""
    for cell in array.flat:
        if not isinstance(cell, str):
            raise RequestError(
                "wrong_type",
                f"input {tensor.name!r} holds a {type(cell).__name__}; the model takes texts",
                "decode bytes as UTF-8",
            )


def _refuse_unknown(known: list[str], arrays: Mapping[str, Array]) -> None:
    name = next(name for name in arrays if name not in known)
    raise RequestError(
        "unknown_input", f"the model has no input {name!r:.64}", _nearest(name, known)
    )


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name[:64], known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
