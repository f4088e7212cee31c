"""A replica: one trainable copy of a network with its optimiser and the passes that it has made.

Why: teacher replicas and student differ in what they are shown, not in how a step is taken.

A network's class may say which of its parts, by the name of an attribute, learns at another rate
than the others: `rates`, such as `{"head": 20.0}`, times the learning rate.

Invariants: same rows in the same order and same random numbers give the same bits, with one torch
thread. A gradient is clipped to its bound before it moves anything (Pascanu et al. 2013), so what
one micro-batch can do is bounded as well. Every row of every step is counted in `sample_passes`.

Knows nothing about which rows it is given, or why.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from cloud_learner.stats.tasks import Task
from cloud_learner.train.dataset import Matrix, Rows
from cloud_learner.train.declaration import Steps
from cloud_learner.train.hidden import looked_into, side_by_side
from cloud_learner.train.losses import activated, hard_loss, soft_loss
from cloud_learner.train.parts import chunks, chunks_of, lengths_of, looked_at

WEIGHT_DECAY = 0.05
_STEPS = Steps()
AVERAGE_KEEP = 0.97  # of the moving average, at each step


def answers_of(network: nn.Module, features: Matrix, task: Task) -> Matrix:
    """Answers of shape (rows, outputs); dropout off, no gradient."""
    network.eval()
    with torch.inference_mode():
        logits = looked_at(network, features, network)
        answers: Matrix = activated(task, logits).numpy()
    return answers


@contextlib.contextmanager
def each_step(told: Callable[[], None]) -> Iterator[None]:
    """Call `told` after every gradient step, of whichever replica, as long as this is entered."""
    hook = register_optimizer_step_post_hook(lambda *_: told())
    try:
        yield
    finally:
        hook.remove()


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
        steps: Steps = _STEPS,
    ) -> None:
        self.network = network
        self.average = copy.deepcopy(network) if averaged else network
        self.sample_passes = self._steps = 0
        self._task, self._averaged, self._learning_rate = task, averaged, learning_rate
        self._gradient_norm_max, self._taking = gradient_norm_max, steps
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
        lengths = lengths_of(self.network, rows.features)
        for index in chunks_of(rows, self._taking.rows, random, lengths):
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

    def follow(
        self,
        features: Matrix,
        targets: Matrix,
        random: np.random.Generator,
        embeddings: Matrix | None = None,
        pull: float = 0.0,
    ) -> None:
        """One pass towards another network's answers (rows, outputs); no label is seen.

        With `pull`, also towards its `embeddings` (rows, width), by their mean squared distance.
        """
        lengths = lengths_of(self.network, features)
        for index in chunks(len(features), self._taking.rows, random, lengths):
            self.network.train()
            given, wanted = torch.from_numpy(features[index]), torch.from_numpy(targets[index])
            if embeddings is None or not pull:
                loss = soft_loss(self._task, self.network(given), wanted)
            else:
                logits, embedding = looked_into(self.network, given)
                assert embedding is not None, "a network that follows an embedding has one"
                apart = nn.functional.mse_loss(embedding, torch.from_numpy(embeddings[index]))
                loss = soft_loss(self._task, logits, wanted) + pull * apart
            self._descend(loss, len(index))

    def answers(self, features: Matrix) -> Matrix:
        """Answers of shape (rows, outputs)."""
        return answers_of(self.average, features, self._task)

    def look(self, features: Matrix) -> tuple[Matrix, Matrix]:
        """Answers (rows, outputs) and embeddings (rows, width), width 0 where there are none."""
        both, outputs = side_by_side(self.average, features), self._task.outputs
        logits, embeddings = (
            np.ascontiguousarray(part) for part in np.split(both, [outputs], axis=1)
        )
        answers: Matrix = activated(self._task, torch.from_numpy(logits)).numpy()
        return answers, embeddings

    def fork(self) -> Replica:
        """An independent replica that stands where this one does, without a moving average."""
        other = Replica(
            copy.deepcopy(self.network),
            self._task,
            self._learning_rate,
            gradient_norm_max=self._gradient_norm_max,
            steps=self._taking,
        )
        other._optimizer.load_state_dict(copy.deepcopy(self._optimizer.state_dict()))
        other._steps = self._steps
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
        parts = dict[float, list[nn.Parameter]]()
        rates = getattr(type(self.network), "rates", {})  # a layer may be called so
        for name, parameter in self.network.named_parameters():
            parts.setdefault(rates.get(name.partition(".")[0], 1.0), []).append(parameter)
        groups = [
            {"params": part, "lr": self._learning_rate * rate} for rate, part in parts.items()
        ]
        return torch.optim.AdamW(groups, lr=self._learning_rate, weight_decay=WEIGHT_DECAY)

    def _descend(self, loss: torch.Tensor, count: int) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._gradient_norm_max:
            nn.utils.clip_grad_norm_(self._parameters, self._gradient_norm_max)
        self._warmed(self._optimizer.step)
        self.sample_passes += count
        self._steps += 1
        if self._averaged:
            self._move_average()

    def _warmed(self, step: Callable[[], Any]) -> None:
        """Take the step, at a share of its learning rates while the first steps are warming up."""
        share = (self._steps + 1) / (self._taking.warmup + 1)
        if share >= 1:
            step()
            return
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = share * rate
        step()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def _move_average(self) -> None:
        # At first it follows closely, or it would remember the random weights it began with.
        keep = min(AVERAGE_KEEP, (1 + self._steps) / (10 + self._steps))
        with torch.no_grad():
            torch._foreach_lerp_(  # the multi-tensor form has no public name
                list(self.average.parameters()), list(self.network.parameters()), 1 - keep
            )
            for kept, new in zip(self.average.buffers(), self.network.buffers(), strict=True):
                kept.copy_(new)
