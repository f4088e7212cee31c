"""A bandit over releases: what share of the answers each gets in the next plan.

Why: where several releases are safe and the answer itself earns a reward, trying and using are one
problem. The shares change only with a plan, and rewards come hours after the answers.

Method: Thompson sampling in batches (Chapelle & Li 2011), Beta posteriors that forget (discounted
Thompson sampling, Raj & Kalyani 2017). What was answered and has no reward yet is counted as if it
earned the mean that is believed now (Desautels, Krause & Burdick 2014): while rewards are under way
an arm is not tried again and again for the same doubt.

Invariants: shares sum to 1 and none is below the floor, so each arm can always prove itself and the
propensity of each answer is known and positive; the same state and generator give the same shares.

Knows nothing about plans, devices or time: a batch is whatever lies between two calls of `forget`.
"""

from __future__ import annotations

import msgspec
import numpy as np

# How often the posteriors are drawn from: a share is exact to about one percent.
_DRAWS = 2000


class Arm(msgspec.Struct):
    """What is remembered of one arm: discounted rewards, their number, answers still open."""

    reward_sum: float = 0.0
    rewards: float = 0.0
    pending: float = 0.0

    @property
    def mean(self) -> float:
        """The mean reward that is believed, 1/2 before any."""
        return (self.reward_sum + 1.0) / (self.rewards + 2.0)


class Bandit(msgspec.Struct, kw_only=True):
    """Arms by name; plain numbers, so it can be stored and go on.

    `memory` is how many batches are remembered: of what is older e^-1 counts, and less and less.
    `floor` is the least share of an arm.
    """

    arms: dict[str, Arm]
    memory: float
    floor: float = 0.05

    @classmethod
    def start(cls, names: list[str], memory: float, floor: float = 0.05) -> Bandit:
        """A bandit that knows nothing yet. `floor` at most one over the number of arms."""
        assert memory > 0, f"memory {memory}"
        assert 0 < floor <= 1 / len(names), f"floor {floor} of {len(names)} arms"
        return cls(arms={name: Arm() for name in names}, memory=memory, floor=floor)

    def answered(self, name: str, answers: int) -> None:
        """`name` gave so many answers, whose rewards are to come."""
        self.arms[name].pending += answers

    def reward(self, name: str, reward_sum: float, rewards: int) -> None:
        """So many rewards of `name` came, each in [0, 1]."""
        assert 0 <= reward_sum <= rewards, f"{rewards} rewards sum to {reward_sum}"
        arm = self.arms[name]
        arm.reward_sum += reward_sum
        arm.rewards += rewards
        arm.pending = max(arm.pending - rewards, 0.0)

    def forget(self) -> None:
        """A batch has passed: rewards count less, and answers that never got one are let go."""
        kept = float(np.exp(-1.0 / self.memory))
        for arm in self.arms.values():
            arm.reward_sum *= kept
            arm.rewards *= kept
            arm.pending *= kept

    def weights(self, generator: np.random.Generator) -> dict[str, float]:
        """The share of each arm: how likely it is the best one, above the floor."""
        arms = list(self.arms.values())
        wins = np.array([arm.reward_sum + arm.pending * arm.mean + 1.0 for arm in arms])
        tries = np.array([arm.rewards + arm.pending + 2.0 for arm in arms])
        draws = generator.beta(wins, tries - wins, (_DRAWS, len(arms)))
        best = np.bincount(draws.argmax(1), minlength=len(arms)) / _DRAWS
        shares = self.floor + (1.0 - self.floor * len(arms)) * best
        return dict(zip(self.arms, shares.tolist(), strict=True))
