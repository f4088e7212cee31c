"""The feature spec: a family's ordered features, with the tables and tokenizers that they use.

Why: it is read from features.toml where a family is made and from the package where it is served,
and both give the same object with the same hash.

Invariants: two specs with the same `hash` compute the same values in the same order; a spec that
was constructed is valid, and can be computed here. Every error names the feature, or table, and
the key that is wrong.

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
    Padding,
    Standardise,
    StaticTable,
    Tokens,
    Window,
)
from edge_runtime.features.rules import bad, check_feature, check_table, check_tokens, nearest
from edge_runtime.features.tokens import Encoder, encoder

SPEC_VERSION = 1
_SPEC_KEYS = ("version", "features", "tables", "tokenizers")
_PARTS: dict[str, type[msgspec.Struct]] = {
    "window": Window,
    "lookup": Lookup,
    "cycle": Cycle,
    "tokens": Tokens,
    "standardise": Standardise,
}


class Spec:
    """Features in order; construct with `from_toml`, `from_json` or `from_document`.

    `columns` are what a model is given, `names` and `size` their names and count. `encoders` make
    the ids of those features that are texts, by feature; `tokenizers` are JSON, by name.
    """

    def __init__(
        self,
        features: Iterable[Feature],
        tables: Mapping[str, StaticTable] | None = None,
        tokenizers: Mapping[str, str] | None = None,
    ) -> None:
        self.features = tuple(features)
        self.tables = dict(tables or {})
        self.tokenizers = dict(tokenizers or {})
        if not self.features:
            raise ConfigError("empty_spec", "the feature spec declares no feature")
        for name, table in self.tables.items():
            check_table(name, table)
        for feature in self.features:
            check_feature(feature, self.tables)
            check_tokens(feature, self.tokenizers)
        self.encoders = {f.name: self._encoder(f.tokens) for f in self.features if f.tokens}
        self.columns: list[Column] = [c for f in self.features for c in self._columns(f)]
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
        tokenizers = _parse_tokenizers(document.get("tokenizers", {}))
        parsed = [_parse_feature(table, index) for index, table in features]
        return cls(parsed, tables, tokenizers)

    def to_json(self) -> str:
        """Canonical JSON: equal specs give equal text."""
        return _canonical(self.features, self.tables, self.tokenizers)

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

    @cached_property
    def padding(self) -> Padding | None:
        """How its rows end, where they hold one text and nothing else."""
        pad = self.columns[0].pad
        return Padding(self.size, pad) if len(self.features) == 1 and pad is not None else None

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
        used_too = {feature.tokens.tokenizer for feature in features if feature.tokens}
        return Spec(
            features,
            {name: table for name, table in self.tables.items() if name in used},
            {name: text for name, text in self.tokenizers.items() if name in used_too},
        )

    def _encoder(self, tokens: Tokens) -> Encoder:
        try:
            return encoder(self.tokenizers[tokens.tokenizer], tokens.length)
        except ConfigError as error:
            error.message = f"tokenizer {tokens.tokenizer!r}: {error.message}"
            raise

    def _columns(self, feature: Feature) -> list[Column]:
        made = self.encoders.get(feature.name)
        if made is None:
            return feature.columns
        return [Column(column.name, made.size, made.pad) for column in feature.columns]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spec):
            return NotImplemented
        mine, others = ((s.features, s.tables, s.tokenizers) for s in (self, other))
        return mine == others

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


def _canonical(
    features: Iterable[Feature],
    tables: Mapping[str, StaticTable],
    tokenizers: Mapping[str, str] = {},
) -> str:
    document = {"version": SPEC_VERSION, "features": msgspec.to_builtins(list(features))}
    if tables:
        document["tables"] = msgspec.to_builtins(dict(tables))
    if tokenizers:
        document["tokenizers"] = dict(tokenizers)
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


def _parse_tokenizers(document: Any) -> dict[str, str]:
    try:
        return msgspec.convert(document, dict[str, str])
    except msgspec.ValidationError as error:
        raise ConfigError("bad_tokenizer", f"the feature spec's tokenizers: {error}") from error


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
