"""What the windows of a release know when it begins to serve: carried over, restored, or rebuilt.

Why: a release with new windows must not answer as if nothing had happened before it came.

Invariants: a window whose definition is unchanged goes on with all it holds; one that is new, or
reaches further back, is rebuilt from the records that the log still has. What is rebuilt is what
streaming would have given.

A window over labels that comes new begins empty: labels were not logged for it. A label that is
ahead of the event clock moves the horizon of its windows with it.

Knows nothing about logs and files: records come as an iterator.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping

from edge_runtime.errors import ConfigError, RequestError
from edge_runtime.features.engine import Engine
from edge_runtime.features.feature import LABEL
from edge_runtime.features.plan import TableId, windows_by_table
from edge_runtime.features.spec import Spec
from edge_runtime.inference.package import PackageInfo
from edge_runtime.wire.messages import Fields

ANSWERED_MAX = 32_768
_VALUE, _EPOCH, _SEQ = "label.value", "label.epoch", "label.seq"

Number = tuple[int, int]
Reach = tuple[float, int]
Seen = tuple[str, float, Fields]
"""A record that moved the windows: kind, time and fields."""


def engines_for(
    infos: Iterable[PackageInfo], known: Mapping[str, Engine], rebuilt: Mapping[str, Engine]
) -> dict[str, Engine]:
    """One engine for each feature spec of `infos`: the known one, one that goes on with the tables
    of another with the same windows, or a new one that inherits.
    """
    engines: dict[str, Engine] = {}
    for info in infos:
        lateness_s, windows = info.interface.lateness_s_max, info.spec.windows_json()
        alike = [
            engine
            for engine in (*known.values(), *engines.values())
            if engine.lateness_s == lateness_s and engine.spec.windows_json() == windows
        ]
        same = next((engine for engine in alike if engine.spec.hash == info.spec.hash), None)
        if same is None and alike:
            same = Engine(info.spec, lateness_s=lateness_s, tables=alike[0].tables)
        if same is None:
            same = _new(info)
            same.inherit([*known.values(), *rebuilt.values()])
        engines[info.spec.hash] = same
    return engines


def with_tables_of_their_own(engines: Iterable[Engine]) -> list[Engine]:
    """Of engines that share their tables, the first: what it sees, all of them have seen."""
    return list({id(engine.tables): engine for engine in reversed([*engines])}.values())[::-1]


def with_new_windows(
    infos: Iterable[PackageInfo], known: Collection[Engine]
) -> dict[str, PackageInfo]:
    """Those of `infos`, by spec hash, that have a window which reaches beyond all that `known`
    keeps.
    """
    kept = [_reach(engine.spec) for engine in known]
    return {
        info.spec.hash: info
        for info in infos
        if any(
            not any(_covers(each.get(name), reach) for each in kept)
            for name, reach in _reach(info.spec).items()
        )
    }


def _reach(spec: Spec) -> dict[TableId, Reach]:
    """How far back each table of `spec` goes, in seconds and in events."""
    return {
        name: (
            max(window.span_s or 0.0 for window in windows),
            max(window.span_events or 0 for window in windows),
        )
        for name, windows in windows_by_table(spec.features).items()
    }


def _covers(kept: Reach | None, wanted: Reach) -> bool:
    return kept is not None and kept[0] >= wanted[0] and kept[1] >= wanted[1]


def rebuild(infos: Mapping[str, PackageInfo], records: Iterator[Seen]) -> dict[str, Engine]:
    """Engines by spec hash that have seen `records`, oldest first."""
    engines, newest_s = {name: _new(info) for name, info in infos.items()}, -math.inf
    for kind, time_s, fields in records:
        if kind != LABEL:
            newest_s = max(newest_s, time_s)
        for engine in engines.values():
            if kind == LABEL or time_s >= newest_s - engine.lateness_s:
                see(engine, kind, time_s, fields)
    return engines


def see(engine: Engine, kind: str, time_s: float, fields: Fields) -> None:
    """Let `engine` see a record of the log: an event, or a label logged for the windows."""
    if kind == LABEL:
        value = fields[_VALUE]
        assert not isinstance(value, str)
        engine.observe_label(time_s, value, fields)
    else:
        engine.observe(kind, time_s, fields)


class Answered:
    """What windows over labels will ask for of the last ANSWERED_MAX predictions without a label.

    A label is logged for the windows as a record of kind LABEL that carries these fields, so that
    one ordered stream says all that the windows know.
    """

    def __init__(self) -> None:
        self.entries: dict[int, OrderedDict[int, Fields]] = {}
        self.forgotten = self._waiting = 0
        self._wanted: frozenset[str] | None = None

    def serve(self, engines: Iterable[Engine]) -> None:
        """Remember from now on what `engines` need."""
        watching = [engine.label_fields for engine in engines if engine.sees_labels]
        self._wanted = frozenset().union(*watching) if watching else None

    def load(self, entries: Mapping[int, Mapping[int, Fields]]) -> None:
        """Hold what `entries` of an earlier run say: by epoch and number, oldest first."""
        self.entries = {epoch: OrderedDict(each) for epoch, each in entries.items()}
        self._waiting = sum(map(len, self.entries.values()))

    def remember(self, number: Number, fields: Fields) -> None:
        """Prediction `number` was made of `fields`."""
        if self._wanted is None:
            return
        epoch, seq = number
        entries = self.entries.get(epoch)
        if entries is None:
            entries = self.entries[epoch] = OrderedDict()
        entries[seq] = {name: fields[name] for name in self._wanted if name in fields}
        self._waiting += 1
        if self._waiting > ANSWERED_MAX:
            oldest = min(epoch for epoch, each in self.entries.items() if each)
            self.entries[oldest].popitem(last=False)
            self._waiting -= 1
            self.forgotten += 1

    def record(self, number: Number, value: float) -> Fields | None:
        """The fields to log for the first label of prediction `number`; None for all others."""
        entries = self.entries.get(number[0])
        fields = None if entries is None else entries.get(number[1])
        if fields is None:
            return None
        return {**fields, _VALUE: value, _EPOCH: number[0], _SEQ: number[1]}

    def forget(self, fields: Fields) -> None:
        """The prediction that the logged `fields` are of has its label."""
        entries = self.entries.get(int(fields[_EPOCH]))
        if entries is not None and entries.pop(int(fields[_SEQ]), None) is not None:
            self._waiting -= 1


def restored(states: Iterable[tuple[str, bytes]], lateness_s: float) -> dict[str, Engine]:
    """Engines by spec hash from their specs and snapshots. Raises: RequestError `bad_snapshot`."""
    engines = {}
    for text, snapshot in states:
        try:
            engine = Engine(Spec.from_json(text), lateness_s=lateness_s)
        except ConfigError as error:
            raise RequestError("bad_snapshot", f"the snapshot's feature spec: {error}") from error
        engine.restore(snapshot)
        engines[engine.spec.hash] = engine
    return engines


def _new(info: PackageInfo) -> Engine:
    return Engine(info.spec, lateness_s=info.interface.lateness_s_max)
