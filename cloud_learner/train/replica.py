"""Replicas of the teacher: `fast` follows the stream, `stable` remembers; weights decide between.

Why: no single network has both adaptation and retention (docs/experiments.md). `fast` makes several
passes over the recent rows, held near its former self by its own soft answers (Learning without
Forgetting, Li & Hoiem 2016). `stable` learns the new rows among a replay of the reservoir and
serves the moving average of its weights. Weights follow the loss on rows that neither has seen
(exponentially weighted forecasters, Cesa-Bianchi & Lugosi 2006).

Invariants: same rows in the same order and same seed give the same bits, with one torch thread. A
replica that hurts gets weight zero. Nothing here sees a row before it was used to weigh.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cloud_learner.train.dataset import Matrix, Reservoir, Rows, concatenate

CHUNK_ROWS = 250
FAST_PASSES = 2
FAST_LEARNING_RATE = 3e-4
STABLE_LEARNING_RATE = 1.5e-3
WEIGHT_DECAY = 0.05
AVERAGE_KEEP = 0.97  # of the moving average, at each step
HEDGE_RATE = 30.0  # per nat of mean loss
HEDGE_MEMORY = 0.95
WEIGHT_MIN = 0.1  # below it a replica hurts and weighs nothing

_soft_loss = nn.functional.binary_cross_entropy_with_logits


def probabilities(network: nn.Module, features: Matrix) -> Matrix:
    """Scores of shape (rows,); dropout off, no gradient."""
    network.eval()
    with torch.inference_mode():
        answers: Matrix = torch.sigmoid(network(torch.from_numpy(features)))[:, 0].numpy()
    return answers


class Replica:
    """One trainable copy with its optimiser and, if asked, a moving average that answers for it."""

    def __init__(self, network: nn.Module, learning_rate: float, *, averaged: bool) -> None:
        self.network = network
        self.average = copy.deepcopy(network) if averaged else network
        self._averaged = averaged
        self._optimizer = torch.optim.AdamW(
            network.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY
        )

    def step(self, features: Tensor, targets: Tensor, anchor: Tensor | None = None) -> None:
        """One gradient step; with `anchor`, half the pull is towards those soft answers."""
        self.network.train()
        logits = self.network(features)[:, 0]
        loss = _soft_loss(logits, targets)
        if anchor is not None:
            loss = loss + _soft_loss(logits, anchor)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        if self._averaged:
            self._follow()

    def answers(self, features: Matrix) -> Matrix:
        """Probabilities of shape (rows,)."""
        return probabilities(self.average, features)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _follow(self) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(  # the multi-tensor form has no public name
                list(self.average.parameters()), list(self.network.parameters()), 1 - AVERAGE_KEEP
            )
            for kept, new in zip(self.average.buffers(), self.network.buffers(), strict=True):
                kept.copy_(new)


class Replicas:
    """`fast` and `stable` with the weights between them and the memory they share."""

    def __init__(
        self, network: nn.Module, reservoir: Reservoir, replay_rows: int, recent_rows: int
    ) -> None:
        self.fast = Replica(copy.deepcopy(network), FAST_LEARNING_RATE, averaged=False)
        self.stable = Replica(copy.deepcopy(network), STABLE_LEARNING_RATE, averaged=True)
        self.reservoir = reservoir
        self._replay_rows = replay_rows
        self._recent_rows = recent_rows
        self._recent: list[Rows] = []
        self._merit = np.zeros(2)

    @property
    def weights(self) -> tuple[float, float]:
        """Of `fast` and `stable`, summing to one; either may be zero."""
        share = np.exp(self._merit - self._merit.max())
        share = np.where(share / share.sum() < WEIGHT_MIN, 0.0, share)
        fast, stable = share / share.sum()
        return float(fast), float(stable)

    def answers(self, features: Matrix) -> Matrix:
        """The weighted mean of the replicas' probabilities: what a student is distilled from."""
        fast, stable = self.weights
        mixed = np.zeros(len(features), np.float32)
        for weight, replica in ((fast, self.fast), (stable, self.stable)):
            if weight:
                mixed += np.float32(weight) * replica.answers(features)
        return mixed

    def learn(self, rows: Rows, random: np.random.Generator) -> None:
        """Weigh the replicas on the new rows, then train both on them."""
        self._weigh(rows)
        self._learn_fast(rows, random)
        self._learn_stable(rows, random)
        self.reservoir.add(rows)

    def pretrain(self, rows: Rows, passes: int, random: np.random.Generator) -> None:
        """Passes over all rows before the stream begins; both replicas start from the average."""
        for _ in range(passes):
            self._train(self.stable, rows, random)
        average = self.stable.average.state_dict()
        self.stable.network.load_state_dict(average)
        self.fast.network.load_state_dict(average)
        self.reservoir.add(rows.take(random.permutation(len(rows))))

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        return {
            "fast": self.fast.state(),
            "stable": self.stable.state(),
            "reservoir": self.reservoir.state(),
            "recent": [(rows.features, rows.labels) for rows in self._recent],
            "merit": self._merit.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.fast.restore(state["fast"])
        self.stable.restore(state["stable"])
        self.reservoir.restore(state["reservoir"])
        self._recent = [Rows(features, labels) for features, labels in state["recent"]]
        self._merit = np.array(state["merit"])

    def _weigh(self, rows: Rows) -> None:
        losses = [
            _log_loss(r.answers(rows.features), rows.labels) for r in (self.fast, self.stable)
        ]
        self._merit = HEDGE_MEMORY * self._merit - HEDGE_RATE * (1 - HEDGE_MEMORY) * np.array(
            losses
        )

    def _learn_fast(self, rows: Rows, random: np.random.Generator) -> None:
        self._recent.append(rows)
        while len(self._recent) > 1 and sum(map(len, self._recent[1:])) >= self._recent_rows:
            del self._recent[0]
        recent = concatenate(self._recent)
        anchors = probabilities(self.fast.network, recent.features)
        for _ in range(FAST_PASSES):
            self._train(self.fast, recent, random, anchors)

    def _learn_stable(self, rows: Rows, random: np.random.Generator) -> None:
        self._train(
            self.stable, concatenate([rows, self.reservoir.draw(self._replay_rows)]), random
        )

    @staticmethod
    def _train(
        replica: Replica, rows: Rows, random: np.random.Generator, anchors: Matrix | None = None
    ) -> None:
        for index in chunks(len(rows), random):
            anchor = None if anchors is None else torch.from_numpy(anchors[index])
            chunk = rows.take(index)
            replica.step(torch.from_numpy(chunk.features), torch.from_numpy(chunk.labels), anchor)


def chunks(count: int, random: np.random.Generator) -> list[npt.NDArray[np.intp]]:
    """Positions 0 to count-1 in random order, `CHUNK_ROWS` at a time."""
    order = random.permutation(count)
    return [order[start : start + CHUNK_ROWS] for start in range(0, count, CHUNK_ROWS)]


def _log_loss(scores: Matrix, labels: Matrix) -> float:
    clipped = np.clip(scores.astype(np.float64), 1e-4, 1 - 1e-4)
    return float(-np.mean(labels * np.log(clipped) + (1 - labels) * np.log1p(-clipped)))
