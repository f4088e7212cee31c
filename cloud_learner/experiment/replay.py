"""A data file as a stream of events in the order of their time.

Why: the bootstrap, the comparison worlds and the replay client read the same file in the same way.

The file is Parquet or CSV: `event_time`, `kind` (absent: the family's predicting kind), `device`
(absent: one device called "device"), the fields of the kinds, and on predicting rows `label` and
`label_time`, empty where unknown.

Invariants: rows come in file order, which must be time order; each is an event that a device would
take. A file that lacks a column is refused before the first row. CSV is read as text, so that a
word made of digits stays the word it is.

Knows nothing about sockets, features or learning. Implements the data file of DESIGN's surfaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import msgspec

from edge_runtime.errors import ConfigError, RequestError
from edge_runtime.inference.package import Interface
from edge_runtime.wire.messages import Fields

FETCH_ROWS = 20_000
_TYPES = {"str": "VARCHAR", "int": "BIGINT", "float": "DOUBLE"}


class DataRow(msgspec.Struct, frozen=True, gc=False):
    """One event; times in seconds since the epoch, UTC. `label` only where it became known."""

    time_s: float
    kind: str
    device: str
    fields: Fields
    label: float | None
    label_time_s: float | None


def read_rows(
    path: Path, interface: Interface, *, limit_predictions: int | None = None
) -> Iterator[DataRow]:
    """The events of the file; ends before prediction number `limit_predictions` + 1.

    Raises: ConfigError (no_data, bad_data); RequestError where a row is not of the interface.
    """
    columns = _columns(path)
    _check_columns(path, columns, interface)
    names = sorted({field for kind in interface.kinds.values() for field in kind.fields})
    positions = {name: 5 + index for index, name in enumerate(names)}
    fields_of = {
        kind: [(field, positions[field]) for field in declared.fields]
        for kind, declared in interface.kinds.items()
    }
    left, newest_s = limit_predictions, float("-inf")
    for row in _fetch(path, columns, interface, names):
        time_s, kind, device, label, label_time_s = row[:5]
        fields = {name: row[at] for name, at in fields_of.get(kind, ()) if row[at] is not None}
        _check_row(path, interface, row, fields, newest_s)
        newest_s = time_s
        if left is not None and interface.kinds[kind].predicts:
            if left == 0:
                return
            left -= 1
        known_s = label_time_s if label is not None else None
        yield DataRow(time_s, kind, device, fields, label, known_s)


def _columns(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise ConfigError("no_data", f"data file {path} does not exist")
    try:
        with duckdb.connect() as database:
            rows = database.execute(f"DESCRIBE SELECT * FROM {_source(path)}").fetchall()
    except duckdb.Error as error:
        raise ConfigError("bad_data", f"data file {path} cannot be read: {error}") from error
    return {row[0]: row[1] for row in rows}


def _check_columns(path: Path, columns: dict[str, str], interface: Interface) -> None:
    needed = {"event_time"} | ({"label_time"} if "label" in columns else set())
    kinds = interface.kinds if "kind" in columns else _predicting(interface)
    needed |= {field for kind in kinds for field in interface.kinds[kind].fields}
    missing = sorted(needed - columns.keys())
    if missing:
        raise ConfigError("bad_data", f"data file {path} has no column {missing[0]!r}")


def _predicting(interface: Interface) -> list[str]:
    return [name for name, kind in interface.kinds.items() if kind.predicts]


def _fetch(
    path: Path, columns: dict[str, str], interface: Interface, names: list[str]
) -> Iterator[tuple[Any, ...]]:
    types = {f: t for kind in interface.kinds.values() for f, t in kind.fields.items()}
    kind = "kind::VARCHAR" if "kind" in columns else f"'{_predicting(interface)[0]}'"
    device = "device::VARCHAR" if "device" in columns else "'device'"
    label = "label::DOUBLE" if "label" in columns else "NULL::DOUBLE"
    label_time = "epoch(label_time::TIMESTAMPTZ)" if "label_time" in columns else "NULL::DOUBLE"
    fields = [f'"{name}"::{_TYPES[types[name]]}' if name in columns else "NULL" for name in names]
    selected = ", ".join(
        ["epoch(event_time::TIMESTAMPTZ)", kind, device, label, label_time, *fields]
    )
    with duckdb.connect() as database:
        database.execute("SET TimeZone = 'UTC'; SET threads = 1")
        try:
            found = database.execute(f"SELECT {selected} FROM {_source(path)}")
            while rows := found.fetchmany(FETCH_ROWS):
                yield from rows
        except duckdb.Error as error:
            raise ConfigError("bad_data", f"data file {path} cannot be read: {error}") from error


def _check_row(
    path: Path, interface: Interface, row: tuple[Any, ...], fields: Fields, newest_s: float
) -> None:
    time_s, kind, device, label, label_time_s = row[:5]
    if time_s is None or time_s < newest_s:
        raise RequestError("not_in_order", f"{path}: event_time {time_s} is missing or goes back")
    try:
        interface.check(kind, time_s, fields)
    except RequestError as error:
        where = f"{path}, the row at event_time {time_s}"
        raise RequestError(error.code, f"{where}: {error.message}", error.hint) from error
    if device is None:
        raise RequestError("missing_field", f"{path}: device is empty at event_time {time_s}")
    if label is not None and not (0.0 <= label <= 1.0 and label_time_s is not None):
        raise RequestError(
            "bad_label",
            f"{path}: label {label} at event_time {time_s} is not in [0, 1] or has no label_time",
            "leave both empty where the outcome is unknown",
        )


def _source(path: Path) -> str:
    quoted = "'" + str(path).replace("'", "''") + "'"
    return f"read_csv({quoted}, all_varchar = true)" if path.suffix == ".csv" else quoted
