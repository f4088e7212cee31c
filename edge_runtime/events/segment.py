"""The segment file: a header that says whose it is, then frames of consecutive records.

Why: an append-only file gives its space back with one unlink, and a directory of them is a log of
which any part may be gone without harm to the rest.

Format, version 1, little-endian; readers refuse a version that they do not know:

    header  4s "HWSG"  u16 version  u8 class  u8 device length  u64 epoch  u64 base_seq
            64s device, zero-padded  u32 CRC-32 of all before it
    frames  see `frames`
    tail    zeros, where the file is longer than what was written

The file is named class-epoch-base_seq.segment, so that a damaged header is replaced by its name.

Knows nothing about threads, commits, other files or what a record means.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from edge_runtime.errors import ConfigError
from edge_runtime.files import Files
from edge_runtime.wire.messages import EventClass

VERSION = 1
SUFFIX = ".segment"
INDEX_BYTES = 64 * 1024

_MAGIC = b"HWSG"
_HEADER = struct.Struct("<4sHBBQQ64s")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size
_CODES: dict[EventClass, int] = {"event": 1, "label": 2}
_CLASSES = {code: event_class for event_class, code in _CODES.items()}
_NAME = re.compile(rf"(event|label)-(\d{{1,16}})-(\d{{1,16}}){re.escape(SUFFIX)}", re.ASCII)


@dataclass(eq=False)
class Segment:
    """A segment file as far as it is known: `size` bytes, records `base_seq` to `last_seq`.

    `allocated` is how long the file is while it grows, 0 after that. `index` holds
    (first sequence number, offset) of a frame about every INDEX_BYTES, in order.
    """

    path: Path
    device: str
    event_class: EventClass
    epoch: int
    base_seq: int
    last_seq: int
    size: int
    allocated: int = 0
    index: list[tuple[int, int]] = field(default_factory=list)

    @property
    def disk_bytes(self) -> int:
        """What the file takes of the disk."""
        return max(self.size, self.allocated)

    def grew(self, offset: int, base_seq: int, last_seq: int, size: int) -> None:
        """Take in frames that begin at `offset` and end the file, which has `size` bytes now."""
        if not self.index or size - self.index[-1][1] >= INDEX_BYTES:
            self.index.append((base_seq, offset))
        self.last_seq, self.size = last_seq, size

    def frozen(self) -> Segment:
        """A copy for a reader, which later growth does not touch."""
        return replace(self, index=[(self.base_seq, HEADER_BYTES), *self.index])


def new(
    directory: Path, device: str, event_class: EventClass, epoch: int, base_seq: int
) -> Segment:
    """A segment that is still to be written, with no records in it."""
    path = directory / f"{event_class}-{epoch:016d}-{base_seq:016d}{SUFFIX}"
    return Segment(path, device, event_class, epoch, base_seq, base_seq - 1, HEADER_BYTES)


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


def open_header(files: Files, path: Path) -> Segment | None:
    """The segment in `path`, its records not yet looked at; None when the header is no header.

    Raises: ConfigError `log_version` for a header of a version that this does not read.
    """
    with files.reader(path) as file:
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
    name, size = device[:length].decode(), files.size(path)
    return Segment(path, name, _CLASSES[code], epoch, base_seq, base_seq - 1, size)


def named(files: Files, path: Path, device: str) -> Segment | None:
    """The segment that the name of `path` speaks of; None when it is no such name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    name: EventClass = "event" if match[1] == "event" else "label"
    epoch, base_seq = int(match[2]), int(match[3])
    return Segment(path, device, name, epoch, base_seq, base_seq - 1, files.size(path))
