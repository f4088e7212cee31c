"""Files of a family folder: what a features.toml keeps in other files becomes part of the spec.

Why: facts of a thousand places, and tokenizers, belong in files of their own, and yet every package
has to carry them, so that the spec's hash covers what a model was given.

A table with `file` takes its rows from there: the first column names the row, the first line names
the columns, of which `columns` may choose. A column in which every cell is a number holds numbers;
an empty cell is unknown.

A tokenizer is a JSON file of the library tokenizers, taken without its layout. With `package` it is
a file of an installed Python package.

Invariants: every error names file and row. Knows nothing about features.
"""

from __future__ import annotations

import csv
import json
from importlib import resources
from math import isfinite
from pathlib import Path
from typing import Any

from edge_runtime.errors import ConfigError


def expanded(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`document`, a parsed features.toml, with what its files hold. Raises: ConfigError."""
    whole = dict(document)
    for part, read in (("tables", _with_rows), ("tokenizers", _tokenizer)):
        named = document.get(part)
        if isinstance(named, dict):
            whole[part] = {
                name: read(each, folder) if isinstance(each, dict) and "file" in each else each
                for name, each in named.items()
            }
    return whole


def _tokenizer(table: dict[str, Any], folder: Path) -> str:
    """The JSON of a tokenizer without its layout."""
    package, name = table.get("package"), str(table["file"])
    if not table.keys() <= {"file", "package"}:
        raise ConfigError("unknown_key", f"tokenizer {name}: its keys are file and package")
    try:
        place = folder if package is None else resources.files(str(package))
        found = json.loads(place.joinpath(name).read_text("utf-8"))
    except (OSError, ValueError, RecursionError, ImportError, TypeError) as error:
        where = name if package is None else f"{name} of package {package!r}"
        raise ConfigError(
            "bad_tokenizer",
            f"tokenizer file {where} cannot be read: {error}",
            "" if package is None else f"is {package} installed?",
        ) from error
    return json.dumps(found, ensure_ascii=False, separators=(",", ":"))


def _with_rows(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    rest = {key: value for key, value in table.items() if key not in ("file", "columns")}
    path = folder / str(table["file"])
    if "rows" in table:
        raise _bad(path, "has no meaning beside rows")
    header, rows = _read(path)
    columns = table.get("columns", header)
    if not isinstance(columns, list):
        raise _bad(path, f"columns is {columns!r}, not a list of names")
    for column in columns:
        if column not in header:
            raise _bad(path, f"has no column {column!r}", f"it has: {', '.join(header)}")
    chosen = [_column([row[header.index(name) + 1] for row in rows]) for name in columns]
    cells = zip(*chosen, strict=True) if chosen else ((),) * len(rows)
    keys = [row[0] for row in rows]
    by_key = {key: list(row) for key, row in zip(keys, cells, strict=True)}
    return {**rest, "columns": list(columns), "rows": by_key}


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """The names of the columns after the first, and all rows with their key."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = [row for row in csv.reader(file, strict=True) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise _bad(path, f"cannot be read: {error}") from error
    seen = set()
    for row in rows:
        if len(row) != len(header):
            raise _bad(path, f"row {row[0]!r} has {len(row)} cells of {len(header)}")
        if row[0] in seen:
            raise _bad(path, f"row {row[0]!r} is there twice")
        seen.add(row[0])
    return header[1:], rows


def _column(cells: list[str]) -> list[float | str | None]:
    try:
        numbers = [float(cell) if cell else None for cell in cells]
    except ValueError:
        return [cell or None for cell in cells]
    finite = all(number is None or isfinite(number) for number in numbers)
    return [*numbers] if finite else [cell or None for cell in cells]


def _bad(path: Path, what: str, hint: str = "") -> ConfigError:
    return ConfigError("bad_table", f"table file {path}: {what}", hint)
