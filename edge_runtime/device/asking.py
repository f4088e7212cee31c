"""Asking: events in, answers out, and what both leave in log and windows.

Why: the one hot path. An answer counts once it is logged, and a logged event is one that the
windows have seen; both happen in one turn, whoever asks and however.

Invariants: turns do not overlap (`turn`). An event that was refused left no trace. Where several
events are answered by one run of the model, each still sees in its windows what came before it;
one whose answer then fails stays as an observation, for its windows have moved.

Knows nothing about sockets, disks or updates.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from edge_runtime.clock import Clock
from edge_runtime.device.family import Family
from edge_runtime.device.serving import Serving
from edge_runtime.device.shadowing import Shadowing
from edge_runtime.device.words import Event, Prediction, Within
from edge_runtime.errors import HeadwaterError, PackageError, RequestError
from edge_runtime.events.journal import Journal
from edge_runtime.events.labels import label_record
from edge_runtime.features.feature import LABEL
from edge_runtime.inference.history import Number
from edge_runtime.inference.scoring import Rows, Scores, score, score_many
from edge_runtime.metrics import Histogram
from edge_runtime.wire.messages import Fields, LabelRecord, ObservationRecord, PredictionRecord


class Asking:
    """The families of a device; `counts` and `latency` are of what was answered, no more."""

    def __init__(
        self,
        families: Mapping[str, Family],
        journal: Journal,
        serving: Serving,
        clock: Clock,
        refused: Callable[[HeadwaterError], None],
    ) -> None:
        self._families, self._journal, self._serving = families, journal, serving
        self._clock = clock
        self.refused = refused
        self.turn = threading.Lock()
        self.latency = Histogram()
        self.counts = {"predictions": 0, "observations": 0, "labels": 0}
        self.shadowing = Shadowing(clock, self)
        for family in families.values():
            family.shadowing = self.shadowing

    def predict(self, name: str | None, event: Event, within: Within | None = None) -> Prediction:
        """See `Runtime.predict`."""
        started_ns = time.perf_counter_ns()
        try:
            with self.turn:
                family = self._families.get(name) or self.family(name)  # type: ignore[arg-type]
                pipeline, said = family.pipeline, (event.kind, event.time_s, event.fields)
                arms = pipeline.admitted(*said)
                rows = pipeline.rows(event.time_s, event.fields)
                scores = Scores(arms, rows, score(arms, rows), family.salt)
                prediction = self._log_and_move(family, scores, said, within)
                self.counts["predictions"] += 1
                self.latency.record((time.perf_counter_ns() - started_ns) / 1000)
        except HeadwaterError as error:
            self.refused(error)
            raise
        return prediction

    async def predict_async(
        self, name: str | None, event: Event, timeout_s: float | None, within: Within | None = None
    ) -> Prediction:
        """See `Runtime.predict_async`."""
        family, started_ns = self._known(name), time.perf_counter_ns()
        # A copy, so that what is logged is what was asked, whatever the caller does meanwhile.
        pipeline, said = family.pipeline, (event.kind, event.time_s, dict(event.fields))
        if all(arm.runner.inline for arm in pipeline.slot.arms):
            return self.predict(family.name, event, within)
        try:
            with self.turn:
                pipeline.admitted(*said)
                rows = pipeline.rows(event.time_s, said[2])
                lease, salt = pipeline.slot.lease(), family.salt
            with lease as arms:
                answers = await self._serving.worker.submit(
                    lambda many: score_many(arms, many),
                    rows,
                    group=id(arms),
                    owner=arms,
                    timeout_s=self._serving.deadline_s if timeout_s is None else timeout_s,
                )
                with self.turn:
                    scores = Scores(arms, rows, answers, salt)
                    prediction = self._log_and_move(family, scores, said, within)
                    self.counts["predictions"] += 1
                    self.latency.record((time.perf_counter_ns() - started_ns) / 1000)
        except HeadwaterError as error:
            self.refused(error)
            raise
        return prediction

    def predict_many(
        self, name: str | None, events: Sequence[Event]
    ) -> list[Prediction | HeadwaterError]:
        """See `Runtime.predict_many`."""
        family, started_ns = self._known(name), time.perf_counter_ns()
        with self.turn:
            fits = family.records_fit([event.fields for event in events])
            found = self._answer_together(family, events) if fits else None
            if found is not None:
                answered = sum(type(each) is Prediction for each in found)
                each_us = (time.perf_counter_ns() - started_ns) / 1000 / max(len(found), 1)
                self.latency.record(each_us, answered)
                self.counts["predictions"] += answered
        if found is None:
            return [self._tried(family, event) for event in events]
        for each in found:
            if isinstance(each, HeadwaterError):
                self.refused(each)
        return found

    def observe(self, name: str | None, event: Event) -> int:
        """See `Runtime.observe`."""
        try:
            with self.turn:
                family = self.family(name)
                kind, time_s, fields = event.kind, event.time_s, event.fields
                family.pipeline.admit(kind, time_s, fields)
                seq = self._journal.event(ObservationRecord(family.name, kind, time_s, fields))
                self.moved(family, (kind, time_s, fields))
                self.counts["observations"] += 1
        except HeadwaterError as error:
            self.refused(error)
            raise
        return seq

    def label(
        self,
        name: str | None,
        prediction_id: str,
        value: float,
        time_s: float | None,
        *,
        final: bool,
    ) -> int:
        """See `Runtime.label`."""
        try:
            with self.turn:
                family = self.family(name)
                record = self.label_of(family, prediction_id, value, time_s, final=final)
                return self.log_label(family, record)
        except HeadwaterError as error:
            self.refused(error)
            raise

    def label_of(
        self,
        family: Family,
        prediction_id: str,
        value: float,
        time_s: float | None,
        *,
        final: bool,
    ) -> LabelRecord:
        """A label that can be logged. Raises: as `Runtime.label`."""
        said = prediction_id, value, self._clock.now_s() if time_s is None else time_s
        outputs = max((arm.runner.scores for arm in family.pipeline.slot.arms), default=0)
        return label_record(self._journal.log, family.name, *said, final=final, outputs=outputs)

    def log_label(self, family: Family, record: LabelRecord) -> int:
        """Log a label, and let windows see a final one; its own number."""
        seq = self._journal.label(record)
        if record.final:
            self._show_label(family, (record.epoch, record.seq), record.value, record.time_s)
        self.counts["labels"] += 1
        return seq

    def family(self, name: str | None) -> Family:
        """The family of that name; None: the only one. Raises: RequestError `unknown_family`."""
        if name is None and len(self._families) == 1:
            return next(iter(self._families.values()))
        family = self._families.get(name or "")
        if family is None:
            raise RequestError(
                "unknown_family",
                f"this device does not serve {name!r:.64}",
                f"it serves: {', '.join(self._families)}",
            )
        return family

    def is_busy(self) -> bool:
        """Whether somebody waits for an answer now."""
        return self.turn.locked() or self._serving.worker.statistics()["waiting"] > 0

    def spent_us(self) -> float:
        """What all answers took so far, those to tensors included."""
        return self.latency.sum_us() + self._serving.latency.sum_us()

    def _known(self, name: str | None) -> Family:
        try:
            return self.family(name)
        except RequestError as error:
            self.refused(error)
            raise

    def _log_and_move(
        self,
        family: Family,
        scores: Scores,
        said: tuple[str, float, Fields],
        within: Within | None,
    ) -> Prediction:
        """Log an answer, then let the event move the windows: what the log refuses moves none."""
        prediction = self._log(family, scores, said, within)
        self.moved(family, said)
        return prediction

    def moved(self, family: Family, said: tuple[str, float, Fields]) -> None:
        """Let the windows see an event that was logged."""
        family.pipeline.move(*said)
        self._journal.moved()

    def _log(
        self,
        family: Family,
        scores: Scores,
        said: tuple[str, float, Fields],
        within: Within | None = None,
    ) -> Prediction:
        number = self.next_number()
        if within is None:
            record = family.record(scores, said, number)
            first, name = record.scored[0], self.logged(family, record, number)
            return Prediction(name, first.outputs, first.release, first.arm)
        shift = within.shift(scores)
        record = family.record(scores, said, number, adapted=shift != 0.0)
        name = self.logged(family, record, number)
        return within.told(scores, number, name, record.scored[0], shift)

    def next_number(self) -> Number:
        """What the next answer will be known by."""
        return self._journal.log.epoch, self._journal.next_seq()

    def logged(
        self, family: Family, record: PredictionRecord, number: Number, data: bytes = b""
    ) -> str:
        """Log an answer of that number; its id. Raises: RequestError `too_large`."""
        seq = self._journal.event(record, data)
        assert (number[0], seq) == number
        family.pipeline.answered.remember(number, record.fields)
        return self._journal.id_of(seq)

    def _answer_together(
        self, family: Family, events: Sequence[Event]
    ) -> list[Prediction | HeadwaterError]:
        """One run of the model for all events that are admitted; the log takes each of them."""
        pipeline, arms = family.pipeline, family.pipeline.slot.arms
        found: list[Prediction | HeadwaterError] = []
        asked: list[tuple[int, Event, Rows]] = []
        for event in events:
            try:
                pipeline.admitted(event.kind, event.time_s, event.fields)
                asked.append((len(found), event, pipeline.rows(event.time_s, event.fields)))
            except HeadwaterError as error:
                found.append(error)
                continue
            found.append(_UNANSWERED)
            pipeline.move(event.kind, event.time_s, event.fields)
        scored = score_many(arms, [rows for _, _, rows in asked])
        for (index, event, rows), answers in zip(asked, scored, strict=True):
            said = event.kind, event.time_s, event.fields
            try:
                found[index] = self._log(family, Scores(arms, rows, answers, family.salt), said)
            except PackageError as error:
                self._journal.event(ObservationRecord(family.name, *said))
                found[index] = error
        self._journal.moved(len(asked))
        return found

    def _tried(self, family: Family, event: Event) -> Prediction | HeadwaterError:
        try:
            return self.predict(family.name, event)
        except HeadwaterError as error:
            return error

    def _show_label(
        self, family: Family, number: tuple[int, int], value: float, time_s: float
    ) -> None:
        """Let windows over labels see it, by way of the log."""
        fields = family.pipeline.labelled(number, value, time_s)
        if fields is None:
            return
        self._journal.event(ObservationRecord(family.name, LABEL, time_s, fields))
        self.moved(family, (LABEL, time_s, fields))


_UNANSWERED = PackageError("run_failed", "the model gave no answer")
