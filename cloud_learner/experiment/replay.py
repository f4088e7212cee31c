"""A data file as a stream of events in the order of their time.

Why: the bootstrap, the comparison worlds and the replay client read the same file in the same way.

The file is Parquet or CSV: `event_time`, `kind` (absent: the family's predicting kind), `device`
(absent: one device called "device"), the fields of the kinds, and on predicting rows `label` and
`label_time`, empty where unknown.

Invariants: rows come in file order, which must be time order; each carries exactly the fields that
its kind declares. A file that lacks a column is refused before the first row.

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

    Raises: ConfigError (no_data, bad_data), RequestError where a row is not of the interface.
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
        _check_row(path, row, fields_of, newest_s)
        newest_s = time_s
        if left is not None and interface.kinds[kind].predicts:
            if left == 0:
                return
            left -= 1
        fields = {name: row[index] for name, index in fields_of[kind] if row[index] is not None}
        known = label is not None and label_time_s is not None
        yield DataRow(
            time_s, kind, device, fields, label if known else None, label_time_s if known else None
        )


def _columns(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise ConfigError("no_data", f"data file {path} does not exist")
    try:
        with duckdb.connect() as database:
            rows = database.execute(f"DESCRIBE SELECT * FROM '{_quoted(path)}'").fetchall()
    except duckdb.Error as error:
        raise ConfigError("bad_data", f"data file {path} cannot be read: {error}") from error
    return {row[0]: row[1] for row in rows}


def _check_columns(path: Path, columns: dict[str, str], interface: Interface) -> None:
    needed = {"event_time"}
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
    kind = "kind" if "kind" in columns else f"'{_predicting(interface)[0]}'"
    device = "device" if "device" in columns else "'device'"
    label = "label::DOUBLE" if "label" in columns else "NULL::DOUBLE"
    label_time = "epoch(label_time::TIMESTAMPTZ)" if "label_time" in columns else "NULL::DOUBLE"
    fields = [f'"{name}"::{_TYPES[types[name]]}' if name in columns else "NULL" for name in names]
    selected = ", ".join(
        ["epoch(event_time::TIMESTAMPTZ)", kind, device, label, label_time, *fields]
    )
    with duckdb.connect() as database:
        database.execute("SET TimeZone = 'UTC'; SET threads = 1")
        try:
            found = database.execute(f"SELECT {selected} FROM '{_quoted(path)}'")
        except duckdb.Error as error:
            raise ConfigError("bad_data", f"data file {path} cannot be read: {error}") from error
        while rows := found.fetchmany(FETCH_ROWS):
            yield from rows


def _check_row(
    path: Path, row: tuple[Any, ...], fields_of: dict[str, list[tuple[str, int]]], newest_s: float
) -> None:
    if row[1] not in fields_of:
        raise RequestError("unknown_kind", f"{path}: {row[1]!r} is not a kind of the family")
    if row[0] is None or row[0] < newest_s:
        raise RequestError("not_in_order", f"{path}: event_time {row[0]} is missing or goes back")


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
