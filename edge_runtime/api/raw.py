"""Tensors as bytes, and back: what the socket and binary HTTP carry, and numpy's arrays.

Why: server and client read and write the same bytes, and requests of one shape, of which there are
many at once, are read together.

Invariants: what `packed` wrote `unpacked` reads, bit for bit. A shape is believed only when as many
bytes came as it needs, so no request makes anyone allocate more than it sent.

Knows nothing about models, and is imported late by what must load no numpy.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from edge_runtime.api.frames import FRAME_BYTES_MAX, RawTensor, too_large
from edge_runtime.errors import RequestError
from edge_runtime.inference.tensors import DTYPES, Array, Tensor, datatype_of

_LENGTH = struct.Struct("<I")


def packed(array: Array) -> bytes:
    """The bytes of a tensor: little-endian, row-major; a text is its length (u32), then UTF-8.

    Raises: RequestError `wrong_type` for a cell that is no text.
    """
    if array.dtype.kind not in "OSU":
        return array.tobytes()
    try:
        texts = [each if isinstance(each, bytes) else each.encode() for each in array.ravel()]
    except (AttributeError, UnicodeEncodeError) as error:
        raise RequestError("wrong_type", f"a cell is no text: {error}") from error
    return b"".join([part for text in texts for part in (_LENGTH.pack(len(text)), text)])


def unpacked(datatype: str, shape: Sequence[int], data: bytes) -> Array:
    """The tensor that `packed` wrote, read-only. Raises: ValueError for `data` of anything else."""
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise ValueError(f"unknown datatype; there are {', '.join(DTYPES)}")
    if shape and min(shape) < 0:  # which numpy reads as "any"
        raise ValueError("a dimension is negative")
    if datatype == "BYTES":
        values = _texts(data)
    elif datatype == "BOOL":  # any byte may come; only 0 and 1 are what others call a bool
        values = np.frombuffer(data, "u1") != 0
    else:
        values = np.frombuffer(data, dtype)
    try:
        return values.reshape(shape)
    except OverflowError as error:
        raise ValueError(str(error)) from error


def raw_of(name: str, array: Array) -> RawTensor:
    """A named array as bytes. Raises: RequestError (wrong_type, frame_too_large)."""
    datatype = datatype_of(array)
    if array.nbytes > FRAME_BYTES_MAX:
        raise too_large(array.nbytes)
    if not datatype:
        raise RequestError(
            "wrong_type",
            f"{name!r} is an array of {array.dtype}, which cannot be sent",
            f"types that can be: {', '.join(DTYPES)}",
        )
    return RawTensor(name, datatype, array.shape, packed(array))


def raws_of(arrays: Mapping[str, Array]) -> tuple[RawTensor, ...]:
    """`raw_of` each of `arrays`."""
    return tuple([raw_of(name, array) for name, array in arrays.items()])


def array_of(tensor: RawTensor) -> Array:
    """The array in `tensor`, read-only. Raises: RequestError `bad_tensor`."""
    try:
        return unpacked(tensor.datatype, tensor.shape, tensor.data)
    except ValueError as error:
        raise RequestError(
            "bad_tensor",
            f"{tensor.name!r:.64}: {len(tensor.data)} bytes are not {tensor.datatype:.64} of shape "
            f"{[*tensor.shape]!s:.200}: {error}",
        ) from error


def arrays_of(tensors: Sequence[RawTensor]) -> list[Array]:
    """The arrays in `tensors`, which are alike in datatype (not BYTES), shape and number of bytes.

    Raises: RequestError `bad_tensor`, about the first, for they are all as wrong.
    """
    first, rows = tensors[0], len(tensors)
    array_of(first)
    data = b"".join([tensor.data for tensor in tensors])
    try:
        stack = unpacked(first.datatype, (rows, *first.shape), data)
    except ValueError:  # they have as many dimensions as numpy allows
        return [array_of(tensor) for tensor in tensors]
    return [stack[row, ...] for row in range(rows)]


def signature_of(tensors: Sequence[RawTensor]) -> list[tuple[str, str, tuple[int, ...], int]]:
    """What is equal in tensors that can be read together: all but their elements."""
    return [(each.name, each.datatype, each.shape, len(each.data)) for each in tensors]


def size(tensors: Sequence[RawTensor]) -> int:
    """The bytes of tensors."""
    return sum([len(each.data) for each in tensors])


def answer_size(sent: Sequence[RawTensor], outputs: Sequence[Tensor]) -> int:
    """About how many bytes answer the rows in `sent`, where a model declares `outputs` of as many.

    A free dimension is taken to be as long as the longest of what was sent.
    """
    longest = max([max(each.shape, default=1) for each in sent])
    row = sum(
        prod([longest if length < 0 else length for length in each.shape[1:]]) * each.dtype.itemsize
        for each in outputs
    )
    return row * prod(sent[0].shape[:1])


def names_of(inputs: Sequence[RawTensor]) -> list[str]:
    """The names of a request's inputs. Raises: RequestError `bad_request` for a name twice."""
    names = [tensor.name for tensor in inputs]
    if len(names) > 1 and len(set(names)) < len(names):
        raise RequestError("bad_request", "two inputs have the same name")
    return names


def _texts(data: bytes) -> Array:
    texts: list[str] = []
    at, end = 0, len(data)
    while at < end:
        if end - at < 4 or end - at - 4 < (size := _LENGTH.unpack_from(data, at)[0]):
            raise ValueError("a text is longer than its bytes")
        texts.append(data[at + 4 : at + 4 + size].decode())
        at += 4 + size
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array
