"""Frames of a raw file: how messages lie one after the other, and how they are found again.

Why: a file of days must give back all that is whole in it, whatever else is torn or rotten.

Invariants: a head, then frames; a frame is the mark of its file, the length of the body, the CRC-32
of all three, the body. The mark is drawn for each file and no device knows it, so bytes inside a
body never look like a frame, not even where what stood before them is damaged.

Pure: bytes in, bytes out; knows nothing about messages.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

MAGIC = b"HWRAW\x00\x00\x01"  # the last byte is the version of the format
MARK_SIZE = 8
_HEAD = struct.Struct("<8s8sd")  # magic, mark, `before_s`; then the CRC-32
_FRAME = struct.Struct("<8sII")  # mark, length, CRC-32 of mark, length and body
_CRC = struct.Struct("<I")
HEAD_SIZE = _HEAD.size + _CRC.size


def head(mark: bytes, before_s: float) -> bytes:
    """The head of a file; `before_s` is when the newest message of the file before it arrived."""
    data = _HEAD.pack(MAGIC, mark, before_s)
    return data + _CRC.pack(zlib.crc32(data))


def read_head(data: bytes) -> tuple[bytes, float] | None:
    """Mark and `before_s` of a file that begins with these bytes; None if its head is not whole."""
    data = data[:HEAD_SIZE]
    if len(data) < HEAD_SIZE or data[:8] != MAGIC:
        return None
    _, mark, before_s = _HEAD.unpack_from(data)
    (crc,) = _CRC.unpack_from(data, _HEAD.size)
    return (mark, before_s) if crc == zlib.crc32(data[: _HEAD.size]) else None


def frame(mark: bytes, body: bytes) -> bytes:
    """A body in its frame."""
    start = mark + _CRC.pack(len(body))
    return start + _CRC.pack(zlib.crc32(body, zlib.crc32(start))) + body


def scan(data: bytes) -> Iterator[memoryview | int]:
    """What lies in a file, in order: bodies, and between them the sizes of damaged stretches."""
    found = read_head(data)
    # Where the head is damaged, the first frame shows the mark as well.
    mark = found[0] if found else data[HEAD_SIZE : HEAD_SIZE + MARK_SIZE]
    good, at = (HEAD_SIZE if found else 0), HEAD_SIZE
    while len(mark) == MARK_SIZE and (at := data.find(mark, at)) >= 0:
        body = _body(data, at)
        if body is None:
            at += 1
            continue
        if at > good:
            yield at - good
        yield body
        good = at = at + _FRAME.size + len(body)
    if len(data) > good:
        yield len(data) - good


def _body(data: bytes, at: int) -> memoryview | None:
    """The body of the frame at an offset, None if it is not whole."""
    if len(data) - at < _FRAME.size:
        return None
    _, length, crc = _FRAME.unpack_from(data, at)
    begin = at + _FRAME.size
    body = memoryview(data)[begin : begin + length]
    is_whole = len(body) == length and crc == zlib.crc32(body, zlib.crc32(data[at : begin - 4]))
    return body if is_whole else None
