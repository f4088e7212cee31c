"""Teaching: what one micro-batch does to replicas and student, step by step.

Why: who may be learned from, what the weights are, who learns what: the order of these is what
makes a learner right, so it stands in one place.

Invariants: replicas are weighed on rows before they learn them. The gradient of every step is
clipped. If any weight is no number afterwards, replicas, student and memory stand as before, and
`TrainingError` says so; what the batch showed of devices and of the world is kept. Same lessons and
same seed give the same bits.

Knows nothing about examples, packages and alarms' causes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.train.concepts import Concepts
from cloud_learner.train.dataset import Rows, concatenate
from cloud_learner.train.declaration import Learning
from cloud_learner.train.distill import Student
from cloud_learner.train.ensemble import Replicas
from cloud_learner.train.trust import HeldOut, Trust, trimmed
from edge_runtime.errors import HeadwaterError

Mask = npt.NDArray[np.bool_]


class TrainingError(HeadwaterError):
    """A micro-batch would have left weights that are no numbers; nothing of it was learned."""


class Lesson(msgspec.Struct, frozen=True):
    """Rows with their devices, and who learns them: masks of shape (rows,).

    `held_out` rows are learned by nobody. `time_s` is the newest event time; `alarmed` says that
    the world may have changed.
    """

    rows: Rows
    devices: list[str]
    follow: Mask
    remember: Mask
    held_out: Rows
    held_out_devices: list[str]
    time_s: float
    alarmed: bool = False
    alarm_is_new: bool = False


class Teaching:
    """Replicas and student of a family, and what decides about their lessons."""

    def __init__(
        self,
        replicas: Replicas,
        student: Student,
        trust: Trust,
        held_out: HeldOut,
        concepts: Concepts,
    ) -> None:
        self.replicas, self.student = replicas, student
        self.trust, self.held_out, self.concepts = trust, held_out, concepts
        self.seconds: dict[str, float] = {}
        self.trimmed_rows = 0
        self._scratch_s: float | None = None

    def learn(self, lesson: Lesson, learning: Learning, random: np.random.Generator) -> None:
        """Take in one lesson. Raises: TrainingError, with all weights as they were."""
        admitted = self._admitted(lesson, learning)
        heard = np.flatnonzero(self.trust.heard(lesson.held_out_devices))
        held_out = lesson.held_out.take(heard)
        self.held_out.add(held_out, [lesson.held_out_devices[at] for at in heard])
        new = lesson.rows.take(np.flatnonzero(admitted & lesson.follow & lesson.remember))
        with self._timed("weigh"):
            self.replicas.weigh(concatenate([new, held_out]))
        before = self.replicas.weights_state(), copy.deepcopy(self.student.state())
        follow, remember = self._train(lesson, learning, admitted, random)
        if not (self.replicas.is_finite and self.student.replica.is_finite):
            self.replicas.restore_weights(before[0])
            self.student.restore(before[1])
            raise TrainingError(
                "not_finite",
                "a weight became infinite or undefined; nothing of this micro-batch was learned,"
                " and what serves goes on",
                "look for values without bounds: features.toml can give them `bounds`",
            )
        self.replicas.keep(follow, remember)

    def recall(self, rows: Rows, time_s: float, *, is_new: bool) -> bool:
        """Let `fast` be what it once was where that fits new rows better; whether it did.

        A world that is new is noted first: `fast` as it stands knows the one before.
        """
        fast = self.replicas.fast
        if fast is None:
            return False
        if is_new:
            self.concepts.note(fast.network.state_dict(), time_s)
        task = self.replicas.task
        losses = task.losses(rows.labels, fast.answers(rows.features), rows.groups)
        weights = self.concepts.recall(rows, task, fast.network, losses)
        if weights is None:
            return False
        fast.start_from(weights)
        self.replicas.forget_newest()
        return True

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        return {
            "concepts": self.concepts.state(),
            "replicas": self.replicas.state(),
            "student": self.student.state(),
            "trust": self.trust.state(),
            "held_out": self.held_out.state(),
            "trimmed_rows": self.trimmed_rows,
            "scratch_s": self._scratch_s,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.concepts.restore(state["concepts"])
        self.replicas.restore(state["replicas"])
        self.student.restore(state["student"])
        self.trust.restore(state["trust"])
        self.held_out.restore(state["held_out"])
        self.trimmed_rows = state["trimmed_rows"]
        self._scratch_s = state["scratch_s"]

    def _admitted(self, lesson: Lesson, learning: Learning) -> Mask:
        """Which rows may be learned at all."""
        with self._timed("trust"):
            replica = next(iter(self.replicas.all.values()))
            admitted = self.trust.admitted(replica, lesson.rows, lesson.devices)
        if lesson.alarmed and learning.trim_share:
            losses = self.replicas.losses(lesson.rows)
            kept = trimmed(losses, learning.trim_share)
            self.trimmed_rows += int((admitted & ~kept).sum())
            admitted &= kept
        return admitted

    def _train(
        self,
        lesson: Lesson,
        learning: Learning,
        admitted: Mask,
        random: np.random.Generator,
    ) -> tuple[Rows, Rows]:
        """Train everyone; what `fast` and what those that remember have learned."""
        follow = lesson.rows.take(np.flatnonzero(admitted & lesson.follow))
        remember = lesson.rows.take(np.flatnonzero(admitted & lesson.remember))
        with self._timed("fast"):
            self.replicas.learn_fast(follow, random)
        with self._timed("stable"):
            self.replicas.learn_stable(remember, random)
        if self._scratch_is_due(lesson, learning):
            with self._timed("scratch"):
                self.replicas.learn_from_scratch(self.held_out.rows, random)
        learned = lesson.rows.take(np.flatnonzero(admitted & (lesson.follow | lesson.remember)))
        with self._timed("distil"):
            self.student.follow(self.replicas, learned, random)
        return follow, remember

    def _scratch_is_due(self, lesson: Lesson, learning: Learning) -> bool:
        scratch = learning.scratch
        if not scratch.on:
            return False
        if self._scratch_s is None:
            self._scratch_s = lesson.time_s
        due = bool(scratch.every_s) and lesson.time_s - self._scratch_s >= scratch.every_s
        if due or (scratch.on_alarm and lesson.alarm_is_new):
            self._scratch_s = lesson.time_s
            return True
        return False

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started_s = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started_s
