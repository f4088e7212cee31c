"""How much was written to flash: bytes per UTC day, over restarts.

Why: flash wears out by what is written to it, and a device whose day costs more than it should is
seen in its status long before its card dies.

What is counted are the bytes that were handed to files; what a file system adds is not seen here.
The file is overwritten in place and never synced: a power cut may take a segment's worth of the
count, and nothing else depends on it. It has no commit point.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import zlib
from pathlib import Path

from edge_runtime.clock import Clock
from edge_runtime.files import Files

_DAY_S = 86400
_MAGIC = b"HWUS"
_BODY = struct.Struct("<4sQQQ")
_CRC = struct.Struct("<I")


class Usage:
    """What `files` writes once it has written `since` bytes, by day; kept in `path`."""

    def __init__(self, files: Files, path: Path, clock: Clock, since: int = 0) -> None:
        self._files, self._path, self._clock = files, path, clock
        self._lock, self._seen = threading.Lock(), since
        self._day, self._today, self._yesterday = self._load() or (self._now(), 0, 0)

    def follow(self) -> None:
        """Take in what was written since, as of this day."""
        with self._lock:
            written, day = self._files.written, self._now()
            if day != self._day:  # a clock that is set back begins a day, too
                self._yesterday = self._today if day == self._day + 1 else 0
                self._day, self._today = day, 0
            self._today += written - self._seen
            self._seen = written

    def save(self) -> None:
        """Keep the count; what cannot be kept is counted on in memory."""
        self.follow()
        body = _BODY.pack(_MAGIC, self._day, self._today, self._yesterday)
        with contextlib.suppress(OSError):
            fd = self._opened()
            try:
                self._files.write(fd, body + _CRC.pack(zlib.crc32(body)), 0)
            finally:
                self._files.close(fd)

    def statistics(self) -> dict[str, int]:
        """Bytes written today and on the day before, UTC."""
        self.follow()
        return {"flash_bytes_today": self._today, "flash_bytes_yesterday": self._yesterday}

    def _now(self) -> int:
        return max(0, int(self._clock.now_s() // _DAY_S))

    def _opened(self) -> int:
        try:
            return self._files.open(self._path)
        except FileNotFoundError:
            return self._files.create(self._path)

    def _load(self) -> tuple[int, int, int] | None:
        try:
            with self._files.reader(self._path) as file:
                data = file.read()
        except OSError:
            return None
        body, crc = data[: _BODY.size], data[_BODY.size :]
        if crc != _CRC.pack(zlib.crc32(body)):
            return None
        _, day, today, yesterday = _BODY.unpack(body)
        return day, today, yesterday
