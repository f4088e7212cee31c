"""Alarms: what a detector found becomes one alarm that has a name, stands, and comes to an end.

Why: detectors fire again and again while a change lasts. People and gates want to hear of it once,
what kind of change it is, and when it is over.

A change is *sudden* where its levels jump and *gradual* where they climb (`drift.is_gradual`). It
is *cyclic* where it has come three times at even distances, or where the learner recalled a former
state for it.

Invariants: an alarm stands for `calm_batches` micro-batches after its last sign. A sign that comes
after three micro-batches without one is a change of its own, and raises an alarm of its own.

Knows nothing about detectors, and nothing of what an alarm does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from cloud_learner.stats import drift

Kind = Literal["sudden", "gradual", "cyclic"]
Source = Literal["loss", "score", "feature", "embedding", "sketch", "estimate"]
WATCHED: tuple[Source, ...] = ("loss", "score", "feature", "embedding")  # in the stream
SOURCES: tuple[Source, ...] = (*WATCHED, "sketch", "estimate")  # each has its share of delta

_APART = 3  # micro-batches without a sign after which the next one is a return
_RETURNS = 3
_UNEVEN = 0.1  # of a period


class Alarm(msgspec.Struct, frozen=True):
    """Something changed: `source` and `name` say where, `found` against `reach` how much.

    `batch` and `time_s`, event time, are those of the newest row when it was raised.
    """

    kind: Kind
    source: Source
    name: str
    found: float
    reach: float
    batch: int
    time_s: float

    def facts(self) -> dict[str, Any]:
        """As plain data for lineage, where `kind` is an entry's own and time that of the wall."""
        names = {"kind": "change", "time_s": "event_time_s"}
        return {names.get(key, key): each for key, each in msgspec.to_builtins(self).items()}


class Sign(msgspec.Struct, frozen=True):
    """What a detector found; `levels` are what it watches, one a micro-batch, newest last."""

    source: Source
    name: str
    found: float
    reach: float
    levels: Sequence[float] = ()


class Alarms:
    """The alarms of one family that stand."""

    def __init__(self, calm_batches: int) -> None:
        self._calm_batches = calm_batches
        self._standing: dict[tuple[str, str], Alarm] = {}
        self._last: dict[tuple[str, str], int] = {}
        self._onsets: dict[tuple[str, str], list[int]] = {}

    def take(self, signs: Sequence[Sign], batch: int, time_s: float) -> list[Alarm]:
        """The alarms that these signs raise; one that goes on only keeps its alarm standing."""
        self._settle(batch)
        raised = [self._raised(sign, batch, time_s) for sign in signs]
        return [alarm for alarm in raised if alarm is not None]

    def recalled(self, batch: int, time_s: float) -> list[Alarm]:
        """A former state fitted: what stands and had no such name is cyclic; those alarms."""
        self._settle(batch)
        changed = {
            key: msgspec.structs.replace(alarm, kind="cyclic", batch=batch, time_s=time_s)
            for key, alarm in self._standing.items()
            if alarm.kind != "cyclic"
        }
        self._standing |= changed
        return list(changed.values())

    def standing(self, batch: int) -> list[Alarm]:
        """Those whose last sign is fresh at that micro-batch; any thread may ask."""
        known = list(self._standing.items())
        return [alarm for key, alarm in known if batch - self._last[key] < self._calm_batches]

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        return {
            "standing": [msgspec.to_builtins(alarm) for alarm in self._standing.values()],
            "last": dict(self._last),
            "onsets": {key: list(found) for key, found in self._onsets.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        alarms = [msgspec.convert(each, Alarm) for each in state["standing"]]
        self._standing = {(alarm.source, alarm.name): alarm for alarm in alarms}
        self._last = dict(state["last"])
        self._onsets = {key: list(found) for key, found in state["onsets"].items()}

    def _settle(self, batch: int) -> None:
        over = [k for k in self._standing if batch - self._last[k] >= self._calm_batches]
        for key in over:
            del self._standing[key]

    def _raised(self, sign: Sign, batch: int, time_s: float) -> Alarm | None:
        key = (sign.source, sign.name)
        returned = key not in self._last or batch - self._last[key] > _APART
        self._last[key] = batch
        if returned:
            self._onsets[key] = [*self._onsets.get(key, []), batch][-_RETURNS:]
        elif key in self._standing:
            return None
        kind = self._kind(sign, key)
        alarm = Alarm(kind, sign.source, sign.name, sign.found, sign.reach, batch, time_s)
        self._standing[key] = alarm
        return alarm

    def _kind(self, sign: Sign, key: tuple[str, str]) -> Kind:
        if _is_even(self._onsets[key]):
            return "cyclic"
        return "gradual" if drift.is_gradual(np.array(sign.levels, np.float64)) else "sudden"


def _is_even(onsets: Sequence[int]) -> bool:
    """Whether the distances between these micro-batches are alike, to a tenth or two batches."""
    if len(onsets) < _RETURNS:
        return False
    distances = np.diff(onsets)
    return bool(np.ptp(distances) <= max(2.0, _UNEVEN * distances.mean()))
