"""Frames: consecutive records under one CRC, and how to find them in a damaged file.

Why: a frame that can be proven whole is taken, whatever became of its neighbours; so a crash costs
what it tore, and a flipped bit costs one frame.

Format, little-endian:

    frame   4s "HWFR"  u32 body bytes  u32 CRC-32 of the rest  u64 base_seq  u32 count
            body: u32 length of each of the `count` records, then the records themselves

Invariants: record i of a frame has sequence number `base_seq + i`; the frames of a segment are
written without a gap in sequence numbers, starting at the header's `base_seq`; a frame's body
stays under FRAME_BYTES unless one record alone is larger. A reader takes every frame that proves
itself and whose numbers rise, and goes on behind one that does not.

Knows nothing about threads, commits or what a record means.
"""

from __future__ import annotations

import errno
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO, NamedTuple

from edge_runtime.events.segment import HEADER_BYTES, Segment
from edge_runtime.files import Files

FRAME_BYTES = 64 * 1024
_PIECE_BYTES = 4096
_MAGIC = b"HWFR"
_FRAME = struct.Struct("<4sIIQI")
_REST = struct.Struct("<QI")


class Frame(NamedTuple):
    """A frame that proved itself, and where it stands in its file."""

    offset: int
    base_seq: int
    last_seq: int
    body: bytes

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.offset + _FRAME.size + len(self.body)


def encode_frames(base_seq: int, records: list[bytes]) -> bytes:
    """One or more frames that hold `records`, numbered from `base_seq`."""
    return b"".join(
        _encode_frame(base_seq + start, records[start:end]) for start, end in _cuts(records)
    )


def _cuts(records: list[bytes]) -> Iterator[tuple[int, int]]:
    if sum(map(len, records)) <= FRAME_BYTES:
        yield 0, len(records)
        return
    start = used = 0
    for position, record in enumerate(records):
        if used and used + len(record) > FRAME_BYTES:
            yield start, position
            start, used = position, 0
        used += len(record)
    yield start, len(records)


def _encode_frame(base_seq: int, records: list[bytes]) -> bytes:
    count = len(records)
    body = struct.pack(f"<{count}I", *map(len, records)) + b"".join(records)
    rest = _REST.pack(base_seq, count)
    crc = _crc(body, zlib.crc32(rest))
    return _FRAME.pack(_MAGIC, len(body), crc, base_seq, count) + body


def _crc(body: bytes, crc: int) -> int:
    """The CRC-32 of `body` after `crc`, in pieces so small that zlib does not let go of the
    interpreter for each: every time that it does, an answer waits for it to come back.
    """
    view = memoryview(body)
    for at in range(0, len(body), _PIECE_BYTES):
        crc = zlib.crc32(view[at : at + _PIECE_BYTES], crc)
    return crc


def scan(files: Files, segment: Segment) -> Segment:
    """`segment` up to the last of its frames that proves itself: the rest is out."""
    proven = replace(segment, size=HEADER_BYTES, index=[])
    with files.reader(segment.path) as file:
        for frame in _frames(file, HEADER_BYTES, segment.size, segment.base_seq):
            proven.grew(frame.offset, frame.base_seq, frame.last_seq, frame.end)
    return proven


def ensure_index(files: Files, segment: Segment, view: Segment) -> None:
    """Read through a large `segment` of an earlier run once, so that reads can start inside it."""
    if not segment.index and segment.size > 4 * FRAME_BYTES:
        segment.index = scan(files, view).index
        view.index = [*view.index, *segment.index]


def records(files: Files, segment: Segment, after_seq: int) -> Iterator[tuple[int, bytes]]:
    """(sequence number, record) of a frozen `segment`, from the first above `after_seq`.

    Numbers that are missing stood in frames that no longer prove themselves.
    Raises: OSError; FileNotFoundError when the file was given back meanwhile.
    """
    wanted = max(after_seq + 1, segment.base_seq)
    found, offset = max(entry for entry in segment.index if entry[0] <= wanted)
    with files.reader(segment.path) as file:
        for frame in _frames(file, offset, segment.size, found):
            if frame.last_seq >= wanted:
                yield from _split(frame, after_seq, segment.last_seq)
            if frame.last_seq >= segment.last_seq:
                return


def _split(frame: Frame, after_seq: int, last_seq: int) -> Iterator[tuple[int, bytes]]:
    count = frame.last_seq - frame.base_seq + 1
    start, lengths = 4 * count, struct.unpack_from(f"<{count}I", frame.body)
    for seq, length in enumerate(lengths, frame.base_seq):
        if seq > last_seq:
            return
        if seq > after_seq:
            yield seq, frame.body[start : start + length]
        start += length


def _frames(file: BinaryIO, offset: int, end: int, next_seq: int) -> Iterator[Frame]:
    """Each frame from `offset` to `end` that proves itself, with numbers from `next_seq` rising."""
    file.seek(offset)
    while offset < end:
        frame = _proven(_read(file, _FRAME.size), offset, end, file)
        if frame is None or frame.base_seq < next_seq:
            frame = _next_proven(file, offset, end, next_seq)
            if frame is None:
                return
            file.seek(frame.end)
        yield frame
        offset, next_seq = frame.end, frame.last_seq + 1


def _proven(head: bytes, offset: int, end: int, file: BinaryIO) -> Frame | None:
    """The frame with that head, its body read from `file`; None when it does not prove itself."""
    if len(head) < _FRAME.size:
        return None
    magic, length, crc, base_seq, count = _FRAME.unpack(head)
    if magic != _MAGIC or not 0 < 4 * count <= length <= end - offset - _FRAME.size:
        return None
    body = _read(file, length)
    if len(body) < length or zlib.crc32(body, zlib.crc32(head[12:])) != crc:
        return None
    return Frame(offset, base_seq, base_seq + count - 1, body)


def _next_proven(file: BinaryIO, offset: int, end: int, next_seq: int) -> Frame | None:
    """The first frame that proves itself behind the damaged one at `offset`."""
    file.seek(offset)
    data = _read(file, end - offset)
    for at in _places(data):
        head = data[at : at + _FRAME.size]
        file.seek(offset + at + _FRAME.size)
        frame = _proven(head, offset + at, end, file)
        if frame is not None and frame.base_seq >= next_seq:
            return frame
    return None


def _places(data: bytes) -> Iterator[int]:
    """Where a frame may begin behind the damaged one that `data` begins with.

    Where that one says how long it is comes first: what it holds may look like a frame, too.
    """
    if data.startswith(_MAGIC) and len(data) >= _FRAME.size:
        yield _FRAME.size + _FRAME.unpack_from(data)[1]
    at = data.find(_MAGIC, 1)
    while at >= 0:
        yield at
        at = data.find(_MAGIC, at + 1)


def _read(file: BinaryIO, size: int) -> bytes:
    """The next `size` bytes; zeros stand for blocks that the disk cannot read any more."""
    at = file.tell()
    try:
        return file.read(size)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
    blocks = [
        _block(file, start, min(_PIECE_BYTES, at + size - start))
        for start in range(at, at + size, _PIECE_BYTES)
    ]
    return b"".join(blocks)


def _block(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    try:
        return file.read(size)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
    file.seek(at + size)
    return bytes(size)
