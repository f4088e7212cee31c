"""What the releases of a contest earned: joined examples as bounded rewards, one for each arm.

Why: a label may be a truth about the world, such as a flight that was late, or what an answer
brought about, such as a click. Of a truth every resident arm's answer can be scored, whoever
answered (`quality`: one less the bounded loss). What an answer brought about is known of the arm
that answered alone (`reward`: the label itself), and an arm that answers rarely must count for
more: by the propensity that the device logged when it drew.

What an arm would have earned on a request is then estimated without bias: b + (r - b) / p for the
arm that answered with reward r and propensity p, b for the others, b being the mean reward so far
(inverse propensity weighting around a baseline: Horvitz & Thompson 1952; a control variate). The
estimate of one request depends on earlier requests only.

Invariants: an example counts only if exactly these releases were resident and the propensity is
what a plan of this contest gives that arm, so neither a device that lost an arm, nor a plan from
before, nor a forged propensity shifts the scales; an early form is left out, its mature one
follows. What does not count is counted by its reason and moves nothing.

Knows nothing about plans, devices or where examples come from; plain numbers, so it can be stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example

Outcome = Literal["quality", "reward"]

# A device divides a weight by the sum of them; the division may round.
_PROPENSITY_ERROR = 1e-9
# Plans whose answers may still be without a label; older ones are forgotten.
PLANS_MAX = 500


class Tally(msgspec.Struct):
    """One arm: the answers of it that counted, and the sum of what those earned."""

    release: str
    answered: int = 0
    reward_sum: float = 0.0

    @property
    def mean(self) -> float:
        """What an answer earned on average; NaN before the first."""
        return self.reward_sum / self.answered if self.answered else math.nan


class Earned(NamedTuple):
    """One request: which arm answered, and what each arm earned, or would have by estimate."""

    arm: int
    reward: float
    estimates: tuple[float, ...]


class Ledger(msgspec.Struct, kw_only=True):
    """What each of `arms` earned; `plans` holds the weights of the arms in each plan, by order."""

    family: str
    outcome: Outcome
    task: Task
    arms: list[Tally]
    plans: list[list[float]] = []
    other_arms: int = 0
    other_plan: int = 0
    early: int = 0
    unusable: int = 0

    def plan(self, weights: Sequence[float]) -> None:
        """From the next plan on the arms answer in these shares, which add up to 1."""
        assert len(weights) == len(self.arms)
        self.plans = [*self.plans, list(weights)][-PLANS_MAX:]

    def take(self, example: Example) -> Earned | None:
        """Count an example; None where it does not."""
        outputs = self._outputs(example)
        if outputs is None:
            self.other_arms += 1
            return None
        if example.early:
            self.early += 1
            return None
        arm = self._index(example.scored[0].release)
        if not self._is_planned(arm, example.propensity):
            self.other_plan += 1
            return None
        earned = self._earned(example, arm, outputs)
        if earned is None:
            self.unusable += 1
            return None
        self.arms[arm].answered += 1
        self.arms[arm].reward_sum += earned.reward
        return earned

    @property
    def answered(self) -> int:
        """Answers that counted."""
        return sum(arm.answered for arm in self.arms)

    @property
    def mean(self) -> float:
        """What an answer earned on average, begun at 0.5 as one that was imagined."""
        return (sum(arm.reward_sum for arm in self.arms) + 0.5) / (self.answered + 1)

    def statistics(self) -> dict[str, float | int | str]:
        """What counted by arm, and what did not by its reason."""
        return {
            **{f"{arm.release}_answered": arm.answered for arm in self.arms},
            **{f"{arm.release}_reward": arm.mean for arm in self.arms if arm.answered},
            "other_arms": self.other_arms,
            "other_plan": self.other_plan,
            "early": self.early,
            "unusable": self.unusable,
        }

    def _outputs(self, example: Example) -> list[list[float]] | None:
        """What each arm answered, in order; None when others were resident."""
        if example.family != self.family or len(example.scored) != len(self.arms):
            return None
        found = {scored.release: scored.outputs for scored in example.scored}
        outputs = [found.get(arm.release) for arm in self.arms]
        return None if None in outputs else outputs  # type: ignore[return-value] # None was ruled out

    def _index(self, release: str) -> int:
        return next(i for i, arm in enumerate(self.arms) if arm.release == release)

    def _is_planned(self, arm: int, propensity: float) -> bool:
        weights = (plan[arm] for plan in reversed(self.plans))
        return any(abs(propensity - weight) <= _PROPENSITY_ERROR for weight in weights)

    def _earned(self, example: Example, arm: int, outputs: list[list[float]]) -> Earned | None:
        if self.task.why_unfit(example.label):
            return None
        if self.outcome == "quality":
            return self._scored(example.label, arm, outputs)
        reward, base = self.task.reward(example.label), self.mean
        estimates = [base] * len(self.arms)
        estimates[arm] += (reward - base) / example.propensity
        return Earned(arm, reward, tuple(estimates))

    def _scored(self, label: float, arm: int, outputs: list[list[float]]) -> Earned | None:
        """One less the loss of each arm's answer."""
        if not all(map(self.task.is_answer, outputs)):
            return None
        labels = np.full(len(outputs), label, np.float32)
        losses = self.task.bounded_losses(labels, np.array(outputs, np.float32)).tolist()
        rewards = tuple(1.0 - loss for loss in losses)
        return Earned(arm, rewards[arm], rewards)
