"""The archive: every accepted record as a row of Parquet, for queries, replays and proofs.

Why: "answered = archived" has to be counted by a query over files, and a world is scored again
from what was logged; both need columns, not envelopes.

Invariants: a file holds the records of exactly one commit and is named by its number, so writing
the commit again replaces the file instead of adding to it. Commit point: the transaction of the
ingest database that names the file; what no transaction names is removed by `adopt`. `write` and
`adopt` belong to one thread; `query` may be called from any.

Knows nothing about envelopes, joins or batches. This room is the only home of duckdb.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import numpy as np

from edge_runtime.errors import CapacityError, ConfigError
from edge_runtime.files import fsync_directory
from edge_runtime.wire.messages import (
    EventClass,
    LabelRecord,
    ObservationRecord,
    PredictionRecord,
    Record,
)


class ArchivedRecord(msgspec.Struct, frozen=True, gc=False):
    """A record with its identity. `raw` is `record` as it stood in the log of the device;
    `arrived_s` is the wall time at which its envelope reached the learner.
    """

    device: str
    epoch: int
    event_class: EventClass
    seq: int
    record: Record
    raw: bytes
    arrived_s: float


Row = tuple[Any, ...]

_OURS = re.compile(r"\d{12}\.parquet|\.\d{12}\.parquet\.tmp")

_NONE_TEXT, _NONE_BYTES, _NONE_INT, _NONE_FLOAT = "", b"", -1, float("nan")
# name, numpy type, and how the column leaves its stand-in for "absent" behind.
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("device", "O", "{}"),
    ("epoch", "i8", "{}"),
    ("event_class", "O", "{}"),
    ("seq", "i8", "{}"),
    ("type", "O", "{}"),
    ("family", "O", "{}"),
    ("time_s", "f8", "{}"),
    ("kind", "O", "nullif({}, '')"),
    ("fields", "O", "nullif({}, '')"),
    ("spec", "O", "nullif({}, '')"),
    ("features", "O", "nullif({}::BLOB, ''::BLOB)"),
    ("propensity", "f8", "CASE WHEN isnan({0}) THEN NULL ELSE {0} END"),
    ("release", "O", "nullif({}, '')"),
    ("arm", "O", "nullif({}, '')"),
    ("score", "f8", "CASE WHEN isnan({0}) THEN NULL ELSE {0} END"),
    ("scored", "O", "nullif({}, '')"),
    ("label_epoch", "i8", "nullif({}, -1)"),
    ("label_seq", "i8", "nullif({}, -1)"),
    ("label_value", "f8", "CASE WHEN isnan({0}) THEN NULL ELSE {0} END"),
    ("final", "i1", "CASE {0} WHEN -1 THEN NULL ELSE {0} = 1 END"),
)
_SELECT = "SELECT " + ", ".join(f"{how.format(name)} AS {name}" for name, _, how in _COLUMNS)
_NO_EVENT: Row = (_NONE_TEXT, _NONE_TEXT)
_NO_ANSWER: Row = (
    *(_NONE_TEXT, _NONE_BYTES, _NONE_FLOAT, _NONE_TEXT, _NONE_TEXT, _NONE_FLOAT, _NONE_TEXT),
)
_NO_LABEL: Row = (_NONE_INT, _NONE_INT, _NONE_FLOAT, -1)


class Archive:
    """Parquet files in `directory`, one for each commit."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = duckdb.connect(config={"threads": 1})

    def write(self, records: Sequence[ArchivedRecord], number: int) -> str:
        """Write the records of commit `number`, durable on return; returns the file's name.

        Raises: CapacityError `disk_full`, with nothing of the commit left.
        """
        name = f"{number:012d}.parquet"
        temporary = self._directory / f".{name}.tmp"
        try:
            self._copy(records, temporary)
            _fsync(temporary)
            os.replace(temporary, self._directory / name)
            fsync_directory(self._directory)
        except (OSError, duckdb.Error) as error:
            temporary.unlink(missing_ok=True)
            raise CapacityError(
                "disk_full", f"{name}: {len(records)} records were not archived: {error}"
            ) from error
        return name

    def _copy(self, records: Sequence[ArchivedRecord], path: Path) -> None:
        columns = zip(*map(_row, records), strict=True)
        batch = {
            name: np.array(values, dtype=kind)
            for (name, kind, _), values in zip(_COLUMNS, columns, strict=True)
        }
        self._writer.register("batch", batch)
        try:
            self._writer.execute(
                f"COPY ({_SELECT} FROM batch) TO '{_quoted(path)}'"
                " (FORMAT parquet, COMPRESSION zstd)"
            )
        finally:
            self._writer.unregister("batch")

    def adopt(self, names: Collection[str]) -> list[str]:
        """Remove the files that no transaction names, and return what was removed.

        Raises: ConfigError `archive_incomplete` when a named file is absent.
        """
        present = {path.name for path in self._directory.iterdir()}
        if lost := sorted(set(names) - present):
            raise ConfigError(
                "archive_incomplete",
                f"{self._directory} lacks {len(lost)} files, the first of them {lost[0]}",
                "archive and ingest database belong together: restore both from one copy",
            )
        orphans = sorted(name for name in present - set(names) if _OURS.fullmatch(name))
        for name in orphans:
            (self._directory / name).unlink()
        fsync_directory(self._directory)
        return orphans

    def query(self, sql: str, files: Iterable[str]) -> Any:
        """A duckdb relation of `sql`, which reads the view `records`: the rows of these files.

        Raises: duckdb.Error for a wrong query.
        """
        connection = duckdb.connect(config={"threads": 1})
        paths = [f"'{_quoted(self._directory / name)}'" for name in files]
        source = f"read_parquet([{', '.join(paths)}])" if paths else f"({_empty()})"
        connection.execute(f"CREATE VIEW records AS SELECT * FROM {source}")
        return connection.sql(sql)

    def close(self) -> None:
        """Give the writer's memory back."""
        self._writer.close()


def _row(item: ArchivedRecord) -> Row:
    record = item.record
    kind, tail = _TAILS[type(record)]
    head = (item.device, item.epoch, item.event_class, item.seq, kind, record.family, record.time_s)
    return head + tail(record)


def _prediction(record: PredictionRecord) -> Row:
    first = record.scored[0]
    return (
        record.kind,
        _json(record.fields),
        record.spec,
        record.features,
        record.propensity,
        first.release,
        first.arm,
        first.outputs[0],
        _json([msgspec.structs.asdict(scored) for scored in record.scored]),
        *_NO_LABEL,
    )


def _observation(record: ObservationRecord) -> Row:
    return (record.kind, _json(record.fields), *_NO_ANSWER, *_NO_LABEL)


def _label(record: LabelRecord) -> Row:
    value = (record.epoch, record.seq, record.value, int(record.final))
    return _NO_EVENT + _NO_ANSWER + value


_TAILS: dict[type, tuple[str, Callable[[Any], Row]]] = {
    PredictionRecord: ("prediction", _prediction),
    ObservationRecord: ("observation", _observation),
    LabelRecord: ("label", _label),
}


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _empty() -> str:
    types = {"O": "VARCHAR", "i8": "BIGINT", "f8": "DOUBLE", "i1": "BOOLEAN"}
    special = {"features": "BLOB"}
    columns = (f"NULL::{special.get(name, types[kind])} AS {name}" for name, kind, _ in _COLUMNS)
    return f"SELECT {', '.join(columns)} WHERE false"


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
