"""RocksDB, fenced: one directory of sorted tables, one transaction at a time, errors of ours.

Why: ten million predictions that wait for a label belong on disk, and what a commit says about them
must hold together; a log-structured tree takes both at the speed of a log.

Invariants: a transaction is one write batch, synced before `write` returns; after a kill or a power
cut the database holds some prefix of the transactions. One process writes: a lock beside the
directory keeps a second one out, and `reader` opens what is there at that moment for reading.
After a failed write the object is done with; a new one begins at the last transaction.

Knows nothing about what keys and values mean. This room is the only home of rocksdict.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    DataBlockIndexType,
    DBCompressionType,
    Options,
    Rdict,
    ReadOptions,
    WriteBatch,
    WriteOptions,
)

from edge_runtime.errors import CapacityError, ConfigError, HeadwaterError

CACHE_BYTES = 256 << 20
_WAL_BYTES = 128 << 20
_BUFFER_BYTES = 4 << 20
_BLOB_FROM_BYTES = 1024
_REMAINS = (".sst", ".log", ".blob")
_CONFIG = "rocksdict-config.json"
_LOOKS, _LOOK_S = 5, 0.02


class Table:
    """How a table is used.

    `buffer_bytes` of new entries stay in memory. `has_blobs` keeps large values out of the tree,
    where they would be written again and again. `is_looked_up` is for many keys that nearly all
    exist.
    """

    def __init__(
        self,
        *,
        buffer_bytes: int = _BUFFER_BYTES,
        has_blobs: bool = False,
        is_looked_up: bool = False,
    ) -> None:
        self.buffer_bytes, self.has_blobs = buffer_bytes, has_blobs
        self.is_looked_up = is_looked_up


class Transaction:
    """What one commit changes; nothing of it is visible before `Rocks.write`."""

    def __init__(self, tables: dict[str, Rdict], handles: dict[str, Any], start: str = "") -> None:
        self.batch = WriteBatch(raw_mode=True)
        self._tables, self._handles, self._start = tables, handles, start

    def within(self, start: str) -> Transaction:
        """The same transaction, for the tables whose names begin with `start`, by the rest."""
        part = Transaction(self._tables, self._handles, start)
        part.batch = self.batch
        return part

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """Set a value."""
        self.batch.put(key, value, self._handles[self._start + table])

    def put_many(self, table: str, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Set many values."""
        put, handle = self.batch.put, self._handles[self._start + table]
        for key, value in items:
            put(key, value, handle)

    def delete(self, table: str, key: bytes) -> None:
        """Remove a key; one that is absent is no error."""
        self.batch.delete(key, self._handles[self._start + table])


