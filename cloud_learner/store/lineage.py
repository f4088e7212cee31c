"""Lineage: what came from what, one JSON line for each candidate, verdict, release, plan, decision,
and for each micro-batch that failed.

Why: months later somebody asks why a device ran this very file; the answer must still be there.

Invariants: lines are only appended; `append` returned means on disk. Commit point: the `fsync` of
the appended line. A line that a crash tore is cut off at the next open, so `read` yields whole
entries only. Safe to call from any thread.

Knows nothing about what the facts of an entry mean.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.clock import Clock, SystemClock
from edge_runtime.errors import CapacityError, ConfigError
from edge_runtime.files import fsync_directory

KINDS = (
    *("candidate", "verdict", "release", "plan", "decision", "failed"),
    *("alarm", "quarantine", "approval", "control"),
)
Entry = dict[str, Any]


class Lineage:
    """The append-only record in `directory`. Raises: ConfigError `lineage_damaged`."""

    def __init__(self, directory: Path, clock: Clock | None = None) -> None:
        self._path = directory / "lineage.jsonl"
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        directory.mkdir(parents=True, exist_ok=True)
        self._cut_torn_line()

    def append(self, kind: str, **facts: Any) -> None:
        """Add an entry of one of KINDS; `facts` is whatever JSON holds.

        Raises: CapacityError `disk_full`, with the record as it was.
        """
        assert kind in KINDS, kind
        entry = {"kind": kind, "time_s": self._clock.now_s()} | facts
        line = msgspec.json.encode(entry) + b"\n"
        with self._lock, self._path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except OSError as error:
                os.truncate(self._path, size)
                raise CapacityError(
                    "disk_full", f"{self._path}: the entry {kind!r} was not written: {error}"
                ) from error

    def read(self, kind: str | None = None) -> Iterator[Entry]:
        """All entries, or those of one kind, oldest first."""
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                entry = self._entry(number, line)
                if kind is None or entry["kind"] == kind:
                    yield entry

    def of(self, family: str) -> Lineage:
        """The part of one family: what is added names it, what is read is its own."""
        return _Part(self, family)

    def _entry(self, number: int, line: bytes) -> Entry:
        try:
            return msgspec.json.decode(line, type=Entry)
        except msgspec.DecodeError as error:
            raise ConfigError(
                "lineage_damaged",
                f"{self._path}, line {number}: {error}; nothing was changed",
                f"look at it with: sed -n {number}p {self._path}",
            ) from error

    def _cut_torn_line(self) -> None:
        data = self._path.read_bytes() if self._path.exists() else b""
        with self._path.open("ab") as file:
            file.truncate(data.rfind(b"\n") + 1)
            os.fsync(file.fileno())
        fsync_directory(self._path.parent)


class _Part(Lineage):
    """The entries of one family in the record of all."""

    def __init__(self, whole: Lineage, family: str) -> None:
        self._whole, self._family = whole, family

    def append(self, kind: str, **facts: Any) -> None:
        self._whole.append(kind, **{"family": self._family, **facts})

    def read(self, kind: str | None = None) -> Iterator[Entry]:
        entries = self._whole.read(kind)
        return (entry for entry in entries if entry.get("family") == self._family)
