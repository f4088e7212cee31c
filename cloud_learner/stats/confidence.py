"""A confidence sequence: between what a mean lies, true at every look, however often one looks.

Why: an interval that was made for one look leaves out the truth sooner or later when it is looked
at after every value.

Method: the empirical Bernstein sequence with predictable plug-ins of Waudby-Smith & Ramdas,
"Estimating means of bounded random variables by betting" (JRSS-B 2024), theorem 2: a bound of the
capital of two gamblers that can be solved for the mean, so six numbers stand for all values.

Invariants: a bet depends on earlier values only; the interval only ever narrows, and holds a mean
that is constant at all times together with probability at least 1 - alpha. Without values it is all
of `low` to `high`.

Knows nothing about what the values are.
"""

from __future__ import annotations

import math

import msgspec

_BET_MAX = 0.75


class ConfidenceSequence(msgspec.Struct, kw_only=True):
    """Of values between `low` and `high`; plain numbers, so it can be stored and go on.

    With a `horizon` it is made for about so many values: then it is about half as wide, up to a
    tenth of them wider.
    """

    low: float = 0.0
    high: float = 1.0
    alpha: float = 0.05
    horizon: int = 0
    values: int = 0
    # Below, values are mapped to [0, 1]; one imagined value of 1/2 with variance 1/4 came first.
    value_sum: float = 0.5
    square_sum: float = 0.25
    bets: float = 0.0
    bet_sum: float = 0.0
    penalty: float = 0.0
    bounds: tuple[float, float] = (0.0, 1.0)

    def add(self, value: float) -> None:
        """Settle the bet on `value`, then learn from it."""
        assert self.low <= value <= self.high, f"{value} is not in [{self.low}, {self.high}]"
        scaled = (value - self.low) / (self.high - self.low)
        off = scaled - self.value_sum / (self.values + 1)
        bet = self._bet()
        self.bets += bet
        self.bet_sum += bet * scaled
        self.penalty += off * off * (-math.log1p(-bet) - bet)
        self.values += 1
        self.value_sum += scaled
        self.square_sum += (scaled - self.value_sum / (self.values + 1)) ** 2
        self._narrow()

    def _bet(self) -> float:
        variance = self.square_sum / (self.values + 1)
        time = self.horizon or (self.values + 1) * math.log(self.values + 2)
        return min(math.sqrt(2 * math.log(2 / self.alpha) / (variance * time)), _BET_MAX)

    def _narrow(self) -> None:
        """Where the sequence contradicts itself, since the mean has moved, it stays as it was."""
        centre = self.bet_sum / self.bets
        reach = (math.log(2 / self.alpha) + self.penalty) / self.bets
        low, high = max(self.bounds[0], centre - reach), min(self.bounds[1], centre + reach)
        if low <= high:
            self.bounds = (low, high)

    @property
    def mean(self) -> float:
        """The mean so far; NaN without values."""
        if not self.values:
            return math.nan
        return self.low + (self.value_sum - 0.5) / self.values * (self.high - self.low)

    @property
    def interval(self) -> tuple[float, float]:
        """Between what the mean lies."""
        span = self.high - self.low
        return self.low + self.bounds[0] * span, self.low + self.bounds[1] * span