class Rocks:
    """The database in the directory `path`, made when absent.

    Raises: ConfigError `already_owned`, or `damaged` as the code of what is damaged.
    """

    def __init__(self, path: Path, tables: dict[str, Table], *, damaged: str) -> None:
        self._path, self._damaged = path, damaged
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = _owned(path)
        try:
            self._refuse_remains()
            self._open(tables, AccessType.read_write())
        except BaseException:
            os.close(self._lock)
            raise

    @classmethod
    @contextlib.contextmanager
    def reader(cls, path: Path, tables: dict[str, Table], *, damaged: str) -> Iterator[Rocks]:
        """The database as it stands now, for reading, whether or not another process writes.

        Raises: ConfigError with the code `damaged`, also when there is none.
        """
        self = cls.__new__(cls)
        self._path, self._damaged, self._lock = path, damaged, None
        self._open(tables, AccessType.read_only(error_if_log_file_exist=False))
        try:
            yield self
        finally:
            self._shut()

    def begin(self) -> Transaction:
        """An empty transaction."""
        return Transaction(self._tables, self._handles)

    def write(self, transaction: Transaction) -> None:
        """Commit; durable on return. Raises: CapacityError `disk_full`; then open it anew."""
        try:
            self._db.write(transaction.batch, self._synced)
        except Exception as error:  # rocksdict knows no other type
            raise self._failure(error) from error

    def get(self, table: str, key: bytes) -> bytes | None:
        """A committed value."""
        with self._fenced():
            value: bytes | None = self._tables[table].get(key)
            return value

    def get_many(self, table: str, keys: Sequence[bytes]) -> list[bytes | None]:
        """Committed values, in the order of the keys; fastest when those are sorted."""
        with self._fenced():
            values: list[bytes | None] = self._tables[table][list(keys)]  # type: ignore[assignment]
            return values

    def scan(self, table: str, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Committed entries from `start` up to, not including, `end`."""
        options = ReadOptions()
        options.set_iterate_upper_bound(end)
        with self._fenced():
            entries: Iterator[tuple[bytes, bytes]]
            entries = self._tables[table].items(from_key=start, read_opt=options)  # type: ignore[assignment]
            yield from entries

    def close(self) -> None:
        """Close, and let another process in."""
        self._shut()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _open(self, tables: dict[str, Table], access: AccessType) -> None:
        cache = Cache(CACHE_BYTES)
        families = {name: _options(table, cache) for name, table in tables.items()}
        try:
            self._db = Rdict(str(self._path), _options(Table(), cache), families, access)
            self._tables = {name: self._db.get_column_family(name) for name in tables}
            self._handles: dict[str, object] = {
                name: self._db.get_column_family_handle(name) for name in tables
            }
        except Exception as error:
            raise self._failure(error) from error
        self._synced = WriteOptions()
        self._synced.sync = True

    def _shut(self) -> None:
        """RocksDB lives until the last handle of it is gone; all that counts is in its log."""
        self._handles.clear()
        open_handles = [self._db, *self._tables.values()]
        self._tables.clear()
        del self._db
        while open_handles:
            with contextlib.suppress(Exception):  # it wanted to tidy up, on a disk that is full
                open_handles.pop().close()

    def _refuse_remains(self) -> None:
        """RocksDB would begin anew, and clear away the rest, where its list of files is lost."""
        if self._path.exists() and not self._path.is_dir():
            raise self._failure(NotADirectoryError("it is a file"))
        names = os.listdir(self._path) if self._path.exists() else []
        if "CURRENT" not in names and any(name.endswith(_REMAINS) for name in names):
            raise self._failure(FileNotFoundError("CURRENT is missing"))
        config = self._path / _CONFIG
        if config.exists() and not config.read_bytes().endswith(b"}"):
            config.unlink()  # a kill cut it short; the library writes it anew

    @contextlib.contextmanager
    def _fenced(self) -> Iterator[None]:
        try:
            yield
        except HeadwaterError:
            raise
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> HeadwaterError:
        text = str(error)
        if "No space left" in text or _is_full(self._path):
            return CapacityError(
                "disk_full",
                f"{self._path}: nothing more was written: {text}",
                "give the learner space; what the broker and the devices hold will come again",
            )
        if text.startswith("IO error") and "No such file" not in text:
            return CapacityError("disk_error", f"{self._path}: nothing more was written: {text}")
        return ConfigError(
            self._damaged,
            f"{self._path} is damaged, or not what it should be: {text}; nothing was changed",
            "restore the learner's directory from a copy, or start with an empty one",
        )


def tables_in(path: Path) -> set[str]:
    """The names of the tables of the database at `path`; none where no database can be read."""
    try:
        return set(Rdict.list_cf(str(path))) - {"default"}
    except Exception:  # whoever opens it says what is wrong with it
        return set()


def _options(table: Table, cache: Cache) -> Options:
    blocks = BlockBasedOptions()
    blocks.set_block_cache(cache)
    blocks.set_bloom_filter(10, block_based=False)
    blocks.set_format_version(5)
    options = Options(raw_mode=True)
    if table.is_looked_up:
        blocks.set_data_block_index_type(DataBlockIndexType.binary_and_hash())
        options.set_optimize_filters_for_hits(True)
    options.create_if_missing(True)
    options.create_missing_column_families(True)
    options.set_block_based_table_factory(blocks)
    options.set_compression_type(DBCompressionType.lz4())
    options.set_write_buffer_size(table.buffer_bytes)
    options.set_max_total_wal_size(_WAL_BYTES)
    options.set_max_background_jobs(2)
    options.set_bytes_per_sync(1 << 20)
    # Keys are asked for in their order, so what the system reads ahead is soon asked for.
    options.set_advise_random_on_open(False)
    options.set_keep_log_file_num(4)
    options.set_max_log_file_size(1 << 20)
    if table.has_blobs:
        options.set_enable_blob_files(True)
        options.set_min_blob_size(_BLOB_FROM_BYTES)
        options.set_blob_compression_type(DBCompressionType.lz4())
        # What is large lives and dies in about the order in which it came, so its files empty by
        # themselves; to collect garbage would write the oldest quarter again at each compaction.
        options.set_enable_blob_gc(False)
    return options


def _owned(path: Path) -> int:
    fd = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    for _ in range(_LOOKS):  # a reader that looks who owns it holds it for a moment
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        time.sleep(_LOOK_S)
    os.close(fd)
    raise ConfigError(
        "already_owned", f"another learner uses {path}", "stop it, or choose another directory"
    )


def is_owned(path: Path) -> bool:
    """Whether a process has the database at `path` open for writing."""
    try:
        fd = os.open(path.with_name(path.name + ".lock"), os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _is_full(path: Path) -> bool:
    try:
        return shutil.disk_usage(path).free < _BUFFER_BYTES
    except OSError:
        return False
