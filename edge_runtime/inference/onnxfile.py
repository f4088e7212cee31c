"""What an ONNX file says of itself, read without loading the model.

Why: what a file is of can be said in a millisecond; making a session of it takes far longer. And a
model whose weights lie in other files must be refused before they are read: no signature covers
them.

Invariants: garbage raises PackageError and nothing else; of a large file weights are not read.

Knows nothing about what the metadata means. Source: onnx.proto; field 14 of `ModelProto` holds
`metadata_props`, pairs of key (1) and value (2), field 13 of `TensorProto` where its data lies.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_runtime.errors import PackageError

PREFIX = "headwater."
_METADATA, _KEY, _VALUE = 14, 1, 2
_FIELDS_MAX, _PARTS_MAX = 10_000, 1_000_000
_TENSOR, _EXTERNAL = "tensor", 13
_PARTS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: _TENSOR, 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: _TENSOR, 6: "graph", 10: _TENSOR, 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: _TENSOR, 2: _TENSOR},
    _TENSOR: {},
}
"""The fields of each kind of message through which a tensor can be reached, and what they hold."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def metadata_in(path: Path) -> dict[str, str]:
    """The metadata of the file at `path`. Raises: PackageError `unreadable_package`."""
    with _opened(path) as data:
        return _pairs(data)


def check_whole(path: Path) -> None:
    """Refuse a model that would have ONNX Runtime read other files than the one at `path`.

    Raises: PackageError (external_data, unreadable_package).
    """
    with _opened(path) as data:
        elsewhere = _refers_elsewhere(data)
    if elsewhere:
        raise PackageError(
            "external_data",
            f"{path} keeps weights in another file, which no signature covers; it is not loaded",
            "save it whole: onnx.save(onnx.load(MODEL), FILE, save_as_external_data=False)",
        )


@contextmanager
def _opened(path: Path) -> Iterator[memoryview]:
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            memoryview(data) as view,
        ):
            yield view
    except (OSError, ValueError, IndexError, BufferError) as error:
        raise PackageError(
            "unreadable_package", f"{path} cannot be read as an ONNX file: {error}"
        ) from error


def _refers_elsewhere(data: memoryview) -> bool:
    todo, seen = [("model", data)], 0
    while todo:
        kind, message = todo.pop()
        for number, body in _fields(message, _PARTS_MAX):
            if kind == _TENSOR and number == _EXTERNAL:
                return True
            inner = _PARTS[kind].get(number)
            if inner is not None:
                todo.append((inner, body))
                seen += 1
        if seen > _PARTS_MAX:
            raise ValueError(f"it has more than {_PARTS_MAX} parts")
    return False


def _pairs(data: memoryview) -> dict[str, str]:
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


def _fields(data: memoryview, most: int = _FIELDS_MAX) -> Iterator[tuple[int, memoryview]]:
    """(field number, body) of the length-delimited fields of a protobuf message."""
    at = count = 0
    while at < len(data):
        count += 1
        if count > most:
            raise ValueError(f"it has more than {most} fields")
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
