"""The engine: events in, feature vectors out.

Why: the only code that turns events into numbers, on the device and wherever a release is judged,
so that training and serving cannot drift apart.

Invariants: `vector` reads and never writes; the values depend on the set of events observed, not on
their order (within what is kept) nor on the questions asked; restoring a snapshot and observing the
events after it gives the same bits as never having stopped.

Knows nothing about clocks, interfaces, models or files: who calls has checked the fields.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.errors import RequestError
from edge_runtime.features.spec import FLOAT32_MAX, Feature, Spec, Window
from edge_runtime.features.windows import SCALE, Key, Table, to_units
from edge_runtime.wire.messages import Value

Vector = npt.NDArray[np.float32]
Fields = Mapping[str, Value]
Reader = Callable[[float, Fields], float]
TableId = tuple[str, str, str]

SNAPSHOT_VERSION = 1
_MAGIC = b"HWFE"
_WHOLE = ""  # the only key of a table without a key field
_ROUNDING_S = 1.0  # kept beyond need, so that rounding of times never decides


class _SeriesState(msgspec.Struct, array_like=True):
    key: Key
    times: list[float]
    values: list[float]


class _TableState(msgspec.Struct, array_like=True):
    table: TableId
    series: list[_SeriesState]


class _Snapshot(msgspec.Struct, array_like=True):
    version: int
    spec: str
    tables: list[_TableState]


_decoder = msgspec.msgpack.Decoder(_Snapshot)


class Engine:
    """Windows of one spec and the readers that turn them and an event into a vector.

    Entries are kept for the longest span of their table and `lateness_s` more, so that a question
    asked up to `lateness_s` behind the newest event is answered exactly. `tables` are the windows.
    """

    def __init__(self, spec: Spec, *, lateness_s: float = 0.0) -> None:
        self.spec = spec
        self.lateness_s = lateness_s
        self.tables: dict[TableId, Table] = {}
        self._compile(self._empty_tables())

    def observe(self, kind: str, time_s: float, fields: Fields) -> None:
        """Let every window over `kind` see the event; a window whose field is absent skips it."""
        for table, key_field, value_field in self._feeds.get(kind, ()):
            key = fields.get(key_field) if key_field else _WHOLE
            value = fields.get(value_field) if value_field else 0
            if key is None or value is None or isinstance(value, str):
                continue
            table.add(key, time_s, to_units(value))

    def vector(self, time_s: float, fields: Fields) -> Vector:
        """Feature values, float32 of shape (size,), as of `time_s`; the event itself not counted.

        An event just observed at `time_s` does count: ask first, then observe.
        """
        return np.array([read(time_s, fields) for read in self._readers], dtype=np.float32)

    def snapshot(self) -> bytes:
        """All state, with a checksum."""
        tables = [_TableState(name, _series_of(table)) for name, table in self.tables.items()]
        body = msgspec.msgpack.encode(_Snapshot(SNAPSHOT_VERSION, self.spec.hash, tables))
        return _MAGIC + zlib.crc32(body).to_bytes(4, "little") + body

    def restore(self, data: bytes) -> None:
        """Replace all state by that of a snapshot of the same spec.

        Raises: RequestError `bad_snapshot` or `other_spec`, with the state unchanged.
        """
        snapshot = _decode(data)
        if snapshot.spec != self.spec.hash:
            raise RequestError(
                "other_spec",
                f"the snapshot is of feature spec {snapshot.spec}, not {self.spec.hash}",
            )
        tables = self._empty_tables()
        if {state.table for state in snapshot.tables} != tables.keys():
            raise _bad_snapshot("its tables are not those of its spec")
        for state in snapshot.tables:
            _fill(tables[state.table], state)
        self._compile(tables)

    def inherit(self, others: Collection[Engine]) -> None:
        """Take over, when new, what engines of other specs have observed for the same windows.

        A window longer than they kept is short of its oldest entries until its span has passed.
        """
        for name, table in self.tables.items():
            known = [other.tables[name] for other in others if name in other.tables]
            longest = max(known, key=lambda each: each.retention_s, default=None)
            for key, series in longest.items() if longest is not None else ():
                table.load(key, series.times, series.values())

    def statistics(self) -> dict[str, int]:
        """What is held, and what the bounds have pushed out."""
        tables = self.tables.values()
        return {
            "tables": len(tables),
            "keys": sum(table.keys for table in tables),
            "entries": sum(table.entries for table in tables),
            "keys_evicted": sum(table.keys_evicted for table in tables),
            "entries_evicted": sum(table.entries_evicted for table in tables),
        }

    def _empty_tables(self) -> dict[TableId, Table]:
        spans: dict[TableId, float] = {}
        for feature in self.spec.features:
            if feature.window is not None:
                name = _table_id(feature.window)
                spans[name] = max(spans.get(name, 0.0), feature.window.span_s)
        return {
            name: Table(span_s + self.lateness_s + _ROUNDING_S) for name, span_s in spans.items()
        }

    def _compile(self, tables: dict[TableId, Table]) -> None:
        self.tables = tables
        self._feeds: dict[str, list[tuple[Table, str, str]]] = {}
        for (over, key, value), table in tables.items():
            self._feeds.setdefault(over, []).append((table, key, value))
        self._readers = [_reader(feature, tables) for feature in self.spec.features]


def _table_id(window: Window) -> TableId:
    return window.over, window.key or "", window.value or ""


def _reader(feature: Feature, tables: dict[TableId, Table]) -> Reader:
    if feature.window is not None:
        return _read_window(feature, feature.window, tables[_table_id(feature.window)])
    assert feature.field is not None
    if feature.vocabulary is not None:
        return _read_vocabulary(feature.field, feature.vocabulary)
    return _read_field(feature, feature.field)


def _read_vocabulary(field: str, words: list[str | int]) -> Reader:
    index = {word: float(position) for position, word in enumerate(words, start=1)}
    find = index.get

    def read(_time_s: float, fields: Fields) -> float:
        return find(fields.get(field), 0.0)  # type: ignore[arg-type]  # None is not in the index

    return read


def _read_field(feature: Feature, field: str) -> Reader:
    low, high = feature.bounds or (-FLOAT32_MAX, FLOAT32_MAX)
    fill = feature.fill

    def read(_time_s: float, fields: Fields) -> float:
        value: float = fields.get(field, fill)  # type: ignore[assignment]  # checked: a number
        return value if low <= value <= high else min(max(value, low), high)

    return read


def _read_window(feature: Feature, window: Window, table: Table) -> Reader:
    """The reader that each prediction runs once a window: binary searches in place, no calls."""
    low, high = feature.bounds or (-FLOAT32_MAX, FLOAT32_MAX)
    find, span_s, key_field = table.get, window.span_s, window.key
    counts, divides = window.statistic == "count", window.statistic == "mean"
    empty = min(max(feature.fill if divides else 0.0, low), high)

    def read(time_s: float, fields: Fields) -> float:
        series = find(_WHOLE if key_field is None else fields.get(key_field))  # type: ignore[arg-type]  # None is no key
        if series is None:
            return empty
        times = series.times
        end = len(times)
        if end and times[-1] > time_s:
            end = bisect_right(times, time_s)
        start = bisect_right(times, time_s - span_s, 0, end)
        if start == end:
            return empty
        if counts:
            value: float = end - start
        else:
            totals = series.totals
            units = totals[end] - totals[start]
            value = units / ((end - start) * SCALE if divides else SCALE)
        return value if low <= value <= high else min(max(value, low), high)

    return read


def _series_of(table: Table) -> list[_SeriesState]:
    return [_SeriesState(key, series.times, series.values()) for key, series in table.items()]


def _fill(table: Table, state: _TableState) -> None:
    for series in state.series:
        if len(series.times) != len(series.values) or series.times != sorted(series.times):
            raise _bad_snapshot(f"the series of {series.key!r} is not in order")
        table.load(series.key, series.times, series.values)


def _decode(data: bytes) -> _Snapshot:
    body = data[8:]
    if data[:4] != _MAGIC or int.from_bytes(data[4:8], "little") != zlib.crc32(body):
        raise _bad_snapshot("its checksum does not match")
    try:
        snapshot = _decoder.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _bad_snapshot(str(error)) from error
    if snapshot.version != SNAPSHOT_VERSION:
        raise _bad_snapshot(f"version {snapshot.version}; this reads {SNAPSHOT_VERSION}")
    return snapshot


def _bad_snapshot(why: str) -> RequestError:
    return RequestError("bad_snapshot", f"the window snapshot cannot be read: {why}")
