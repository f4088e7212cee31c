"""The features of a data file: what devices would have logged, had they seen its events.

Why: what lies in files went through no device; it goes through the device's engine here, so that
the rows of the first training are those that serving will log.

Invariants: each device has windows of its own. A label moves windows when it becomes known, before
an event of that same time, and only if a device would have let it: not later than `lateness_s_max`
behind the newest event, nor further ahead of it than `skew_s_max`.

Knows nothing about learning.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from itertools import count
from math import inf

from cloud_learner.experiment.replay import DataRow
from edge_runtime.features.engine import Engine, Vector
from edge_runtime.features.spec import Spec
from edge_runtime.inference.package import Interface


def featured(
    rows: Iterable[DataRow], interface: Interface, spec: Spec, *, unlabelled: bool = False
) -> Iterator[tuple[DataRow, Vector | None]]:
    """All rows, in order; those that have a label with their features, float32 (features,).

    With `unlabelled`, all that ask for a prediction have them.
    """
    devices: dict[str, _Device] = {}
    for row in rows:
        device = devices.get(row.device)
        if device is None:
            device = devices[row.device] = _Device(interface, spec)
        device.reach(row.time_s)
        predicts = interface.kinds[row.kind].predicts and (unlabelled or row.label is not None)
        yield row, device.engine.vector(row.time_s, row.fields) if predicts else None
        device.observe(row)


class _Device:
    """The windows of one device, and the labels that are not known yet."""

    def __init__(self, interface: Interface, spec: Spec) -> None:
        self.engine = Engine(spec, lateness_s=interface.lateness_s_max)
        self._interface = interface
        self._newest_s = -inf
        self._due: list[tuple[float, int, DataRow]] = []
        self._order = count()

    def reach(self, time_s: float) -> None:
        """Let the windows see the labels that are known at `time_s`."""
        while self._due and self._due[0][0] <= time_s:
            known_s, _, row = heapq.heappop(self._due)
            late_s = self._newest_s - known_s
            if -self._interface.skew_s_max <= late_s <= self._interface.lateness_s_max:
                assert row.label is not None
                self.engine.observe_label(known_s, row.label, row.fields)

    def observe(self, row: DataRow) -> None:
        self._newest_s = row.time_s
        self.engine.observe(row.kind, row.time_s, row.fields)
        if self.engine.sees_labels and row.label is not None and row.label_time_s is not None:
            heapq.heappush(self._due, (row.label_time_s, next(self._order), row))
