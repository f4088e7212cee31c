"""The feature spec: the ordered features of a family with the static tables that they look up.

Why: it is read from features.toml where a family is made and from the package where it is served,
and both give the same object with the same hash.

Invariants: two specs with the same `hash` compute the same values in the same order; a spec that
was constructed is valid. Every error names the feature, or table, and the key that is wrong.

Knows nothing about events, windows in memory, or models. Implements proto/package.md (features).
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import msgspec

from edge_runtime.errors import ConfigError
from edge_runtime.features.feature import (
    Column,
    Cycle,
    Feature,
    Lookup,
    Standardise,
    StaticTable,
    Window,
)
from edge_runtime.features.rules import bad, check_feature, check_table, nearest

SPEC_VERSION = 1
_SPEC_KEYS = ("version", "features", "tables")
_PARTS: dict[str, type[msgspec.Struct]] = {
    "window": Window,
    "lookup": Lookup,
    "cycle": Cycle,
    "standardise": Standardise,
}


class Spec:
    """Features in order; construct with `from_toml`, `from_json` or `from_document`.

    `columns` are what a model is given, `names` and `size` their names and count.
    """

    def __init__(
        self, features: Iterable[Feature], tables: Mapping[str, StaticTable] | None = None
    ) -> None:
        self.features = tuple(features)
        self.tables = dict(tables or {})
        if not self.features:
            raise ConfigError("empty_spec", "the feature spec declares no feature")
        for name, table in self.tables.items():
            check_table(name, table)
        for feature in self.features:
            check_feature(feature, self.tables)
        self.columns: list[Column] = [c for feature in self.features for c in feature.columns]
        self.names = [column.name for column in self.columns]
        for names in ([feature.name for feature in self.features], self.names):
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise bad("duplicate_name", twice, "name", "is declared twice")

    @classmethod
    def from_toml(cls, text: str) -> Spec:
        """Parse the text of a features.toml. Raises: ConfigError naming feature and key."""
        return cls.from_document(parse_toml(text))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """Parse what `to_json` wrote. Raises: ConfigError naming feature and key."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError("bad_json", f"the feature spec is not JSON: {error}") from error
        return cls.from_document(document)

    @classmethod
    def from_document(cls, document: Any) -> Spec:
        """The spec of a parsed file. Raises: ConfigError naming feature and key."""
        if not isinstance(document, dict) or not isinstance(document.get("features"), list):
            raise ConfigError("empty_spec", "the feature spec declares no [[features]]")
        for key in document:
            if key not in _SPEC_KEYS:
                raise ConfigError(
                    "unknown_key", f"feature spec: {key!r} is not a key", nearest(key, _SPEC_KEYS)
                )
        if document.get("version") != SPEC_VERSION:
            found = repr(document["version"]) if "version" in document else "missing"
            raise ConfigError(
                "bad_version",
                f"feature spec: version is {found}",
                f"this reads version = {SPEC_VERSION}",
            )
        tables = _parse_tables(document.get("tables", {}))
        features = enumerate(document["features"])
        return cls([_parse_feature(table, index) for index, table in features], tables)

    def to_json(self) -> str:
        """Canonical JSON: equal specs give equal text."""
        return _canonical(self.features, self.tables)

    def windows_json(self) -> str:
        """The canonical JSON of its windows alone, enough to hold them; "" where it has none."""
        bare = [Feature(name=f.name, window=f.window) for f in self.features if f.window]
        return _canonical(bare, {}) if bare else ""

    @cached_property
    def hash(self) -> str:
        """Its version: 16 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return hash_of(self.to_json())

    @property
    def size(self) -> int:
        """How many values a vector has."""
        return len(self.columns)

    def subset(self, names: Iterable[str]) -> Spec:
        """The named features, in the order of this spec, with the tables that they look up.

        Raises: ConfigError `unknown_feature`.
        """
        wanted, known = set(names), [feature.name for feature in self.features]
        for name in sorted(wanted.difference(known)):
            raise ConfigError(
                "unknown_feature",
                f"the feature spec has no feature {name!r}",
                nearest(name, known),
            )
        features = [feature for feature in self.features if feature.name in wanted]
        used = {feature.lookup.table for feature in features if feature.lookup}
        return Spec(features, {name: self.tables[name] for name in self.tables if name in used})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spec):
            return NotImplemented
        return self.features == other.features and self.tables == other.tables

    def __hash__(self) -> int:
        return hash(self.hash)


def parse_toml(text: str) -> dict[str, Any]:
    """The text of a features.toml as a document. Raises: ConfigError `bad_toml`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("bad_toml", f"the feature spec is not TOML: {error}") from error


def hash_of(text: str) -> str:
    """The hash of a spec whose canonical JSON is `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canonical(features: Iterable[Feature], tables: Mapping[str, StaticTable]) -> str:
    document = {"version": SPEC_VERSION, "features": msgspec.to_builtins(list(features))}
    if tables:
        document["tables"] = msgspec.to_builtins(dict(tables))
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _parse_feature(table: Any, index: int) -> Feature:
    if not isinstance(table, dict):
        raise bad("bad_value", f"#{index + 1}", "features", "is not a table")
    name = table.get("name")
    label = name if isinstance(name, str) else f"#{index + 1}"
    _check_keys(f"feature {label!r}", table, Feature, "")
    for key, part in _PARTS.items():
        if isinstance(table.get(key), dict):
            _check_keys(f"feature {label!r}", table[key], part, f"{key}.")
    try:
        return msgspec.convert(table, Feature)
    except msgspec.ValidationError as error:
        raise ConfigError("bad_value", f"feature {label!r}: {error}") from error


def _parse_tables(document: Any) -> dict[str, StaticTable]:
    if not isinstance(document, dict):
        raise ConfigError("bad_table", "the feature spec's tables are no tables")
    tables = {}
    for name, table in document.items():
        if isinstance(table, dict):
            _check_keys(f"table {name!r}", table, StaticTable, "")
        try:
            tables[name] = msgspec.convert(table, StaticTable)
        except msgspec.ValidationError as error:
            raise ConfigError("bad_table", f"table {name!r}: {error}") from error
    return tables


def _check_keys(
    where: str, table: dict[str, Any], known: type[msgspec.Struct], prefix: str
) -> None:
    for key in table:
        if key not in known.__struct_fields__:
            raise ConfigError(
                "unknown_key",
                f"{where}: {prefix + key} is not a key",
                nearest(key, known.__struct_fields__),
            )
