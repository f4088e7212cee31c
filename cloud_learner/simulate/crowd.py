"""A crowd: ten thousand devices as numbers, which obey real plans and say real messages.

Why: whether a campaign decides well shows in the thousandth fleet, not in the first; and a fleet is
never as even as a test of statistics takes it to be.

Each device has its own traffic, its own rates of failures and of labels, its own hours without a
network, perhaps weeks; one in a hundred lies. The model on trial is described by how much AUC it
lacks and how many times more often it fails.

Invariants: who tries what and who answers is decided by the device's own code, `arms_for` and
`choose`; what is said is what devices say, `Report` and `Example`. A device hears of a plan when it
is online, and its labels are known when all outcomes can be, or when it is online again. The same
seed gives the same crowd.

Knows nothing about campaigns, and nothing about who decides what.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.stats.scores import auc
from cloud_learner.store.examples import Example
from edge_runtime.rollout.plan import Plan, PlanArm, arms_for, choose, propensity
from edge_runtime.wire.messages import WIRE_VERSION, ArmReport, Report, Scored

DAY_S = 86_400.0
FAMILY = "crowd"
SLEEP_S = 90 * DAY_S
LOUD, LOUD_LABELS = 20, 4  # what a liar says in each step: answers, labels

Lies = Literal["", "harm", "praise"]
Numbers = npt.NDArray[np.float64]


class World(msgspec.Struct, frozen=True, kw_only=True):
    """What a crowd is like; `cv` is the coefficient of variation of rates over devices.

    `sleepers` hear nothing for ninety days. `lies` is what liars want: that a good release looks
    harmful, or that a bad one is praised. `drift` moves all labels, in logits a week.
    """

    devices: int = 10_000
    seed: int = 1
    cv: float = 1.0
    requests_a_day: float = 12.0
    failures: float = 0.01
    label_delay_s: float = DAY_S / 2
    sleepers: float = 0.03
    liars: float = 0.0
    lies: Lies = ""
    drift: float = 0.3
    step_s: float = 1800.0


class Model(msgspec.Struct, frozen=True):
    """The model on trial, against the stable one."""

    auc_lost: float = 0.0
    failure_ratio: float = 1.0


class Crowd:
    """The devices of `world`, which are told plans that try `model`.

    `tries` says which of them have the release in memory; it failed `failures` requests.
    """

    def __init__(self, world: World, model: Model) -> None:
        random = self._random = np.random.default_rng(world.seed)
        self.world, self.model, count = world, model, world.devices
        self.names = [f"d{number:05d}" for number in range(count)]
        self.attributes = [{"site": "ab"[number % 2]} for number in range(count)]
        self._requests = world.requests_a_day * _uneven(random, world.cv, count)
        self._failures = np.minimum(world.failures * _uneven(random, world.cv, count), 0.5)
        self._bias = random.normal(-1.4, 0.3 * world.cv, count)
        self._phase_s = random.uniform(0, DAY_S, count)
        self._away_s = random.uniform(0, 0.4, count) * DAY_S
        self._wakes_s = np.where(random.random(count) < world.sleepers, SLEEP_S, 0.0)
        self._lies = (random.random(count) < world.liars) & (self._wakes_s == 0)
        self._spread = spread_of(model.auc_lost)
        self._told = np.zeros(count, np.int64)
        self._number = np.zeros(count, np.int64)
        self._seq = np.zeros(count, np.int64)
        self._arms: list[list[tuple[str, PlanArm]]] = [[] for _ in self.names]
        self._salt = [""] * count
        self._before: dict[int, Report] = {}
        self.tries = np.zeros(count, bool)
        self._answered, self._failed = (np.zeros((count, 2), np.int64) for _ in range(2))
        self._due: dict[int, list[Example]] = defaultdict(list)
        self.failures = 0

    def online(self, now_s: float) -> npt.NDArray[np.bool_]:
        """Which devices have a network."""
        here = (now_s - self._phase_s) % DAY_S >= self._away_s
        return here & (now_s >= self._wakes_s)

    def step(self, plan: Plan, now_s: float) -> tuple[list[Report], list[Example]]:
        """Let a step pass from `now_s` on; what the cloud hears at its end."""
        step_s, online = self.world.step_s, self.online(now_s)
        new = np.flatnonzero(online & (self._told != plan.seq))
        for device in new.tolist():
            self._follow(device, plan)
        asked = self._ask(now_s)
        speak = np.union1d(new, np.flatnonzero(online & asked))
        reports = [self._report(device, now_s + step_s) for device in speak.tolist()]
        if self.world.lies and plan.canary is not None:
            reports += self._forged_reports(plan, now_s)
            self._forge_labels(plan, now_s)
        return reports, self._due.pop(int(now_s // step_s), [])

    def _follow(self, device: int, plan: Plan) -> None:
        arms = arms_for(plan, self.names[device], self.attributes[device])
        before = {arm.release for _, arm in self._arms[device]}
        self._told[device], self._arms[device], self._salt[device] = plan.seq, arms, plan.salt
        self.tries[device] = len(arms) > 1
        for at, (_, arm) in enumerate(arms):
            if arm.release not in before:
                self._answered[device, at] = self._failed[device, at] = 0

    def _ask(self, now_s: float) -> npt.NDArray[np.bool_]:
        """Requests on the devices that try something; which had any."""
        daily = (1 + 0.7 * np.sin(2 * np.pi * now_s / DAY_S)) * self.world.step_s / DAY_S
        expected = np.where(self.tries, self._requests * daily, 0.0)
        counts = self._random.poisson(expected)
        devices = np.repeat(np.arange(len(counts)), counts)
        bias = self._bias[devices] + self.world.drift * now_s / (7 * DAY_S)
        columns = devices, *draw(self._random, bias, self._spread), self._random.random(len(bias))
        rows = zip(*(each.tolist() for each in columns), strict=True)
        for device, old, new, label, luck in rows:
            chosen, weights = self._choose(device)
            self._count(device, chosen, luck)
            scored = self._scored(device, (old, new), chosen)
            due_s, share = self._due_s(device, now_s), propensity(weights, chosen)
            self._log(device, now_s, scored, due_s=due_s, label=label, share=share)
        return counts > 0

    def _choose(self, device: int) -> tuple[int, list[float]]:
        """Which arm answers the next request, and the weights that it was drawn by."""
        self._seq[device] += 1
        weights = [arm.weight for _, arm in self._arms[device]]
        salt = f"{self._salt[device]}|{self.names[device]}"
        return choose(weights, salt, 1, int(self._seq[device])), weights

    def _count(self, device: int, chosen: int, luck: float) -> None:
        rate = self._failures[device] * (self.model.failure_ratio if chosen else 1.0)
        self._answered[device, chosen] += 1
        if luck < rate:
            self._failed[device, chosen] += 1
            self.failures += chosen

    def _scored(self, device: int, answers: Sequence[float], chosen: int) -> list[Scored]:
        scored = [
            Scored(arm.release, name, [answer])
            for (name, arm), answer in zip(self._arms[device], answers, strict=True)
        ]
        return scored[::-1] if chosen else scored

    def _log(
        self,
        device: int,
        now_s: float,
        scored: list[Scored],
        *,
        due_s: float,
        label: float,
        share: float,
    ) -> None:
        """What the learner gets at `due_s` of the request that the device was asked last."""
        seq = int(self._seq[device])
        step_s = self.world.step_s
        example = Example(
            device=self.names[device],
            epoch=1,
            seq=seq,
            family=FAMILY,
            time_s=now_s + step_s * seq / (seq + 1),  # rises within the step
            label_time_s=due_s,
            features=b"",
            spec="",
            label=label,
            propensity=share,
            scored=scored,
            arrived_s=due_s,
            matured_s=due_s,
        )
        self._due[int(due_s // step_s)].append(example)

    def _due_s(self, device: int, now_s: float) -> float:
        """When a label of now is learned: in the window's time, or when the device is back."""
        due_s = now_s + self.world.label_delay_s
        into_s = (due_s - self._phase_s[device]) % DAY_S
        return float(due_s + max(self._away_s[device] - into_s, 0.0))

    def _report(self, device: int, now_s: float) -> Report:
        counts = self._answered[device].tolist(), self._failed[device].tolist()
        arms = [
            ArmReport(FAMILY, name, arm.release, 0.0, "", 0.0, answered, failed)
            for (name, arm), answered, failed in zip(self._arms[device], *counts, strict=False)
        ]
        return self._said(device, now_s, arms, int(self._told[device]))

    def _said(self, device: int, now_s: float, arms: list[ArmReport], seq: int) -> Report:
        self._number[device] += 1
        name, about = self.names[device], self.attributes[device]
        number = int(self._number[device])
        return Report(
            WIRE_VERSION, name, 1, now_s, about, arms, seq, {}, {}, [], 0, 0, number=number
        )

    def _forged_reports(self, plan: Plan, now_s: float) -> Iterator[Report]:
        """Each liar claims to try the release, wherever it is, and says again what it said before.

        It fails all the time, or the stable one does.
        """
        for device in np.flatnonzero(self._lies).tolist():
            if device in self._before:
                yield self._before[device]
            self._answered[device] += LOUD
            self._failed[device, 1 if self.world.lies == "harm" else 0] += LOUD
            counts = self._answered[device].tolist(), self._failed[device].tolist()
            arms = [
                ArmReport(FAMILY, name, arm.release, 0.0, "", 0.0, *said)
                for name, arm, *said in zip(("stable", "canary"), plan.arms, *counts, strict=True)
            ]
            self._before[device] = self._said(device, now_s, arms, plan.seq)
            yield self._before[device]

    def _forge_labels(self, plan: Plan, now_s: float) -> None:
        """Each liar has made up both answers, and the label."""
        wrong, right = Scored("", "", [0.99]), Scored("", "", [0.01])
        both = (right, wrong) if self.world.lies == "harm" else (wrong, right)
        scored = [
            msgspec.structs.replace(each, release=arm.release)
            for each, arm in zip(both, plan.arms, strict=True)
        ]
        for device in np.flatnonzero(self._lies).tolist():
            for _ in range(LOUD_LABELS):
                self._seq[device] += 1
                self._log(device, now_s, scored, due_s=now_s, label=0.0, share=0.8)


