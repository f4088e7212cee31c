"""What a feature may say: its source, its transforms and the columns that come of it, as data.

Why: one declaration, carried inside the package, drives the device, the learner and every gate, so
there is no second implementation that could differ.

A value goes through its transforms in one order, whatever the order of the keys: source, `fill`,
`bounds`, `log1p`, `standardise`, `bucket`; or, where the source gives words, `vocabulary` or
`hash`; and an index through `one_hot` last.

Knows nothing about events, windows in memory, or models. Implements proto/package.md (features).
"""

from __future__ import annotations

from typing import Literal

import msgspec

FLOAT32_MAX = (2 - 2**-23) * 2.0**127
LABEL = "label"
"""The `over` of a window over labels; no kind of event may have this name."""

Cell = str | int | float | None


class Window(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A statistic of `value` over the latest events of kind `over`, or over the latest labels.

    The latest are those of the last `span_s` seconds or the last `span_events` events; a decayed
    mean has neither and halves an event's weight with every `half_life_s`. With a `key`, only
    events that agree in that field with the event being predicted.
    """

    over: str
    statistic: str
    span_s: float | None = None
    key: str | None = None
    value: str | None = None
    span_events: int | None = None
    half_life_s: float | None = None


class Lookup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cell of a static table: the row is named by the event's field `key`."""

    table: str
    key: str
    column: str


class Cycle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where the event's time stands in a period, as sine and cosine: two columns.

    The phase is 0 at the epoch, 1970-01-01, a Thursday, at midnight of the zone `utc_offset_s`; a
    year has 365.2425 days.
    """

    of: Literal["day", "week", "year"]
    utc_offset_s: float = 0.0


class Tokens(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The text in the event's field `field`: the first `length` ids that `tokenizer` gives it."""

    field: str
    tokenizer: str
    length: int


class Standardise(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Subtract `mean`, divide by `std`: statistics that were taken when the package was made."""

    mean: float
    std: float


class Feature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One source and what is done to it; one column, or two with `cycle`, or many with `one_hot`
    or `tokens`.

    The source is a `field` of the event, a `window`, a `lookup`, a `cycle` or `tokens`, to which
    nothing is done. `fill` stands in for an absent field, an unknown row, and what an empty window
    cannot say. `bounds` clip. `log1p` is odd: -log1p(-x) below 0. `bucket` gives how many of its
    ascending edges are at or below the value. `vocabulary` maps a word to its index, counted from
    1; anything else is 0. `hash` maps words to that many indices: CRC-32 of the UTF-8 text, modulo.
    """

    name: str
    field: str | None = None
    vocabulary: list[str | int] | None = None
    window: Window | None = None
    fill: float = 0.0
    bounds: tuple[float, float] | None = None
    lookup: Lookup | None = None
    cycle: Cycle | None = None
    tokens: Tokens | None = None
    log1p: bool = False
    standardise: Standardise | None = None
    bucket: list[float] | None = None
    hash: int | None = None
    one_hot: bool = False

    @property
    def is_number(self) -> bool:
        """Whether its source has to give numbers, not words."""
        return self.vocabulary is None and self.hash is None and self.tokens is None

    @property
    def indices(self) -> int:
        """How many values its index can take; 0 where it is no index."""
        if self.vocabulary is not None:
            return len(self.vocabulary) + 1
        if self.hash is not None:
            return self.hash
        return 0 if self.bucket is None else len(self.bucket) + 1

    @property
    def columns(self) -> list[Column]:
        """What a model is given of it, in order; of `tokens` by name alone."""
        if self.tokens is not None:
            return [Column(f"{self.name}_{at}", 0) for at in range(self.tokens.length)]
        if self.cycle is not None:
            return [Column(f"{self.name}.sin", 0), Column(f"{self.name}.cos", 0)]
        if not self.one_hot:
            return [Column(self.name, self.indices)]
        words = range(self.indices) if self.vocabulary is None else self.vocabulary
        return [Column(f"{self.name}={word}", 0) for word in words]


class Column(msgspec.Struct, frozen=True):
    """A column of the model's input; `indices` says how many values an index has, 0: a number.

    With a `pad` it holds the id of a token; that one stands where the text has ended.
    """

    name: str
    indices: int
    pad: int | None = None

    @property
    def is_key(self) -> bool:
        """Whether its index names a thing by itself, which a token does not."""
        return self.indices > 0 and self.pad is None


class Padding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows of `length` columns that hold one text each: `pad` stands behind its last token."""

    length: int
    pad: int


class StaticTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Facts that do not change with events: one row for each key, a cell for each column.

    `version` is for people; what identifies the content is the hash of the spec.
    """

    version: str
    columns: list[str]
    rows: dict[str, list[Cell]]
