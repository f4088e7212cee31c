"""The head: what one session's labels say of how the model's answers should shift.

Why: a model meets a person whom it has never seen; a Bayesian linear head on its embedding learns
from each label in closed form, in microseconds, and knows how sure it is.

The answer is the model's plus a shift, `weights @ [1, embedding]`; weight 0 is the running bias.
`regression` shifts the value. `binary` shifts the log odds, not the probability: the answer stays a
probability, and a region of log odds bounds a rare event as it bounds a common one. `ranking` takes
the score for log odds of being chosen; what a score lacks to be that, the bias makes up for, and no
order depends on the bias. A label updates mean and covariance by one step of the Kalman filter
(what the prior forgets comes first), for log odds linearised (West, Harrison and Migon 1985).

Invariants: no shift is outside of the prior's trust region, whatever the labels and embeddings;
what is not a number shifts nothing and teaches nothing. Before its first label a session answers as
the model does, bit for bit. So does one whose labels deny the head: when the likelihood ratio of
the model to the head exceeds the prior's patience, of which Ville's inequality bounds the chance
where the prior is right, the session begins anew; the third time it stays with the model until
`reset`. Sessions share nothing but the prior and its scratch: all heads of one prior are used by
one thread at a time, without a lock of their own.

Knows nothing about keys, clocks, events or models. Formats: `STATE_VERSION`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Annotated, Final, Literal

import msgspec
import numpy as np

from edge_runtime.errors import RequestError
from edge_runtime.personal.explanation import Explanation, Moved
from edge_runtime.personal.history import History, Kept
from edge_runtime.personal.odds import ODDS_MAX, loss_of, odds_of, probability, shifted
from edge_runtime.personal.prior import WEIGHT_MAX, Matrix, Prior, Vector, packed, unpacked

Embed = Callable[[Matrix], tuple[Matrix, Vector]]
"""Feature rows (count, columns) to embeddings (count, width) and base outputs (count,)."""

STATE_VERSION: Final = 1
FALLS_MAX = 3
TOLD_MAX = 5

_Count = Annotated[int, msgspec.Meta(ge=0)]


class _State(msgspec.Struct, array_like=True, frozen=True):
    version: Literal[1]
    prior: bytes
    labels: _Count
    refused: _Count
    falls: _Count
    against: float
    mean: bytes
    covariance: bytes
    history: Kept


_decoder = msgspec.msgpack.Decoder(_State)


class Head:
    """One session's head; `columns` is the length of the feature rows that it may keep.

    Its weights are believed to be `mean`, of shape (1 + width,), with `covariance`; others read
    them and never write.
    """

    __slots__ = (
        "_against",
        "_history",
        "_weights",
        "covariance",
        "falls",
        "labels",
        "mean",
        "prior",
        "refused",
    )

    def __init__(self, prior: Prior, columns: int = 0) -> None:
        self.prior = prior
        self.mean, self.covariance = prior.mean.copy(), prior.covariance.copy()
        self._weights = self.mean[1:]
        self._history = History(columns)
        self.labels = self.refused = self.falls = 0
        self._against = 0.0

    @property
    def nbytes(self) -> int:
        """What its arrays take; they never grow."""
        return self.mean.nbytes + self.covariance.nbytes + self._history.nbytes

    def shift(self, embedding: Vector) -> float:
        """By how much the answer moves; the hot path."""
        if not self.labels:
            return 0.0
        shift = float(np.vdot(self._weights, embedding)) + self.mean.item(0)
        region = self.prior.region
        return shift if -region <= shift <= region else self._within(shift)

    def _within(self, shift: float) -> float:
        region = self.prior.region
        if -region <= shift <= region:
            return shift
        return 0.0 if math.isnan(shift) else math.copysign(region, shift)

    def answer(self, embedding: Vector, base: float) -> float:
        """The model's output `base`, shifted: a probability, a value or a score."""
        shift = self.shift(embedding)
        return shifted(self.prior.task, base, shift) if shift else base

    def adapt(
        self, embedding: Vector, base: float, label: float, row: Vector | None = None
    ) -> bool:
        """Learn that `label` was true where the model said `base`; False when nothing is learned.

        A label of `binary` and of `ranking` lies in [0, 1]. `row`, the feature values that the
        embedding came from, is kept for the next release.
        """
        if self.falls >= FALLS_MAX or not self.usable(embedding, base, label):
            self.refused += 1
            return False
        self.prior.relax(self.mean, self.covariance)
        if self.prior.task == "regression":
            self._learn_value(embedding, label - base)
        else:
            odds = odds_of(base) if self.prior.task == "binary" else base
            self._learn_odds(embedding, max(-ODDS_MAX, min(ODDS_MAX, odds)), label)
        self.labels += 1
        if row is not None:
            self._history.add(row, label)
        if self._against > self.prior.patience:
            self._fall()
        return True

    def usable(self, embedding: Vector, base: float, label: float) -> bool:
        """Whether a head of this prior could learn from such a label."""
        if not (math.isfinite(base) and math.isfinite(label)):
            return False
        if self.prior.task != "regression" and not 0 <= label <= 1:
            return False
        # False for NaN; `vdot`, unlike `dot`, does not warn of what overflows.
        return float(np.vdot(embedding, embedding)) <= self.prior.norm_max**2

    def _learn_value(self, embedding: Vector, residual: float) -> None:
        prior = self.prior
        target = max(-prior.region, min(prior.region, residual))
        expected, variance = self._expect(embedding)
        variance += prior.noise
        shown = self._within(expected) if self.labels else 0.0
        self._against += ((target - shown) ** 2 - target**2) / (2 * variance)
        self._move((target - expected) / variance, 1 / variance)

    def _learn_odds(self, embedding: Vector, base: float, label: float) -> None:
        expected, variance = self._expect(embedding)
        shown = base + (self._within(expected) if self.labels else 0.0)
        self._against += loss_of(shown, label) - loss_of(base, label)
        chance = probability(base + expected)
        slope = chance * (1 - chance)
        damped = 1 + slope * variance
        self._move((label - chance) / damped, slope / damped)

    def _expect(self, embedding: Vector) -> tuple[float, float]:
        """The shift that is expected, unbounded, and its variance; `pulled` is left for `_move`."""
        scratch = self.prior.scratch
        features = scratch.features
        scratch.embedding[:] = embedding
        pulled = self.covariance.dot(features, scratch.pulled)
        return float(features.dot(self.mean)), max(float(features.dot(pulled)), 0.0)

    def _move(self, pull: float, shrink: float) -> None:
        scratch, mean, covariance = self.prior.scratch, self.mean, self.covariance
        np.add(mean, np.multiply(scratch.pulled, pull, scratch.step), mean)
        np.multiply(scratch.pulled, math.sqrt(shrink), scratch.pulled)
        scratch.column.dot(scratch.row, scratch.square)  # symmetric to the last bit
        np.subtract(covariance, scratch.square, covariance)

    def _fall(self) -> None:
        counts = self.falls + 1, self.refused
        self.reset()
        self.falls, self.refused = counts

    def reset(self) -> None:
        """Begin anew: the session answers as the model does, and its history is gone."""
        self.mean[:], self.covariance[:] = self.prior.mean, self.prior.covariance
        self._history.clear()
        self.labels = self.refused = self.falls = 0
        self._against = 0.0

    def deviation(self, embedding: Vector) -> float:
        """How unsure the shift is: its standard deviation."""
        return math.sqrt(self._expect(embedding)[1])

    def explain(self) -> Explanation:
        """What moved, and by how much: the bias first, then the weights that moved the most."""
        prior = self.prior
        before = np.sqrt(np.diagonal(prior.covariance))
        sure = np.sqrt(np.maximum(np.diagonal(self.covariance), 0))
        order = np.argsort(-np.abs(self.mean - prior.mean)[1:] / before[1:], kind="stable") + 1
        moved = [
            Moved(i, float(prior.mean[i]), float(self.mean[i]), float(sure[i]))
            for i in (0, *order[: TOLD_MAX - 1].tolist())
        ]
        counts = self.labels, self.refused, self.falls
        return Explanation(*counts, self._against, not self.labels, tuple(moved))

    @property
    def columns(self) -> int:
        """The length of the feature rows that it keeps."""
        return self._history.columns

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """What it was told so far, and how much of that it keeps."""
        return self.labels, self.refused, self.falls, len(self._history)

    @property
    def is_behind(self) -> bool:
        """Whether it has a history that it has not learned yet: see `carried`."""
        return len(self._history) > self.labels

    def carried(self, prior: Prior) -> Head:
        """The session on another prior: its history and counts, of which nothing is learned yet."""
        head = Head(prior)
        head._history = deepcopy(self._history)
        head.refused, head.falls = self.refused, self.falls
        return head

    def catch_up(self, embed: Embed) -> None:
        """Learn the own history, as the model of `embed` sees it; what it had learned is to be
        nothing. What `embed` raises changes nothing.
        """
        rows, labels = self._history.ordered()
        if len(labels):
            embeddings, bases = embed(rows)
            self._history.clear()
            for embedding, base, label, row in zip(embeddings, bases, labels, rows, strict=True):
                self.adapt(embedding, float(base), float(label), row)

    def encode(self) -> bytes:
        """The session as bytes, for a restart; `decode` gives it back bit for bit."""
        return msgspec.msgpack.encode(
            _State(
                STATE_VERSION,
                self.prior.digest,
                self.labels,
                self.refused,
                self.falls,
                self._against,
                self.mean.astype("<f4").tobytes(),
                packed(self.covariance),
                self._history.keep(),
            )
        )

    @classmethod
    def decode(cls, data: bytes, prior: Prior) -> Head:
        """The session that was encoded; one of another prior as `carried` to this one.

        Raises: RequestError `bad_session`.
        """
        try:
            state = _decoder.decode(data)
            head = cls(prior)
            head._history = History.of(state.history)
            head.refused, head.falls = state.refused, state.falls
            if state.prior == prior.digest:
                head._take(state)
        except (msgspec.MsgspecError, ValueError) as error:
            raise RequestError(
                "bad_session",
                f"the state of a session cannot be read: {error}; nothing of it was taken",
                "the session begins anew; its next labels adapt it",
            ) from None
        return head

    def _take(self, state: _State) -> None:
        mean = np.frombuffer(state.mean, "<f4")
        covariance = unpacked(state.covariance, len(self.mean))
        if mean.shape != self.mean.shape:
            raise ValueError(f"a mean of {len(mean)} weights")
        most = 1.01 * np.sqrt(np.diagonal(self.prior.covariance))  # a label adds no doubt
        if not (np.abs(mean) <= 1e3 * WEIGHT_MAX).all() or not math.isfinite(state.against):
            raise ValueError("a mean that no labels give")
        if not (np.abs(covariance) <= np.outer(most, most)).all():
            raise ValueError("a covariance that no labels give")
        self.mean[:], self.covariance[:] = mean, covariance
        self.labels, self._against = state.labels, state.against