def draw(
    random: np.random.Generator, bias: Numbers, spread: float
) -> tuple[Numbers, Numbers, Numbers]:
    """Answers of the stable model and of the one on trial, and labels, for each of `bias`.

    Both know the same of what decides a label, and each has a little noise of its own; `spread` is
    how much more of it the one on trial has. Both are as calibrated as the other.
    """
    known, rest, one, other = random.normal(size=(4, len(bias)))
    labels = (random.random(len(bias)) < _sigmoid(bias + known + 0.8 * rest)).astype(float)
    old, new = (_calibrated(bias, known, noise) for noise in ((one, 0.25), (other, 0.25 + spread)))
    return old, new, labels


def _calibrated(bias: Numbers, known: Numbers, noise: tuple[Numbers, float]) -> Numbers:
    """What is best answered by who sees `known` through noise of a given size."""
    values, size = noise
    trust = 1 / (1 + size * size)
    unknown = 0.64 + size * size * trust  # variance that is left to the logit
    logit = bias + trust * (known + size * values)
    return _sigmoid(logit / np.sqrt(1 + np.pi * unknown / 8))


@cache
def spread_of(auc_lost: float) -> float:
    """The noise by which a model loses so much AUC, by bisection on a large sample."""
    if not auc_lost:
        return 0.0
    low, high = 0.0, 3.0
    bias = np.full(200_000, -1.4)
    for _ in range(20):
        middle = (low + high) / 2
        old, new, labels = draw(np.random.default_rng(0), bias, middle)
        lost = auc(labels, old) - auc(labels, new)
        low, high = (middle, high) if lost < auc_lost else (low, middle)
    return high


def _uneven(random: np.random.Generator, cv: float, count: int) -> Numbers:
    """Positive numbers of mean 1 and this coefficient of variation."""
    return random.gamma(1 / cv**2, cv**2, count) if cv else np.ones(count)


def _sigmoid(x: Numbers) -> Numbers:
    return np.asarray(1 / (1 + np.exp(-x)))
