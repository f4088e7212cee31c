"""A data file as a stream of events in the order of their time.

Why: the bootstrap, the comparison worlds and the replay client read the same file in the same way.

The file is Parquet or CSV: `event_time`, `kind` (absent: the family's predicting kind), `device`
(absent: one device called "device"), the fields of the kinds, and on predicting rows `label` and
`label_time`, empty where unknown.

Invariants: rows come in file order, which must be time order; each is an event that a device would
take, each label one of the task, and known no sooner than it was asked for. A file that lacks a
column is refused before the first row. Every error names the file, the row, the column and the
value.

Knows nothing about sockets, features or learning. Implements the data file of DESIGN's surfaces.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from cloud_learner.experiment.datafile import DataFile, Type
from cloud_learner.stats.tasks import Task
from edge_runtime.errors import RequestError
from edge_runtime.inference.package import Interface
from edge_runtime.wire.messages import Fields

BINARY = Task()


class DataRow(msgspec.Struct, frozen=True, gc=False):
    """One event; times in seconds since the epoch, UTC. `label` only where it became known."""

    time_s: float
    kind: str
    device: str
    fields: Fields
    label: float | None
    label_time_s: float | None


def read_rows(
    path: Path,
    interface: Interface,
    *,
    task: Task = BINARY,
    limit_predictions: int | None = None,
) -> Iterator[DataRow]:
    """The events of the file; ends before prediction number `limit_predictions` + 1.

    Raises: ConfigError (no_data, bad_data); RequestError where a row is not of the interface, not
    in order, or has a label that is none of the task's.
    """
    file = DataFile(path)
    layout = _Layout(file, interface)
    left, newest_s, number = limit_predictions, float("-inf"), 0
    for number, cells in enumerate(file.rows(layout.wanted), 1):
        row = layout.row(cells)
        try:
            _check(row, interface, task, newest_s)
        except RequestError as error:
            where = file.place(number)
            raise RequestError(error.code, f"{where}: {error.message}", error.hint) from error
        newest_s = row.time_s
        if left is not None and interface.kinds[row.kind].predicts:
            if left == 0:
                return
            left -= 1
        yield row
    if not number:
        raise file.bad("has columns and no rows")


class _Layout:
    """Which columns of the file hold what of an event."""

    def __init__(self, file: DataFile, interface: Interface) -> None:
        self._check(file, interface)
        self.wanted: list[tuple[str, Type]] = [("event_time", "time")]
        self._kind = self._place(file, "kind", "str")
        self._device = self._place(file, "device", "str")
        self._label = self._place(file, "label", "float")
        self._label_time = self._place(file, "label_time", "time")
        self._asking = _predicting(interface)[0]
        self._fields = {
            kind: [
                (name, at)
                for name, type_ in declared.fields.items()
                if (at := self._place(file, name, type_)) is not None
            ]
            for kind, declared in interface.kinds.items()
        }

    def row(self, cells: tuple[Any, ...]) -> DataRow:
        """What the cells of a row say; a device or a time may still be None."""
        kind = self._asking if self._kind is None else cells[self._kind]
        fields = self._fields.get(kind, ())
        return DataRow(
            cells[0],
            kind,
            "device" if self._device is None else cells[self._device],
            {name: cells[at] for name, at in fields if cells[at] is not None},
            None if self._label is None else cells[self._label],
            None if self._label_time is None else cells[self._label_time],
        )

    def _place(self, file: DataFile, name: str, kind: Type) -> int | None:
        """Where among `wanted` the column is; the same name may be of another type elsewhere."""
        if name not in file.columns:
            return None
        if (name, kind) not in self.wanted:
            self.wanted.append((name, kind))
        return self.wanted.index((name, kind))

    @staticmethod
    def _check(file: DataFile, interface: Interface) -> None:
        needed = {"event_time": "the time of the event"}
        if {"label", "label_time"} & set(file.columns):
            needed |= {"label": "the outcome", "label_time": "when the label became known"}
        asking = _predicting(interface)
        if len(asking) > 1:
            needed["kind"] = f"which of {', '.join(asking)} a row is"
        kinds = interface.kinds if "kind" in file.columns else asking
        for kind in kinds:
            for name in interface.kinds[kind].fields:
                needed.setdefault(name, f"a field of {kind}")
        for name, what in needed.items():
            if name not in file.columns:
                raise file.bad(f"has no column {name!r}, {what}", _nearest(name, file.columns))


def _predicting(interface: Interface) -> list[str]:
    return [name for name, kind in interface.kinds.items() if kind.predicts]


def _check(row: DataRow, interface: Interface, task: Task, newest_s: float) -> None:
    """Refuse a row that no device would take, or whose label cannot be one."""
    if row.time_s is None:
        raise RequestError("not_in_order", "event_time is missing")
    if row.time_s < newest_s:
        raise RequestError(
            "not_in_order",
            f"event_time {_utc(row.time_s)} goes back: the row before is of {_utc(newest_s)}",
            "sort the file by event_time",
        )
    if row.kind is None:
        raise RequestError("unknown_kind", "kind is empty", f"known: {', '.join(interface.kinds)}")
    interface.check(row.kind, row.time_s, row.fields)
    if row.device is None:
        raise RequestError("missing_field", "device is empty")
    if row.label is not None or row.label_time_s is not None:
        _check_label(row, row.label, row.label_time_s, interface, task)


def _check_label(
    row: DataRow,
    label: float | None,
    label_time_s: float | None,
    interface: Interface,
    task: Task,
) -> None:
    hint = "leave label and label_time empty where the outcome is unknown"
    if not interface.kinds[row.kind].predicts:
        raise RequestError("bad_label", f"label on {row.kind}, which asks for no prediction", hint)
    if label is None:
        raise RequestError("bad_label", "label_time without a label", hint)
    if why := task.why_unfit(label):
        raise RequestError("bad_label", f"label {label} {why} ({task.kind})", hint)
    if label_time_s is None:
        raise RequestError("bad_label", f"label {label} has no label_time", hint)
    if label_time_s < row.time_s:
        raise RequestError(
            "bad_label",
            f"label_time {_utc(label_time_s)} is before event_time {_utc(row.time_s)}",
            "a label becomes known after its prediction",
        )


def _utc(time_s: float) -> str:
    try:
        return datetime.fromtimestamp(time_s, UTC).isoformat()
    except (OverflowError, OSError, ValueError):
        return str(time_s)


def _nearest(name: str, columns: list[str]) -> str:
    close = difflib.get_close_matches(name, columns, n=1)
    return f"is it {close[0]!r}?" if close else f"it has: {', '.join(columns)}"
