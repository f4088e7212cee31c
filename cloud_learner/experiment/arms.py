"""Arms: ways of turning a stream of micro-batches into models, all with the same two questions.

Why: a comparison is fair when the arms differ in nothing but what is compared.

`incremental` is the production cycle with all that the family declares; the student answers.
`fast` and `stable` are one such replica alone, of the student's network, taught by labels.
`scratch:SPAN` trains that network anew for each version, on the examples of the last SPAN, with as
many passes over each as `fast` makes rows of a new one.

Invariants: all arms start from the same warm-up rows and never train on held-out examples; every
row of every step is counted. Same stream and seed, same bits.

Knows nothing about cadences or scores.
"""

from __future__ import annotations

import copy
import time
from typing import Literal, Protocol

import msgspec
import numpy as np

from cloud_learner.cycle import Cycle
from cloud_learner.evaluate.offline import is_held_out
from cloud_learner.experiment.asked import Index
from cloud_learner.experiment.cadence import span_s
from cloud_learner.experiment.stream import Cut, Stream
from cloud_learner.experiment.worlds import REFERENCE_ROWS
from cloud_learner.train import checkpoint
from cloud_learner.train.dataset import Matrix, Rows
from cloud_learner.train.declaration import Learning
from cloud_learner.train.ensemble import Replicas
from cloud_learner.train.family import Family
from cloud_learner.train.replica import Replica
from cloud_learner.train.teaching import TrainingError
from edge_runtime.errors import ConfigError

Kind = Literal["incremental", "fast", "stable", "scratch"]


class Policy(msgspec.Struct, frozen=True):
    """How models are made; `window_s` is the memory of `scratch`."""

    name: str
    kind: Kind
    window_s: float = 0.0


class Spent(msgspec.Struct, frozen=True):
    """Rows of all training steps, and seconds of the processor."""

    sample_passes: int
    cpu_s: float


class Arm(Protocol):
    """A learner on trial; `ready` is called before the answers of a version are asked for."""

    def learn(self, number: int, cut: Cut) -> None: ...

    def ready(self) -> None: ...

    def answers(self, features: Matrix) -> Matrix: ...

    @property
    def spent(self) -> Spent: ...


def policies_of(text: str) -> list[Policy]:
    """`incremental,scratch:30d` as policies. Raises: ConfigError `bad_policy`."""
    found = [_policy(name.strip()) for name in text.split(",")]
    if len({policy.name for policy in found}) < len(found):
        raise ConfigError("bad_policy", f"--policy {text} names one twice")
    return found


def _policy(name: str) -> Policy:
    if name == "incremental":
        return Policy(name, "incremental")
    if name == "fast":
        return Policy(name, "fast")
    if name == "stable":
        return Policy(name, "stable")
    kind, _, span = name.partition(":")
    if kind == "scratch":
        return Policy(name, "scratch", span_s(span, "bad_policy"))
    raise ConfigError(
        "bad_policy",
        f"--policy {name!r} is not known",
        "there are incremental, fast, stable, and scratch:SPAN such as scratch:30d",
    )


def seeded(family: Family, seed: int) -> Family:
    """The family with its seed moved by `seed`."""
    learning = family.config.learning
    return family.learning_otherwise(msgspec.structs.replace(learning, seed=learning.seed + seed))


def arm_of(policy: Policy, family: Family, stream: Stream, warm: Index) -> Arm:
    """An arm that knows the `warm` positions of the stream."""
    if policy.kind == "incremental":
        return Incremental(family, stream, warm)
    if policy.kind == "scratch":
        return _Scratch(family, stream, warm, policy.window_s)
    return _Single(family, stream, warm, policy.kind)


class Incremental:
    """The production cycle; `teacher` answers as the replicas do that the student learns from."""

    def __init__(
        self, family: Family, stream: Stream, warm: Index, logged: Family | None = None
    ) -> None:
        """`logged` is the family whose features the stream has, where `family` knows only some."""
        spec = (logged or family).spec
        self._columns = [spec.names.index(name) for name in family.spec.names]
        self._stream, rows = stream, stream.rows_at(warm)
        rows = msgspec.structs.replace(rows, features=self._seen(rows.features))
        self.cycle = Cycle(family, rows.features[:REFERENCE_ROWS], spec)
        self.cycle.pretrain(rows)
        self.failed = 0

    def learn(self, number: int, cut: Cut) -> None:
        try:
            self.cycle.learn(self._stream.batch(number, cut))
        except TrainingError:
            self.failed += 1

    def ready(self) -> None:
        """What is shipped stands after each micro-batch."""

    def answers(self, features: Matrix) -> Matrix:
        return self.cycle.answers(self._seen(features))

    def teacher(self, features: Matrix) -> Matrix:
        """The replicas' answers (rows, outputs)."""
        return self.cycle.replicas.answers(self._seen(features))

    @property
    def spent(self) -> Spent:
        return Spent(self.cycle.sample_passes, self.cycle.cpu_s)

    def _seen(self, features: Matrix) -> Matrix:
        return np.ascontiguousarray(features[:, self._columns])


