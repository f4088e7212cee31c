"""A struct from a table of a TOML file, each mistake named with file, key and nearest valid key.

Why: what a person wrote must be refused in words that lead to the line that is wrong.

Knows nothing about what the structs mean.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edge_runtime.errors import ConfigError

T = TypeVar("T")

_AT = re.compile(r"(?P<what>.*) - at `\$\.?(?P<key>.*)`", re.DOTALL)


def check_keys(table: dict[str, Any], struct: type, path: Path, prefix: str) -> None:
    """Refuse keys that `struct`, read from `table`, does not know. Raises: ConfigError unknown_key.

    `prefix` is where the table stands in its file, with a dot at its end. A field `package` is none
    of the file's.
    """
    fields = {field.name: field.type for field in msgspec.structs.fields(struct)}
    fields.pop("package", None)
    for key, value in table.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"keys: {', '.join(fields)}"
            raise ConfigError("unknown_key", f"{path}: {prefix}{key}: unknown key", hint)
        inner = fields[key]
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct) and type(value) is dict:
            check_keys(value, inner, path, f"{prefix}{key}.")


def converted(value: Any, wanted: type[T], path: Path, prefix: str) -> T:
    """The struct in `value`, which stands in its file at `prefix`.

    Raises: ConfigError bad_value.
    """
    try:
        return msgspec.convert(value, wanted, dec_hook=_path_hook)
    except msgspec.ValidationError as error:
        raise ConfigError("bad_value", f"{path}: {_explain(str(error), prefix)}") from error


def _path_hook(wanted: type, value: Any) -> Any:
    if wanted is Path or (isinstance(wanted, types.UnionType) and Path in typing.get_args(wanted)):
        if not isinstance(value, str) or not value:
            raise ValueError("Expected a path, as a text that is not empty")
        return Path(value)
    raise NotImplementedError(wanted)


def _explain(text: str, prefix: str) -> str:
    match = _AT.fullmatch(text)
    what, key = (match["what"], match["key"]) if match else (text, "")
    key = ".".join(filter(None, (prefix, key)))
    what = what.replace("`", "")
    return f"{key}: {what[0].lower()}{what[1:]}" if key else what
