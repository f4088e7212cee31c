"""The metadata of an ONNX file, read without loading the model.

Why: what a file is of can be said in a millisecond; making a session of it takes far longer.

Invariants: garbage raises PackageError and nothing else; of a large file only the metadata is read.

Knows nothing about what the metadata means. Source: the top level of `ModelProto` in onnx.proto,
whose field 14 holds `metadata_props`, pairs of key (1) and value (2).
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.errors import PackageError

PREFIX = "headwater."
_METADATA, _KEY, _VALUE = 14, 1, 2
_FIELDS_MAX = 10_000
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def metadata_in(path: Path) -> dict[str, str]:
    """The metadata of the file at `path`. Raises: PackageError `unreadable_package`."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _pairs(memoryview(data))
    except (OSError, ValueError, IndexError, BufferError) as error:
        raise PackageError(
            "unreadable_package", f"{path} cannot be read as an ONNX file: {error}"
        ) from error


def _pairs(data: memoryview) -> dict[str, str]:
    with data:
        found = {}
        for number, body in _fields(data):
            if number == _METADATA:
                pair = {field: bytes(text) for field, text in _fields(body)}
                found[_text(pair, _KEY)] = _text(pair, _VALUE)
            body.release()
        return found


def is_package(metadata: dict[str, str]) -> bool:
    """Whether a file with this metadata was made to be a family's package."""
    return any(key.startswith(PREFIX) for key in metadata)


def family_of(path: Path) -> str:
    """The family that a file belongs to; for a bare one its name, made to be a family's.

    Raises: PackageError `unreadable_package`.
    """
    named = metadata_in(path).get(f"{PREFIX}family", "")
    return named or re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-_")[:64] or "model"


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(field number, body) of the length-delimited fields of a protobuf message."""
    at = count = 0
    while at < len(data):
        count += 1
        if count > _FIELDS_MAX:
            raise ValueError(f"it has more than {_FIELDS_MAX} fields")
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        elif kind == _BYTES:
            size, at = _varint(data, at)
            if size > len(data) - at:
                raise ValueError("it is truncated")
            yield number, data[at : at + size]
            at += size
        else:
            raise ValueError(f"byte {at} is no field")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError("a number is too long")


def _text(pair: dict[int, bytes], field: int) -> str:
    return str(pair.get(field, b""), "utf-8")
