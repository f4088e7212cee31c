"""The feature spec: which values a model is given, declared as data.

Why: one declaration, carried inside the package, drives the device, the learner and every gate, so
there is no second implementation that could differ.

Invariants: two specs with the same `hash` compute the same values in the same order; a spec that
was constructed is valid. Every error names the feature and the key that is wrong.

Knows nothing about events, windows in memory, or models. Implements proto/package.md (features).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import msgspec

from edge_runtime.errors import ConfigError

SPEC_VERSION = 1
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
STATISTICS = ("count", "mean", "sum")
_SPEC_KEYS = ("version", "features")


class Window(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A statistic of `value` over the events of kind `over` in the last `span_s` seconds.

    With a `key`, only events that agree in that field with the event being predicted.
    """

    over: str
    statistic: str
    span_s: float
    key: str | None = None
    value: str | None = None


class Feature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One column: either a `field` of the event (with or without `vocabulary`) or a `window`.

    `vocabulary` maps a value to its index, counted from 1; anything else is 0. `fill` stands in
    for an absent field and for the mean of an empty window. `bounds` clip whatever comes out.
    """

    name: str
    field: str | None = None
    vocabulary: list[str | int] | None = None
    window: Window | None = None
    fill: float = 0.0
    bounds: tuple[float, float] | None = None


class Spec:
    """An ordered list of features; construct with `from_toml` or `from_json`."""

    def __init__(self, features: Iterable[Feature]) -> None:
        self.features = tuple(features)
        if not self.features:
            raise ConfigError("empty_spec", "the feature spec declares no feature")
        for feature in self.features:
            _check_feature(feature)
        self.names = [feature.name for feature in self.features]
        for name in self.names:
            if self.names.count(name) > 1:
                raise _bad("duplicate_name", name, "name", "is declared twice")

    @classmethod
    def from_toml(cls, text: str) -> Spec:
        """Parse the text of a features.toml. Raises: ConfigError naming feature and key."""
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError("bad_toml", f"the feature spec is not TOML: {error}") from error
        return cls._from_document(document)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """Parse what `to_json` wrote. Raises: ConfigError naming feature and key."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError("bad_json", f"the feature spec is not JSON: {error}") from error
        return cls._from_document(document)

    @classmethod
    def _from_document(cls, document: Any) -> Spec:
        if not isinstance(document, dict) or not isinstance(document.get("features"), list):
            raise ConfigError("empty_spec", "the feature spec declares no [[features]]")
        for key in document:
            if key not in _SPEC_KEYS:
                raise ConfigError(
                    "unknown_key", f"feature spec: {key!r} is not a key", _nearest(key, _SPEC_KEYS)
                )
        if document.get("version") != SPEC_VERSION:
            raise ConfigError(
                "bad_version",
                f"feature spec: version is {document.get('version')!r}",
                f"this reads version = {SPEC_VERSION}",
            )
        return cls(_parse_feature(table, index) for index, table in enumerate(document["features"]))

    def to_json(self) -> str:
        """Canonical JSON: equal specs give equal text."""
        document = {"version": SPEC_VERSION, "features": msgspec.to_builtins(self.features)}
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @cached_property
    def hash(self) -> str:
        """Its version: 16 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def size(self) -> int:
        """How many values a vector has."""
        return len(self.features)

    def subset(self, names: Iterable[str]) -> Spec:
        """The named features, in the order of this spec. Raises: ConfigError `unknown_feature`."""
        wanted = set(names)
        for name in sorted(wanted.difference(self.names)):
            raise ConfigError(
                "unknown_feature",
                f"the feature spec has no feature {name!r}",
                _nearest(name, self.names),
            )
        return Spec(feature for feature in self.features if feature.name in wanted)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self.features == other.features

    def __hash__(self) -> int:
        return hash(self.hash)


def _parse_feature(table: Any, index: int) -> Feature:
    if not isinstance(table, dict):
        raise _bad("bad_value", f"#{index + 1}", "features", "is not a table")
    name = table.get("name")
    label = name if isinstance(name, str) else f"#{index + 1}"
    _check_keys(label, table, Feature.__struct_fields__, "")
    window = table.get("window")
    if isinstance(window, dict):
        _check_keys(label, window, Window.__struct_fields__, "window.")
    try:
        return msgspec.convert(table, Feature)
    except msgspec.ValidationError as error:
        raise ConfigError("bad_value", f"feature {label!r}: {error}") from error


def _check_keys(label: str, table: dict[str, Any], known: tuple[str, ...], prefix: str) -> None:
    for key in table:
        if key not in known:
            error = _bad("unknown_key", label, prefix + key, "is not a key")
            error.hint = _nearest(key, known)
            raise error


def _check_feature(feature: Feature) -> None:
    if not feature.name:
        raise _bad("bad_value", feature.name, "name", "is empty")
    if (feature.field is None) == (feature.window is None):
        raise _bad("bad_source", feature.name, "field", "or window: exactly one must be given")
    if not math.isfinite(feature.fill):
        raise _bad("bad_value", feature.name, "fill", "is not finite")
    _check_bounds(feature)
    _check_vocabulary(feature)
    if feature.window is not None:
        _check_window(feature.name, feature.window)


def _check_bounds(feature: Feature) -> None:
    if feature.bounds is None:
        return
    low, high = feature.bounds
    if not -FLOAT32_MAX <= low < high <= FLOAT32_MAX:
        raise _bad("bad_value", feature.name, "bounds", f"[{low}, {high}] is not an interval")


def _check_vocabulary(feature: Feature) -> None:
    words = feature.vocabulary
    if words is None:
        return
    if feature.field is None:
        raise _bad("bad_source", feature.name, "vocabulary", "needs a field")
    if feature.bounds is not None:
        raise _bad("bad_value", feature.name, "bounds", "has no meaning beside a vocabulary")
    if not words or len(set(words)) != len(words):
        raise _bad("bad_value", feature.name, "vocabulary", "is empty or names a value twice")


def _check_window(name: str, window: Window) -> None:
    if window.statistic not in STATISTICS:
        raise ConfigError(
            "unknown_statistic",
            f"feature {name!r}: window.statistic {window.statistic!r} is not known",
            f"one of {', '.join(STATISTICS)}",
        )
    if not (math.isfinite(window.span_s) and window.span_s > 0):
        raise _bad("bad_value", name, "window.span_s", f"{window.span_s} is not a positive time")
    if window.statistic != "count" and window.value is None:
        raise _bad("missing_key", name, "window.value", f"is needed by {window.statistic!r}")
    for key, text in (("over", window.over), ("key", window.key), ("value", window.value)):
        if text == "":
            raise _bad("bad_value", name, f"window.{key}", "is empty")


def _bad(code: str, name: str, key: str, what: str) -> ConfigError:
    return ConfigError(code, f"feature {name!r}: {key} {what}")


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
