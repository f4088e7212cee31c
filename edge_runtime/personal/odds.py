"""Log odds and probabilities, one number at a time.

Why: the head shifts log odds on the hot path, where numpy costs more than the arithmetic.

Invariants: every number has log odds within `ODDS_MAX` and a probability strictly between 0 and 1.
"""

from __future__ import annotations

import math

ODDS_MAX = 30.0
"""Log odds beyond which a probability is 0 or 1."""


def odds_of(chance: float) -> float:
    """The log odds of a probability, within what float32 can tell from certainty."""
    if chance <= 0 or chance >= 1:
        return ODDS_MAX if chance >= 1 else -ODDS_MAX
    return math.log(chance / (1 - chance))


def probability(odds: float) -> float:
    """The probability of log odds."""
    return 1 / (1 + math.exp(-max(-ODDS_MAX, min(ODDS_MAX, odds))))


def loss_of(odds: float, label: float) -> float:
    """The log loss of `odds` where the share `label` was true."""
    return max(odds, 0.0) + math.log1p(math.exp(-abs(odds))) - label * odds


def shifted(task: str, base: float, shift: float) -> float:
    """A model's output `base` moved by `shift`, a probability by its log odds."""
    if task != "binary":
        return base + shift
    if 0 < base < 1:
        return 1 / (1 + (1 - base) / base * math.exp(-shift))
    return base if not shift or math.isnan(base) else probability(odds_of(base) + shift)
