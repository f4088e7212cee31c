"""An anytime-valid test of two models on the same requests: may the new one replace the old?

Why: a canary is looked at after every label. A test made for one look raises a false alarm in a
third of such campaigns; a wager against the hypothesis does not, whenever and however often it is
looked at. Method: Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting"
(JRSS-B 2024), sections 4 and B.3; Ville's inequality bounds the error over all looks together.

The data are paired differences d = (p_new - y)^2 - (p_old - y)^2 in [-1, 1], negative where the new
model is better. Two gamblers start with a capital of 1:

* *non-inferior* bets against "the new one is worse by `margin` or more"; at 1/alpha_promote the
  hypothesis is rejected, and the new one is `not_worse`;
* *harm* bets against "the new one is worse by half the margin or less"; at 1/alpha_stop it is
  `harmful`. Without any margin an equal model would be stopped in one trial of ten, since it
  really is worse for weeks at a time; with the whole one it takes twice the labels to see two
  points of AUC.

Both go on after the other has spoken: what was not worse on the first devices is watched further.

Where the trial is so large that some devices may lie (`trimming`), the capital must stand without
what those devices won that speak loudest for it; a difference counts for 0.25 at most; and a device
that has moved either capital by its share of four nats, or by two thirds of one, is not heard any
further. So lies cannot bring a verdict about, nor hold one up for long. All of it depends on
earlier differences only. The price: what is rare and very bad is seen at a quarter of its size in
such a trial.

Invariants: a bet depends on earlier differences only; capital stays positive; a flag that was set
stays. A model worse by the margin is called not worse with probability at most alpha_promote, one
worse by half of it harmful with at most alpha_stop, over an unlimited number of looks.

Knows nothing about models, releases or plans.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from cloud_learner.stats.trimming import liars, without_loudest

Verdict = Literal["hold", "promote", "stop"]
Name = Literal["noninferior", "harm"]

HARM_SHARE = 0.5
"""Of the margin: what is worse by more is harm."""

DIFFERENCE_MAX = 0.25
"""What a difference counts for at most where devices may lie."""

# What all devices that may lie can move together, and what one can, before it is not heard further.
_LIES_NATS, _LIE_NATS = 4.0, 2 / 3

# Before the first differences the bets rest on this many imagined payoffs of this mean square.
_PRIOR_PAYOFFS = 20
_PRIOR_SQUARE = 0.002
_BET_MAX = 0.95

MARGIN_MAX = 0.05
"""A payoff is at least -1 less the margin; with the highest bet the capital stays positive."""


class Wager(msgspec.Struct, kw_only=True):
    """The capital of one gambler, who bets on payoffs whose mean is at most 0 if the null is true.

    The bet is the growth-optimal one to second order, expected payoff over expected square. The
    expected payoff is `effect` where the case to be recognised is known beforehand, else (None) the
    mean so far (aGRAPA). Payoffs must be at least -1.05. `parts` is what each device won, in nats.
    """

    effect: float | None
    payoffs: int = 0
    payoff_sum: float = 0.0
    square_sum: float = 0.0
    log_capital: float = 0.0
    parts: dict[str, float] = {}

    def bet(self) -> float:
        """The share of capital at stake on the next payoff, in [0, 0.95]."""
        count = self.payoffs + _PRIOR_PAYOFFS
        square = (self.square_sum + _PRIOR_SQUARE * _PRIOR_PAYOFFS) / count
        expected = self.payoff_sum / count if self.effect is None else self.effect
        return min(max(expected / square, 0.0), _BET_MAX)

    def add(self, payoff: float, device: str = "") -> None:
        """Settle the bet on `payoff`, then learn from it."""
        gain = math.log1p(self.bet() * payoff)
        self.log_capital += gain
        self.parts[device] = self.parts.get(device, 0.0) + gain
        self.payoffs += 1
        self.payoff_sum += payoff
        self.square_sum += payoff * payoff

    def reaches(self, alpha: float, left_out: int) -> bool:
        """Whether the hypothesis is rejected, without the `left_out` loudest devices."""
        reach = -math.log(alpha)
        return self.log_capital >= reach and self._trimmed(left_out) >= reach

    def standing(self, left_out: int) -> float:
        """The capital without what the `left_out` loudest devices won: an e-value, too."""
        return math.exp(min(self._trimmed(left_out), 700.0))

    def _trimmed(self, left_out: int) -> float:
        return without_loudest(self.parts.values(), left_out, self.log_capital)

    @property
    def evidence(self) -> float:
        """The capital: the e-value against the null."""
        return self.standing(0)


class PairedTest(msgspec.Struct, kw_only=True):
    """Both wagers over one stream of differences; plain numbers, so it can be stored and go on.

    `devices` counts the pairs of each; `on_trial` is how many devices could send pairs, where that
    is known to be more. `unheard` pairs came from devices that were not heard any further.
    """

    margin: float
    alpha_promote: float
    alpha_stop: float
    noninferior: Wager
    harm: Wager
    pairs: int = 0
    difference_sum: float = 0.0
    not_worse: bool = False
    harmful: bool = False
    devices: dict[str, int] = {}
    on_trial: int = 0
    unheard: int = 0
    look_at: float = 0.0

    @classmethod
    def start(cls, margin: float, alpha_promote: float, alpha_stop: float) -> PairedTest:
        """A test without data. `margin` in (0, MARGIN_MAX], both alphas in (0, 1)."""
        assert 0 < margin <= MARGIN_MAX, f"margin {margin}"
        assert 0 < alpha_promote < 1, f"alpha_promote {alpha_promote}"
        assert 0 < alpha_stop < 1, f"alpha_stop {alpha_stop}"
        return cls(
            margin=margin,
            alpha_promote=alpha_promote,
            alpha_stop=alpha_stop,
            # An equal model is the case to promote: its payoff is the margin on average.
            noninferior=Wager(effect=margin),
            # How bad a broken model is nobody knows beforehand.
            harm=Wager(effect=None),
        )

    def add(self, difference: float, device: str = "") -> Verdict:
        """Take one difference of a device into account."""
        assert -1 <= difference <= 1, f"difference {difference}"
        before = self.devices.setdefault(device, 0)
        may_lie = self.may_lie
        if may_lie and self._moved(device) > min(_LIES_NATS / may_lie, _LIE_NATS):
            self.unheard += 1
            return self.verdict
        if may_lie:
            difference = min(max(difference, -DIFFERENCE_MAX), DIFFERENCE_MAX)
        self.devices[device] = before + 1
        self.pairs += 1
        self.difference_sum += difference
        self.noninferior.add(self.margin - difference, device)
        self.harm.add(difference - self.margin * HARM_SHARE, device)
        if self.pairs >= self.look_at:
            self.not_worse |= self.noninferior.reaches(self.alpha_promote, may_lie)
            self.harmful |= self.harm.reaches(self.alpha_stop, may_lie)
            # Leaving devices out goes through all of them: each time one percent more has come.
            self.look_at = self.pairs * 1.01 if may_lie else 0.0
        return self.verdict

    @property
    def may_lie(self) -> int:
        """How many devices may lie."""
        return liars(max(self.on_trial, len(self.devices)))

    def _moved(self, device: str) -> float:
        """How far a device alone has moved the capital of either wager, in nats."""
        return max(abs(each.parts.get(device, 0.0)) for each in (self.noninferior, self.harm))

    @property
    def verdict(self) -> Verdict:
        """Harm outweighs all else."""
        if self.harmful:
            return "stop"
        return "promote" if self.not_worse else "hold"

    @property
    def mean(self) -> float:
        """Mean difference so far; NaN without data."""
        return self.difference_sum / self.pairs if self.pairs else math.nan
