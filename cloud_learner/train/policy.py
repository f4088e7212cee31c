"""The policy of a family's sessions, kept up with a student that never stands still.

Why: what people have in common is learned from past sessions, as the student sees them now. One
round of expectation maximisation takes tens of milliseconds and dozens are needed, but students
that follow each other are alike: the prior is carried from one to the next, and gains a round.

The bases of past sessions are what the student says of them now, though it has learned from them.
So people seem a little more alike to it than strangers will be. What it said when they came would be
fairer to strangers, and wrong after each drift, for as long as the memory lasts.

Invariants: a policy follows from the state and the embedding that is asked for; asking changes
nothing. Without past sessions and without a prior there is none, and sessions sleep.

Knows nothing about packages, nor where embeddings come from.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from cloud_learner.train.carry import carried
from cloud_learner.train.dataset import Matrix
from cloud_learner.train.declaration import Personal
from cloud_learner.train.past import PastSessions
from cloud_learner.train.prior import ROUNDS, PastSession, learn_prior
from edge_runtime.personal.head import Embed
from edge_runtime.personal.policy import Policy
from edge_runtime.personal.prior import Prior, Task

REFERENCE_ROWS = 512  # on which a prior is carried
LABELS_MAX = 9600
"""So many labels are looked at in a round: 200 sessions of 48."""

FOLLOWED_BATCHES: Final = 8
"""A prior follows the student after so many micro-batches."""


class PolicyLearner:
    """What is known of a family's sessions; `past` is to be filled as the family learns.

    `reference` (rows, features) are usual rows, always the same.
    """

    def __init__(self, personal: Personal, task: Task, reference: Matrix) -> None:
        self.past = PastSessions(personal)
        self._personal, self._task = personal, task
        self._reference = reference[:REFERENCE_ROWS]
        self._prior: Prior | None = None
        self._known = np.empty((0, 0), np.float32)

    def follow(self, embed: Embed) -> None:
        """Learn the prior of the student as it stands, from the one before."""
        known, prior = self._learned(embed)
        self._known, self._prior = known, prior

    def policy(self, embed: Embed) -> Policy | None:
        """The policy of a package with this embedding."""
        _, prior = self._learned(embed)
        personal = self._personal
        return prior and Policy(prior, personal.explore, personal.optimism)

    def _learned(self, embed: Embed) -> tuple[Matrix, Prior | None]:
        """What the embedding is on the reference, and its prior."""
        told = self.past.newest(LABELS_MAX)
        rows = [self._reference, *(each.features for each in told)]
        ends = np.cumsum([len(each) for each in rows])[:-1]
        embeddings, bases = embed(np.concatenate(rows))
        known, *seen = np.split(embeddings, ends)
        _, *said = np.split(bases, ends)
        start = self._prior and carried(self._prior, self._known, known)
        if not told:
            return known, start
        labels = (each.labels for each in told)
        sessions = [PastSession(*each) for each in zip(seen, said, labels, strict=True)]
        return known, learn_prior(
            self._task,
            sessions,
            self._personal.region,
            forgetting=self._personal.forgetting,
            rounds=ROUNDS if start is None else 1,
            start=start,
        )

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        prior = self._prior and self._prior.encode()
        return {"past": self.past.state(), "prior": prior, "known": self._known}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.past.restore(state["past"])
        self._prior = state["prior"] and Prior.decode(state["prior"])
        self._known = state["known"]
