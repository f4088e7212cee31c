"""Problems of a family's files: all that can be found are found, and told together.

Why: a newcomer who writes three files makes several mistakes; told one at a time, each of them
costs another start.

Invariants: each problem is a ConfigError that names the file, the key by its path, as in
`learning.fast.passes`, and where a word is wrong the nearest that is known. One problem alone is
raised as it is.

Knows nothing about what the keys mean.
"""

from __future__ import annotations

import math
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edge_runtime.errors import ConfigError
from edge_runtime.features.rules import nearest

S = TypeVar("S", bound=msgspec.Struct)

EXAMPLE = "models/README.md writes a family step by step"


class Problems:
    """What is wrong with the folder so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[ConfigError] = []

    def add(self, error: ConfigError) -> None:
        """One more; the same sentence counts once."""
        if all(error.message != other.message for other in self.found):
            self.found.append(error)

    def settle(self) -> None:
        """Raises: ConfigError, the only problem or, as `bad_family`, all of them."""
        if not self.found:
            return
        if len(self.found) == 1:
            raise self.found[0]
        lines = [_line(error) for error in self.found]
        what = f"{self.folder} has {len(lines)} problems:\n" + "\n".join(lines)
        raise ConfigError("bad_family", what, EXAMPLE)


def bad(path: Path, what: str, hint: str = EXAMPLE) -> ConfigError:
    """The error that something in a file of a family is wrong."""
    return ConfigError("bad_family", f"{path}: {what}", hint)


def read_toml(path: Path, kind: type[S], problems: Problems) -> S | None:
    """The file as a `kind`; None, with every problem noted, when it is none."""
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:  # of TOML, of UTF-8
        problems.add(bad(path, str(error)))
        return None
    found = list(_unfit(document, kind, ""))
    for key, what, hint in found:
        problems.add(bad(path, f"{key}: {what}" if key else what, hint))
    return None if found else msgspec.convert(document, kind)


Unfit = Iterator[tuple[str, str, str]]
"""The key, what is wrong with it, a hint."""


def _unfit(value: Any, kind: Any, key: str) -> Unfit:
    """What is wrong with the parts of the value; if nothing is, with the whole."""
    found = list(_unfit_parts(value, _bare(kind), f"{key}." if key else ""))
    yield from found or _unfit_whole(value, kind, key)


def _unfit_parts(value: Any, kind: Any, prefix: str) -> Unfit:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, dict):
        yield from _unfit_keys(value, kind, prefix)
    elif typing.get_origin(kind) is dict and isinstance(value, dict):
        for name, each in value.items():
            yield from _unfit(each, typing.get_args(kind)[1], prefix + name)
    elif typing.get_origin(kind) is tuple and isinstance(value, list):
        for at, each in enumerate(value):
            yield from _unfit(each, typing.get_args(kind)[0], f"{prefix[:-1]}[{at}]")


def _unfit_keys(table: dict[str, Any], kind: type[msgspec.Struct], prefix: str) -> Unfit:
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    for key, value in table.items():
        if key in fields:
            yield from _unfit(value, fields[key].type, prefix + key)
        else:
            yield prefix + key, "is not a key", nearest(key, fields)
    for key, field in fields.items():
        if field.required and key not in table:
            yield prefix + key, "is needed and is not there", EXAMPLE


def _unfit_whole(value: Any, kind: Any, key: str) -> Unfit:
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    if isinstance(value, float) and not math.isfinite(value):
        yield key, f"is {value}, not a finite number", EXAMPLE
        return
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        if choices:
            one_of = ", ".join(map(repr, choices))
            hint = nearest(str(value), choices)
            yield key, f"is {value!r:.60}, not one of {one_of}", hint if "mean" in hint else EXAMPLE
        else:
            what = str(error).replace("`object`", "a table")
            yield key, what if isinstance(value, dict) else f"{what}; it is {value!r:.60}", EXAMPLE


def _bare(kind: Any) -> Any:
    """The type without its bounds, and without the None that it may be instead."""
    wrapped = typing.get_origin(kind) in (typing.Annotated, types.UnionType)
    return typing.get_args(kind)[0] if wrapped else kind


def _line(error: ConfigError) -> str:
    hint = f" ({error.hint})" if error.hint and error.hint != EXAMPLE else ""
    return f"- {' '.join(error.message.split())}{hint}"
