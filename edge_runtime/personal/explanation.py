"""The explanation: what a session says of itself, in numbers that people can be shown.

Why: who is answered otherwise than others may ask what is behind it.

Knows nothing about heads and priors.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Moved:
    """What became of one weight; number 0 is the bias. `sure` is the deviation that is left."""

    weight: int
    before: float
    now: float
    sure: float


@dataclass(frozen=True)
class Explanation:
    """What a session has learned: the weights that moved, against what was expected.

    `against` is the log of the likelihood ratio of the model to the head; negative: the head helps.
    `with_model`: it answers as the model does.
    """

    labels: int
    refused: int
    falls: int
    against: float
    with_model: bool
    moved: tuple[Moved, ...]


NOTHING = Explanation(0, 0, 0, 0.0, with_model=True, moved=())
"""What is learned where no session is open."""
