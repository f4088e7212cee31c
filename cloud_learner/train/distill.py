"""Distillation: one student of device size that follows as `fast` does and remembers as `stable`.

Why: a device cannot hold the networks of the cloud; soft targets carry more than labels do (Hinton,
Vinyals & Dean 2015). On the newest rows the student answers as the weighted replicas do, on rows of
the reservoir as the replica that remembers: where new and old look different, one network can hold
both (docs/experiments.md). It is kept from cycle to cycle.

Where the family wants it, the student is pulled towards the replicas' embeddings as well (Romero et
al. 2015): a small network that starts from layers of a large one learns from few rows what these
layers lead to.

Invariants: same rows, teachers and seed give the same bits. The student never sees a label: what it
knows it has from the replicas.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from cloud_learner.stats.tasks import Task
from cloud_learner.train.dataset import Matrix, Rows
from cloud_learner.train.declaration import Learning
from cloud_learner.train.ensemble import Replicas
from cloud_learner.train.replica import Replica


class Student:
    """The student network; `network` is the moving average that becomes a candidate."""

    def __init__(self, network: nn.Module, task: Task, learning: Learning) -> None:
        self._distilled = learning.student
        self.replica = Replica(
            network,
            task,
            learning.student.learning_rate,
            gradient_norm_max=learning.gradient_norm_max,
            averaged=True,
            steps=learning.steps,
        )

    @property
    def network(self) -> nn.Module:
        """What is exported."""
        return self.replica.average

    def answers(self, features: Matrix) -> Matrix:
        """Answers of shape (rows, outputs), in floating point."""
        return self.replica.answers(features)

    def look(self, features: Matrix) -> tuple[Matrix, Matrix]:
        """Embeddings (rows, width) and answers, as a device's `Runner.embed` gives them."""
        answers, embeddings = self.replica.look(features)
        return embeddings, answers

    def follow(self, teachers: Replicas, rows: Rows, random: np.random.Generator) -> None:
        """Passes over the rows, each with as many of the window, and a replay."""
        recent = teachers.recent(rows)
        shown = self._shown(teachers, recent.rows.features)
        for _ in range(self._distilled.passes):
            index = recent.drawn(random)
            replayed, _ = teachers.reservoir.draw(self._distilled.replay_rows)
            features = np.concatenate([recent.rows.features[index], replayed.features])
            remembered = self._shown(teachers, replayed.features, remembered=True)
            answers, embeddings = (
                np.concatenate([new[index], old])
                for new, old in zip(shown, remembered, strict=True)
            )
            self._follow(features, answers, embeddings, random)

    def pretrain(
        self, teachers: Replicas, rows: Rows, passes: int, random: np.random.Generator
    ) -> None:
        """Several passes before the stream begins."""
        answers, embeddings = self._shown(teachers, rows.features)
        for _ in range(passes):
            self._follow(rows.features, answers, embeddings, random)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        return self.replica.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.replica.restore(state)

    def _follow(
        self, features: Matrix, answers: Matrix, embeddings: Matrix, random: np.random.Generator
    ) -> None:
        pull = self._distilled.embedding
        self.replica.follow(features, answers, random, embeddings, pull)

    def _shown(
        self, teachers: Replicas, features: Matrix, *, remembered: bool = False
    ) -> tuple[Matrix, Matrix]:
        """What is followed: answers, and embeddings of width 0 where none are."""
        if self._distilled.embedding:
            return teachers.look(features, remembered=remembered)
        answers = teachers.remembered(features) if remembered else teachers.answers(features)
        return answers, np.empty((len(features), 0), np.float32)
