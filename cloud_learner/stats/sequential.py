"""An anytime-valid test of two models on the same requests: may the new one replace the old?

Why: a canary is looked at after every label. A test made for one look raises a false alarm in a
third of such campaigns; a wager against the hypothesis does not, whenever and however often it is
looked at. Method: Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting"
(JRSS-B 2024), sections 4 and B.3; Ville's inequality bounds the error over all looks together.

The data are paired differences d = (p_new - y)^2 - (p_old - y)^2 in [-1, 1], negative where the new
model is better. Two gamblers start with a capital of 1:

* *non-inferior* bets against "the new one is worse by `margin` or more"; at 1/alpha_promote the
  hypothesis is rejected and the new model may be promoted;
* *harm* bets against "the new one is worse by `margin` or less"; at 1/alpha_stop it is stopped.

Invariants: a bet depends on earlier differences only; capital stays positive; the first rejection
stands, and what comes after it is not counted, so the verdict does not depend on how differences
are grouped. A model worse by exactly the margin is promoted with probability at most alpha_promote
and stopped with probability at most alpha_stop, over an unlimited number of looks.

Knows nothing about models, releases or plans.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

Verdict = Literal["hold", "promote", "stop"]

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
    mean so far (aGRAPA). Payoffs must be at least -1.05.
    """

    effect: float | None
    payoffs: int = 0
    payoff_sum: float = 0.0
    square_sum: float = 0.0
    log_capital: float = 0.0

    def bet(self) -> float:
        """The share of capital at stake on the next payoff, in [0, 0.95]."""
        count = self.payoffs + _PRIOR_PAYOFFS
        square = (self.square_sum + _PRIOR_SQUARE * _PRIOR_PAYOFFS) / count
        expected = self.payoff_sum / count if self.effect is None else self.effect
        return min(max(expected / square, 0.0), _BET_MAX)

    def add(self, payoff: float) -> None:
        """Settle the bet on `payoff`, then learn from it."""
        self.log_capital += math.log1p(self.bet() * payoff)
        self.payoffs += 1
        self.payoff_sum += payoff
        self.square_sum += payoff * payoff

    @property
    def evidence(self) -> float:
        """The capital: the e-value against the null."""
        return math.exp(min(self.log_capital, 700.0))


class PairedTest(msgspec.Struct, kw_only=True):
    """Both wagers over one stream of differences; plain numbers, so it can be stored and go on."""

    margin: float
    alpha_promote: float
    alpha_stop: float
    noninferior: Wager
    harm: Wager
    pairs: int = 0
    difference_sum: float = 0.0
    verdict: Verdict = "hold"

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

    def add(self, difference: float) -> Verdict:
        """Take one difference into account; after a verdict, nothing changes any more."""
        assert -1 <= difference <= 1, f"difference {difference}"
        if self.verdict == "hold":
            self.pairs += 1
            self.difference_sum += difference
            self.noninferior.add(self.margin - difference)
            self.harm.add(difference - self.margin)
            self.verdict = self._decide()
        return self.verdict

    def _decide(self) -> Verdict:
        if self.harm.log_capital >= -math.log(self.alpha_stop):
            return "stop"
        if self.noninferior.log_capital >= -math.log(self.alpha_promote):
            return "promote"
        return "hold"

    @property
    def mean(self) -> float:
        """Mean difference so far; NaN without data."""
        return self.difference_sum / self.pairs if self.pairs else math.nan
