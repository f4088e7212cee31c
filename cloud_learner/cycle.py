"""One learning cycle: a micro-batch in, better replicas, a distilled student, a candidate out.

Why: the live learner and the replayed worlds must learn in exactly the same way: both drive this.

Invariants: the same batches in the same order give the same bits; nothing held out is trained on;
the ledger holds every id that was trained on, and an id that is already in it is counted and left
out, and so is an example of another feature spec. Commit point: one rename of the checkpoint, which
names the last batch it contains; after a crash, batches above it are learned again from the same
state as if for the first time.

Knows nothing about gates, keys and the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cloud_learner.evaluate.offline import is_held_out
from cloud_learner.package.build import Graph
from cloud_learner.package.quantize import quantized
from cloud_learner.package.seal import sealed
from cloud_learner.store.examples import Batch, Example
from cloud_learner.train import checkpoint
from cloud_learner.train.dataset import Matrix, Reservoir, Rows, rows_of
from cloud_learner.train.distill import Student
from cloud_learner.train.family import Family
from cloud_learner.train.replica import Replicas
from edge_runtime.errors import ConfigError
from edge_runtime.features.spec import Spec

GOLDEN_ROWS = 8
CALIBRATION_ROWS = 1000
STUDENT_PASSES = 4


class Candidate(msgspec.Struct, frozen=True):
    """A student that may become a release: its int8 package and the float form it came from."""

    number: int
    package: bytes
    float_package: bytes
    learned_through_s: float
    arrived_s: float
    weights: tuple[float, float]


class Cycle:
    """The trainable state of one family; single-threaded, torch with one thread."""

    def __init__(self, family: Family, reference: Matrix, logged: Spec | None = None) -> None:
        """`reference` (rows, features) freezes the scaling.

        `logged` is the spec of the examples' values, where the family knows only some of them.
        """
        learning = family.config.learning
        self.family, self._reference, self._logged = family, reference, logged or family.spec
        self._columns = [self._logged.names.index(name) for name in family.spec.names]
        self._torch_random = checkpoint.settle(learning.seed)
        self._random = np.random.default_rng(learning.seed)
        reservoir = Reservoir(learning.reservoir_rows, family.spec.size, learning.seed)
        with self._torch_random.used():
            teacher, student = family.build_teacher(reference), family.build_student(reference)
        self.replicas = Replicas(
            teacher, reservoir, learning.stable.replay_rows, learning.fast.window_rows
        )
        self.student = Student(student)
        self._graph: Graph | None = None
        self._learned: set[tuple[str, int, int]] = set()
        self.number = 0
        self.learned_twice = 0
        self.other_spec = 0
        self.whole = True
        self._learned_through_s = 0.0
        self._arrived_s = 0.0

    @property
    def examples_learned(self) -> int:
        """Entries of the ledger."""
        return len(self._learned)

    def pretrain(self, rows: Rows) -> None:
        """Learn what was known before the stream."""
        passes = self.family.config.learning.bootstrap_passes
        with self._torch_random.used():
            self.replicas.pretrain(rows, passes, self._random)
            self.student.pretrain(self.replicas, rows, STUDENT_PASSES, self._random)

    def learn(self, batch: Batch) -> None:
        """Learn one micro-batch; if it raises, `whole` is false: this state is not to be kept."""
        self.whole = False
        fresh = self._enter(batch.examples)
        if fresh:
            self._train(rows_of(fresh, self._columns))
        self.number = batch.number
        for example in batch.examples:
            self._learned_through_s = max(self._learned_through_s, example.time_s)
            self._arrived_s = max(self._arrived_s, example.matured_s)
        self.whole = True

    def candidate(self) -> Candidate:
        """The student as it stands, packaged; learning goes on as if nobody had asked.

        Raises: PackageError.
        """
        plain = self._exported().package(self.student.network, {})
        int8 = quantized(plain, self._calibration_rows())
        facts = {"batch": self.number, "weights": list(self.replicas.weights)}
        family, golden = self.family, self._reference[:GOLDEN_ROWS]
        return Candidate(
            self.number,
            sealed(int8, family.interface, family.spec, golden, {**facts, "form": "int8"}),
            sealed(plain, family.interface, family.spec, golden, {**facts, "form": "float32"}),
            self._learned_through_s,
            self._arrived_s,
            self.replicas.weights,
        )

    def keep_graph(self, path: Path) -> None:
        """Write the exported graph beside the checkpoint, once for an architecture."""
        self._exported().save(path)

    def take_graph(self, path: Path) -> None:
        """Use the graph that `keep_graph` wrote. Raises: OSError, PackageError."""
        self._graph = Graph.load(path)

    def save(self, path: Path) -> None:
        """Write the checkpoint. Raises: OSError."""
        checkpoint.save(path, self._state())

    def fork(self) -> Cycle:
        """An independent cycle that stands where this one does, graph and random state included."""
        other = Cycle(self.family, self._reference, self._logged)
        other._take(checkpoint.copied(self._state()))
        other._graph = self._graph
        return other

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. Raises: ConfigError `bad_checkpoint`."""
        try:
            self._take(checkpoint.load(path))
        except (KeyError, RuntimeError, ValueError) as error:  # of other shapes
            raise ConfigError(
                "bad_checkpoint",
                f"{path} is of another build, or of networks of another shape: {error}",
                "serve with what wrote it, or bootstrap a new home",
            ) from error

    def _take(self, state: dict[str, Any]) -> None:
        self.replicas.restore(state["replicas"])
        self.student.restore(state["student"])
        self._random.bit_generator.state = state["random"]
        self._torch_random.state = state["torch_random"]
        self._learned = set(state["ledger"])
        self.number = state["number"]
        self.learned_twice = state["learned_twice"]
        self._learned_through_s = state["learned_through_s"]
        self._arrived_s = state["arrived_s"]

    def _state(self) -> dict[str, Any]:
        return {
            "replicas": self.replicas.state(),
            "student": self.student.state(),
            "random": self._random.bit_generator.state,
            "torch_random": self._torch_random.state,
            "ledger": list(self._learned),
            "number": self.number,
            "learned_twice": self.learned_twice,
            "learned_through_s": self._learned_through_s,
            "arrived_s": self._arrived_s,
        }

    def _enter(self, examples: Sequence[Example]) -> list[Example]:
        """Those of the examples to train on, entered in the ledger."""
        fresh = []
        for example in examples:
            if example.id in self._learned:
                self.learned_twice += 1
            elif example.spec != self._logged.hash:
                self.other_spec += 1
            elif not is_held_out(example):
                self._learned.add(example.id)
                fresh.append(example)
        return fresh

    def _train(self, rows: Rows) -> None:
        replay_rows = self.family.config.learning.student.replay_rows
        with self._torch_random.used():
            self.replicas.learn(rows, self._random)
            self.student.follow(self.replicas, rows, replay_rows, self._random)

    def _exported(self) -> Graph:
        if self._graph is None:
            self._graph = Graph(self.student.network, self._reference[:64])
        return self._graph

    def _calibration_rows(self) -> Matrix:
        kept = self.replicas.reservoir.spread(CALIBRATION_ROWS)
        return kept if len(kept) else self._reference[:CALIBRATION_ROWS]
