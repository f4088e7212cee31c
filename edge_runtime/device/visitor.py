"""A visitor: one session on the hot path, where an answer is shifted and remembered.

Why: what a session adds to an answer is to cost less than a fifth of it; so all that it needs is
looked up here, once, and nothing is copied that a label does not need.

Invariants: a session moves only answers that were computed by what serves now, and remembers only
those. Used in the turn of `Asking`.

Knows nothing about logs, and nothing of how releases come and go.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.device.words import SessionPrediction
from edge_runtime.inference.history import Number
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.scoring import Scores
from edge_runtime.inference.slot import Arm
from edge_runtime.personal.ground import Ground
from edge_runtime.personal.head import Head
from edge_runtime.personal.odds import shifted
from edge_runtime.personal.pending import Answered, Pending
from edge_runtime.personal.sessions import Sessions
from edge_runtime.wire.messages import Scored


class Visitor:
    """The session of `key` with a family, whether it is open or not; `grounds` are by the runner of
    the stable arm that serves now.
    """

    __slots__ = ("_counts", "_grounds", "_pending", "_sessions", "family", "key", "name")

    def __init__(
        self,
        name: tuple[str, str],
        grounds: Mapping[Runner, Ground],
        sessions: Sessions,
        pending: Pending,
        counts: dict[str, int],
    ) -> None:
        self.name, (self.family, self.key) = name, name
        self._grounds, self._sessions, self._pending = grounds, sessions, pending
        self._counts = counts

    def head(self, stable: Arm) -> Head | None:
        """The session's head as it stands on the arm; None where there is none, where the arm's
        release knows no sessions, or where another serves by now.
        """
        ground = self._grounds.get(stable.runner)
        return None if ground is None else self._sessions.find(self.name, ground)

    def shift(self, scores: Scores) -> float:
        """By how much the session moves the answer to an event."""
        embedding, ground = scores.answers[2], self._grounds.get(scores.arms[0].runner)
        if embedding is None or ground is None:
            return 0.0
        head = self._sessions.find(self.name, ground)
        return 0.0 if head is None else head.shift(embedding)

    def told(
        self, scores: Scores, number: Number, name: str, answer: Scored, shift: float
    ) -> SessionPrediction:
        """The `answer` that was logged as `name`, moved by `shift`, as the application is told it;
        what a label of it will need is remembered.
        """
        base, ground = answer.outputs, self._grounds.get(scores.arms[0].runner)
        if ground is None:
            return SessionPrediction(name, base, answer.release, answer.arm, base, adapted=False)
        answers, _, embedding = scores.answers
        stable, row = answers[0], scores.rows[0]
        if embedding is not None and type(stable) is list and isinstance(row, bytes):
            kept = Answered(
                self.family,
                self.key,
                ground.prior,
                ground.spec,
                embedding.tobytes(),
                stable[0],
                row,
            )
            self._pending.remember(number[1], kept)
        if not shift:
            return SessionPrediction(name, base, answer.release, answer.arm, base, adapted=False)
        self._counts["adapted"] += 1
        moved = [shifted(ground.prior.task, base[0], shift)]
        return SessionPrediction(name, moved, answer.release, answer.arm, base, adapted=True)
