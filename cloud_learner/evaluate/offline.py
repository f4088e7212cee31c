"""Offline evidence: a package scored on rows that nobody trained on, by the code of the device.

Why: a score of another implementation says nothing about what a device will answer.

Two sets: `static` was set aside before anything was learned and never changes; `recent` is a hash
sample of the stream, kept from every replica, and follows the world.

Invariants: whether an example is held out depends on its content alone, so every trust domain
draws the same line; scoring goes through `edge_runtime.inference`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.stats import scores
from cloud_learner.store.examples import Example
from edge_runtime.files import write_atomic
from edge_runtime.inference.pipeline import score_batch
from edge_runtime.inference.runner import Runner

HOLD_OUT_SHARE = 10  # one example in so many

Matrix = npt.NDArray[np.float32]


class ScoredSet(msgspec.Struct, frozen=True):
    """How a package did on a set: rows, AUC, Brier score, and mean prediction over base rate."""

    rows: int
    auc: float
    brier: float
    calibration: float


class EvaluationSet(msgspec.Struct, frozen=True):
    """`features` (rows, features) float32 and `labels` (rows,) float32."""

    features: Matrix
    labels: Matrix

    def __len__(self) -> int:
        return len(self.labels)


def is_held_out(example: Example) -> bool:
    """Whether this example belongs to the hold-out: one in ten, by its content."""
    key = f"{example.device}|{example.time_s}".encode()
    return zlib.crc32(example.features, zlib.crc32(key)) % HOLD_OUT_SHARE == 0


class HoldOut:
    """The newest held-out examples, at most `bound`; what `recent` is made of.

    One thread may add while another asks for the rows. All examples are of one feature spec.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._examples: list[Example] = []

    def add(self, examples: Sequence[Example]) -> None:
        """Keep those of the examples that are held out."""
        self._examples += [example for example in examples if is_held_out(example)]
        del self._examples[: -self._bound]

    def rows(self) -> EvaluationSet:
        """The examples as one set."""
        examples = self._examples[:]  # at one moment: labels must stay with their features
        width = len(examples[0].features) // 4 if examples else 0
        joined = b"".join(example.features for example in examples)
        features = np.frombuffer(joined, "<f4").astype(np.float32)
        labels = np.array([example.label for example in examples], np.float32)
        return EvaluationSet(features.reshape(-1, width) if width else features, labels)


def probabilities(runner: Runner, features: Matrix) -> Matrix:
    """First output of every row, shape (rows,)."""
    answers: Matrix = score_batch(runner, features)[:, 0]
    return answers


def score(runner: Runner, rows: EvaluationSet) -> ScoredSet:
    """How the package behind the runner does on the set; NaN where it is undefined."""
    if not len(rows):
        return ScoredSet(0, float("nan"), float("nan"), float("nan"))
    answers = probabilities(runner, rows.features)
    base = float(rows.labels.mean())
    return ScoredSet(
        len(rows),
        scores.auc(rows.labels, answers),
        scores.brier(rows.labels, answers),
        float(answers.mean()) / base if base else float("nan"),
    )


def save_set(path: Path, rows: EvaluationSet) -> None:
    """Keep a set on disk. Raises: OSError."""
    data = (rows.features.tobytes(), rows.labels.tobytes(), rows.features.shape[1])
    write_atomic(path, msgspec.msgpack.encode(data))


def load_set(path: Path) -> EvaluationSet:
    """What `save_set` wrote. Raises: OSError, msgspec.DecodeError."""
    features, labels, width = msgspec.msgpack.decode(
        path.read_bytes(), type=tuple[bytes, bytes, int]
    )
    table = np.frombuffer(features, np.float32).reshape(-1, width)
    return EvaluationSet(table.copy(), np.frombuffer(labels, np.float32).copy())