class _Alone:
    """What arms of one network have in common: random numbers and costs of their own."""

    def __init__(self, family: Family, stream: Stream, warm: Index) -> None:
        self._learning, self._task = family.config.learning, family.config.task
        self._stream, self._warm = stream, stream.rows_at(warm)
        self._torch_random = checkpoint.settle(self._learning.seed)
        self._random = np.random.default_rng(self._learning.seed)
        with self._torch_random.used():
            self._network = family.build_student(self._warm.features[:REFERENCE_ROWS])
        self._cpu_s = 0.0

    def _learnable(self, cut: Cut) -> Index:
        """The positions to train on: mature, and not held out."""
        stream = self._stream
        return np.array(
            [
                position
                for position in cut.positions
                if not stream.released.early[position]
                and not is_held_out(stream.example(position), group=stream.group)
            ],
            np.intp,
        )


class _Single(_Alone):
    """`fast` or `stable` alone."""

    def __init__(self, family: Family, stream: Stream, warm: Index, kind: Kind) -> None:
        super().__init__(family, stream, warm)
        learning = self._only(self._learning, kind)
        self._replicas = Replicas(self._network, self._task, learning, family.spec.size)
        started_s = time.thread_time()
        with self._torch_random.used():
            self._replicas.pretrain(self._warm, learning.bootstrap_passes, self._random)
        self._cpu_s = time.thread_time() - started_s
        self._taught = self._replicas.learn_fast if kind == "fast" else self._replicas.learn_stable

    def learn(self, number: int, cut: Cut) -> None:  # noqa: ARG002 - the interface of arms
        rows, started_s = self._stream.rows_at(self._learnable(cut)), time.thread_time()
        with self._torch_random.used():
            self._taught(rows, self._random)
        self._replicas.keep(rows, rows)
        self._cpu_s += time.thread_time() - started_s

    def ready(self) -> None:
        """What is shipped stands after each micro-batch."""

    def answers(self, features: Matrix) -> Matrix:
        return self._replicas.answers(features)

    @property
    def spent(self) -> Spent:
        return Spent(self._replicas.sample_passes, self._cpu_s)

    @staticmethod
    def _only(learning: Learning, kind: Kind) -> Learning:
        replace = msgspec.structs.replace
        return replace(
            learning,
            fast=replace(learning.fast, on=kind == "fast"),
            stable=replace(learning.stable, on=kind == "stable"),
            scratch=replace(learning.scratch, on=False),
        )


class _Scratch(_Alone):
    """A network that forgets all it knew, and learns the last `window_s` from its first weights."""

    def __init__(self, family: Family, stream: Stream, warm: Index, window_s: float) -> None:
        super().__init__(family, stream, warm)
        self._window_s, self._positions, self._now_s = window_s, warm, 0.0
        self._passes = passes_per_example(self._learning)
        self._sample_passes = 0
        self._replica = self._trained(self._warm)

    def learn(self, number: int, cut: Cut) -> None:  # noqa: ARG002 - the interface of arms
        self._positions = np.concatenate([self._positions, self._learnable(cut)])
        self._now_s = cut.released_s

    def ready(self) -> None:
        if not self._now_s:
            return
        released_s = self._stream.released.released_s
        self._positions = self._positions[
            released_s[self._positions] > self._now_s - self._window_s
        ]
        self._replica = self._trained(self._stream.rows_at(self._positions))

    def answers(self, features: Matrix) -> Matrix:
        return self._replica.answers(features)

    @property
    def spent(self) -> Spent:
        return Spent(self._sample_passes, self._cpu_s)

    def _trained(self, rows: Rows) -> Replica:
        started_s = time.thread_time()
        learning = self._learning
        replica = Replica(
            copy.deepcopy(self._network),
            self._task,
            learning.scratch.learning_rate,
            gradient_norm_max=learning.gradient_norm_max,
        )
        with self._torch_random.used():
            for _ in range(self._passes):
                replica.train(rows, self._random)
        self._sample_passes += replica.sample_passes
        self._cpu_s += time.thread_time() - started_s
        return replica


def passes_per_example(learning: Learning) -> int:
    """How many rows `fast`, or else `stable`, is shown for each new one; rounded."""
    fast, stable = learning.fast, learning.stable
    if fast.on:
        return fast.passes * (2 if fast.window_rows else 1)
    return round(stable.passes * (1 + stable.replay_rows / learning.batch_size))
