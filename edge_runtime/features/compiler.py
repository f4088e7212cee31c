"""The compiler: from a feature spec to the source of the functions that compute it.

Why: a prediction reads a dozen windows in a few microseconds. Loops over readers spend that time on
calls; a function written out for one spec looks each key up once, shares the searches of windows
that lie in one another, and packs its columns in one call.

Invariants: the source depends on the spec alone. Names and words of the spec stand in it only as
`repr` gives them, so no text of a package can become code. Whatever the state and the checked
event, what is packed is finite.

Knows nothing about tables beyond what a `Series`, a `Distinct` and a `Decayed` can be asked.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import CodeType
from typing import Any
from zlib import crc32

from edge_runtime.features.feature import FLOAT32_MAX, LABEL, Feature, StaticTable, Window
from edge_runtime.features.plan import TableId, table_id, windows_by_table
from edge_runtime.features.spec import Spec
from edge_runtime.features.windows import SCALE, VALUE_MAX, to_units

PERIODS_S = {"day": 86_400.0, "week": 604_800.0, "year": 31_556_952.0}
_EMPTY_IS_ZERO = ("count", "sum", "rate", "distinct")
_UNITS = f"{float(SCALE)!r}"


class Program:
    """The compiled form of a spec: `source` to read, and what it needs beside the tables."""

    def __init__(self, spec: Spec) -> None:
        self.tables = list(windows_by_table(spec.features))
        self._fields: dict[str, str] = {}
        self.source = self._packed(spec) + "".join(self._observers())
        self._constants = _constants(spec)
        self._code: CodeType = compile(self.source, f"<features {spec.hash}>", "exec")

    def bind(self, tables: Mapping[TableId, Any]) -> dict[str, Any]:
        """The functions of the source over `tables`: `packed`, and `observe_KIND` by number."""
        names = dict(self._constants)
        for number, each in enumerate(self.tables):
            names[f"get_{number}"], names[f"add_{number}"] = tables[each].get, tables[each].add
        exec(self._code, names)  # noqa: S102 - our own source; the package's words are literals
        return names

    @property
    def kinds(self) -> dict[str, str]:
        """The kinds that some window is over, with the name of the function that takes them."""
        kinds = dict.fromkeys(table.over for table in self.tables)
        return {kind: f"observe_{number}" for number, kind in enumerate(kinds)}

    def _packed(self, spec: Spec) -> str:
        body: list[str] = []
        for number, each in enumerate(self.tables):
            key = self._field(each.key) if each.key else "''"
            inside = [
                (f"x_{index}", feature, feature.window)
                for index, feature in enumerate(spec.features)
                if feature.window is not None and table_id(feature.window) == each
            ]
            body += [f"# {each!r}", f"state = get_{number}({key})", *_read_table(each, inside)]
        columns = []
        for index, feature in enumerate(spec.features):
            steps, packed = self._column(index, feature)
            body += steps
            columns.append(packed)
        head = [f"{variable} = fields.get({name!r})" for name, variable in self._fields.items()]
        body.append(f"return pack({', '.join(columns)})")
        return _function("packed(time_s, fields)", [*head, *body])

    def _column(self, index: int, feature: Feature) -> tuple[list[str], str]:
        """The lines that finish `x_INDEX`, and what of it is packed."""
        x = f"x_{index}"
        if feature.cycle is not None:
            period_s, offset_s = PERIODS_S[feature.cycle.of], feature.cycle.utc_offset_s
            turn = f"{x} = fmod(time_s + {offset_s!r}, {period_s!r}) * {math.tau / period_s!r}"
            return [turn], f"sin({x}), cos({x})"
        packed = f"*one_hot_{index}[{x}]" if feature.one_hot else x
        if not feature.is_number:
            return [f"{x} = {self._index(index, feature)}"], packed
        steps = []
        if feature.field is not None:
            steps.append(f"{x} = fields.get({feature.field!r}, {_fill(feature)!r})")
        elif feature.lookup is not None:
            key = self._field(feature.lookup.key)
            steps.append(f"{x} = look_up_{index}({key}, {_fill(feature)!r})")
        return steps + _transforms(index, feature), packed

    def _index(self, index: int, feature: Feature) -> str:
        """The index of a word."""
        if feature.lookup is not None:
            word = f"look_up_{index}({self._field(feature.lookup.key)})"
        else:
            assert feature.field is not None
            word = self._field(feature.field)
        if feature.vocabulary is not None:
            return f"index_{index}({word}, 0)"
        return f"hashed({word}, {feature.hash})"

    def _field(self, name: str) -> str:
        """The variable that holds a field of the event."""
        safe = name if name.isidentifier() and name.isascii() else str(len(self._fields))
        return self._fields.setdefault(name, f"f_{safe}")

    def _observers(self) -> Iterable[str]:
        for kind, function in self.kinds.items():
            self._fields = {}
            body = [
                line
                for number, each in enumerate(self.tables)
                if each.over == kind
                for line in self._add(number, each)
            ]
            head = [f"{variable} = fields.get({name!r})" for name, variable in self._fields.items()]
            units = [
                line
                for name in dict.fromkeys(t.value for t in self.tables if t.over == kind)
                if name or kind == LABEL
                for line in _to_units(self._value(name, kind))
            ]
            value = "value, " if kind == LABEL else ""
            yield "\n\n" + _function(f"{function}(time_s, {value}fields)", [*head, *units, *body])

    def _value(self, name: str, kind: str) -> str:
        return "value" if kind == LABEL else self._field(name)

    def _add(self, number: int, table: TableId) -> list[str]:
        """The lines that put an event into a table; what lacks a field of it is skipped."""
        key, needed = "''", []
        if table.key:
            key = self._field(table.key)
            needed.append(f"{key} is not None")
        entry = "0"
        if table.value or table.over == LABEL:
            value = self._value(table.value, table.over)
            exact, words = f"{value}_units", table.how.startswith("distinct")
            entry = value if table.how else exact
            needed.append(f"{value if words else exact} is not None")
        add = f"add_{number}({key}, time_s, {entry})"
        return [f"if {' and '.join(needed)}:", f"    {add}"] if needed else [add]


@lru_cache(maxsize=64)
def compiled(spec: Spec) -> Program:
    """The program of a spec; the same one for equal specs."""
    return Program(spec)


Read = tuple[str, Feature, Window]


def _read_table(table: TableId, reads: list[Read]) -> list[str]:
    """The lines that set the variable of each read from `state`."""
    empty = _assign_empty(reads)
    if table.how:
        inside = [f"{x} = {_sketch(window)}" for x, _, window in reads]
    else:
        inside = _read_series(reads)
    return ["if state is None:", *_indented(empty), "else:", *_indented(inside)]


def _sketch(window: Window) -> str:
    if window.half_life_s is not None:
        return "state.total / state.weight"
    if window.span_s is not None:
        return f"state.count(time_s - {window.span_s!r})"
    return f"state.count_events({window.span_events})"


def _read_series(reads: list[Read]) -> list[str]:
    """Windows from the shortest to the longest: each search ends where the last one came out."""
    used = {window.statistic for _, _, window in reads}
    lines = ["times, head = state.times, state.head"]
    if used & {"sum", "mean", "std", "last"}:
        lines.append("totals = state.totals")
    if "std" in used:
        lines.append("squares = state.squares")
    lines += [
        "size = end = start = len(times)",
        "if times[-1] > time_s:",
        "    end = start = bisect_right(times, time_s)",
    ]
    spans = {(window.span_s, window.span_events): None for _, _, window in reads}
    for span_s, events in sorted(spans, key=lambda span: (span[0] or math.inf, span[1] or 0)):
        inside = [r for r in reads if (r[2].span_s, r[2].span_events) == (span_s, events)]
        if span_s is None:
            lines.append(f"start = end - {events} if end - {events} > head else head")
        else:
            lines.append(f"start = bisect_right(times, time_s - {span_s!r}, head, start)")
        lines += ["count = end - start", "if count > 0:", *_indented(_statistics(inside))]
        lines += ["else:", *_indented(_assign_empty(inside))]
    return lines


def _statistics(reads: list[Read]) -> list[str]:
    lines = []
    if {window.statistic for _, _, window in reads} & {"sum", "mean", "std"}:
        lines.append("total = totals[end] - totals[start]")
    return lines + [f"{x} = {_statistic(window)}" for x, _, window in reads]


def _statistic(window: Window) -> str:
    """The expression of a statistic over entries `start` to `end`, of which there are some."""
    peak = (
        "(state.{0}.units[bisect_left(state.{0}.positions, start)] "
        "if end == size else state.high(start, end, {1}))"
    )
    deviation = "sqrt(count * (squares[end] - squares[start]) - total * total)"
    return {
        "count": "count",
        "sum": f"total / {_UNITS}",
        "mean": f"total / (count * {SCALE})",
        "std": f"{deviation} / (count * {_UNITS})",
        "max": f"{peak.format('highs', 1)} / {_UNITS}",
        "min": f"-{peak.format('lows', -1)} / {_UNITS}",
        "last": f"(totals[end] - totals[end - 1]) / {_UNITS}",
        "rate": f"count / {window.span_s!r}",
        "time_since_last": "time_s - times[end - 1]",
    }[window.statistic]


def _assign_empty(reads: list[Read]) -> list[str]:
    return [
        f"{x} = {0.0 if window.statistic in _EMPTY_IS_ZERO else _fill(feature)!r}"
        for x, feature, window in reads
    ]


def _transforms(index: int, feature: Feature) -> list[str]:
    """The lines that take `x_INDEX` from its source to what the model is given."""
    x, lines = f"x_{index}", []
    window = feature.window
    safe = window is not None and window.statistic != "time_since_last"
    if feature.bounds is not None or not safe:
        lines.append(_clip(x, feature.bounds or (-FLOAT32_MAX, FLOAT32_MAX)))
    if feature.log1p:
        lines.append(f"{x} = log1p({x}) if {x} >= 0.0 else -log1p(-{x})")
    if feature.standardise is not None:
        lines.append(f"{x} = ({x} - {feature.standardise.mean!r}) / {feature.standardise.std!r}")
        lines.append(_clip(x, (-FLOAT32_MAX, FLOAT32_MAX)))
    if feature.bucket is not None:
        lines.append(f"{x} = bisect_right(edges_{index}, {x})")
    return lines


def _clip(x: str, bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"if not {low!r} <= {x} <= {high!r}: {x} = {low!r} if {x} < {low!r} else {high!r}"


def _fill(feature: Feature) -> float:
    return min(max(feature.fill, -FLOAT32_MAX), FLOAT32_MAX)


def _to_units(value: str) -> list[str]:
    return [
        f"{value}_units = None",
        f"if {value} is not None and not isinstance({value}, str):",
        f"    exact = {-VALUE_MAX!r} <= {value} <= {VALUE_MAX!r}",
        f"    {value}_units = round({value} * {_UNITS}) if exact else to_units({value})",
    ]


def _constants(spec: Spec) -> dict[str, Any]:
    """What the source names and does not write out."""
    names: dict[str, Any] = {
        "bisect_left": bisect_left,
        "bisect_right": bisect_right,
        "sqrt": math.sqrt,
        "log1p": math.log1p,
        "fmod": math.fmod,
        "sin": math.sin,
        "cos": math.cos,
        "hashed": hashed,
        "to_units": to_units,
        "pack": struct.Struct(f"<{spec.size}f").pack,
    }
    for index, feature in enumerate(spec.features):
        if feature.vocabulary is not None:
            positions = enumerate(feature.vocabulary, start=1)
            names[f"index_{index}"] = {word: position for position, word in positions}.get
        if feature.bucket is not None:
            names[f"edges_{index}"] = feature.bucket
        if feature.lookup is not None:
            table, column = spec.tables[feature.lookup.table], feature.lookup.column
            names[f"look_up_{index}"] = _cells(table, column).get
        if feature.one_hot:
            names[f"one_hot_{index}"] = _one_hot(feature)
    return names


def _cells(table: StaticTable, column: str) -> dict[str | int, Any]:
    """The known cells of a column by their row's name; a name that is an integer answers to it."""
    at = table.columns.index(column)
    cells: dict[str | int, Any] = {
        name: row[at] for name, row in table.rows.items() if row[at] is not None
    }
    for name in list(table.rows):
        if name in cells and name.lstrip("-").isdecimal() and str(int(name)) == name:
            cells[int(name)] = cells[name]
    return cells


def _one_hot(feature: Feature) -> list[tuple[float, ...]]:
    rows = [
        tuple(float(i == index) for i in range(feature.indices)) for index in range(feature.indices)
    ]
    # A word that the vocabulary does not know has no column: all of them are 0.
    return rows if feature.vocabulary is None else [row[1:] for row in rows]


def hashed(word: str | int | None, indices: int) -> int:
    """The index of a word among so many, the same on every machine; 0 for none."""
    return 0 if word is None else crc32(str(word).encode()) % indices


def _function(signature: str, body: list[str]) -> str:
    return "\n".join([f"def {signature}:", *_indented(body), ""])


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]
