"""What is asked of a device and what it answers, and the session that an answer may be for.

Why: whoever asks, ranks or adapts means the same by them.

Knows nothing about how answers come to be.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from edge_runtime.inference.history import Number
from edge_runtime.inference.scoring import Scores
from edge_runtime.wire.messages import Fields, Scored


class Event(msgspec.Struct, frozen=True):
    """What an application reports: typed fields at a time (seconds since the epoch, UTC)."""

    kind: str
    time_s: float
    fields: Fields


class Prediction(msgspec.Struct, frozen=True):
    """The answer to an event; `outputs` are the values of the arm that answered."""

    id: str
    outputs: list[float]
    release: str
    arm: str


class SessionPrediction(Prediction, frozen=True):
    """An answer within a session: `outputs` are the session's, `base` those of the model."""

    base: list[float]
    adapted: bool


class Labelled(msgspec.Struct, frozen=True):
    """A label within a session: its own number in the log, and whether the session learned it."""

    seq: int
    adapted: bool


class Within(Protocol):
    """The session that an answer is for: it shifts the answer, and is told what was logged."""

    def shift(self, scores: Scores) -> float: ...

    def told(
        self, scores: Scores, number: Number, name: str, answer: Scored, shift: float
    ) -> Prediction: ...
