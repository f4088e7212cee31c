"""What devices tell about their features, held against the reference: drift before any label.

Why: a device says within a minute that what it sees has changed; its records may come days later,
and their labels weeks. What is heard comes by wall time, so nothing that is learned may hang on it:
it stands beside the stream's `Watch`, for people, for the gate and for the status.

The newest sketch of each device is added to those of the others, each at most as heavy as the
median device: one that floods, or lies, weighs as one among many. One look a minute at most.

Invariants: hearing a sketch twice is hearing it once; at most `DEVICES_MAX` devices are remembered,
and what is older than `STALE_S` of wall time counts no more. A sketch that is none, or of another
feature spec, is counted and left out.

Knows nothing about the network. Not thread-safe: one caller.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cloud_learner.evaluate.alarms import SOURCES, Alarm, Alarms, Sign
from cloud_learner.evaluate.watch import Limits
from cloud_learner.stats.columns import ColumnShifts
from edge_runtime.features.histogram import Counts, Histograms, counts_of
from edge_runtime.features.spec import Spec
from edge_runtime.wire.messages import FeatureSketch

Matrix = npt.NDArray[np.float32]

LOOK_EVERY_S = 60.0
STALE_S = 3600.0
DEVICES_MAX = 4096


class Hearing:
    """Hears `family`'s devices; `reference` are rows, (rows, columns), of the world as it was."""

    def __init__(self, family: str, spec: Spec, limits: Limits, reference: Matrix) -> None:
        self._family, self._spec, self._limits = family, spec, limits
        known = Histograms(spec.columns)
        known.add(reference)
        alpha = limits.delta / len(SOURCES)
        self._shifts = ColumnShifts(spec.columns, known, limits.psi_max, alpha)
        self._alarms = Alarms(limits.calm_batches)
        self._newest: dict[str, _Heard] = {}
        self._looked_s = -np.inf
        self._counts = {"sketches_heard": 0, "sketches_refused": 0, "sketches_of_other_spec": 0}

    def hear(
        self, device: str, sketches: Sequence[FeatureSketch], *, now_s: float, batch: int
    ) -> list[Alarm]:
        """Take what `device` told at wall time `now_s`, when micro-batch `batch` was the newest."""
        for sketch in sketches:
            if sketch.family == self._family:
                self._take(device, sketch, now_s)
        if not self._limits.on or not sketches or now_s < self._looked_s + LOOK_EVERY_S:
            return []
        self._looked_s = now_s
        return self._look(now_s, batch)

    def standing(self, batch: int) -> list[Alarm]:
        """The alarms that stand when micro-batch `batch` is the newest."""
        return self._alarms.standing(batch)

    def statistics(self) -> dict[str, int]:
        """Sketches that were heard, refused, or of another spec, and who tells any."""
        return self._counts | {"sketching_devices": len(self._newest)}

    def _take(self, device: str, sketch: FeatureSketch, now_s: float) -> None:
        if sketch.spec != self._spec.hash:
            self._counts["sketches_of_other_spec"] += 1
            return
        try:
            heard = _Heard(sketch, self._spec, now_s)
        except ValueError:
            self._counts["sketches_refused"] += 1
            return
        self._counts["sketches_heard"] += 1
        self._newest.pop(device, None)
        self._newest[device] = heard
        if len(self._newest) > DEVICES_MAX:
            del self._newest[next(iter(self._newest))]

    def _look(self, now_s: float, batch: int) -> list[Alarm]:
        fresh = {d: each for d, each in self._newest.items() if each.at_s > now_s - STALE_S}
        self._newest = fresh
        if not fresh:
            return []
        found = merged(list(fresh.values()))
        shifts = self._shifts.judge(found, found)
        signs = [Sign("sketch", s.name, s.found, s.reach, s.levels) for s in shifts]
        return self._alarms.take(signs, batch, max(each.until_s for each in fresh.values()))


class _Heard:
    """A device's newest sketch, checked. Raises: ValueError for what cannot be one of the spec."""

    def __init__(self, sketch: FeatureSketch, spec: Spec, at_s: float) -> None:
        if sketch.rows < 1 or [each.name for each in sketch.columns] != spec.names:
            raise ValueError("a sketch of no row, or of other columns than its spec's")
        self.counts = [counts_of(each, sketch.rows) for each in sketch.columns]
        self.rows, self.until_s, self.at_s = sketch.rows, sketch.until_s, at_s


def merged(parts: Sequence[_Heard]) -> list[dict[int, float]]:
    """The histograms of each column added up, no part heavier than the median one."""
    heaviest = float(np.median([part.rows for part in parts]))
    added: list[dict[int, float]] = [{} for _ in parts[0].counts]
    for part in parts:
        weight = min(1.0, heaviest / part.rows)
        for column, counts in zip(added, part.counts, strict=True):
            _add(column, counts, weight)
    return added


def _add(column: dict[int, float], counts: Counts, weight: float) -> None:
    for bucket, count in counts.items():
        column[bucket] = column.get(bucket, 0.0) + weight * count
