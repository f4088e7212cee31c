"""The policy of a family's sessions, kept up with a student that never stands still.

Why: what people have in common is learned from past sessions, as the student sees them now. One
round of expectation maximisation takes tens of milliseconds and dozens are needed; but students
that follow each other are alike, so the prior is carried from one to the next and gains a round.

The bases of past sessions are what the student says of them now, though it has learned from them:
people look a little more alike to it than strangers will. What it said when they came would be fair
to strangers, and wrong after each drift for as long as the memory lasts.

Invariants: a policy follows from the state, the package that it is for, and what devices told of
other sessions, which weigh as many as they are; asking changes nothing. A family that declares no
`[personal]` has none, nor has one that knows no session yet: a device's sessions sleep. Rows of
which the network makes no usable numbers say nothing.

Knows nothing about the gate, nor whose sessions may be heard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from cloud_learner.train.carry import carried
from cloud_learner.train.dataset import Matrix, Rows
from cloud_learner.train.declaration import Personal
from cloud_learner.train.past import PastSessions
from cloud_learner.train.pooled import Anchor
from cloud_learner.train.prior import ROUNDS, PastSession, learn_prior
from edge_runtime.inference.runner import Runner
from edge_runtime.personal.policy import Policy
from edge_runtime.personal.prior import NORM_MAX, Prior

Look = Callable[[Matrix], tuple[Matrix, Matrix]]
"""Rows (count, features) to embeddings (count, width) and answers (count, 1): `Runner.embed`."""

REFERENCE_ROWS = 512  # on which a prior is carried
LABELS_MAX = 4800  # that a round looks at: 200 sessions of 24
FOLLOW_BATCHES = 8  # from one round to the next
BITS = 8  # of a number in a prior that ships


class PolicyLearner:
    """What is known of a family's sessions; `reference` (rows, features) never changes."""

    def __init__(self, personal: Personal | None, task: Task, reference: Matrix) -> None:
        self._personal, self._task = personal, task
        self._past = PastSessions(personal) if personal is not None else None
        self._reference = reference[:REFERENCE_ROWS]
        self._prior: Prior | None = None
        self._known = np.empty((0, 0), np.float32)

    def __len__(self) -> int:
        """How many past sessions are kept."""
        return len(self._past) if self._past is not None else 0

    def remember(
        self, rows: Rows, devices: Sequence[str], names: Sequence[str], times_s: Sequence[float]
    ) -> None:
        """Take in rows of past sessions; see `PastSessions.add`."""
        if self._past is not None:
            self._past.add(rows, devices, names, times_s)

    def learn(self, batch: int, examples: Sequence[Example], rows: Rows, look: Look) -> None:
        """Take in what a micro-batch taught, as examples and as rows; `look` is the student's."""
        if self._personal is not None:
            group = self._personal.group
            names = [f"{each.fields.get(group, '')}" for each in examples]
            devices, times_s = [e.device for e in examples], [e.time_s for e in examples]
            self.remember(rows, devices, names, times_s)
            if batch % FOLLOW_BATCHES == 0:
                self.follow(look)

    def follow(self, look: Look) -> None:
        """Learn the prior of the student as it stands, from that of the one before."""
        if self._personal is not None:
            self._known, self._prior = self._learned(self._personal, look)

    def policy(self, runner: Runner, anchor: Anchor | None = None) -> Policy | None:
        """The policy of the package in `runner`; `anchor` is what devices told of other sessions.
        Raises: PackageError.
        """
        if self._personal is None:
            return None
        _, prior = self._learned(self._personal, runner.embed, anchor)
        if prior is None:
            return None
        return Policy(shortened(prior), self._personal.explore, self._personal.optimism)

    def _learned(
        self, personal: Personal, look: Look, anchor: Anchor | None = None
    ) -> tuple[Matrix, Prior | None]:
        """The embeddings of the reference, and the prior of such embeddings."""
        told = self._past.newest(LABELS_MAX) if self._past is not None else []
        known, sessions = self._seen(told, look)
        start = self._prior and carried(self._prior, self._known, known)
        begun = anchor and anchor.moved(known)
        if not sessions:
            return known, begun.declared(personal) if begun else start
        assert self._task.kind != "multiclass", "such a family is refused"
        return known, learn_prior(
            self._task.kind,
            sessions,
            personal.region,
            forgetting=personal.forgetting,
            rounds=ROUNDS if start is None else 1,
            start=start,
            others=(begun.prior, begun.sessions) if begun and begun.sessions else None,
        )

    def _seen(self, told: Sequence[Rows], look: Look) -> tuple[Matrix, list[PastSession]]:
        """The reference and past sessions, all looked at at once."""
        rows = [self._reference, *(each.features for each in told)]
        embeddings, answers = look(np.concatenate(rows))
        ends = np.cumsum([len(each) for each in rows])[:-1]
        parts = zip(np.split(embeddings, ends), np.split(answers[:, 0], ends), strict=True)
        (known, _), *seen = parts
        usable = [(_usable(*part), part) for part in seen]
        sessions = [
            PastSession(embedded[where], bases[where], each.labels[where])
            for (where, (embedded, bases)), each in zip(usable, told, strict=True)
        ]
        return known, [session for session in sessions if len(session.labels)]

    def state(self) -> dict[str, Any] | None:
        """All that is needed to go on from here."""
        if self._past is None:
            return None
        prior = self._prior and self._prior.encode()
        return {"past": self._past.state(), "prior": prior, "known": self._known}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from `state`; None is that of a family which declared nothing then."""
        if self._past is not None and state is not None:
            self._past.restore(state["past"])
            self._prior = state["prior"] and Prior.decode(state["prior"])
            self._known = state["known"]


def shortened(prior: Prior) -> Prior:
    """The prior in numbers of eight bits, in no direction surer than before.

    More bits say nothing of people, and would double a patch from release to release. What rounding
    can take from the variance of any direction is given to all of them first.
    """
    covariance = prior.covariance.astype(np.float64)
    taken = np.linalg.norm(np.abs(covariance), 2) / (2**BITS - 1)
    wider = covariance + taken * np.eye(len(covariance))
    return replace(prior, mean=_rounded(prior.mean), covariance=_rounded(wider))


def _rounded(values: npt.NDArray[np.floating[Any]]) -> Matrix:
    significand, exponent = np.frexp(values)
    short = np.ldexp(np.round(significand * 2**BITS) / 2**BITS, exponent)
    return np.asarray(short, np.float32)


def _usable(embeddings: Matrix, bases: Matrix) -> npt.NDArray[np.bool_]:
    """Which rows a head can learn from: finite, and no longer than any prior may allow."""
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    return np.asarray(np.isfinite(bases) & (lengths < NORM_MAX / 4))
