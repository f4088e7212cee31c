"""A Parquet or CSV file as typed columns, in which every cell that is none can be named.

Why: a file from elsewhere is wrong in one cell of a million; whoever has to mend it must be told
which, and a fast reader alone says at most that something could not be cast.

Invariants: nothing is guessed. CSV is UTF-8, separated by commas, named by its first line, and read
as text, so that a word made of digits stays the word it is; a whole number is never rounded from
one that is not. Rows come in file order, counted from 1. Lines are counted only once something
is wrong.

Knows nothing about events and families.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import duckdb

from edge_runtime.errors import ConfigError

Type = Literal["str", "int", "float", "time"]

FETCH_ROWS = 20_000
_OTHER_DELIMITERS = (";", "\t", "|")
_WANTED = {
    "int": ("a whole number", ""),
    "float": ("a number", "write it with a point and without separators, or leave it empty"),
    "time": ("a time", "write it as 2024-05-01T12:00:00Z; without a zone it is UTC"),
    "str": ("text", ""),
}


class DataFile:
    """The file at `path`. Raises: ConfigError (no_data, bad_data), naming what is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ConfigError("no_data", f"data file {path} does not exist")
        self._is_csv = path.suffix.lower() == ".csv"
        self._columns = self._header() if self._is_csv else self._schema()

    @property
    def columns(self) -> list[str]:
        """The names of the columns, in the file's order."""
        return list(self._columns)

    def rows(self, wanted: Sequence[tuple[str, Type]]) -> Iterator[tuple[Any, ...]]:
        """The named columns of every row as None, str, int, float or seconds since the epoch.

        Raises: ConfigError `bad_data` for the first cell that is not of its type.
        """
        cells = [self._cell(name, kind) for name, kind in wanted]
        flags = " ".join(
            f"WHEN {raw} IS NOT NULL AND ({bad}) THEN {at}"
            for at, (raw, _, bad) in enumerate(cells)
        )
        asked = ", ".join([value for _, value, _ in cells] + [f"CASE {flags} END"])
        for number, row in enumerate(self._fetch(f"SELECT {asked} FROM {self._source}"), 1):
            if row[-1] is not None:
                raise self._wrong_cell(number, *wanted[row[-1]])
            yield row

    def place(self, number: int) -> str:
        """Where row `number` is: for CSV, with its line."""
        if not self._is_csv:
            return f"{self.path}, row {number}"
        with self.path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.reader(file)
            lines = ((reader.line_num, row) for row in reader)
            line = next(islice((at for at, row in lines if row), number, None), None)
        return f"{self.path}, row {number}" + (f" (line {line})" if line else "")

    def bad(self, what: str, hint: str = "") -> ConfigError:
        """The error that something is wrong with the file as a whole."""
        return ConfigError("bad_data", f"data file {self.path} {what}", hint)

    def _header(self) -> dict[str, tuple[str, str]]:
        """Of each named column what it is called in queries, and its type."""
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                names = next(csv.reader(file, strict=True), [])
        except (OSError, ValueError, csv.Error) as error:
            raise self.bad(f"cannot be read: {error}", "write it as UTF-8") from error
        if not any(names):
            raise self.bad("is empty", "its first line names the columns")
        for other in _OTHER_DELIMITERS:
            if len(names) == 1 and other in names[0]:
                raise self.bad(f"is separated by {other!r}", "separate its columns by commas")
        twice = next((name for name in names if name and names.count(name) > 1), None)
        if twice is not None:
            raise self.bad(f"has two columns {twice!r}", "each name may stand once in line 1")
        self._width = len(names)
        return {name: (f"c{at}", "VARCHAR") for at, name in enumerate(names) if name}

    def _schema(self) -> dict[str, tuple[str, str]]:
        try:
            rows = list(self._fetch(f"DESCRIBE SELECT * FROM {self._source}"))
        except ConfigError as error:
            error.hint = "a data file is Parquet, or CSV if its name ends in .csv"
            raise
        return {row[0]: (_quoted(row[0], '"'), row[1]) for row in rows}

    @property
    def _source(self) -> str:
        path = _quoted(str(self.path), "'")
        if not self._is_csv:
            return f"read_parquet({path})"
        columns = ", ".join(f"'c{at}': 'VARCHAR'" for at in range(self._width))
        return (
            f"read_csv({path}, auto_detect = false, header = true, delim = ',', quote = '\"',"
            f" escape = '\"', columns = {{{columns}}})"
        )

    def _cell(self, name: str, kind: Type) -> tuple[str, str, str]:
        """The column as it stands, as a value, and whether it has none; in SQL."""
        raw, stored = self._columns[name]
        if kind == "str":
            return raw, f"CAST({raw} AS VARCHAR)", "false"
        if kind == "float":
            value = f"TRY_CAST({raw} AS DOUBLE)"
            return raw, value, f"{value} IS NULL"
        if kind == "int":
            value = f"TRY_CAST({raw} AS BIGINT)"
            exact = f"TRY_CAST({raw} AS DOUBLE) = CAST({value} AS DOUBLE)"
            return raw, value, f"({exact}) IS NOT TRUE"
        if not stored.startswith(("VARCHAR", "TIMESTAMP", "DATE")):
            raise self.bad(
                f"has a column {name!r} of type {stored}, not of times", _WANTED[kind][1]
            )
        value = f"epoch(TRY_CAST({raw} AS TIMESTAMPTZ))"
        return raw, value, f"{value} IS NULL"

    def _fetch(self, query: str) -> Iterator[tuple[Any, ...]]:
        with duckdb.connect() as database:
            database.execute("SET TimeZone = 'UTC'; SET threads = 1")
            try:
                found = database.execute(query)
                while rows := found.fetchmany(FETCH_ROWS):
                    yield from rows
            except duckdb.Error as error:
                raise self.bad(f"cannot be read: {_shortened(str(error))}") from error

    def _wrong_cell(self, number: int, name: str, kind: Type) -> ConfigError:
        raw = self._columns[name][0]
        query = f"SELECT CAST({raw} AS VARCHAR) FROM {self._source} LIMIT 1 OFFSET {number - 1}"
        [(text,)] = self._fetch(query)
        what, hint = _WANTED[kind]
        return ConfigError(
            "bad_data", f"{self.place(number)}: {name} {text!r:.80} is not {what}", hint
        )


def _quoted(text: str, mark: str) -> str:
    return mark + text.replace(mark, mark * 2) + mark


def _shortened(text: str) -> str:
    """Of DuckDB's report on CSV its line and its reason; of any other its first line."""
    if "state machine" in text:  # all that it says of such a file
        return "its lines do not all end alike, or a quote is never closed"
    found = re.search(r"CSV Error on Line: (\d+)", text)
    if found is None:
        return text.splitlines()[0]
    reason = next(
        (line for line in text[found.end() :].splitlines() if line and "Original Line" not in line),
        "",
    )
    return f"line {found[1]}: {reason}"
