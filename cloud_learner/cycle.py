"""One learning cycle: a micro-batch in, better replicas, a distilled student, a candidate out.

Why: the live learner and the replayed worlds must learn in exactly the same way: both drive this.

Invariants: the same batches in the same order give the same bits; nothing held out is trained on;
the ledger holds every id that was trained on, and an id that is already in it is counted and left
out, and so is an example of another feature spec; an early example is learned by `fast` alone, and
its mature form by all others. A batch that would leave a weight that is no number is learned by
nobody: all weights stand as before it. Commit point: one rename of the checkpoint, which names the
last batch it contains; after a crash, batches above it are learned again from the same state as if
for the first time.

Knows nothing about gates, keys and the network.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cloud_learner.evaluate.alarms import Alarm
from cloud_learner.evaluate.offline import EvaluationSet, is_held_out
from cloud_learner.evaluate.watch import Watch
from cloud_learner.package.forms import Forms
from cloud_learner.package.provenance import NOTHING_S, origin, widened
from cloud_learner.store.examples import Batch, Example
from cloud_learner.train import checkpoint
from cloud_learner.train.concepts import Concepts
from cloud_learner.train.dataset import Matrix, Rows, rows_of
from cloud_learner.train.distill import Student
from cloud_learner.train.ensemble import Replicas
from cloud_learner.train.family import Family
from cloud_learner.train.hidden import embeddings_of, looked_into
from cloud_learner.train.ledger import Entered, Ledger
from cloud_learner.train.policy import PolicyLearner
from cloud_learner.train.pooled import Anchor, facts_of
from cloud_learner.train.replica import answers_of
from cloud_learner.train.teaching import Lesson, Teaching, TrainingError
from cloud_learner.train.trust import HeldOut, Trust
from edge_runtime.errors import ConfigError
from edge_runtime.features.spec import Spec

CALIBRATION_ROWS = 1000
STUDENT_PASSES = 4
HELD_OUT_ROWS = 500


class Candidate(msgspec.Struct, frozen=True):
    """A student that may become a release: its int8 package and the float form it came from.

    `alarmed` says that an alarm stands, so that the gate has to be strict.
    """

    number: int
    package: bytes
    float_package: bytes
    learned_through_s: float
    arrived_s: float
    weights: dict[str, float]
    alarmed: bool = False


class Cycle:
    """The trainable state of one family; single-threaded, torch with one thread.

    `is_taught` says whether the last batch held anything to learn, `cpu_s` what all learning has
    cost so far in seconds of the processor.
    """

    def __init__(self, family: Family, reference: Matrix, logged: Spec | None = None) -> None:
        """`reference` (rows, features) freezes the scaling.

        `logged` is the spec of the examples' values, where the family knows only some of them.
        """
        task, learning, drift = family.config.task, family.config.learning, family.config.drift
        self.family, self._reference, self._logged = family, reference, logged or family.spec
        self._columns = [self._logged.names.index(name) for name in family.spec.names]
        self._torch_random = checkpoint.settle(learning.seed)
        self._random = np.random.default_rng(learning.seed)
        with self._torch_random.used():
            teacher, student = family.networks(reference)
        self.ledger = Ledger(self._logged.hash, partial(is_held_out, group=task.group))
        self.teaching = Teaching(
            Replicas(teacher, task, learning, family.spec.size),
            Student(student, task, learning),
            Trust(task, learning.contributors),
            HeldOut(HELD_OUT_ROWS, family.spec.size),
            Concepts(drift.concepts, answers_of),
        )
        self.watch = Watch(drift, task, family.spec.columns, reference, learning.seed)
        self.alarms: list[Alarm] = []
        self.personal = PolicyLearner(family.config.personal, task, reference)
        look = looked_into if family.config.personal else None
        how, known = family.config.package, (family.interface, family.spec, task)
        self._forms = Forms(*known, reference, look, exporter=how.exporter, ranges=how.quantize)
        self.number = self.failed = 0
        self.whole, self.is_taught = True, False
        self.cpu_s = self._arrived_s = 0.0
        self.parent = ""  # the release that serves
        self.anchor: Anchor | None = None  # what devices told of their sessions on it
        self._learned_s = NOTHING_S  # from the first event time to the last

    @property
    def replicas(self) -> Replicas:
        """The teachers."""
        return self.teaching.replicas

    @property
    def student(self) -> Student:
        """What is distilled from them."""
        return self.teaching.student

    @property
    def examples_learned(self) -> int:
        """Entries of the ledger."""
        return len(self.ledger)

    @property
    def sample_passes(self) -> int:
        """Rows of all training steps so far, the bootstrap's included."""
        return self.replicas.sample_passes + self.student.replica.sample_passes

    def answers(self, features: Matrix) -> Matrix:
        """The student's answers (rows, outputs), in floating point."""
        return self.student.answers(features)

    def pretrain(self, rows: Rows) -> None:
        """Learn what was known before the stream."""
        passes = self.family.config.learning.bootstrap_passes
        with self._working():
            self.replicas.pretrain(rows, passes, self._random)
            student_passes = max(STUDENT_PASSES, passes)
            self.student.pretrain(self.replicas, rows, student_passes, self._random)

    def remember(self, known: EvaluationSet) -> None:
        """Take in the past sessions among the rows that were learned before the stream."""
        told, whose = Rows(known.features, known.labels), known.sessions.words
        with self._working():
            self.personal.remember(told, known.devices.words, whose, known.times_s.tolist())
            self.personal.follow(self.student.look)

    def learn(self, batch: Batch) -> None:
        """Learn one micro-batch; if it raises anything else, `whole` is false: this state is not
        to be kept.

        Raises: TrainingError; then the batch is passed over, and the state is whole.
        """
        self.whole, self.alarms = False, []
        self.number = batch.number
        entered = self.ledger.enter(batch.examples)
        self.is_taught = bool(entered.examples)
        self._learned_s = widened(self._learned_s, (e.time_s for e in batch.examples))
        self._arrived_s = max([self._arrived_s, *(e.matured_s for e in batch.examples)])
        try:
            if entered.examples:
                with self._working():
                    lesson = self._watched(self._lesson(entered))
                    self.teaching.learn(lesson, self.family.config.learning, self._random)
                    self._remember(entered, lesson)
            elif entered.held_out:
                devices = [example.device for example in entered.held_out]
                self.teaching.held_out.add(self._rows_of(entered.held_out), devices)
        except TrainingError:
            self.ledger.leave(entered)
            self.failed += 1
            self.whole = True
            raise
        self.whole = True

    def candidate(self) -> Candidate:
        """The student as it stands, packaged; learning goes on as if nobody had asked.

        Raises: PackageError.
        """
        weights, rows = self.replicas.weights, self._calibration_rows()
        made_of = origin(self.parent, self._learned_s, self.family.spec)
        facts = {"batch": self.number, "weights": weights, **made_of, **facts_of(self.anchor)}
        policy = partial(self.personal.policy, anchor=self.anchor)
        return Candidate(
            self.number,
            *self._forms.of(self.student.network, rows, facts, policy),
            self._learned_s[1],
            self._arrived_s,
            weights,
            self.watch.stands,
        )

    def keep_graph(self, path: Path) -> None:
        """Write the exported graph beside the checkpoint, once for an architecture."""
        self._forms.keep(self.student.network, path)

    def take_graph(self, path: Path) -> None:
        """Use the graph that `keep_graph` wrote. Raises: OSError, PackageError."""
        self._forms.take(path)

    def save(self, path: Path) -> None:
        """Write the checkpoint. Raises: OSError."""
        checkpoint.save(path, self._state())

    def fork(self) -> Cycle:
        """An independent cycle that stands where this one does, graph and random state included."""
        other = Cycle(self.family, self._reference, self._logged)
        other._take(checkpoint.copied(self._state()))
        other._forms = self._forms
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
        self.teaching.restore(state["teaching"])
        self.ledger.restore(state["ledger"])
        self.watch.restore(state["watch"])
        self.personal.restore(state.get("personal"))
        self._random.bit_generator.state = state["random"]
        self._torch_random.state = state["torch_random"]
        self.number, self.failed = state["number"], state["failed"]
        self._learned_s = state.get("learned_from_s", NOTHING_S[0]), state["learned_through_s"]
        self._arrived_s, self.cpu_s = state["arrived_s"], state["cpu_s"]

    def _state(self) -> dict[str, Any]:
        return {
            "teaching": self.teaching.state(),
            "ledger": self.ledger.state(),
            "watch": self.watch.state(),
            "personal": self.personal.state(),
            "random": self._random.bit_generator.state,
            "torch_random": self._torch_random.state,
            "number": self.number,
            "failed": self.failed,
            "learned_from_s": self._learned_s[0],
            "learned_through_s": self._learned_s[1],
            "arrived_s": self._arrived_s,
            "cpu_s": self.cpu_s,
        }

    def _lesson(self, entered: Entered) -> Lesson:
        return Lesson(
            self._rows_of(entered.examples),
            [example.device for example in entered.examples],
            entered.follow,
            entered.remember,
            self._rows_of(entered.held_out),
            [example.device for example in entered.held_out],
            self._learned_s[1],
        )

    def _watched(self, lesson: Lesson) -> Lesson:
        """The lesson, knowing what alarms stand; `alarms` are those that its mature rows raise."""
        rows = lesson.rows.take(np.flatnonzero(lesson.remember))
        if len(rows):
            self.alarms = self.watch.observe(
                *(rows.labels, self.answers(rows.features), rows.features),
                partial(embeddings_of, self.student.network),
                groups=rows.groups,
                batch=self.number,
                time_s=lesson.time_s,
            )
        is_new = any(alarm.source == "loss" for alarm in self.alarms)
        can_recall = self.watch.hurts and len(rows) > 0
        if can_recall and self.teaching.recall(rows, lesson.time_s, is_new=is_new):
            self.alarms += self.watch.recalled()
        return msgspec.structs.replace(lesson, alarmed=self.watch.hurts, alarm_is_new=is_new)

    def _remember(self, entered: Entered, lesson: Lesson) -> None:
        at = np.flatnonzero(lesson.remember & self.teaching.trust.heard(lesson.devices))
        examples = [entered.examples[each] for each in at.tolist()]
        self.personal.learn(self.number, examples, lesson.rows.take(at), self.student.look)

    def _rows_of(self, examples: Sequence[Example]) -> Rows:
        if not examples:
            return Rows.none(self.family.spec.size)
        return rows_of(examples, self._columns, self.family.config.task.group)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Draw from the own stream of random numbers, and count the processor's time."""
        started_s = time.thread_time()
        with self._torch_random.used():
            yield
        self.cpu_s += time.thread_time() - started_s

    def _calibration_rows(self) -> Matrix:
        kept = self.replicas.reservoir.spread(CALIBRATION_ROWS)
        return kept if len(kept) else self._reference[:CALIBRATION_ROWS]
