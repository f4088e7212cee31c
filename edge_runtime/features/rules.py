"""The rules that a declared feature keeps: what goes together, what is needed, what is in range.

Why: whoever writes a features.toml learns at once which feature and which key is wrong, and a spec
that was constructed can be compiled without a second thought.

Invariants: every error names the feature and the key.

Knows nothing about files, events or what is kept in memory.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping

from edge_runtime.errors import ConfigError
from edge_runtime.features.feature import FLOAT32_MAX, LABEL, Feature, StaticTable, Window

STATISTICS = (
    *("count", "sum", "mean", "std", "min", "max", "distinct", "last"),
    *("decayed_mean", "rate", "time_since_last"),
)
VALUELESS = ("count", "rate", "time_since_last")
INDICES_MAX = 1 << 16
EVENTS_MAX = 1 << 15
TOKENS_MAX = 512


def check_feature(feature: Feature, tables: Mapping[str, StaticTable]) -> None:
    """Raises: ConfigError naming feature and key."""
    if not feature.name:
        raise bad("bad_value", feature.name, "name", "is empty")
    sources = (feature.field, feature.window, feature.lookup, feature.cycle, feature.tokens)
    if sum(source is not None for source in sources) != 1:
        what = "or window, lookup, cycle, tokens: exactly one is given"
        raise bad("bad_source", feature.name, "field", what)
    if not math.isfinite(feature.fill):
        raise bad("bad_value", feature.name, "fill", "is not finite")
    _check_bounds(feature)
    _check_index(feature)
    _check_scale(feature)
    if feature.window is not None:
        _check_window(feature.name, feature.window)
    if feature.lookup is not None:
        _check_lookup(feature, tables)
    if feature.cycle is not None and not abs(feature.cycle.utc_offset_s) <= 86_400.0:
        raise bad("bad_value", feature.name, "cycle.utc_offset_s", "is more than a day")


def check_table(name: str, table: StaticTable) -> None:
    """Raises: ConfigError naming table and row."""
    where = f"table {name!r}"
    if not table.columns or len(set(table.columns)) != len(table.columns):
        raise ConfigError("bad_table", f"{where}: columns are missing or one is named twice")
    for key, row in table.rows.items():
        if len(row) != len(table.columns):
            raise ConfigError(
                "bad_table",
                f"{where}: row {key!r} has {len(row)} cells of {len(table.columns)}",
            )
        if any(isinstance(cell, float) and not math.isfinite(cell) for cell in row):
            raise ConfigError(
                "bad_table", f"{where}: row {key!r} holds a number that is not finite"
            )


def _check_bounds(feature: Feature) -> None:
    if feature.bounds is None:
        return
    low, high = feature.bounds
    if not -FLOAT32_MAX <= low < high <= FLOAT32_MAX:
        raise bad("bad_value", feature.name, "bounds", f"[{low}, {high}] is not an interval")


def _check_index(feature: Feature) -> None:
    """Words become indices by a vocabulary or a hash; only an index can be one-hot."""
    name, words = feature.name, feature.vocabulary
    for key, given in (("vocabulary", words), ("hash", feature.hash)):
        if given is not None and feature.field is None and feature.lookup is None:
            raise bad("bad_source", name, key, "needs a field or a lookup")
    if words is not None and feature.hash is not None:
        raise bad("bad_value", name, "hash", "has no meaning beside a vocabulary")
    if words is not None and (not words or len(set(words)) != len(words)):
        raise bad("bad_value", name, "vocabulary", "is empty or names a value twice")
    if feature.hash is not None and not 2 <= feature.hash <= INDICES_MAX:
        raise bad("bad_value", name, "hash", f"is not a count from 2 to {INDICES_MAX}")
    edges = feature.bucket
    if edges is not None and not (
        edges and all(map(math.isfinite, edges)) and edges == sorted(set(edges))
    ):
        raise bad("bad_value", name, "bucket", "is not a list of ascending edges")
    if feature.one_hot and not feature.indices:
        raise bad("bad_value", name, "one_hot", "needs a vocabulary, a hash or a bucket")


def _check_scale(feature: Feature) -> None:
    """What is done to numbers means nothing for words and cycles."""
    for key, given in (
        ("bounds", feature.bounds is not None),
        ("log1p", feature.log1p),
        ("standardise", feature.standardise is not None),
        ("bucket", feature.bucket is not None),
    ):
        if given and not feature.is_number:
            raise bad("bad_value", feature.name, key, "has no meaning for words and texts")
        if given and feature.cycle is not None:
            raise bad("bad_value", feature.name, key, "has no meaning beside a cycle")
    scale = feature.standardise
    if scale is not None and not (math.isfinite(scale.mean) and 0 < scale.std < math.inf):
        raise bad("bad_value", feature.name, "standardise", "needs a finite mean and a std above 0")


def _check_window(name: str, window: Window) -> None:
    if window.statistic not in STATISTICS:
        raise ConfigError(
            "unknown_statistic",
            f"feature {name!r}: window.statistic {window.statistic!r} is not known",
            nearest(window.statistic, STATISTICS),
        )
    _check_extent(name, window)
    if window.over == LABEL:
        if window.value is not None:
            raise bad("bad_value", name, "window.value", "is the label itself over labels")
    elif window.statistic not in VALUELESS and window.value is None:
        raise bad("missing_key", name, "window.value", f"is needed by {window.statistic!r}")
    for key, text in (("over", window.over), ("key", window.key), ("value", window.value)):
        if text == "":
            raise bad("bad_value", name, f"window.{key}", "is empty")


def _check_extent(name: str, window: Window) -> None:
    """A window has one extent: seconds, events, or the half-life of a decayed mean."""
    if window.statistic == "decayed_mean":
        if window.half_life_s is None:
            raise bad("missing_key", name, "window.half_life_s", "is needed by 'decayed_mean'")
        for key in ("span_s", "span_events"):
            if getattr(window, key) is not None:
                raise bad("bad_value", name, f"window.{key}", "has no meaning beside half_life_s")
    elif window.half_life_s is not None:
        raise bad("bad_value", name, "window.half_life_s", "is of 'decayed_mean' alone")
    elif (window.span_s is None) == (window.span_events is None):
        raise bad("bad_value", name, "window.span_s", "or window.span_events: exactly one is given")
    elif window.statistic == "rate" and window.span_s is None:
        raise bad("missing_key", name, "window.span_s", "is needed by 'rate'")
    _check_lengths(name, window)


def _check_lengths(name: str, window: Window) -> None:
    for key in ("span_s", "half_life_s"):
        seconds = getattr(window, key)
        if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
            raise bad("bad_value", name, f"window.{key}", f"{seconds} is not a positive time")
    if window.span_events is not None and not 1 <= window.span_events <= EVENTS_MAX:
        raise bad("bad_value", name, "window.span_events", f"is not from 1 to {EVENTS_MAX}")


def _check_lookup(feature: Feature, tables: Mapping[str, StaticTable]) -> None:
    name, lookup = feature.name, feature.lookup
    assert lookup is not None
    table = tables.get(lookup.table)
    if table is None:
        raise _with_hint(
            bad("unknown_table", name, "lookup.table", f"{lookup.table!r} is not declared"),
            nearest(lookup.table, tables),
        )
    if lookup.column not in table.columns:
        raise _with_hint(
            bad("unknown_column", name, "lookup.column", f"{lookup.column!r} is not in the table"),
            nearest(lookup.column, table.columns),
        )
    at = table.columns.index(lookup.column)
    cells = {row[at]: key for key, row in table.rows.items()}
    if feature.vocabulary is not None and not cells.keys() & set(feature.vocabulary):
        raise bad("bad_value", name, "vocabulary", f"has no word of column {lookup.column!r}")
    texts = [key for cell, key in cells.items() if isinstance(cell, str)]
    if feature.is_number and texts:
        raise bad("bad_value", name, "lookup.column", f"holds text in row {texts[0]!r}")


def check_tokens(feature: Feature, tokenizers: Iterable[str]) -> None:
    """Raises: ConfigError naming feature and key."""
    tokens = feature.tokens
    if tokens is None:
        return
    if tokens.tokenizer not in tokenizers:
        raise _with_hint(
            bad("unknown_tokenizer", feature.name, "tokens.tokenizer", "is not declared"),
            nearest(tokens.tokenizer, tokenizers),
        )
    if not tokens.field:
        raise bad("bad_value", feature.name, "tokens.field", "is empty")
    if not 1 <= tokens.length <= TOKENS_MAX:
        raise bad("bad_value", feature.name, "tokens.length", f"is not from 1 to {TOKENS_MAX}")


def bad(code: str, name: str, key: str, what: str) -> ConfigError:
    """The error that `key` of feature `name` is wrong."""
    return ConfigError(code, f"feature {name!r}: {key} {what}")


def _with_hint(error: ConfigError, hint: str) -> ConfigError:
    error.hint = hint
    return error


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at what may have been meant."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
