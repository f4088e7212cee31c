"""The segment file: a header, then frames of consecutive records, each frame under one CRC.

Why: an append-only file whose every whole frame can be proven whole is cut at the first torn byte
after a crash, and gives its space back with one unlink.

Format, version 1, little-endian; readers refuse a version that they do not know:

    header  4s "HWSG"  u16 version  u8 class  u8 device length  u64 epoch  u64 base_seq
            64s device, zero-padded  u32 CRC-32 of all before it
    frame   4s "HWFR"  u32 body bytes  u32 CRC-32 of the rest  u64 base_seq  u32 count
            body: u32 length of each of the `count` records, then the records themselves

Invariants: record i of a frame has sequence number `base_seq + i`; the frames of a segment follow
each other without a gap in sequence numbers, starting at the header's `base_seq`; a frame's body
stays under FRAME_BYTES unless one record alone is larger, so damage costs no more than that.

Knows nothing about threads, commits, epochs of other files or what a record means.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from edge_runtime.errors import ConfigError
from edge_runtime.wire.messages import EventClass

VERSION = 1
FRAME_BYTES = 64 * 1024
_PIECE_BYTES = 4096
SUFFIX = ".segment"

_MAGIC = b"HWSG"
_HEADER = struct.Struct("<4sHBBQQ64s")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size
_FRAME_MAGIC = b"HWFR"
_FRAME = struct.Struct("<4sIIQI")
_FRAME_REST = struct.Struct("<QI")
_CODES: dict[EventClass, int] = {"event": 1, "label": 2}
_CLASSES = {code: event_class for event_class, code in _CODES.items()}


class DamagedError(Exception):
    """A frame inside the proven part of a segment does not match its CRC; internal to the room."""


@dataclass(eq=False)
class Segment:
    """A segment file as far as it is proven: `size` bytes, records `base_seq` to `last_seq`.

    `charge` is what the records count against the log's bound. `index` holds
    (first sequence number, offset) of a frame about every FRAME_BYTES, in order.
    """

    path: Path
    device: str
    event_class: EventClass
    epoch: int
    base_seq: int
    last_seq: int
    size: int
    charge: int
    index: list[tuple[int, int]] = field(default_factory=list)

    def grew(self, last_seq: int, size: int, charge: int) -> None:
        """Take in what was just made durable at the end of the file."""
        if not self.index or size - self.index[-1][1] >= FRAME_BYTES:
            self.index.append((self.last_seq + 1, self.size))
        self.last_seq, self.size, self.charge = last_seq, size, self.charge + charge

    def frozen(self) -> Segment:
        """A copy for a reader, which later growth does not touch."""
        return replace(self, index=[(self.base_seq, HEADER_BYTES), *self.index])


def new(
    directory: Path, device: str, event_class: EventClass, epoch: int, base_seq: int
) -> Segment:
    """A segment that is still to be written, with no records in it."""
    path = directory / f"{event_class}-{epoch:08d}-{base_seq:016d}{SUFFIX}"
    return Segment(path, device, event_class, epoch, base_seq, base_seq - 1, HEADER_BYTES, 0)


def encode_header(segment: Segment) -> bytes:
    """The header that opens the file of `segment`."""
    device = segment.device.encode()
    fixed = _HEADER.pack(
        _MAGIC,
        VERSION,
        _CODES[segment.event_class],
        len(device),
        segment.epoch,
        segment.base_seq,
        device,
    )
    return fixed + _CRC.pack(zlib.crc32(fixed))


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
    rest = _FRAME_REST.pack(base_seq, count)
    crc = _crc(body, zlib.crc32(rest))
    return _FRAME.pack(_FRAME_MAGIC, len(body), crc, base_seq, count) + body


def _crc(body: bytes, crc: int) -> int:
    """The CRC-32 of `body` after `crc`, in pieces so small that zlib does not let go of the
    interpreter for each: every time that it does, an answer waits for it to come back.
    """
    view = memoryview(body)
    for at in range(0, len(body), _PIECE_BYTES):
        crc = zlib.crc32(view[at : at + _PIECE_BYTES], crc)
    return crc


def open_header(path: Path) -> Segment | None:
    """The segment in `path`, its records not yet looked at; None when the header is no header.

    Raises: ConfigError `log_version` for a header of a version that this does not read.
    """
    with path.open("rb") as file:
        data = file.read(HEADER_BYTES)
    if len(data) < HEADER_BYTES or zlib.crc32(data[:-4]) != _CRC.unpack(data[-4:])[0]:
        return None
    magic, version, code, length, epoch, base_seq, device = _HEADER.unpack(data[:-4])
    if magic != _MAGIC:
        return None
    if version != VERSION or code not in _CLASSES:
        raise ConfigError(
            "log_version",
            f"{path} has format version {version}; this reads {VERSION}; nothing was changed",
            "open the log with the release that wrote it",
        )
    name, size = device[:length].decode(), path.stat().st_size
    return Segment(path, name, _CLASSES[code], epoch, base_seq, base_seq - 1, size, size)


def scan(segment: Segment) -> Segment:
    """`segment` as far as its frames prove themselves: the rest is out."""
    size = segment.size
    proven = replace(segment, size=HEADER_BYTES, charge=0, index=[])
    with segment.path.open("rb") as file:
        file.seek(HEADER_BYTES)
        while (frame := _read_frame(file.read, size - proven.size)) is not None:
            base_seq, count, body = frame
            if base_seq != proven.last_seq + 1:
                break
            end = proven.size + _FRAME.size + len(body)
            proven.grew(base_seq + count - 1, end, len(body))
    return proven


def ensure_index(segment: Segment, view: Segment) -> None:
    """Read through a large `segment` of an earlier run once, so that reads can start inside it."""
    if not segment.index and segment.size > 4 * FRAME_BYTES:
        segment.index = scan(view).index
        view.index = [*view.index, *segment.index]


def records(segment: Segment, after_seq: int) -> Iterator[tuple[int, bytes]]:
    """(sequence number, record) of a frozen `segment`, from the first above `after_seq`.

    Raises: DamagedError where the proven part no longer proves itself; FileNotFoundError when
    the file was trimmed meanwhile.
    """
    wanted = max(after_seq + 1, segment.base_seq)
    found, offset = max(entry for entry in segment.index if entry[0] <= wanted)
    with segment.path.open("rb") as file:
        file.seek(offset)
        while found <= segment.last_seq and offset < segment.size:
            frame = _read_frame(file.read, segment.size - offset)
            if frame is None:
                raise DamagedError(f"{segment.path} at byte {offset}")
            base_seq, count, body = frame
            offset += _FRAME.size + len(body)
            found = base_seq + count
            if found > wanted:
                yield from _split(base_seq, count, body, after_seq, segment.last_seq)


def _split(
    base_seq: int, count: int, body: bytes, after_seq: int, last_seq: int
) -> Iterator[tuple[int, bytes]]:
    start = 4 * count
    for seq, length in enumerate(struct.unpack_from(f"<{count}I", body), base_seq):
        if seq > last_seq:
            return
        if seq > after_seq:
            yield seq, body[start : start + length]
        start += length


def _read_frame(read: Callable[[int], bytes], left: int) -> tuple[int, int, bytes] | None:
    """(base_seq, count, body) of the frame that comes next; None when it does not prove itself."""
    head = read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    magic, length, crc, base_seq, count = _FRAME.unpack(head)
    if magic != _FRAME_MAGIC or not 0 < 4 * count <= length <= left:
        return None
    body = read(length)
    if len(body) < length or zlib.crc32(body, zlib.crc32(head[12:])) != crc:
        return None
    return base_seq, count, body


def write_all(fd: int, data: bytes) -> None:
    """Write the whole of `data`. Raises: OSError, with an unknown part of it written."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
