"""Adapting: the sessions of a device, over what its families answer.

Why: the store of sessions is pure; here it meets releases that come and go, answers that are
labelled later, and restarts.

A session stands on the stable arm, whichever arm answers: in a trial each arm scores each request,
so the shift that the stable embedding gives is added to the answer of the arm that was drawn. What
the log keeps are the models' own answers, so evidence about releases is none about sessions.

Invariants: all sessions are used in the turn of `Asking`. Neither a session's key nor anything that
it has learned is logged. On a release without a policy sessions sleep. What sessions take, answers
that wait for their labels included, is bounded by the configuration's bytes. Sessions that are kept
lie on the disk only between two processes.

Knows nothing about sockets, candidates or reports.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.clock import Clock
from edge_runtime.config import SessionsConfig
from edge_runtime.device.asking import Asking
from edge_runtime.device.family import Family
from edge_runtime.device.words import Labelled, Prediction, SessionPrediction
from edge_runtime.errors import HeadwaterError, RequestError
from edge_runtime.files import write_atomic
from edge_runtime.inference.history import Number
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.scoring import Scores
from edge_runtime.inference.slot import Arm
from edge_runtime.personal.head import Explanation, Head
from edge_runtime.personal.odds import shifted
from edge_runtime.personal.pending import Answered, Pending
from edge_runtime.personal.prior import Matrix, Prior, Vector
from edge_runtime.personal.sessions import Ground, Key, Sessions

PENDING_SHARE = 8  # one byte in so many is for answers that wait for their labels
_PAUSE_S = 0.0002  # between two sessions that are moved: whoever waits for the turn gets it

log = logging.getLogger("edge_runtime")

OnEnd = Callable[[str, Head], None]


class Adapting:
    """The sessions of `families`; `path` is where they lie between two processes."""

    def __init__(
        self,
        families: Mapping[str, Family],
        asking: Asking,
        clock: Clock,
        config: SessionsConfig,
        path: Path,
        *,
        on_end: OnEnd | None = None,
    ) -> None:
        self._families, self._asking, self._config, self._path = families, asking, config, path
        bytes_max = config.bytes_max_mb << 20
        self.pending = Pending(bytes_max // PENDING_SHARE)
        self.sessions = Sessions(
            clock,
            ttl_s=config.ttl_s,
            bytes_max=bytes_max - bytes_max // PENDING_SHARE,
            count_max=config.count_max,
            on_end=on_end,
        )
        self.counts = {"adapted": 0, "learned": 0}
        self._grounds: dict[str, Ground] = {}
        self._blank: Head | None = None
        self._stop, self._mover = threading.Event(), threading.Thread()
        for family in families.values():
            family.followed = self._followed

    def head(self, name: Key, arm: Arm) -> Head | None:
        """The session's head as it stands on the stable `arm`; None where there is none, where the
        arm's release knows no sessions, or where another serves by now.
        """
        ground = self._grounds.get(name[0])
        if ground is None or arm.info is None or arm.info.policy is None:
            return None
        same = arm.info.policy.prior is ground.prior
        return self.sessions.find(*name, ground) if same else None

    def blank(self, prior: Prior) -> Head:
        """A head that has learned nothing yet, to be read only."""
        if self._blank is None or self._blank.prior is not prior:
            self._blank = Head(prior)
        return self._blank

    def shift(self, name: Key, scores: Scores) -> float:
        """By how much a session moves the answer to an event."""
        embedding = scores.answers[2]
        if embedding is None:
            return 0.0
        head = self.head(name, scores.arms[0])
        return 0.0 if head is None else head.shift(embedding)

    def told(
        self, name: Key, scores: Scores, number: Number, answer: Prediction, shift: float
    ) -> SessionPrediction:
        """What the application is told, once the model's own `answer` is logged."""
        base, ground = answer.outputs, self._grounds.get(name[0])
        outputs = base
        if shift and ground is not None:
            outputs = [shifted(ground.prior.task, base[0], shift)]
            self.counts["adapted"] += 1
        self._remember(number, name, scores)
        adapted = outputs is not base
        return SessionPrediction(answer.id, outputs, answer.release, answer.arm, base, adapted)

    def _remember(self, number: Number, name: Key, scores: Scores) -> None:
        """Keep what a label of the answer will need."""
        info, (answers, _, embedding) = scores.arms[0].info, scores.answers
        stable = answers[0]
        if info is None or info.policy is None or embedding is None or type(stable) is not list:
            return
        prior, spec = info.policy.prior, info.spec.hash
        kept = Answered(*name, prior, spec, embedding.copy(), stable[0], scores.rows[0])
        self.pending.remember(number, kept)

    def label(
        self,
        name: Key,
        prediction_id: str,
        value: float,
        time_s: float | None,
        *,
        final: bool,
    ) -> Labelled:
        """See `Session.label`."""
        asking, found = self._asking, list[tuple[Number, Answered]]()

        def heed(number: Number) -> None:
            answer = self.pending.find(number)
            if answer is not None:
                if answer[:2] != name:
                    raise _other_session(prediction_id)
                found.append((number, answer))

        with asking.turn:
            family = asking.family(name[0])
            seq = asking.labelled(family, prediction_id, value, time_s, final=final, heed=heed)
            if not (found and final):
                return Labelled(seq, adapted=False)
            [(number, answer)] = found
            self.pending.forget(number)
            learned = self._learn(answer, float(value))
            self.counts["learned"] += learned
            return Labelled(seq, learned)

    def _learn(self, answer: Answered, label: float) -> bool:
        ground = self._grounds.get(answer.family)
        if ground is None or ground.spec != answer.spec:
            return False
        row = np.frombuffer(answer.row, "<f4")
        embedding, base = answer.embedding, answer.base
        try:
            head = self.sessions.open(answer.family, answer.key, ground)
            if answer.prior is not ground.prior:
                embeddings, bases = ground.embed(row[None])
                embedding, base = embeddings[0], float(bases[0])
        except HeadwaterError as error:  # the label is logged all the same
            log.warning("%s: a session could not learn: %s", answer.family, error)
            return False
        return head.adapt(embedding, base, label, row)

    def explain(self, name: Key) -> Explanation:
        """See `Session.explain`."""
        with self._asking.turn:
            head = self._standing(name)
            return NOTHING if head is None else head.explain()

    def reset(self, name: Key) -> None:
        """See `Session.reset`."""
        with self._asking.turn:
            self.pending.wipe(*name)
            head = self._standing(name)
            if head is not None:
                head.reset()

    def _standing(self, name: Key) -> Head | None:
        ground = self._grounds.get(self._asking.family(name[0]).name)
        return None if ground is None else self.sessions.find(*name, ground)

    def end(self, name: Key) -> None:
        """See `Session.close`."""
        with self._asking.turn:
            self.pending.wipe(*name)
            self.sessions.close(*name)

    def forget(self, name: str | None) -> int:
        """See `Runtime.forget_sessions`."""
        with self._asking.turn:
            if name is not None:
                self._asking.family(name)
            self.pending.wipe(name)
            return self.sessions.wipe(name)

    def _followed(self, family: Family) -> None:
        """Other arms serve, in this turn: from now on sessions stand on the stable one of them."""
        ground = _ground_of(family)
        before = self._grounds.get(family.name)
        if ground is None:
            self._grounds.pop(family.name, None)
            return
        if before is not None and before.prior is ground.prior:
            return
        self._grounds[family.name] = ground
        if self.sessions.statistics()["open"] and not self._mover.is_alive():
            self._mover = threading.Thread(target=self._move, name="sessions", daemon=True)
            self._mover.start()

    def _move(self) -> None:
        """Move sessions to what serves now, one in each turn, those first that were used last."""
        moved = True
        while moved and not self._stop.wait(_PAUSE_S):
            with self._asking.turn:
                moved = any(
                    self.sessions.rebase(name, ground, at_most=1)
                    for name, ground in self._grounds.items()
                )

    def expire(self) -> None:
        """End what nobody has used for too long."""
        with self._asking.turn:
            self.sessions.expire()

    def restore(self) -> None:
        """Take what the process before kept; it lies on the disk no more."""
        if not self._path.exists():
            return
        data = self._path.read_bytes()
        self._path.unlink()
        try:
            self.sessions.restore(data, self._grounds)
        except RequestError as error:
            log.warning("sessions begin anew: %s", error)

    def close(self) -> None:
        """End with the process; sessions are kept where the configuration says so."""
        self._stop.set()
        if self._mover.is_alive():
            self._mover.join()
        if not self._config.keep:
            return
        with self._asking.turn:
            data = self.sessions.snapshot()
        try:
            write_atomic(self._path, data, mode=0o600)
        except OSError as error:
            log.warning("sessions are not kept: %s", error)

    def statistics(self) -> dict[str, Any]:
        """What is open, what waits for labels, and what became of others."""
        return self.sessions.statistics() | self.pending.statistics() | self.counts


NOTHING = Explanation(0, 0, 0, 0.0, with_model=True, moved=())


def _ground_of(family: Family) -> Ground | None:
    """What sessions stand on while the stable arm of `family` serves."""
    arms = family.pipeline.slot.arms
    info = arms[0].info if arms else None
    if info is None or info.policy is None:
        return None
    return Ground(info.policy.prior, info.spec.hash, info.spec.size, _embed_of(arms[0].runner))


def _embed_of(runner: Runner) -> Callable[[Matrix], tuple[Matrix, Vector]]:
    def embed(rows: Matrix) -> tuple[Matrix, Vector]:
        embeddings, answers = runner.embed(rows)
        return embeddings, answers[:, 0]

    return embed


def _other_session(prediction_id: str) -> RequestError:
    return RequestError(
        "other_session",
        f"prediction {prediction_id} was answered within another session; nothing was logged",
        "label it there",
    )
