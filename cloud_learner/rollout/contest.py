"""A contest: releases that all serve at once, to know which is better, or to use the better one.

Why: a canary asks whether a release may replace another. Which of two good ones is better, and by
how much, is another question (an A/B test, `ab`); and where answers bring something about, such as
clicks, most of them may go to whichever release earns most at the time (a `bandit`).

    ab      equal shares; the effect, in an interval that holds at every look; ends by `answers`
    bandit  shares by discounted Thompson sampling, drawn anew every `every_s`, none below `floor`

Invariants: the first release is the one that served when the contest began; shares change by a plan
and in no other way; the same examples and times lead to the same shares, so a contest that was
stored goes on, and one that is told again comes to the same. What follows its last answer is not
counted, so the verdict does not depend on how examples are grouped. An effect must stand without
the few devices that speak loudest for it: of a large fleet one percent may lie.

Knows nothing about plans, devices, files or clocks; plain numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
import numpy as np

from cloud_learner.rollout.rewards import Earned, Ledger, Outcome, Tally
from cloud_learner.stats.bandit import Bandit
from cloud_learner.stats.confidence import ConfidenceSequence
from cloud_learner.stats.tasks import Task
from cloud_learner.stats.trimming import liars, without_loudest
from cloud_learner.store.examples import Example
from edge_runtime.errors import RequestError

EXPOSURE_MIN = 500
"""Answers of each release before a difference is told: fewer are one odd hour, however clear."""

MEMORY = 24.0
"""Plans of a bandit after which what was earned counts for a third."""

ARMS_MAX = 8
FLOOR_MIN = 0.01
EVERY_S_MIN = 1.0


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for. `alpha` is the chance that the interval of an `ab` ever leaves out the
    truth; `answers` that count end it. Of a `bandit`, each release has a share of `floor` at least.
    """

    kind: Literal["ab", "bandit"]
    releases: tuple[str, ...]
    answers: int = 20_000
    alpha: float = 0.01
    floor: float = 0.05
    every_s: float = 900.0


def check(terms: Terms, serving: str) -> None:
    """Raises: RequestError (bad_contest, stable_not_in_contest) where it cannot be held."""
    arms = len(terms.releases)
    if not 2 <= arms <= ARMS_MAX or len(set(terms.releases)) < arms:
        why = f"a contest is between 2 to {ARMS_MAX} releases, each named once"
    elif terms.kind == "ab" and arms != 2:
        why = "an A/B test is between two releases"
    elif terms.kind == "ab" and terms.answers < 2 * EXPOSURE_MIN:
        why = f"{terms.answers} answers say nothing; ask for {2 * EXPOSURE_MIN} at least"
    elif not FLOOR_MIN <= terms.floor <= 1 / arms:
        why = f"a floor is from {FLOOR_MIN} to an equal share, not {terms.floor:g}"
    elif not terms.every_s >= EVERY_S_MIN:
        why = f"shares change every {EVERY_S_MIN:g} s at most, not every {terms.every_s:g} s"
    elif not 0 < terms.alpha < 1:
        why = f"alpha is {terms.alpha:g}"
    else:
        why = ""
    if why:
        raise RequestError("bad_contest", f"{why}; nothing was changed")
    if serving not in terms.releases:
        raise RequestError(
            "stable_not_in_contest",
            f"{serving} serves now and is not in the contest; nothing was changed",
            f"name {serving} as well: it is what every device falls back to",
        )


