"""Tensors as lists in JSON, and back.

Why: JSON is what people try first, and it must not answer something else than was asked.

Invariants: each element has the type and range of its tensor, so nothing is rounded to infinity,
cut, or guessed from a text. What JSON cannot carry (NaN, infinity, FP16) is refused by name.

Knows nothing about requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import numpy as np

from edge_runtime.errors import RequestError
from edge_runtime.inference.tensors import DTYPES, Array


def _integers(bits: int, *, signed: bool) -> Any:
    if bits == 64:  # bounds of msgspec end at 63 bits; numpy refuses what is beyond
        return list[int] if signed else list[Annotated[int, msgspec.Meta(ge=0)]]
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return list[Annotated[int, msgspec.Meta(ge=low, le=high)]]


_FP32_MAX = float(np.finfo(np.float32).max)
_LISTS: dict[str, Any] = {
    "BOOL": list[bool],
    "BYTES": list[str],
    "FP64": list[float],
    "FP32": list[Annotated[float, msgspec.Meta(ge=-_FP32_MAX, le=_FP32_MAX)]],
    **{f"UINT{bits}": _integers(bits, signed=False) for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": _integers(bits, signed=True) for bits in (8, 16, 32, 64)},
}
"""What the `data` of an element type may hold, laid flat."""

_flat: dict[str, Callable[[msgspec.Raw], list[Any]]] = {
    datatype: msgspec.json.Decoder(wanted).decode for datatype, wanted in _LISTS.items()
}
_decode_any = msgspec.json.Decoder().decode


def unlisted(datatype: str, shape: list[int], data: msgspec.Raw) -> Array:
    """The tensor whose elements `data` lists, flat or nested as `shape` says.

    Raises: ValueError, msgspec.DecodeError.
    """
    if datatype == "FP16":
        raise ValueError("FP16 cannot be written as JSON; send it as a binary tensor")
    try:
        values = _flat[datatype](data)
    except msgspec.ValidationError:
        values = _unnested(data, shape)
        values = msgspec.convert(values, _LISTS[datatype])
    array = np.array(values, dtype=DTYPES[datatype])
    if array.size != math.prod(shape):
        raise ValueError(f"{array.size} elements; its shape {shape} has another number")
    return array.reshape(shape)


def _unnested(data: msgspec.Raw, shape: list[int]) -> Any:
    """The elements of nested lists, row-major; nested as `shape` says, or not at all."""
    values = _decode_any(data)
    if not isinstance(values, list) or not any(isinstance(row, list) for row in values):
        return values
    for size in shape[1:]:
        if not all(isinstance(row, list) and len(row) == size for row in values):
            raise ValueError(f"data is not nested as its shape {shape} says")
        values = [value for row in values for value in row]
    return values


def listed(name: str, array: Array) -> list[Any]:
    """The elements of output `name`, flat. Raises: RequestError `not_json`."""
    hint = f'ask for {name!r} with {{"binary_data": true}}'
    if array.dtype.itemsize == 2 and array.dtype.kind == "f":
        raise RequestError("not_json", f"output {name!r} is FP16, which JSON lacks", hint)
    values: list[Any] = array.ravel().tolist()
    if array.dtype.kind == "f" and not math.isfinite(sum(values)) and not np.isfinite(array).all():
        raise RequestError(
            "not_json", f"output {name!r} has NaN or infinity, which JSON lacks", hint
        )
    return values
