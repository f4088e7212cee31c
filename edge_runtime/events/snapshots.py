"""The snapshot file: the windows of all families as of one position in the event log.

Why: after a restart the windows are there again, bit for bit, without reading the whole log.

Commit point: the rename of the file. It is written on the log's commit thread, and only once every
record that it covers is durable; so a snapshot never knows an event that the log has lost.

Invariants: `floor` never goes back; the log keeps every event after it.

Knows nothing about engines: a family's state is bytes.
"""

from __future__ import annotations

import logging
import zlib
from pathlib import Path

import msgspec

from edge_runtime.files import Files, OsFiles, write_atomic

SNAPSHOT_VERSION = 1

_MAGIC = b"HWSN"

log = logging.getLogger("edge_runtime.events.snapshots")


class Snapshot(msgspec.Struct, array_like=True, frozen=True):
    """The state of each family after record `seq` of `epoch`, class event."""

    version: int
    epoch: int
    seq: int
    families: dict[str, bytes]


_decoder = msgspec.msgpack.Decoder(Snapshot)


class SnapshotFile:
    """The newest snapshot at `path`, and the one that waits for its records to become durable."""

    def __init__(self, path: Path, files: Files | None = None) -> None:
        self._path, self._files = path, files or OsFiles()
        self._waiting: Snapshot | None = None
        self._counts = {"written": 0, "failures": 0, "unreadable": 0}
        self.floor = (0, 0)

    def load(self) -> Snapshot | None:
        """The snapshot on disk; None when there is none, or none that can be read."""
        try:
            with self._files.reader(self._path) as file:
                data = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._counts["unreadable"] += 1
            log.warning("%s; windows are rebuilt from the log alone", error)
            return None
        snapshot = _decode(data)
        if snapshot is None:
            self._counts["unreadable"] += 1
            log.warning("%s cannot be read; windows are rebuilt from the log alone", self._path)
            return None
        self.floor = (snapshot.epoch, snapshot.seq)
        return snapshot

    def offer(self, snapshot: Snapshot) -> None:
        """Have `snapshot` written as soon as `commit` says that what it covers is durable."""
        self._waiting = snapshot

    def commit(self, epoch: int, durable_seq: int) -> None:
        """Write the waiting snapshot if `epoch` is durable up to it; called on one thread only."""
        waiting = self._waiting
        if waiting is None or (epoch, durable_seq) < (waiting.epoch, waiting.seq):
            return
        try:
            write_atomic(self._path, _encode(waiting), 0o600, self._files)
        except OSError as error:
            self._counts["failures"] += 1
            log.warning("%s cannot be written, the last one stays: %s", self._path, error)
            return
        self._counts["written"] += 1
        self.floor = (waiting.epoch, waiting.seq)
        if self._waiting is waiting:
            self._waiting = None

    def statistics(self) -> dict[str, int]:
        """Counts since the start, and the position of the snapshot on disk."""
        return self._counts | {"epoch": self.floor[0], "seq": self.floor[1]}


def _encode(snapshot: Snapshot) -> bytes:
    body = msgspec.msgpack.encode(snapshot)
    return _MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def _decode(data: bytes) -> Snapshot | None:
    body = data[8:]
    if data[:4] != _MAGIC or int.from_bytes(data[4:8], "little") != zlib.crc32(body):
        return None
    try:
        snapshot = _decoder.decode(body)
    except (msgspec.DecodeError, ValueError):
        return None
    return snapshot if snapshot.version == SNAPSHOT_VERSION else None
