"""Adapting: the sessions of a device, over what its families answer.

Why: the store of sessions is pure; here it meets releases that come and go, answers that are
labelled later, and restarts.

A session stands on the stable arm, whichever arm answers: in a trial each arm scores each request,
so the shift that the stable embedding gives is added to the answer of the arm that was drawn. What
the log keeps are the models' own answers, so evidence about releases is none about sessions.

Invariants: all sessions are used in the turn of `Asking`. Neither a session's key nor anything that
it has learned is logged. On a release without a policy sessions sleep. Where the model is not quick
none is run in a turn: who is late is answered as the model does, and learns nothing, until the
keeper has moved the session. What sessions take, answers that wait for their labels included, is
bounded by the configuration's bytes and ends with its time. Sessions that are kept lie on the disk
only between two processes.

Knows nothing about sockets, candidates or reports.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.clock import Clock
from edge_runtime.config import SessionsConfig
from edge_runtime.device.asking import Asking
from edge_runtime.device.exporting import Exporting
from edge_runtime.device.family import Family
from edge_runtime.device.keeper import Keeper
from edge_runtime.device.visitor import Visitor
from edge_runtime.device.words import Labelled
from edge_runtime.errors import HeadwaterError, RequestError
from edge_runtime.files import write_atomic
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.slot import Arm
from edge_runtime.personal.explanation import NOTHING, Explanation
from edge_runtime.personal.ground import Ground, Key, checked_key
from edge_runtime.personal.head import Head
from edge_runtime.personal.pending import Answered, Pending
from edge_runtime.personal.prior import Matrix, Prior, Vector
from edge_runtime.personal.sessions import Sessions

PENDING_SHARE = 8  # one byte in so many is for answers that wait for their labels

log = logging.getLogger("edge_runtime")


class Adapting:
    """The sessions of `families`; `path` is where they lie between two processes."""

    def __init__(
        self,
        families: Mapping[str, Family],
        asking: Asking,
        clock: Clock,
        config: SessionsConfig,
        path: Path,
    ) -> None:
        self._asking, self._config, self._path = asking, config, path
        bytes_max = config.bytes_max_mb << 20
        self.pending = Pending(bytes_max // PENDING_SHARE)
        self.sessions = Sessions(
            clock,
            ttl_s=config.ttl_s,
            bytes_max=bytes_max - bytes_max // PENDING_SHARE,
            count_max=config.count_max,
            on_end=self._over if config.export else None,
        )
        self.exporting = Exporting(clock)
        self.counts = {"adapted": 0, "learned": 0}
        self._grounds: dict[str, Ground] = {}
        self._stable: dict[Runner, Ground] = {}  # the same, as the hot path finds them
        self._warned: set[str] = set()
        self._blank: Head | None = None
        kept = self.sessions, self.pending, self._grounds
        self.keeper = Keeper(asking.turn, *kept, clock=clock, ttl_s=config.ttl_s)
        self.pending.begun = self.keeper.begin
        for family in families.values():
            family.followed = self._followed

    def visitor(self, family: str, key: str) -> Visitor:
        """The session of `key`, for who asks on its behalf. Raises: RequestError
        `bad_session_key`.
        """
        name = family, checked_key(key)
        return Visitor(name, self._stable, self.sessions, self.pending, self.counts)

    def blank(self, prior: Prior) -> Head:
        """A head that has learned nothing yet, to be read only."""
        if self._blank is None or self._blank.prior is not prior:
            self._blank = Head(prior)
        return self._blank

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
        try:
            with self._asking.turn:
                return self._labelled(name, prediction_id, value, time_s, final=final)
        except HeadwaterError as error:
            self._asking.refused(error)
            raise

    def _labelled(
        self, name: Key, prediction_id: str, value: float, time_s: float | None, *, final: bool
    ) -> Labelled:
        asking = self._asking
        family = asking.family(name[0])
        record = asking.label_of(family, prediction_id, value, time_s, final=final)
        known = record.epoch == asking.next_number()[0]
        answer = self.pending.find(record.seq) if known else None
        if answer is not None and (answer.family, answer.key) != name:
            raise _other_session(prediction_id)
        seq = asking.log_label(family, record)
        if answer is None or not final:
            return Labelled(seq, adapted=False)
        self.pending.forget(record.seq)
        learned = self._learn(answer, record.value)
        self.counts["learned"] += learned
        return Labelled(seq, learned)

    def _learn(self, answer: Answered, label: float) -> bool:
        name, ground = (answer.family, answer.key), self._grounds.get(answer.family)
        if ground is None or ground.spec != answer.spec:
            return False
        base = answer.base
        row, embedding = np.frombuffer(answer.row, "<f4"), np.frombuffer(answer.embedding, "<f4")
        try:
            if answer.prior is not ground.prior:
                if not ground.quick:
                    return False
                embeddings, bases = ground.embed(row[None])
                embedding, base = embeddings[0], float(bases[0])
            head = self.sessions.find(name, ground)
            if head is None and self.blank(ground.prior).usable(embedding, base, label):
                head = self.sessions.open(name, ground)
        except HeadwaterError as error:  # the label is logged all the same
            if answer.family not in self._warned:  # once, for it is so with each label
                log.warning("%s: a session could not learn: %s", answer.family, error)
            self._warned.add(answer.family)
            return False
        return head is not None and head.adapt(embedding, base, label, row)

    def explain(self, name: Key) -> Explanation:
        """See `Session.explain`."""
        with self._asking.turn:
            ground = self._grounds.get(name[0])
            head = None if ground is None else self.sessions.find(name, ground)
            return NOTHING if head is None else head.explain()

    def reset(self, name: Key) -> None:
        """See `Session.reset`."""
        with self._asking.turn:
            self.pending.wipe(*name)
            self.sessions.reset(name)

    def end(self, name: Key) -> None:
        """See `Session.close`."""
        with self._asking.turn:
            self.pending.wipe(*name)
            self.sessions.close(name)

    def forget(self, name: str | None) -> int:
        """See `Runtime.forget_sessions`."""
        with self._asking.turn:
            if name is not None:
                self._asking.family(name)
            self.pending.wipe(name)
            self.exporting.forget(name)
            return self.sessions.wipe(name)

    def _over(self, name: str, head: Head) -> None:
        """Sum up a session that has ended; not one that was late to move to what serves now."""
        ground = self._grounds.get(name)
        if ground is not None and head.prior is ground.prior:
            self.exporting.ended(name, ground.release, head)

    def _followed(self, family: Family) -> None:
        """Other arms serve, in this turn: from now on sessions stand on the stable one of them."""
        self._warned.discard(family.name)
        arms = family.pipeline.slot.arms
        policy = arms[0].info.policy if arms and arms[0].info is not None else None
        if policy is not None and arms[0].runner in self._stable:
            return
        before = self._grounds.pop(family.name, None)
        for runner in [runner for runner, ground in self._stable.items() if ground is before]:
            del self._stable[runner]
        if policy is not None:
            ground = self._stable[arms[0].runner] = _ground_of(arms[0])
            self._grounds[family.name] = ground
            self.keeper.hasten()

    def expire(self) -> None:
        """End what nobody has used for too long."""
        self.keeper.expire()

    def restore(self) -> None:
        """Take what the process before kept; it lies on the disk no more."""
        try:
            with self._path.open("rb") as file:
                self._path.unlink()
                data = file.read(self._config.bytes_max_mb << 20)
            with self._asking.turn:
                self.sessions.restore(data, self._grounds)
                if self.sessions:
                    self.keeper.begin()
                    self.keeper.hasten()
        except FileNotFoundError:
            return
        except (OSError, RequestError) as error:
            log.warning("sessions begin anew: %s", error)

    def close(self) -> None:
        """End with the process; sessions are kept where the configuration says so."""
        self.keeper.close()
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
        told = self.pending.statistics() | self.exporting.statistics()
        return self.sessions.statistics() | told | self.counts


def _ground_of(arm: Arm) -> Ground:
    """What sessions stand on while `arm`, which has a policy, is the stable one."""
    assert arm.info is not None
    assert arm.info.policy is not None
    prior, spec, runner = arm.info.policy.prior, arm.info.spec, arm.runner
    columns, embed = spec.size, _embed_of(runner)
    return Ground(prior, spec.hash, columns, embed, arm.release, quick=runner.inline)


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
