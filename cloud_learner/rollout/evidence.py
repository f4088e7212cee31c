"""Evidence about a canary: joined examples that both releases scored, as paired differences.

Why: both arms of a canary answer the same requests, so each label compares them on equal terms,
whatever the airport, the hour or the weather; unpaired arms would need ten times the labels.

Invariants: only an example scored by exactly the stable and the canary release counts, so only
predictions made while both were resident; each counts once, and those of one device only in the
order in which the joiner releases them, so what is handed over twice is dropped; what cannot be
compared is counted under its reason and moves nothing. All state is plain numbers: evidence that
was stored goes on where it stopped.

Knows nothing about plans, devices' attributes or where examples come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from cloud_learner.stats.sequential import PairedTest, Verdict
from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example

Position = tuple[float, int, int]


class ArmTally(msgspec.Struct):
    """What the counted pairs say about one arm; `loss_sum` sums `Task.bounded_losses`."""

    release: str
    answered: int = 0
    loss_sum: float = 0.0


class PairEvidence(msgspec.Struct, kw_only=True):
    """Stable against canary: the test, tallies by arm, counted pairs by device."""

    family: str
    stable: ArmTally
    canary: ArmTally
    test: PairedTest
    task: Task = Task()
    devices: dict[str, int] = {}
    positions: dict[str, Position] = {}
    other_pair: int = 0
    unusable: int = 0
    repeated: int = 0

    def add(self, examples: Iterable[Example]) -> Verdict:
        """Count `examples` in order until the test decides; what follows is left uncounted."""
        for example in examples:
            if self.test.verdict != "hold":
                break
            self._add(example)
        return self.test.verdict

    def _add(self, example: Example) -> None:
        outputs = self._outputs(example)
        if outputs is None:
            self.other_pair += 1
        elif not self._advance(example):
            self.repeated += 1
        elif not self._is_usable(example.label, outputs):
            self.unusable += 1
        else:
            self._count(example, *outputs)

    def _outputs(self, example: Example) -> tuple[list[float], list[float]] | None:
        """What stable and canary answered, in this order; None when others or one alone did."""
        if example.family != self.family or len(example.scored) != 2:
            return None
        by_release = {scored.release: scored.outputs for scored in example.scored}
        old, new = by_release.get(self.stable.release), by_release.get(self.canary.release)
        return (old, new) if old and new else None

    def _is_usable(self, label: float, outputs: Sequence[list[float]]) -> bool:
        """Whether this is a label of the task, and these are answers to it."""
        if self.task.why_unfit(label):
            return False
        if any(len(answer) != self.task.outputs for answer in outputs):
            return False
        numbers = [value for answer in outputs for value in answer]
        if self.task.kind in ("binary", "multiclass"):
            return all(0 <= value <= 1 for value in numbers)
        return all(map(math.isfinite, numbers))

    def _advance(self, example: Example) -> bool:
        """Move the device's position forward; False when it stands there already or beyond."""
        position = (example.time_s, example.epoch, example.seq)
        seen = self.positions.get(example.device)
        if seen is not None and position <= seen:
            return False
        self.positions[example.device] = position
        return True

    def _count(self, example: Example, old: list[float], new: list[float]) -> None:
        labels = np.array([example.label, example.label], np.float32)
        losses = self.task.bounded_losses(labels, np.array([old, new], np.float32))
        old_loss, new_loss = losses.tolist()
        self.stable.loss_sum += old_loss
        self.canary.loss_sum += new_loss
        answering = example.scored[0].release
        tally = self.canary if answering == self.canary.release else self.stable
        tally.answered += 1
        self.devices[example.device] = self.devices.get(example.device, 0) + 1
        self.test.add(new_loss - old_loss)

    @property
    def pairs(self) -> int:
        """Pairs counted so far."""
        return self.test.pairs

    def statistics(self) -> dict[str, float | int | str]:
        """The numbers behind the verdict, flat, as they stand in lineage and in the live view."""
        test, pairs = self.test, max(self.pairs, 1)
        return {
            "stable": self.stable.release,
            "canary": self.canary.release,
            "pairs": self.pairs,
            "mean_difference": test.difference_sum / pairs,
            "stable_loss": self.stable.loss_sum / pairs,
            "canary_loss": self.canary.loss_sum / pairs,
            "stable_answered": self.stable.answered,
            "canary_answered": self.canary.answered,
            "margin": test.margin,
            "e_noninferior": test.noninferior.evidence,
            "e_noninferior_reach": 1 / test.alpha_promote,
            "e_harm": test.harm.evidence,
            "e_harm_reach": 1 / test.alpha_stop,
            "verdict": test.verdict,
            "other_pair": self.other_pair,
            "unusable": self.unusable,
            "repeated": self.repeated,
        }
