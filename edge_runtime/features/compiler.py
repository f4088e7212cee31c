"""The compiler: from a feature spec to the source of the functions that compute it.

Why: a prediction reads a dozen windows in a few microseconds. A loop over readers spends that time
on calls; a function written out for one spec looks each key up once and packs its columns at once.

Invariants: the source depends on the spec alone. Names and words of the spec stand in it only as
`repr` gives them, so no text of a package can become code. Whatever the state and the checked
event, what is packed is finite.

Knows nothing about what tables hold: reading them is written in `reading`.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakValueDictionary
from zlib import crc32

from edge_runtime.features.feature import FLOAT32_MAX, LABEL, Feature, StaticTable
from edge_runtime.features.plan import TableId, table_id, windows_by_table
from edge_runtime.features.reading import Read, fill_of, indented, read_table
from edge_runtime.features.spec import Spec
from edge_runtime.features.windows import to_units

PERIODS_S = {"day": 86_400.0, "week": 604_800.0, "year": 31_556_952.0}


class Program:
    """The compiled form of a spec: `source` to read, and the functions over any tables."""

    def __init__(self, spec: Spec) -> None:
        self.tables = list(windows_by_table(spec.features))
        kinds = dict.fromkeys(table.over for table in self.tables)
        self.observers = {kind: f"observe_{number}" for number, kind in enumerate(kinds)}
        parts = [_packed(spec, self.tables), _packed_many(spec, self.tables)]
        parts += [_observer(name, kind, self.tables) for kind, name in self.observers.items()]
        self.source = "\n\n".join(parts)
        self._constants = _constants(spec)
        self._code = compile(self.source, f"<features {spec.hash}>", "exec")

    def bind(self, tables: Mapping[TableId, Any]) -> dict[str, Any]:
        """The functions over `tables`: `packed`, `packed_many`, and those of `observers`."""
        names = dict(self._constants)
        for number, each in enumerate(self.tables):
            names[f"get_{number}"], names[f"add_{number}"] = tables[each].get, tables[each].add
        exec(self._code, names)  # noqa: S102 - our own source; the package's words are literals
        return names


_programs: WeakValueDictionary[str, Program] = WeakValueDictionary()


def compiled(spec: Spec) -> Program:
    """The program of a spec; the same one for equal specs, for as long as somebody holds it."""
    program = _programs.get(spec.hash)
    if program is None:
        program = _programs[spec.hash] = Program(spec)
    return program


class _Fields:
    """The fields of the event that a function reads, each once, and the variables they go into."""

    def __init__(self) -> None:
        self._variables: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        safe = name if name.isidentifier() and name.isascii() else str(len(self._variables))
        return self._variables.setdefault(name, f"f_{safe}")

    def lines(self) -> list[str]:
        return [f"{variable} = fields.get({name!r})" for name, variable in self._variables.items()]


def _packed(spec: Spec, tables: list[TableId]) -> str:
    fields, body, columns = _Fields(), [], []
    for number, table in enumerate(tables):
        key = fields[table.key] if table.key else "''"
        body += [f"# {table!r}", *_state_of(number, key, _reads(spec, table))]
    for index, feature in enumerate(spec.features):
        lines, column = _column(index, feature, fields)
        body += lines
        columns.append(column)
    body.append(f"return pack({', '.join(columns)})")
    return _function("packed(time_s, fields)", [*fields.lines(), *body])


def _packed_many(spec: Spec, tables: list[TableId]) -> str:
    """`packed` of many events at one time: a table is read once for each key that they have."""
    fields, once, each, columns = _Fields(), ["found = []"], list[str](), []
    for number, table in enumerate(tables):
        reads = _reads(spec, table)
        read = _state_of(number, fields[table.key] if table.key else "''", reads)
        read += [line for x, feature, _ in reads for line in _transforms(int(x[2:]), feature)]
        if table.key:
            names = "".join(f"{x}, " for x, _, _ in reads)
            once.append(f"seen_{number} = {{}}")
            key = fields[table.key]
            read.append(f"seen_{number}[{key}] = {names}")
            each += [f"known = seen_{number}.get({key})", "if known is None:", *indented(read)]
            each += ["else:", f"    {names}= known"]
        else:
            once += read
    for index, feature in enumerate(spec.features):
        lines, column = _column(index, feature, fields)
        if feature.cycle is not None:
            once += lines
        elif feature.window is None:
            each += lines
        columns.append(column)
    each.append(f"found.append(pack({', '.join(columns)}))")
    body = [*once, "for fields in many:", *indented([*fields.lines(), *each]), "return found"]
    return _function("packed_many(time_s, many)", body)


def _reads(spec: Spec, table: TableId) -> list[Read]:
    """The windows that are read from a table."""
    return [
        Read(f"x_{index}", feature, feature.window)
        for index, feature in enumerate(spec.features)
        if feature.window is not None and table_id(feature.window) == table
    ]


def _state_of(number: int, key: str, reads: list[Read]) -> list[str]:
    return [f"state = get_{number}({key})", *read_table(reads)]


def _column(index: int, feature: Feature, fields: _Fields) -> tuple[list[str], str]:
    """The lines that finish `x_INDEX`, and what of it is packed."""
    x, cycle = f"x_{index}", feature.cycle
    if cycle is not None:
        period_s = PERIODS_S[cycle.of]
        turn = f"fmod(time_s + {cycle.utc_offset_s!r}, {period_s!r}) * {math.tau / period_s!r}"
        return [f"{x} = {turn}"], f"sin({x}), cos({x})"
    if feature.tokens is not None:
        return [f"{x} = encode_{index}({fields[feature.tokens.field]} or '')"], f"*{x}"
    column = f"*one_hot_{index}[{x}]" if feature.one_hot else x
    if feature.is_number:
        return [*_source(index, feature, fields), *_transforms(index, feature)], column
    if feature.lookup is not None:
        word = f"look_up_{index}({fields[feature.lookup.key]})"
    else:
        word = fields[feature.field or ""]
    if feature.vocabulary is not None:
        return [f"{x} = index_{index}({word}, 0)"], column
    return [f"{x} = hashed({word}, {feature.hash})"], column


def _source(index: int, feature: Feature, fields: _Fields) -> list[str]:
    """The lines that set `x_INDEX` to a number that is in no window."""
    if feature.field is not None:
        return [f"x_{index} = fields.get({feature.field!r}, {fill_of(feature)!r})"]
    if feature.lookup is not None:
        key = fields[feature.lookup.key]
        return [f"x_{index} = look_up_{index}({key}, {fill_of(feature)!r})"]
    return []


def _transforms(index: int, feature: Feature) -> list[str]:
    """The lines that take `x_INDEX` from its source to what the model is given."""
    x, lines, window = f"x_{index}", [], feature.window
    always_fits = window is not None and window.statistic != "time_since_last"
    if feature.bounds is not None or not always_fits:
        lines.append(_clip(x, *(feature.bounds or (-FLOAT32_MAX, FLOAT32_MAX))))
    if feature.log1p:
        lines.append(f"{x} = log1p({x}) if {x} >= 0.0 else -log1p(-{x})")
    if feature.standardise is not None:
        lines.append(f"{x} = ({x} - {feature.standardise.mean!r}) / {feature.standardise.std!r}")
        lines.append(_clip(x, -FLOAT32_MAX, FLOAT32_MAX))
    if feature.bucket is not None:
        lines.append(f"{x} = bisect_right(edges_{index}, {x})")
    return lines


def _clip(x: str, low: float, high: float) -> str:
    return f"if not {low!r} <= {x} <= {high!r}: {x} = {low!r} if {x} < {low!r} else {high!r}"


def _observer(name: str, kind: str, tables: list[TableId]) -> str:
    """The function that gives an event, or a label, to every table that is over its kind."""
    fields = _Fields()
    numbers: dict[str, list[str]] = {}
    body = []
    for number, table in enumerate(tables):
        if table.over != kind:
            continue
        key, needed, entry = "''", [], "0"
        if table.key:
            key = fields[table.key]
            needed.append(f"{key} is not None")
        if kind == LABEL or table.value:
            entry = "value" if kind == LABEL else fields[table.value]
            if not table.how.startswith("distinct"):
                numbers[entry] = _to_units(entry)
                needed.append(f"units_of_{entry} is not None")
                entry = entry if table.how else f"units_of_{entry}"
            elif kind != LABEL:
                needed.append(f"{entry} is not None")
        add = f"add_{number}({key}, time_s, {entry})"
        body += [f"if {' and '.join(needed)}:", f"    {add}"] if needed else [add]
    units = [line for lines in numbers.values() for line in lines]
    value = "value, " if kind == LABEL else ""
    return _function(f"{name}(time_s, {value}fields)", [*fields.lines(), *units, *body])


def _to_units(value: str) -> list[str]:
    return [
        f"units_of_{value} = None",
        f"if {value} is not None and not isinstance({value}, str):",
        f"    units_of_{value} = to_units({value})",
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
        if feature.tokens is not None:
            names[f"encode_{index}"] = spec.encoders[feature.name]
        if feature.bucket is not None:
            names[f"edges_{index}"] = feature.bucket
        if feature.lookup is not None:
            table, column = spec.tables[feature.lookup.table], feature.lookup.column
            names[f"look_up_{index}"] = _cells(table, column).get
        if feature.one_hot:
            names[f"one_hot_{index}"] = list(_one_hot(feature))
    return names


def _cells(table: StaticTable, column: str) -> dict[str | int, Any]:
    """The known cells of a column by their row's name; a name that is an integer answers to it."""
    at = table.columns.index(column)
    cells: dict[str | int, Any] = {
        name: row[at] for name, row in table.rows.items() if row[at] is not None
    }
    integers = [name for name in table.rows if name in cells and _is_integer(name)]
    return cells | {int(name): cells[name] for name in integers}


def _is_integer(name: str) -> bool:
    return name.isascii() and name.removeprefix("-").isdecimal() and str(int(name)) == name


def _one_hot(feature: Feature) -> Iterator[tuple[float, ...]]:
    """The columns for each index; a word that the vocabulary does not know has none, all are 0."""
    skipped = int(feature.vocabulary is not None)
    for index in range(feature.indices):
        yield tuple(float(each == index) for each in range(skipped, feature.indices))


def hashed(word: str | int | None, indices: int) -> int:
    """The index of a word among so many, the same on every machine; 0 for none."""
    return 0 if word is None else crc32(str(word).encode()) % indices


def _function(signature: str, body: Iterable[str]) -> str:
    return "\n".join([f"def {signature}:", *indented(body), ""])
