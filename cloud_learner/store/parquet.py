"""Examples as columns of Parquet: names, types, and the way from structs to a file.

Why: what was learned is asked about elsewhere, by DuckDB, Spark and Polars, which read columns.

Invariants: a file needs nothing of ours to be understood: features are a list of FLOAT, the arms a
list of structs, fields JSON text, times seconds (DOUBLE), and `time` is the event time once more as
a TIMESTAMP in UTC, kept within the years 1 to 9999. Columns are only appended, before `time`.
Nothing that a device can say in an example makes `copy` fail; outputs that are no numbers become
NULL.

Knows nothing about where files lie or when they count. The store is the only home of duckdb.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.store.examples import Example

FORMAT = 1
"""Stands as `headwater_examples` in the metadata of each file; rises when a column changes."""

DAY_S = 86_400
_FIRST_DAY, _LAST_DAY = -719_162, 2_932_896  # 0001-01-01 and 9999-12-31

_ARMS = 'STRUCT("release" VARCHAR, arm VARCHAR, outputs DOUBLE[])[]'
_ARMS_JSON = '[{"release":"VARCHAR","arm":"VARCHAR","outputs":["DOUBLE"]}]'
_TYPES: dict[str, tuple[str, str]] = {
    "device": ("O", "VARCHAR"),
    "epoch": ("i8", "BIGINT"),
    "seq": ("i8", "BIGINT"),
    "family": ("O", "VARCHAR"),
    "time_s": ("f8", "DOUBLE"),
    "label_time_s": ("f8", "DOUBLE"),
    "features": ("O", "FLOAT[]"),
    "spec": ("O", "VARCHAR"),
    "label": ("f8", "DOUBLE"),
    "propensity": ("f8", "DOUBLE"),
    "scored": ("O", _ARMS),
    "arrived_s": ("f8", "DOUBLE"),
    "matured_s": ("f8", "DOUBLE"),
    "kind": ("O", "VARCHAR"),
    "fields": ("O", "VARCHAR"),
    "final": ("?", "BOOLEAN"),
    "revision": ("i4", "INTEGER"),
    "weight": ("f8", "DOUBLE"),
    "early": ("?", "BOOLEAN"),
}
"""By column: the type of its numpy array and the SQL type in the file, in order; then `time`."""


def _arms(example: Example) -> str:
    """As JSON, in one text: DuckDB makes lists of structs of it much faster than of objects."""
    arms = [{"release": s.release, "arm": s.arm, "outputs": s.outputs} for s in example.scored]
    return _ENCODE(arms).decode()


_ENCODE = msgspec.json.Encoder().encode
_VALUES: dict[str, Callable[[Example], Any]] = {
    "features": lambda example: np.frombuffer(example.features, "<f4"),
    "scored": _arms,
    "fields": lambda example: _ENCODE(example.fields).decode(),
}


def _selected(name: str, kind: str) -> str:
    if name == "scored":
        return f"from_json(scored, '{_ARMS_JSON}')::{_ARMS} AS scored"
    return f"{name}::{kind} AS {name}"


_SELECT = ", ".join(_selected(name, kind) for name, (_, kind) in _TYPES.items())
EMPTY = "SELECT {}, NULL::TIMESTAMP AS time WHERE false".format(
    ", ".join(f"NULL::{kind} AS {name}" for name, (_, kind) in _TYPES.items())
)
"""A query that answers with all columns and no row."""

_OLDER = "REPLACE (coalesce(weight, 1.0) AS weight, coalesce(early, false) AS early)"
_OPTIONS = f"(FORMAT parquet, COMPRESSION zstd, KV_METADATA {{headwater_examples: '{FORMAT}'}})"


def connect() -> duckdb.DuckDBPyConnection:
    """A connection in memory on one thread: the machine has other work as well."""
    # One value tells the type of a column of objects: none mixes types.
    return duckdb.connect(config={"threads": 1, "pandas_analyze_sample": 1})


def days_of(examples: Sequence[Example]) -> npt.NDArray[np.int64]:
    """The day of each example's event time, counted from 1970-01-01 UTC, shape (examples,)."""
    times_s = np.nan_to_num(np.array([example.time_s for example in examples], "f8"))
    days: npt.NDArray[np.float64] = np.clip(np.floor(times_s / DAY_S), _FIRST_DAY, _LAST_DAY)
    return days.astype(np.int64)


def copy(connection: duckdb.DuckDBPyConnection, examples: Sequence[Example], path: Path) -> None:
    """Write the examples to a new file, in their order. Raises: duckdb.Error."""
    connection.register("batch", _columns(examples))
    try:
        connection.execute(f"COPY (SELECT {_SELECT}, time FROM batch) TO {quoted(path)} {_OPTIONS}")
    finally:
        connection.unregister("batch")


def merge(paths: Sequence[Path], path: Path, temporary: Path, memory_mb: int) -> int:
    """Write the rows of all `paths` to one new file, in their order; returns how many there are.

    Raises: duckdb.Error, also when a file is damaged or a row did not arrive.
    """
    with connect() as connection:
        connection.execute(f"SET memory_limit = '{memory_mb}MB'")
        connection.execute(f"SET temp_directory = {quoted(temporary)}")
        source = read(paths)
        connection.execute(f"COPY (SELECT * FROM {source}) TO {quoted(path)} {_OPTIONS}")
        before, after = (
            connection.execute(f"SELECT count(*) FROM {each}").fetchall()[0][0]
            for each in (source, read([path]))
        )
    if before != after:
        raise duckdb.IOException(f"{path}: {after} rows instead of {before}")
    return int(after)


def read(paths: Sequence[Path]) -> str:
    """The SQL of a table of what the files hold, in their order, with every column: older files
    have none of the later ones, and what those mean is said for them.
    """
    names = ", ".join(quoted(path) for path in paths)
    files = f"read_parquet([{names}], union_by_name = true, hive_partitioning = false)"
    return f"(SELECT * {_OLDER} FROM ({EMPTY} UNION ALL BY NAME SELECT * FROM {files}))"


def quoted(path: Path) -> str:
    """A path as a literal of SQL."""
    return "'{}'".format(str(path).replace("'", "''"))


def _columns(examples: Sequence[Example]) -> dict[str, Any]:
    """Each column as an array of shape (examples,)."""
    columns: dict[str, Any] = {}
    for name, (kind, _) in _TYPES.items():
        values_of = _VALUES.get(name)
        values = (
            [getattr(example, name) for example in examples]
            if values_of is None
            else map(values_of, examples)
        )
        columns[name] = np.fromiter(values, dtype=kind, count=len(examples))
    seconds = np.nan_to_num(columns["time_s"])
    bounded = np.clip(seconds, _FIRST_DAY * DAY_S, (_LAST_DAY + 1) * DAY_S - 1)
    columns["time"] = np.rint(bounded * 1e6).astype("i8").view("M8[us]")
    return columns
