"""The ingest database: what the learner holds of each device, and what it still waits for.

Why: a record counts as held only together with everything that follows from it; SQLite makes that
one transaction.

Invariants: one commit point, the transaction of `apply`: watermarks, the name of the archive file,
pending predictions, labels, released examples, their batches, quarantine and counters move together
or not at all. One writing connection, used by one thread at a time; a lock on the file keeps a
second process out. The reading methods open their own connection and may be called from any thread.
A prediction's row stays for ever: its state tells what became of it when a label comes late.

Knows nothing about how records are accepted, joined or batched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import msgspec

from cloud_learner.store.examples import Batch, Example
from cloud_learner.store.ingest_state import (
    PENDING,
    RELEASED,
    Changes,
    Id,
    IngestState,
    Label,
    Pending,
    example,
)
from edge_runtime.errors import CapacityError, ConfigError
from edge_runtime.wire import codec
from edge_runtime.wire.messages import PredictionRecord

VERSION = 1
QUARANTINE_ROWS, QUARANTINE_BYTES = 1000, 4096

_SCHEMA = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE files (name TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE marks (device TEXT, epoch INTEGER, event_class TEXT, seq INTEGER, newest_s REAL,
  PRIMARY KEY (device, epoch, event_class)) WITHOUT ROWID;
CREATE TABLE predictions (device TEXT, epoch INTEGER, seq INTEGER, record BLOB NOT NULL,
  state INTEGER NOT NULL DEFAULT {PENDING}, label REAL, label_time_s REAL, label_final INTEGER,
  arrived_s REAL, matured_s REAL, released INTEGER, batch INTEGER,
  PRIMARY KEY (device, epoch, seq)) WITHOUT ROWID;
CREATE INDEX in_batch ON predictions (batch) WHERE batch IS NOT NULL;
CREATE TABLE early_labels (device TEXT, epoch INTEGER, seq INTEGER, value REAL, time_s REAL,
  final INTEGER, arrived_s REAL, PRIMARY KEY (device, epoch, seq)) WITHOUT ROWID;
CREATE TABLE quarantine (id INTEGER PRIMARY KEY, arrived_s REAL, subject TEXT, reason TEXT,
  data BLOB);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID;
PRAGMA user_version = {VERSION};
"""
_MARK = "INSERT OR REPLACE INTO marks VALUES (?, ?, ?, ?, ?)"
_PREDICTION = "INSERT INTO predictions (device, epoch, seq, record) VALUES (?, ?, ?, ?)"
_OF_ID = "WHERE device = ? AND epoch = ? AND seq = ?"
_LABEL = (
    "UPDATE predictions SET label = ?, label_time_s = ?, label_final = ?, arrived_s = ? " + _OF_ID
)
_SETTLE = "UPDATE predictions SET state = ?, matured_s = ?, released = ? " + _OF_ID
_BATCH = "UPDATE predictions SET batch = ? " + _OF_ID
_EARLY = "INSERT OR REPLACE INTO early_labels VALUES (?, ?, ?, ?, ?, ?, ?)"
_JOINED = "DELETE FROM early_labels " + _OF_ID
_BAD = "INSERT INTO quarantine (arrived_s, subject, reason, data) VALUES (?, ?, ?, ?)"
_BOUND = "DELETE FROM quarantine WHERE id <= (SELECT max(id) FROM quarantine) - ?"
_COUNT = "INSERT OR REPLACE INTO counters VALUES (?, ?)"
_META = "INSERT OR REPLACE INTO meta VALUES (?, ?)"
_ROWS = (
    "SELECT device, epoch, seq, record, label, label_time_s, label_final, arrived_s, matured_s"
    " FROM predictions "
)


