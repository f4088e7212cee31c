"""The replicas of a family together: `fast` follows, `stable` remembers, `scratch` begins anew.

Why: no single network has both adaptation and retention (docs/experiments.md). `fast` makes several
passes over the new rows, each with as many of a window of newest ones, held near its former self by
its own soft answers (Learning without Forgetting, Li & Hoiem 2016). `stable` learns the new rows
among a replay of the reservoir, held to the answers stored there (DER++, Buzzega et al. 2020), and
serves the moving average of its weights. `scratch` is trained from its first weights over a long
window, which catches what the other two have drifted into. Weights follow the loss on rows that
none has seen (exponentially weighted forecasters, Cesa-Bianchi & Lugosi 2006).

Invariants: same rows in the same order and same seed give the same bits, with one torch thread. A
replica that hurts gets weight zero. Nothing here sees a row before it was used to weigh.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from cloud_learner.stats.tasks import Task
from cloud_learner.train.dataset import Matrix, Rows, concatenate
from cloud_learner.train.declaration import Learning
from cloud_learner.train.memory import Newest, Reservoir
from cloud_learner.train.replica import Replica

HEDGE_RATE = 30.0  # per nat of mean loss
HEDGE_MEMORY = 0.95
WEIGHT_MIN = 0.1  # below it a replica hurts and weighs nothing
LOSS_MAX = 10.0  # of a row, where replicas are compared


class Recent:
    """New rows first, then the window of those before; `rows` are both."""

    def __init__(self, new: Rows, window: Rows) -> None:
        self.rows = concatenate([new, window])
        self._new, self._window = len(new), len(window)

    def drawn(self, random: np.random.Generator) -> npt.NDArray[np.intp]:
        """Positions for one pass: all new rows, and as many of the window as chance has it."""
        new = np.arange(self._new)
        if not self._window:
            return new
        return np.concatenate([new, random.integers(0, self._window, self._new) + self._new])


class Replicas:
    """All replicas that the family declares, the weights between them, and their memory.

    `fast` and `stable` are None where the family switches them off, `scratch` until it was trained.
    """

    def __init__(self, network: nn.Module, task: Task, learning: Learning, width: int) -> None:
        self._network, self.task, self._learning = network, task, learning
        self._width = width
        self.reservoir = Reservoir(learning.reservoir_rows, width, task.outputs, learning.seed)
        self.fast = self._replica(learning.fast.learning_rate) if learning.fast.on else None
        rate = learning.stable.learning_rate
        self.stable = self._replica(rate, averaged=True) if learning.stable.on else None
        self.scratch: Replica | None = None
        self._newest = Newest(learning.fast.window_rows, width)
        self._long = Newest(learning.scratch.window_rows, width)
        self._merit: dict[str, float] = dict.fromkeys(self.all, 0.0)

    @property
    def all(self) -> dict[str, Replica]:
        """Those that there are, by name."""
        named = {"fast": self.fast, "stable": self.stable, "scratch": self.scratch}
        return {name: replica for name, replica in named.items() if replica is not None}

    @property
    def weights(self) -> dict[str, float]:
        """Of each replica, summing to one; some may be zero."""
        merit = np.array([self._merit[name] for name in self.all])
        share = np.exp(merit - merit.max())
        share = np.where(share / share.sum() < WEIGHT_MIN, 0.0, share)
        return dict(zip(self.all, (share / share.sum()).tolist(), strict=True))

    @property
    def sample_passes(self) -> int:
        """Rows of all steps so far."""
        return sum(replica.sample_passes for replica in self.all.values())

    @property
    def is_finite(self) -> bool:
        """Whether every weight of every replica is a number."""
        return all(replica.is_finite for replica in self.all.values())

    def answers(self, features: Matrix) -> Matrix:
        """The weighted mean of the replicas' answers (rows, outputs)."""
        mixed = np.zeros((len(features), self.task.outputs), np.float32)
        for name, weight in self.weights.items():
            if weight:
                mixed += np.float32(weight) * self.all[name].answers(features)
        return mixed

    def look(self, features: Matrix, *, remembered: bool = False) -> tuple[Matrix, Matrix]:
        """The weighted means of the replicas' answers (rows, outputs) and embeddings (rows, width);
        those of the replica that remembers, if asked and where there is one.
        """
        if remembered and self.stable is not None:
            return self.stable.look(features)
        looks = [(weight, self.all[name].look(features)) for name, weight in self.weights.items()]
        answers, embeddings = (
            np.sum([np.float32(weight) * look[at] for weight, look in looks if weight], axis=0)
            for at in (0, 1)
        )
        return answers, embeddings

    def remembered(self, features: Matrix) -> Matrix:
        """The answers (rows, outputs) of the replica that remembers, or of all where it is off."""
        return self.answers(features) if self.stable is None else self.stable.answers(features)

    def recent(self, rows: Rows) -> Recent:
        """New rows, and the window of newest rows that they are learned with."""
        return Recent(rows, self._newest.rows())

    def weigh(self, rows: Rows) -> None:
        """Follow the replicas' losses on rows that none of them has seen."""
        if not len(rows):
            return
        for name, replica in self.all.items():
            merit = HEDGE_MEMORY * self._merit[name]
            loss = self._loss(replica, rows)
            self._merit[name] = merit - HEDGE_RATE * (1 - HEDGE_MEMORY) * loss

    def losses(self, rows: Rows) -> npt.NDArray[np.float64]:
        """Of the mixed answers, (rows,)."""
        return self.task.losses(rows.labels, self.answers(rows.features), rows.groups)

    def learn_fast(self, rows: Rows, random: np.random.Generator) -> None:
        """Passes of `fast` over the rows, each with as many of the window."""
        if self.fast is None or not len(rows):
            return
        recent, fast = self.recent(rows), self._learning.fast
        anchors = self.fast.answers(recent.rows.features) if fast.keep else None
        for _ in range(fast.passes):
            index = recent.drawn(random)
            held = None if anchors is None else anchors[index]
            self.fast.train(recent.rows.take(index), random, held, fast.keep)

    def learn_stable(self, rows: Rows, random: np.random.Generator) -> None:
        """Passes of `stable` over the rows among a replay."""
        if self.stable is None or not len(rows):
            return
        stable = self._learning.stable
        for _ in range(stable.passes):
            replayed, answers = self.reservoir.draw(stable.replay_rows)
            unknown = np.full((len(rows), self.task.outputs), np.nan, np.float32)
            anchors = np.concatenate([unknown, answers])
            self.stable.train(concatenate([rows, replayed]), random, anchors, stable.keep)

    def keep(self, follow: Rows, remember: Rows) -> None:
        """Take what was learned into memory: apart, so that what did harm can be left out."""
        if len(follow):
            self._newest.add(follow)
        if not len(remember):
            return
        if self._learning.scratch.on:
            self._long.add(remember)
        answering = self.stable or self.fast
        assert answering is not None, "a family has fast or stable"
        self.reservoir.add(remember, answering.answers(remember.features))

    def forget_newest(self) -> None:
        """Let go of the window of `fast`: it is of a world that has gone."""
        self._newest = Newest(self._learning.fast.window_rows, self._width)

    def learn_from_scratch(self, recent: Rows, random: np.random.Generator) -> None:
        """Train `scratch` anew; `recent` are held-out rows, by which it is weighed at once."""
        if not len(self._long):
            return
        passes = 0 if self.scratch is None else self.scratch.sample_passes
        self.scratch = self._replica(self._learning.scratch.learning_rate)
        self.scratch.sample_passes = passes
        rows = self._long.rows()
        for _ in range(self._learning.scratch.passes):
            self.scratch.train(rows, random)
        self._merit["scratch"] = self._merit_of_new(self.scratch, recent)

    def pretrain(self, rows: Rows, passes: int, random: np.random.Generator) -> None:
        """Passes over all rows before the stream begins; all replicas start from their average."""
        rate = self._learning.stable.learning_rate
        first = self.stable or self._replica(rate, averaged=True)
        for _ in range(passes):
            first.train(rows, random)
        average = first.average.state_dict()
        if self.stable is not None:
            self.stable.network.load_state_dict(average)
        if self.fast is not None:
            self.fast.start_from(average)
        shuffled = rows.take(random.permutation(len(rows)))
        self.reservoir.add(shuffled, first.answers(shuffled.features))

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        return {
            "replicas": {name: replica.state() for name, replica in self.all.items()},
            "reservoir": self.reservoir.state(),
            "newest": self._newest.state(),
            "long": self._long.state(),
            "merit": dict(self._merit),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.reservoir.restore(state["reservoir"])
        self.restore_weights(state)
        self._newest.restore(state["newest"])
        self._long.restore(state["long"])

    def weights_state(self) -> dict[str, Any]:
        """The replicas and the weights between them, sharing nothing; no memory."""
        replicas = {name: copy.deepcopy(replica.state()) for name, replica in self.all.items()}
        return {"replicas": replicas, "merit": dict(self._merit)}

    def restore_weights(self, state: dict[str, Any]) -> None:
        """Go on from what `weights_state` gave."""
        if "scratch" in state["replicas"] and self.scratch is None:
            self.scratch = self._replica(self._learning.scratch.learning_rate)
        elif "scratch" not in state["replicas"]:
            self.scratch = None
        for name, replica in self.all.items():
            replica.restore(state["replicas"][name])
        self._merit = dict(state["merit"])

    def _replica(self, learning_rate: float, *, averaged: bool = False) -> Replica:
        return Replica(
            copy.deepcopy(self._network),
            self.task,
            learning_rate,
            gradient_norm_max=self._learning.gradient_norm_max,
            averaged=averaged,
            steps=self._learning.steps,
        )

    def _merit_of_new(self, replica: Replica, recent: Rows) -> float:
        """What its merit would be, had it been there and always done as it does on `recent`."""
        if not len(recent):
            return min(self._merit.values())
        others = {
            name: self._loss(each, recent) for name, each in self.all.items() if name != "scratch"
        }
        best = min(others, key=lambda name: others[name])
        return self._merit[best] + HEDGE_RATE * (others[best] - self._loss(replica, recent))

    def _loss(self, replica: Replica, rows: Rows) -> float:
        losses = self.task.losses(rows.labels, replica.answers(rows.features), rows.groups)
        return float(np.fmin(losses, LOSS_MAX).mean())  # no number is the largest loss
