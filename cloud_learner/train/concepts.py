"""Former states of a replica, to be taken back when their world returns.

Why: what a replica relearns over many micro-batches it knew once: seasons, shifts and campaigns
come back. A state that is kept costs a copy of the weights, and one forward pass over a micro-batch
tells whether it fits again. Method: as in recurring concept drifts, Gama & Kosina, "Recurrent
concepts in data streams classification" (KAIS 2014), with the loss itself in place of a learned
referee.

A state is recalled where it is better than the present one on rows that neither has learned, beyond
noise: the mean of the paired differences of losses is above three of its standard errors, and a
quarter of the present loss.

Invariants: at most `count` states are kept; the one that was noted or recalled longest ago makes
room. What grew out of a recalled state takes its place when it is noted, so one world is kept once.
Asking changes no weight and draws no random number. Same states and rows, same answer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from cloud_learner.stats.tasks import Task
from cloud_learner.train.dataset import Matrix, Rows

Weights = dict[str, Tensor]
Answers = Callable[[nn.Module, Matrix, Task], Matrix]

ERRORS_BEYOND = 3.0
SHARE_BEYOND = 0.25
ROWS_MIN = 30


class Concept(msgspec.Struct):
    """A state as it was at event time `noted_s`, and how often it was recalled."""

    weights: Weights
    noted_s: float
    recalls: int = 0


class Concepts:
    """At most `count` former states; `answers` gives the outputs, (rows, outputs), of a network for
    features by the task.
    """

    def __init__(self, count: int, answers: Answers) -> None:
        self._count, self._answers = count, answers
        self._kept: list[Concept] = []
        self._recalled = False  # the newest one, and nothing was noted since

    def __len__(self) -> int:
        return len(self._kept)

    def note(self, weights: Weights, time_s: float) -> None:
        """Keep a copy of these weights, as they are before a change is learned."""
        recalls = self._kept.pop().recalls if self._recalled else 0
        self._recalled = False
        if self._count:
            copied = {name: tensor.detach().clone() for name, tensor in weights.items()}
            self._kept = [*self._kept, Concept(copied, time_s, recalls)][-self._count :]

    def recall(
        self,
        rows: Rows,
        task: Task,
        network: nn.Module,
        present_losses: npt.NDArray[np.float64],
    ) -> Weights | None:
        """The kept weights that fit `rows` best, if better than the present ones beyond noise.

        `network` has the architecture; it stays as it is. `present_losses`, (rows,), are those of
        the present state on the same rows (`Task.losses`). The weights are a copy.
        """
        if not self._kept or len(rows) < ROWS_MIN:
            return None
        trial = copy.deepcopy(network)
        losses = [self._losses(concept, rows, task, trial) for concept in self._kept]
        best = int(np.argmin([float(each.mean()) for each in losses]))
        if not is_better(losses[best], present_losses):
            return None
        concept = self._kept.pop(best)
        concept.recalls += 1
        self._kept.append(concept)
        self._recalled = True
        return {name: tensor.clone() for name, tensor in concept.weights.items()}

    def statistics(self) -> dict[str, int]:
        """States that are kept, and how often they were recalled."""
        return {
            "concepts": len(self._kept),
            "concept_recalls": sum(concept.recalls for concept in self._kept),
        }

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        kept = [(each.weights, each.noted_s, each.recalls) for each in self._kept]
        return copy.deepcopy({"kept": kept, "recalled": self._recalled})

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, as far as there is room now."""
        kept = [Concept(*each) for each in copy.deepcopy(state["kept"])]
        self._kept = kept[-self._count :] if self._count else []
        self._recalled = bool(self._kept) and state["recalled"]

    def _losses(
        self, concept: Concept, rows: Rows, task: Task, trial: nn.Module
    ) -> npt.NDArray[np.float64]:
        trial.load_state_dict(concept.weights)
        losses = task.losses(rows.labels, self._answers(trial, rows.features, task), rows.groups)
        return np.where(np.isfinite(losses), losses, np.inf)


def is_better(losses: npt.NDArray[np.float64], present_losses: npt.NDArray[np.float64]) -> bool:
    """Whether `losses` are below `present_losses` beyond noise, in pairs of shape (rows,)."""
    gains = present_losses - losses
    gain = float(gains.mean())
    if not math.isfinite(gain):
        return bool(np.isfinite(losses).all())  # the present state answers no numbers
    error = float(gains.std(ddof=1)) / math.sqrt(len(gains))
    return gain > max(ERRORS_BEYOND * error, SHARE_BEYOND * float(present_losses.mean()))
