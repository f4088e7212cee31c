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
from itertools import compress
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


def _identity(item: ArchivedRecord) -> Row:
    record = item.record
    kind = _TYPES[type(record)]
    return (item.device, item.epoch, item.event_class, item.seq, kind, record.family, record.time_s)


def _event(record: PredictionRecord | ObservationRecord) -> Row:
    return record.kind, _json(record.fields)


def _prediction(record: PredictionRecord) -> Row:
    first = record.scored[0]
    scored = _json(
        [{"release": s.release, "arm": s.arm, "outputs": s.outputs} for s in record.scored]
    )
    served = (first.release, first.arm, first.outputs[0])
    return (record.spec, record.features, record.propensity, *served, scored)


def _label(record: LabelRecord) -> Row:
    return record.epoch, record.seq, record.value, record.final


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


_TYPES: dict[type, str] = {
    PredictionRecord: "prediction",
    ObservationRecord: "observation",
    LabelRecord: "label",
}
_IDENTITY = ("device", "epoch", "event_class", "seq", "type", "family", "time_s")
# Columns that only some types of record have: the types, the columns, their values.
_PARTS: tuple[tuple[tuple[type, ...], tuple[str, ...], Callable[[Any], Row]], ...] = (
    ((PredictionRecord, ObservationRecord), ("kind", "fields"), _event),
    (
        (PredictionRecord,),
        ("spec", "features", "propensity", "release", "arm", "score", "scored"),
        _prediction,
    ),
    ((LabelRecord,), ("label_epoch", "label_seq", "label_value", "final"), _label),
)
# Columns that are not text: numpy type, stand-in below the mask, SQL type.
_KINDS: dict[str, tuple[str, Any, str]] = {
    **dict.fromkeys(("epoch", "seq", "label_epoch", "label_seq"), ("i8", 0, "BIGINT")),
    **dict.fromkeys(("time_s", "propensity", "score", "label_value"), ("f8", 0.0, "DOUBLE")),
    "features": ("O", b"", "BLOB"),
    "final": ("?", False, "BOOLEAN"),
}
_TEXT = ("O", "", "VARCHAR")
_NAMES = (*_IDENTITY, *(name for _, part, _ in _PARTS for name in part))


def _selected(name: str) -> str:
    """A column of the batch in SQL, NULL where it is blank; the numbers are masked already."""
    _, blank, kind = _KINDS.get(name, _TEXT)
    is_optional_text = name not in _IDENTITY and isinstance(blank, str | bytes)
    return f"nullif({name}, ''::{kind}) AS {name}" if is_optional_text else name


_SELECT = f"SELECT {', '.join(map(_selected, _NAMES))} FROM batch"


class Archive:
    """Parquet files in `directory`, one for each commit."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        # One value tells the type of a column: none mixes types.
        self._writer = duckdb.connect(config={"threads": 1, "pandas_analyze_sample": 1})

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
        self._writer.register("batch", _columns(records))
        try:
            self._writer.execute(f"COPY ({_SELECT}) TO '{_quoted(path)}' (FORMAT parquet)")
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


def _columns(records: Sequence[ArchivedRecord]) -> dict[str, Any]:
    """Each column as an array of shape (records,), masked where it has no value."""
    identities = zip(*map(_identity, records), strict=True)
    columns = {
        name: np.array(values, dtype=_KINDS.get(name, _TEXT)[0])
        for name, values in zip(_IDENTITY, identities, strict=True)
    }
    for owners, names, values_of in _PARTS:
        present = [isinstance(item.record, owners) for item in records]
        rows = [values_of(item.record) for item in compress(records, present)]
        for at, name in enumerate(names):
            columns[name] = _masked(name, np.array(present), [row[at] for row in rows])
    return columns


def _masked(name: str, present: Any, values: list[Any]) -> Any:
    kind, blank, _ = _KINDS.get(name, _TEXT)
    column = np.full(len(present), blank, dtype=kind)
    column[present] = values
    # Text is blank where absent, and _SELECT makes it NULL: the type of a column of objects is
    # read off its first value, which a mask would hide.
    return column if kind == "O" else np.ma.masked_array(column, ~present)


def _empty() -> str:
    columns = (f"NULL::{_KINDS.get(name, _TEXT)[2]} AS {name}" for name in _NAMES)
    return f"SELECT {', '.join(columns)} WHERE false"


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
