"""Customers of a fleet: they ask, devices answer by the plan, and labels come of it later.

Why: a contest must be tried where the truth is known, over days, in a second. Which arms a device
runs, which of them answers and with what propensity is the devices' own code; only the world, which
rewards an answer with a probability that the test decides, is invented.

Invariants: no clock, no network; the same seed and calls give the same examples. Labels mature
`delay_s` after the answer, and come out in the order of the answers.

Knows nothing about contests.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable

import numpy as np

from cloud_learner.store.examples import Example
from edge_runtime.rollout.plan import Plan, PlanArm, arms_for, choose, propensity
from edge_runtime.wire.messages import Scored

World = Callable[[str, float], float]
"""With what probability an answer of a release earns its reward at a time."""


class Customers:
    """They ask devices `d0`, `d1`, ... by turns; `world` is the truth.

    `expected` sums the chances of the answers that they got.
    """

    def __init__(
        self, family: str, devices: int, world: World, *, delay_s: float, seed: int = 1
    ) -> None:
        self._family, self._world, self._delay_s = family, world, delay_s
        self._names = [f"d{number}" for number in range(devices)]
        self._rng = np.random.default_rng(seed)
        self._asked = 0
        self._arms: dict[str, tuple[list[PlanArm], list[float], str]] = {}
        self._coming: deque[Example] = deque()
        self._answered: Counter[str] = Counter()
        self.expected = 0.0

    def follow(self, plan: Plan) -> None:
        """Every device does what the plan says."""
        for name in self._names:
            arms = [arm for _, arm in arms_for(plan, name, {})]
            self._arms[name] = arms, [arm.weight for arm in arms], f"{plan.salt}|{name}"

    def ask(self, count: int, now_s: float) -> None:
        """So many requests, one device after the other."""
        lots = self._rng.random(count).tolist()
        for lot in lots:
            name = self._names[self._asked % len(self._names)]
            seq = self._asked = self._asked + 1
            arms, weights, salt = self._arms[name]
            index = choose(weights, salt, 1, seq)
            chance = self._world(arms[index].release, now_s)
            label = float(lot < chance)
            self.expected += chance
            self._answered[arms[index].release] += 1
            order = [index, *(i for i in range(len(arms)) if i != index)]
            self._coming.append(
                Example(
                    device=name,
                    epoch=1,
                    seq=seq,
                    family=self._family,
                    time_s=now_s,
                    label_time_s=now_s + self._delay_s,
                    features=b"",
                    spec="",
                    label=label,
                    propensity=propensity(weights, index),
                    scored=[Scored(arms[i].release, "", [0.5]) for i in order],
                    arrived_s=now_s + self._delay_s,
                    matured_s=now_s + self._delay_s,
                )
            )

    def matured(self, now_s: float) -> list[Example]:
        """The examples that have come by now and were not told yet, in order."""
        found = []
        while self._coming and self._coming[0].matured_s <= now_s:
            found.append(self._coming.popleft())
        return found

    def answered(self, releases: Iterable[str]) -> list[int]:
        """How often each release has answered since the last call."""
        found = [self._answered[release] for release in releases]
        self._answered.clear()
        return found
