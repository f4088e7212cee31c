"""One learning cycle: a micro-batch in, better replicas, a distilled student, a candidate out.

Why: the live learner and the replayed worlds must learn in exactly the same way: both drive this.

Invariants: the same batches in the same order give the same bits; nothing held out is trained on;
the ledger holds every id that was trained on, and an id that is already in it is counted and left
out. Commit point: one rename of the checkpoint, which names the last batch it contains; after a
crash, batches above it are learned again from the same state as if for the first time.

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

    def __init__(
        self, family: Family, reference: Matrix, columns: Sequence[int] | None = None
    ) -> None:
        """`reference` (rows, features) freezes the scaling; `columns` selects logged features."""
        checkpoint.settle(family.config.learning.seed)
        learning = family.config.learning
        self.family, self._reference, self._columns = family, reference, columns
        self._random = np.random.default_rng(learning.seed)
        reservoir = Reservoir(learning.reservoir_rows, family.spec.size, learning.seed)
        self.replicas = Replicas(
            family.build_teacher(family.spec, reference),
            reservoir,
            learning.replay_rows,
            learning.recent_rows,
        )
        self.student = Student(family.build_student(family.spec, reference))
        self._graph: Graph | None = None
        self._learned: set[tuple[str, int, int]] = set()
        self.number = 0
        self.learned_twice = 0
        self._learned_through_s = 0.0
        self._arrived_s = 0.0

    @property
    def examples_learned(self) -> int:
        """Entries of the ledger."""
        return len(self._learned)

    def pretrain(self, rows: Rows) -> None:
        """Learn what was known before the stream."""
        passes = self.family.config.learning.bootstrap_passes
        self.replicas.pretrain(rows, passes, self._random)
        self.student.pretrain(self.replicas, rows, STUDENT_PASSES, self._random)

    def learn(self, batch: Batch) -> None:
        """Learn one micro-batch."""
        fresh = self._enter(batch.examples)
        if fresh:
            rows = rows_of(fresh, self._columns)
            self.replicas.learn(rows, self._random)
            replay_rows = self.family.config.learning.replay_rows
            self.student.follow(self.replicas, rows, replay_rows, self._random)
        self.number = batch.number
        for example in batch.examples:
            self._learned_through_s = max(self._learned_through_s, example.time_s)
            self._arrived_s = max(self._arrived_s, example.matured_s)

    def candidate(self) -> Candidate:
        """The student as it stands, packaged. Raises: PackageError."""
        calibration = self._calibration_rows()
        if self._graph is None:
            self._graph = Graph(self.student.network, self._reference[:64])
        plain = self._graph.package(self.student.network, {})
        int8 = quantized(plain, calibration)
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
        if self._graph is None:
            self._graph = Graph(self.student.network, self._reference[:64])
        self._graph.save(path)

    def take_graph(self, path: Path) -> None:
        """Use the graph that `keep_graph` wrote. Raises: OSError, PackageError."""
        self._graph = Graph.load(path)

    def save(self, path: Path) -> None:
        """Write the checkpoint. Raises: OSError."""
        checkpoint.save(path, self._state())

    def fork(self) -> Cycle:
        """An independent cycle that stands where this one does, graph and random state included."""
        with checkpoint.random_kept():
            other = Cycle(self.family, self._reference, self._columns)
        other._take(checkpoint.copied(self._state()))
        other._graph = self._graph
        return other

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. Raises: ConfigError `bad_checkpoint`."""
        try:
            self._take(checkpoint.load(path))
        except (KeyError, RuntimeError) as error:  # torch says so of other shapes
            raise ConfigError(
                "bad_checkpoint",
                f"{path} is of another build, or of networks of another shape: {error}",
                "serve with what wrote it, or bootstrap a new home",
            ) from error

    def _take(self, state: dict[str, Any]) -> None:
        self.replicas.restore(state["replicas"])
        self.student.restore(state["student"])
        self._random.bit_generator.state = state["random"]
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
            elif not is_held_out(example):
                self._learned.add(example.id)
                fresh.append(example)
        return fresh

    def _calibration_rows(self) -> Matrix:
        drawn = self.replicas.reservoir.draw(CALIBRATION_ROWS)
        return drawn.features if len(drawn) else self._reference[:CALIBRATION_ROWS]
