"""Hindsight: one device's log once more, through the engine, under a feature spec it did not have.

Why: a new feature needs a history, and the only one that is right is what a device with that
feature would have logged, at each moment, from what it knew at that moment.

How: records go through the device's own engine in the order in which the device took them. Where a
release with windows over labels served, the log itself says when they saw a label. Where none did,
it does not: then a label is shown in the order of its lane, as soon as the event clock reaches its
time, before the event that does; so a label that the device was told late counts from its own time.

Invariants: values that both specs have are those that were logged; they are computed too, and each
difference is counted, as explained by a gap or as not. A vector comes out only if no feature that
is new may lack anything (see `blind`). Event-time rules are those of the device's pipeline.

Knows nothing about files and models. One object for each device.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from cloud_learner.experiment.blind import NOTHING, SETTLED, Blind
from cloud_learner.experiment.lanes import NOT_KEPT, REFUSED, Lost
from cloud_learner.experiment.logged import Found, Known, Logged
from cloud_learner.experiment.needs import Needs
from edge_runtime.features.engine import Engine
from edge_runtime.features.feature import LABEL, Feature
from edge_runtime.features.spec import Spec
from edge_runtime.inference.history import Answered, see
from edge_runtime.inference.package import Interface
from edge_runtime.wire.messages import (
    NO_PRIOR,
    Fields,
    LabelRecord,
    ObservationRecord,
    PredictionRecord,
    Record,
)

BEFORE, OTHER_LIFE = "before_raw", "other_life"
Lane = Iterable[tuple[int, Record | Lost]]


class Vector(NamedTuple):
    """The feature values (float32, little-endian) of prediction (`epoch`, `seq`)."""

    epoch: int
    seq: int
    time_s: float
    spec: str
    features: bytes


class Hindsight:
    """The windows of one device under `spec`; call `live` for each of its epochs, in order."""

    def __init__(self, spec: Spec, interface: Interface, known: Known) -> None:
        self.found = Found()
        self._spec, self._interface, self._known = spec, interface, known
        self._needs = Needs(spec, interface)
        self._counts = {"lacking": Counter[str](), "lost": Counter[str]()}
        self._logged_values = Logged(spec, known, self.found)
        self._last_epoch: int | None = None
        self._forget()

    def _forget(self) -> None:
        """An empty log and empty windows."""
        spec, skew_s = self._spec, self._interface.skew_s_max
        self._engine = Engine(spec, lateness_s=self._interface.lateness_s_max)
        self._newest_s = self._newest_s_max = -math.inf
        self._unsettled = 0  # events until the event clock is known again
        self._start, self._gaps, self._swaps = (Blind(spec, skew_s) for _ in range(3))
        self._blinds = (self._start, self._gaps, self._swaps)
        self._logged, self._unlogged = Answered(), Answered()
        for answered in (self._logged, self._unlogged):
            answered.serve([self._engine])
        self._served = ""
        self._logs_labels = False

    def live(self, epoch: int, prior: int, events: Lane, labels: Lane) -> Iterator[Vector]:
        """One epoch of the device: its vectors under the spec, those that are whole."""
        self._begin(epoch, prior)
        told = _Labels(labels) if self._engine.sees_labels else None
        for seq, record in events:
            if isinstance(record, Lost):
                self._lose(record, first=seq == 1)
                continue
            assert not isinstance(record, LabelRecord), "ingest refuses them in this class"
            if record.family != self._interface.family:
                continue
            if record.kind != LABEL:
                self._reach(record.time_s, (epoch, seq), told)
            if isinstance(record, PredictionRecord):
                vector = self._predict(epoch, seq, record)
                if vector is not None:
                    yield vector
            self._move(record)
        if told is not None:
            self._show(told, math.inf, (epoch + 1, 0))
        self.found.lacking, self.found.lost = map(dict, self._counts.values())

    def _begin(self, epoch: int, prior: int) -> None:
        """Whether what came before is known: the log is new, or goes on from the epoch before."""
        last, self._last_epoch = self._last_epoch, epoch
        if prior == NO_PRIOR:
            self._forget()
        elif last is None:
            self._unsettled = SETTLED
            self._start.gap()
        elif 0 < prior < last:  # of a disk that was cloned, or put back
            self._counts["lost"][OTHER_LIFE] += 1
            self._unsettled = SETTLED
            self._gaps.gap()

    def _lose(self, lost: Lost, *, first: bool) -> None:
        is_start = first and self._newest_s == -math.inf and lost.reason == NOT_KEPT
        self._counts["lost"][BEFORE if is_start else lost.reason] += lost.count
        self._unsettled = SETTLED
        (self._start if is_start else self._gaps).gap()

    def _reach(self, time_s: float, number: tuple[int, int], told: _Labels | None) -> None:
        """An event comes: labels that are known by then are shown before it."""
        for blind in self._blinds:
            blind.reach(time_s)
        if self._unsettled:
            self._unsettled -= 1
            newest_s = max(self._newest_s, time_s) + self._interface.skew_s_max
            self._newest_s_max = math.inf if self._unsettled else newest_s
        if told is not None:
            self._show(told, max(time_s, self._newest_s), number)

    def _show(self, told: _Labels, until_s: float, number: tuple[int, int]) -> None:
        self._miss_labels(told)
        for label in told.due(until_s, number):
            if label.family == self._interface.family and label.final:
                self._show_one(label)
        self._miss_labels(told)

    def _miss_labels(self, told: _Labels) -> None:
        """Labels that are missing before the next one may have come at any moment until it does."""
        for lost in told.lost():
            self._counts["lost"][lost.reason] += lost.count
        if told.is_missing and not self._logs_labels:  # else the log of events says what was seen
            self._gaps.gap(lambda feature: _is_over(feature, LABEL))

    def _show_one(self, label: LabelRecord) -> None:
        late_s = self._newest_s - label.time_s
        fields = self._unlogged.record((label.epoch, label.seq), label.value)
        if fields is None or late_s < -self._interface.skew_s_max or self._is_late(label.time_s):
            return
        self._unlogged.forget(fields)
        self._see(LABEL, label.time_s, fields)

    def _is_late(self, time_s: float, kind: str = LABEL) -> bool:
        """Whether windows pass over what is of this time. After a gap the device's event clock may
        be ahead of ours, as far as `_newest_s_max`.
        """
        lateness_s = self._interface.lateness_s_max
        if time_s < self._newest_s - lateness_s:
            return True
        if time_s < self._newest_s_max - lateness_s:
            self._gaps.miss(time_s, lambda feature: _is_over(feature, kind))
        return False

    def _predict(self, epoch: int, seq: int, record: PredictionRecord) -> Vector | None:
        found, fields = self.found, record.fields
        found.predictions += 1
        found.first_s = min(found.first_s, record.time_s)
        found.last_s = max(found.last_s, record.time_s)
        self._serve(record)
        (self._logged if self._logs_labels else self._unlogged).remember((epoch, seq), fields)
        start, gaps, swaps = (each.hidden(record.time_s, fields) for each in self._blinds)
        lacking = self._lacking(record)
        try:
            packed = self._engine.packed(record.time_s, fields)
        except TypeError:  # text where a number has to be: no device of ours lets it pass
            self._counts["lacking"][f"{record.kind}: a number"] += 1
            return None
        known, packed = self._logged_values.compare(record, packed, start | gaps | swaps | lacking)
        if hidden := lacking - known:
            for name, whose in self._needs.lacking(fields).items():
                self._counts["lacking"][f"{record.kind}.{name}"] += bool(whose & hidden)
        elif start - known:
            found.partial += 1
        elif gaps - known:
            found.after_gap += 1
        else:
            found.whole += 1
            return Vector(epoch, seq, record.time_s, record.spec, packed)
        return None

    def _serve(self, record: PredictionRecord) -> None:
        """Note which release served: one with new windows began with what its device still had."""
        if self._served and record.spec not in ("", self._served):
            self._swaps.gap()
        self._served = record.spec
        releases = {scored.release for scored in record.scored}
        self._logs_labels = not releases.isdisjoint(self._known.saw_labels)

    def _lacking(self, record: PredictionRecord) -> frozenset[str]:
        lacking = self._needs.lacking(record.fields)
        return frozenset().union(*lacking.values()) if lacking else NOTHING

    def _move(self, record: PredictionRecord | ObservationRecord) -> None:
        """What `Pipeline.replay` does."""
        kind, time_s, fields = record.kind, record.time_s, record.fields
        if kind == LABEL:
            self._move_label(time_s, fields)
            return
        self._newest_s = max(self._newest_s, time_s)
        if not self._is_late(time_s, kind):
            self._see(kind, time_s, fields)

    def _move_label(self, time_s: float, logged: Fields) -> None:
        """A label as it was logged for windows, with the fields that those of now ask for."""
        value, epoch, seq = (logged.get(f"label.{name}") for name in ("value", "epoch", "seq"))
        if not (isinstance(value, float | int) and isinstance(epoch, int) and isinstance(seq, int)):
            self._lose(Lost(REFUSED, 1), first=False)
            return
        fields = self._logged.record((epoch, seq), value) or logged
        self._logged.forget(fields)
        self._see(LABEL, time_s, fields)

    def _see(self, kind: str, time_s: float, fields: Fields) -> None:
        if kind == LABEL:
            if missing := self._engine.label_fields - fields.keys():
                self._gaps.miss(time_s, lambda feature: _is_keyed_by(feature, missing))
        else:
            for name, whose in self._needs.unseen(kind, fields).items():
                self._counts["lost"][f"without {kind}.{name}"] += 1
                self._gaps.miss(time_s, lambda feature, whose=whose: feature.name in whose)  # type: ignore[misc]
        see(self._engine, kind, time_s, fields)
        for blind in self._blinds:
            blind.see(kind, time_s, fields)


class _Labels:
    """The labels of an epoch, each when its time has come, in the order of their lane."""

    def __init__(self, lane: Lane) -> None:
        self._lane = iter(lane)
        self._lost: list[Lost] = []
        self.is_missing = False
        self._head: LabelRecord | None = None
        self._next()

    def due(self, until_s: float, number: tuple[int, int]) -> Iterator[LabelRecord]:
        """Those of predictions before `number`, up to a time."""
        while (
            (head := self._head) is not None
            and head.time_s <= until_s
            and (head.epoch, head.seq) < number
        ):
            yield head
            self._next()

    def lost(self) -> list[Lost]:
        """What is missing before the label that is next; said once, `is_missing` until it comes."""
        lost, self._lost = self._lost, []
        return lost

    def _next(self) -> None:
        self._head, self.is_missing = None, False
        for _, record in self._lane:
            if isinstance(record, Lost):
                self._lost.append(record)
                self.is_missing = True
                continue
            assert isinstance(record, LabelRecord), "ingest refuses others in this class"
            self._head = record
            return


def _is_over(feature: Feature, kind: str) -> bool:
    return feature.window is not None and feature.window.over == kind


def _is_keyed_by(feature: Feature, fields: Collection[str]) -> bool:
    window = feature.window
    return window is not None and window.over == LABEL and window.key in fields
