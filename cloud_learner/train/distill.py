"""Distillation: one student of device size that answers as the weighted replicas do.

Why: a device cannot hold two networks of the cloud's size; soft targets carry more than labels do
(Hinton, Vinyals & Dean 2015). The student is kept from cycle to cycle and follows its teachers.

Invariants: same rows, teachers and seed give the same bits. The student never sees a label: what it
knows it has from the replicas.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from cloud_learner.train.dataset import Rows, concatenate
from cloud_learner.train.replica import Replica, Replicas, chunks

LEARNING_RATE = 2e-3


class Student:
    """The student network; `network` is the moving average that becomes a candidate."""

    def __init__(self, network: nn.Module) -> None:
        self._replica = Replica(network, LEARNING_RATE, averaged=True)

    @property
    def network(self) -> nn.Module:
        """What is exported."""
        return self._replica.average

    def follow(
        self, teachers: Replicas, rows: Rows, replay_rows: int, random: np.random.Generator
    ) -> None:
        """One pass over the rows and a replay, towards the teachers' answers."""
        self._pass(teachers, concatenate([rows, teachers.reservoir.draw(replay_rows)]), random)

    def pretrain(
        self, teachers: Replicas, rows: Rows, passes: int, random: np.random.Generator
    ) -> None:
        """Several passes before the stream begins."""
        for _ in range(passes):
            self._pass(teachers, rows, random)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        return self._replica.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._replica.restore(state)

    def _pass(self, teachers: Replicas, rows: Rows, random: np.random.Generator) -> None:
        targets = torch.from_numpy(teachers.answers(rows.features))
        features = torch.from_numpy(rows.features)
        for index in chunks(len(rows), random):
            chosen = torch.from_numpy(index)
            self._replica.step(features[chosen], targets[chosen])
