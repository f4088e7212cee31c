"""The watch over one family's stream: is the world still the one that was learned?

Why: an alarm that comes with the micro-batch that shows the change lets the learner answer within
it: train anew, trim, let the gate be strict. It never bypasses the gate.

Four signs, each with a detector (`stats.drift`, `stats.columns`): the loss rises; scores, a
feature, embeddings follow another distribution.

False alarms: `delta` is the chance that a micro-batch of a world that stands still raises any. Each
of `SOURCES` has an equal share of it, those that are beside the stream too, and shares that among
its columns or classes (Bonferroni), so that all together stay below, however they depend on one
another. For ADWIN the share bounds a check, which
it stays far below. It holds for rows that are exchangeable; neighbours in time are not, and alarm
more often.

Invariants: the same rows in the same order give the same alarms, also across `state` and `restore`.
It sees only rows that nothing has learned yet, and never learns.

Knows nothing about devices and what an alarm does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cloud_learner.evaluate.alarms import SOURCES, Alarm, Alarms, Sign
from cloud_learner.stats import drift
from cloud_learner.stats.columns import LEVELS_KEPT, ColumnShifts
from cloud_learner.stats.shifts import Embed, EmbeddingShift, ScoreShift, usual_step
from cloud_learner.stats.tasks import Floats, Groups, Task
from edge_runtime.features.feature import Column
from edge_runtime.features.histogram import Counts, Histograms

Matrix = npt.NDArray[np.float32]

CLASSES_WATCHED = 10
FEATURE_ROWS = 500  # at least, of the newest micro-batches, that a histogram is judged by


class Limits(Protocol):
    """What a family declares about drift; see docs/configuration.md."""

    @property
    def on(self) -> bool: ...
    @property
    def delta(self) -> float: ...
    @property
    def psi_max(self) -> float: ...
    @property
    def calm_batches(self) -> int: ...


class Watch:
    """Watches micro-batches; `reference` are rows, (rows, columns), of the world as it was."""

    def __init__(
        self, limits: Limits, task: Task, columns: Sequence[Column], reference: Matrix, seed: int
    ) -> None:
        self._limits, self._task = limits, task
        self._alpha = limits.delta / len(SOURCES)
        self._columns = list(columns)
        scores = min(task.outputs, CLASSES_WATCHED)
        self._loss = drift.MeanShift(self._alpha)
        self._scores = [ScoreShift(self._alpha / scores, 1000 * seed + at) for at in range(scores)]
        known = Histograms(self._columns)
        known.add(reference)
        self._features = ColumnShifts(self._columns, known, limits.psi_max, self._alpha)
        self._recent: list[Histograms] = []
        self._embeddings = EmbeddingShift(self._alpha, 1000 * seed)
        self._levels: dict[tuple[str, str], list[float]] = {}
        self._alarms = Alarms(limits.calm_batches)
        self.batch, self.time_s = 0, 0.0

    @property
    def stands(self) -> bool:
        """Whether an alarm stands."""
        return bool(self.standing)

    @property
    def hurts(self) -> bool:
        """Whether one stands that says that answers got worse, not only that rows are other."""
        return any(alarm.source == "loss" for alarm in self.standing)

    @property
    def standing(self) -> list[Alarm]:
        """The alarms that stand."""
        return self._alarms.standing(self.batch)

    def observe(
        self,
        labels: Matrix,
        outputs: Matrix,
        features: Matrix,
        embed: Embed | None = None,
        *,
        groups: Groups | None = None,
        batch: int,
        time_s: float,
    ) -> list[Alarm]:
        """Take micro-batch `batch`, before it is learned; the alarms that it raises.

        `labels` (rows,), `outputs` (rows, outputs) of the student, `features` (rows, columns);
        `groups` (rows,) say which rows compete; `embed` gives the student's last hidden layer for
        features. Rows that are not all finite numbers are left out.
        """
        self.batch, self.time_s = batch, time_s
        sound = np.isfinite(outputs).all(1) & np.isfinite(features).all(1)
        if not self._limits.on or not sound.any():
            return []
        labels, outputs, features = labels[sound], outputs[sound], features[sound]
        groups = None if groups is None else groups[sound]
        losses = self._task.bounded_losses(labels, outputs, groups)
        signs = self._see_losses(losses) + self._see_scores(outputs)
        signs += self._see_features(features)
        if embed is not None:
            signs += self._see_embeddings(features, embed)
        return self._alarms.take(signs, batch, time_s)

    def recalled(self) -> list[Alarm]:
        """The learner took a former state back: what stands is cyclic; the alarms so renamed."""
        return self._alarms.recalled(self.batch, self.time_s)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        return copy.deepcopy(
            {
                "loss": self._loss.state(),
                "scores": [each.state() for each in self._scores],
                "features": self._features.state(),
                "recent": [(each.rows, each.counts) for each in self._recent],
                "embeddings": self._embeddings.state(),
                "levels": self._levels,
                "alarms": self._alarms.state(),
                "at": (self.batch, self.time_s),
            }
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises: KeyError, ValueError when it is of another family."""
        state = copy.deepcopy(state)
        self._loss.restore(state["loss"])
        for each, kept in zip(self._scores, state["scores"], strict=True):
            each.restore(kept)
        self._features.restore(state["features"])
        self._recent = [self._histograms(*each) for each in state["recent"]]
        self._embeddings.restore(state["embeddings"])
        self._levels = state["levels"]
        self._alarms.restore(state["alarms"])
        self.batch, self.time_s = state["at"]

    def _see_losses(self, losses: Floats) -> list[Sign]:
        levels = self._level("loss", "", float(losses.mean()))
        rise = self._loss.add(losses)
        if rise is None:
            return []
        reach = rise.before + usual_step(levels[:-1])
        found = max(rise.after, levels[-1])
        return [Sign("loss", "", found, reach, levels)] if found > reach else []

    def _see_scores(self, outputs: Matrix) -> list[Sign]:
        signs = []
        for at, test in enumerate(self._scores):
            values = outputs[:, at].astype(np.float64)
            name = str(at) if len(self._scores) > 1 else ""
            levels = self._level("score", name, float(values.mean()))
            shift = test.add(values)
            if shift is not None:
                signs.append(Sign("score", name, shift.found, shift.reach, levels))
        return signs

    def _see_features(self, features: Matrix) -> list[Sign]:
        new = Histograms(self._columns)
        new.add(features)
        self._recent.append(new)
        while sum(each.rows for each in self._recent[1:]) >= FEATURE_ROWS:
            del self._recent[0]
        shifts = self._features.judge(_summed(self._recent), new.counts)
        return [Sign("feature", s.name, s.found, s.reach, s.levels) for s in shifts]

    def _see_embeddings(self, features: Matrix, embed: Embed) -> list[Sign]:
        level, shift = self._embeddings.add(features, embed)
        levels = self._level("embedding", "", level)
        return [] if shift is None else [Sign("embedding", "", shift.found, shift.reach, levels)]

    def _histograms(self, rows: int, counts: list[Counts]) -> Histograms:
        made = Histograms(self._columns)
        made.rows, made.counts = rows, counts
        return made

    def _level(self, source: str, name: str, level: float) -> list[float]:
        kept = [*self._levels.get((source, name), []), level][-LEVELS_KEPT:]
        self._levels[source, name] = kept
        return kept


def _summed(parts: Sequence[Histograms]) -> list[Counts]:
    """The histograms of all rows of `parts`, column by column."""
    if len(parts) == 1:
        return parts[0].counts
    summed: list[Counts] = [{} for _ in parts[0].counts]
    for part in parts:
        for column, counts in zip(summed, part.counts, strict=True):
            for bucket, count in counts.items():
                column[bucket] = column.get(bucket, 0) + count
    return summed