class Contest(msgspec.Struct, kw_only=True):
    """A contest as it stands; `planned_s` is when its newest shares were drawn (wall time).

    `devices` sums, device by device, by how much the second release did better than the first.
    """

    terms: Terms
    began_s: float
    planned_s: float
    ledger: Ledger
    effect: ConfidenceSequence | None = None
    devices: dict[str, float] = {}
    policy: Bandit | None = None

    @classmethod
    def begin(
        cls, terms: Terms, family: str, outcome: Outcome, task: Task, now_s: float
    ) -> Contest:
        """With equal shares, and nothing known."""
        arms = len(terms.releases)
        tallies = [Tally(release) for release in terms.releases]
        ledger = Ledger(family=family, outcome=outcome, task=task, arms=tallies)
        ledger.plan(rounded([1 / arms] * arms))
        contest = cls(terms=terms, began_s=now_s, planned_s=now_s, ledger=ledger)
        if terms.kind == "ab":
            # An answer of one arm alone, divided by its share, may be the whole of a difference.
            reach = 1.0 if ledger.outcome == "quality" else 1 / min(contest.shares)
            contest.effect = ConfidenceSequence(
                low=-reach, high=reach, alpha=terms.alpha, horizon=terms.answers
            )
        else:
            contest.policy = Bandit.start(list(terms.releases), MEMORY, terms.floor)
        return contest

    @property
    def shares(self) -> list[float]:
        """The share of the answers that each release has by the newest plan."""
        return self.ledger.plans[-1]

    @property
    def is_over(self) -> bool:
        """Whether all was counted that was asked for, and enough of each release."""
        is_full = self.ledger.answered >= self.terms.answers
        return self.terms.kind == "ab" and is_full and self._is_exposed

    def examples(self, examples: Iterable[Example]) -> bool:
        """Count joined examples in the order of their release; returns whether any counted."""
        before = self.ledger.answered
        for example in examples:
            if not self.is_over and (earned := self.ledger.take(example)) is not None:
                self._learn(earned, example.device)
        return self.ledger.answered > before

    def is_due(self, now_s: float) -> bool:
        """Whether it is time for other shares."""
        return self.policy is not None and now_s >= self.planned_s + self.terms.every_s

    @property
    def interval(self) -> tuple[float, float]:
        """Of an `ab` by how much the second release does better, whichever few devices lie."""
        assert self.effect is not None
        low, high = self.effect.interval
        count, values = liars(len(self.devices)), max(self.effect.values, 1)
        against = (-part for part in self.devices.values())
        low = without_loudest(self.devices.values(), count, low * values) / values
        return low, -without_loudest(against, count, -high * values) / values

    @property
    def winner(self) -> str | None:
        """Of an `ab` the release that is surely better, of a `bandit` the one with most answers."""
        names = self.terms.releases
        if self.effect is None:
            return names[int(np.argmax(self.shares))]
        low, high = self.interval
        if not self._is_exposed or low <= 0 <= high:
            return None
        return names[1] if low > 0 else names[0]

    @property
    def _is_exposed(self) -> bool:
        return min(arm.answered for arm in self.ledger.arms) >= EXPOSURE_MIN

    def _learn(self, earned: Earned, device: str) -> None:
        if self.effect is not None:
            low, high = self.effect.low, self.effect.high
            more = min(max(earned.estimates[1] - earned.estimates[0], low), high)
            self.effect.add(more)
            self.devices[device] = self.devices.get(device, 0.0) + more
        if self.policy is not None:
            for name, reward in self._rewards(earned):
                self.policy.reward(name, reward, 1)

    def _rewards(self, earned: Earned) -> Iterable[tuple[str, float]]:
        """What is known now that was not: of quality each release's, else what was answered."""
        names = self.terms.releases
        if self.ledger.outcome == "quality":
            return zip(names, earned.estimates, strict=True)
        return [(names[earned.arm], earned.reward)]

    def draw(self, answered: Sequence[int], now_s: float) -> None:
        """Draw the shares of the next plan; each release has `answered` so often since the last,
        as devices say. Who says too much makes shares follow the means sooner, and nothing else.
        """
        assert self.policy is not None
        total = sum(answered)
        for name, count in zip(self.terms.releases, answered, strict=True):
            self.policy.answered(name, total if self.ledger.outcome == "quality" else count)
        seed = [int(self.salt, 16), len(self.ledger.plans), int(now_s)]
        shares = self.policy.weights(np.random.default_rng(seed))
        self.policy.forget()
        self.ledger.plan(rounded([shares[name] for name in self.terms.releases]))
        self.planned_s = now_s

    @property
    def salt(self) -> str:
        """What devices draw their buckets and answers by; another for the next contest."""
        text = "|".join([self.ledger.family, *self.terms.releases, repr(self.began_s)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def verdict(self) -> str:
        """How it stands, in plain language."""
        return self._effect_text() if self.effect is not None else self._shares_text()

    def statistics(self) -> dict[str, float | int | str]:
        """The numbers behind the verdict, flat, as they stand in lineage and in the live view."""
        facts: dict[str, float | int | str] = {"kind": self.terms.kind, **self.ledger.statistics()}
        facts |= {
            f"{name}_share": s for name, s in zip(self.terms.releases, self.shares, strict=True)
        }
        if self.effect is not None:
            low, high = self.interval
            facts |= {"effect": self.effect.mean, "effect_low": low, "effect_high": high}
        return facts | {"verdict": self.verdict}

    def _effect_text(self) -> str:
        assert self.effect is not None
        old, new = self.ledger.arms
        counts = f"{old.answered:,} and {new.answered:,} answers"
        if not self._is_exposed:
            return (
                f"too early to say of {new.release} and {old.release}: {counts} of {EXPOSURE_MIN}"
            )
        low, high = (100 * bound for bound in self.interval)
        if low <= 0 <= high:
            most = max(-low, high)
            said = f"no difference of {new.release} to {old.release} larger than {most:.2f} points"
            return f"{said} is left, nor can one be seen yet; {counts}; {self._sure}"
        least, most = (low, high) if low > 0 else (-high, -low)
        verb, more, less = _WORDS[self.ledger.outcome]
        than = f"{more if low > 0 else less} than {old.release}"
        return (
            f"{new.release} {verb} {least:.2f} to {most:.2f} points {than}; {counts}; {self._sure}"
        )

    def _shares_text(self) -> str:
        arms = zip(self.ledger.arms, self.shares, strict=True)
        ordered = sorted(arms, key=lambda each: -each[1])
        told = ", ".join(f"{arm.release} {share:.0%}" for arm, share in ordered)
        return f"shares now: {told}; {self.ledger.answered:,} answers"

    @property
    def _sure(self) -> str:
        return f"sure at {100 * (1 - self.terms.alpha):g} %"


_WORDS = {"reward": ("earns", "more", "less"), "quality": ("answers", "better", "worse")}


def rounded(shares: Sequence[float]) -> list[float]:
    """Shares that a person can read, and that add up to 1: the largest takes the rest."""
    found = [round(share, 4) for share in shares]
    largest = int(np.argmax(found))
    found[largest] = round(1 - sum(found[:largest] + found[largest + 1 :]), 4)
    return found
