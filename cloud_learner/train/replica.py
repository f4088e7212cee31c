"""A replica: one trainable copy of a network with its optimiser and the passes that it has made.

Why: teacher replicas and student differ in what they are shown, not in how a step is taken.

Invariants: same rows in the same order and same random numbers give the same bits, with one torch
thread. A gradient is clipped to its bound before it moves anything (Pascanu et al. 2013), so what
one micro-batch can do is bounded as well. Every row of every step is counted in `sample_passes`.

Knows nothing about which rows it is given, or why.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cloud_learner.stats.tasks import Task
from cloud_learner.train.dataset import Matrix, Rows
from cloud_learner.train.losses import activated, hard_loss, soft_loss

CHUNK_ROWS = 250
WEIGHT_DECAY = 0.05
AVERAGE_KEEP = 0.97  # of the moving average, at each step


def answers_of(network: nn.Module, features: Matrix, task: Task) -> Matrix:
    """Answers of shape (rows, outputs); dropout off, no gradient."""
    network.eval()
    with torch.inference_mode():
        answers: Matrix = activated(task, network(torch.from_numpy(features))).numpy()
    return answers


class Replica:
    """One trainable copy and, if asked, a moving average of its weights that answers for it."""

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        learning_rate: float,
        *,
        gradient_norm_max: float = 0.0,
        averaged: bool = False,
    ) -> None:
        self.network = network
        self.average = copy.deepcopy(network) if averaged else network
        self.sample_passes = self._steps = 0
        self._task, self._averaged, self._learning_rate = task, averaged, learning_rate
        self._gradient_norm_max = gradient_norm_max
        self._parameters = list(network.parameters())
        self._optimizer = self._new_optimizer()

    def train(
        self,
        rows: Rows,
        random: np.random.Generator,
        anchors: Matrix | None = None,
        keep: float = 0.0,
    ) -> None:
        """One pass over the rows, in random order."""
        for index in chunks_of(rows, random):
            self.step(rows.take(index), None if anchors is None else anchors[index], keep)

    def step(self, rows: Rows, anchors: Matrix | None = None, keep: float = 0.0) -> None:
        """One gradient step towards the labels, and by `keep` towards `anchors`."""
        self.network.train()
        logits = self.network(torch.from_numpy(rows.features))
        labels, weights = torch.from_numpy(rows.labels), torch.from_numpy(rows.weights)
        loss = hard_loss(self._task, logits, labels, weights, torch.from_numpy(rows.groups))
        if anchors is not None and keep:
            loss = loss + keep * soft_loss(self._task, logits, torch.from_numpy(anchors))
        self._descend(loss, len(rows))

    def follow(self, features: Matrix, targets: Matrix, random: np.random.Generator) -> None:
        """One pass towards another network's answers (rows, outputs); no label is seen."""
        given, wanted = torch.from_numpy(features), torch.from_numpy(targets)
        for index in chunks(len(features), random):
            self.network.train()
            chosen = torch.from_numpy(index)
            loss = soft_loss(self._task, self.network(given[chosen]), wanted[chosen])
            self._descend(loss, len(index))

    def answers(self, features: Matrix) -> Matrix:
        """Answers of shape (rows, outputs)."""
        return answers_of(self.average, features, self._task)

    def fork(self) -> Replica:
        """An independent replica that stands where this one does, without a moving average."""
        other = Replica(
            copy.deepcopy(self.network),
            self._task,
            self._learning_rate,
            gradient_norm_max=self._gradient_norm_max,
        )
        other._optimizer.load_state_dict(copy.deepcopy(self._optimizer.state_dict()))
        return other

    def start_from(self, weights: dict[str, Any]) -> None:
        """Take other weights, with an optimiser that remembers nothing."""
        self.network.load_state_dict(weights)
        self.average.load_state_dict(weights)
        self._optimizer = self._new_optimizer()

    @property
    def is_finite(self) -> bool:
        """Whether no weight has become infinite or undefined."""
        total = sum(float(parameter.detach().abs().sum()) for parameter in self._parameters)
        return total < float("inf")

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "sample_passes": self.sample_passes,
            "steps": self._steps,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.sample_passes, self._steps = state["sample_passes"], state["steps"]

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self._parameters, lr=self._learning_rate, weight_decay=WEIGHT_DECAY
        )

    def _descend(self, loss: torch.Tensor, count: int) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._gradient_norm_max:
            nn.utils.clip_grad_norm_(self._parameters, self._gradient_norm_max)
        self._optimizer.step()
        self.sample_passes += count
        self._steps += 1
        if self._averaged:
            self._move_average()

    def _move_average(self) -> None:
        # At first it follows closely, or it would remember the random weights it began with.
        keep = min(AVERAGE_KEEP, (1 + self._steps) / (10 + self._steps))
        with torch.no_grad():
            torch._foreach_lerp_(  # the multi-tensor form has no public name
                list(self.average.parameters()), list(self.network.parameters()), 1 - keep
            )
            for kept, new in zip(self.average.buffers(), self.network.buffers(), strict=True):
                kept.copy_(new)


def chunks(count: int, random: np.random.Generator) -> list[npt.NDArray[np.intp]]:
    """Positions 0 to count-1 in random order, in even parts of at most `CHUNK_ROWS`.

    Even, because a small remainder would make a step as large as the others, of few rows.
    """
    order = random.permutation(count)
    return np.array_split(order, -(-count // CHUNK_ROWS)) if count else []


def chunks_of(rows: Rows, random: np.random.Generator) -> list[npt.NDArray[np.intp]]:
    """`chunks` of the rows; where they compete in groups, no group is torn apart."""
    groups = rows.groups
    if len(groups) and (groups != groups[0]).any():
        return _whole_groups(groups, random)
    return chunks(len(rows), random)


def _whole_groups(
    groups: npt.NDArray[np.int64], random: np.random.Generator
) -> list[npt.NDArray[np.intp]]:
    _, number = np.unique(groups, return_inverse=True)
    place = random.permutation(number.max() + 1)[number]
    order = np.argsort(place, kind="stable")
    ends = np.flatnonzero(np.diff(place[order])) + 1
    cuts, start = [], 0
    for end in ends.tolist():
        if end - start >= CHUNK_ROWS:
            cuts.append(end)
            start = end
    return [chunk for chunk in np.split(order, cuts) if len(chunk)]