class IngestDb:
    """The database at `path`, made when absent.

    Raises: ConfigError `already_owned`, `bad_version`, `ingest_db_damaged`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _owned(path)
        try:
            self._writer = _opened(path)
        except BaseException:
            os.close(self._lock)
            raise

    def load(self) -> IngestState:
        """What was committed so far."""
        read = self._writer.execute
        numbers = dict(read("SELECT name, value FROM meta").fetchall())
        return IngestState(
            **numbers,
            marks={(d, e, c): (s, n) for d, e, c, s, n in read("SELECT * FROM marks")},
            pending=[_pending(row) for row in read(_ROWS + f"WHERE state = {PENDING}")],
            early_labels={
                (d, e, s): Label(value, time_s, bool(final), arrived_s)
                for d, e, s, value, time_s, final, arrived_s in read("SELECT * FROM early_labels")
            },
            unbatched=_examples(
                read(_ROWS + f"WHERE state = {RELEASED} AND batch IS NULL ORDER BY released")
            ),
            counters=dict(read("SELECT name, value FROM counters").fetchall()),
        )

    def apply(self, changes: Changes) -> None:
        """Commit; durable on return. Raises: CapacityError `disk_full`, with nothing changed."""
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            self._write(changes)
            self._writer.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):  # it may have rolled back by itself
                self._writer.execute("ROLLBACK")
            raise CapacityError(
                "disk_full", f"{self._path}: commit {changes.commit} was not written: {error}"
            ) from error

    def _write(self, changes: Changes) -> None:
        write = self._writer.executemany
        write("INSERT INTO files VALUES (?)", [(name,) for name in changes.files])
        write(_MARK, [(*lane, *mark) for lane, mark in changes.marks.items()])
        write(_PREDICTION, changes.predictions)
        write(_LABEL, changes.labels)
        write(_SETTLE, changes.settled)
        write(_BATCH, changes.batched)
        write(_EARLY, [(*i, *msgspec.structs.astuple(v)) for i, v in changes.early_labels.items()])
        write(_JOINED, changes.early_joined)
        if changes.quarantine:
            write(_BAD, [(*row, data[:QUARANTINE_BYTES]) for *row, data in changes.quarantine])
            self._writer.execute(_BOUND, (QUARANTINE_ROWS,))
        write(_COUNT, changes.counters.items())
        names = ("commit", "clock_s", "batch", "released")
        write(_META, [(name, getattr(changes, name)) for name in names])

    def state_of(self, identity: Id) -> int | None:
        """What became of a committed prediction: PENDING, RELEASED, ...; None when unknown."""
        row = self._writer.execute("SELECT state FROM predictions " + _OF_ID, identity).fetchone()
        return cast("int", row[0]) if row else None

    def close(self) -> None:
        """Close the writing connection and let another process in."""
        self._writer.close()
        os.close(self._lock)

    def files(self) -> list[str]:
        """Names of the archive files of all commits, in order."""
        return [name for (name,) in self._read("SELECT name FROM files ORDER BY name")]

    def examples_of(self, batch: int) -> list[Example]:
        """The examples of one batch, in release order."""
        return _examples(self._read(_ROWS + "WHERE batch = ? ORDER BY released", batch))

    def batches_after(self, number: int) -> Iterator[Batch]:
        """The committed batches above `number`, in order: what a restarted trainer has missed."""
        last = self._read("SELECT value FROM meta WHERE name = 'batch'")
        for following in range(number + 1, last[0][0] + 1 if last else 0):
            yield Batch(following, self.examples_of(following))

    def quarantined(self) -> list[tuple[float, str, str, bytes]]:
        """The newest refused messages and records: arrival, subject, reason, first bytes."""
        return self._read("SELECT arrived_s, subject, reason, data FROM quarantine ORDER BY id")

    def _read(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        uri = f"file:{quote(str(self._path.absolute()))}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as reader:
            return reader.execute(sql, values).fetchall()


def _owned(path: Path) -> int:
    fd = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise ConfigError(
            "already_owned", f"another learner uses {path}", "stop it, or choose another directory"
        ) from error
    return fd


def _opened(path: Path) -> sqlite3.Connection:
    try:
        # The thread that commits is not the one that opens; they never use it at the same time.
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        version = _prepared(connection)
    except sqlite3.Error as error:
        raise ConfigError(
            "ingest_db_damaged",
            f"{path} is not an ingest database: {error}; nothing was changed",
            "restore the learner's directory from a copy, or start with an empty one",
        ) from error
    if version != VERSION:
        connection.close()
        raise ConfigError("bad_version", f"{path} has version {version}; this reads {VERSION}")
    return connection


def _prepared(connection: sqlite3.Connection) -> int:
    """Set durability, make the tables in an empty file, and return the version."""
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            connection.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
    except sqlite3.Error:
        connection.close()
        raise
    return version or VERSION


def _pending(row: tuple[Any, ...]) -> Pending:
    device, epoch, seq, record, value, time_s, final, arrived_s, _ = row
    label = None if value is None else Label(value, time_s, bool(final), arrived_s)
    return Pending(device, epoch, seq, cast("PredictionRecord", codec.decode_record(record)), label)


def _examples(rows: Any) -> list[Example]:
    return [example(_pending(row), row[-1]) for row in rows]
