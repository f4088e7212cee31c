"""Offline evidence: a package scored on rows that nobody trained on, by the code of the device.

Why: a score of another implementation says nothing about what a device will answer.

Two sets: `static` was set aside before anything was learned and never changes; `recent` is a hash
sample of the stream, kept from every replica, and follows the world.

Invariants: whether an example is held out depends on its content alone, so every trust domain
draws the same line; scoring goes through `edge_runtime.inference`; what was saved by an earlier
release can be read.
"""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from edge_runtime.errors import ConfigError
from edge_runtime.files import write_atomic
from edge_runtime.inference.pipeline import score_batch
from edge_runtime.inference.runner import Runner

HOLD_OUT_SHARE = 10  # one example in so many
LATENCY_ROWS, LATENCY_ROUNDS, LATENCY_S = 32, 3, 0.05
SET_VERSION = 2  # 1 was a bare tuple of features, labels and width

Matrix = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Words(msgspec.Struct, frozen=True):
    """A word for each row: that of row i is `names[codes[i]]`; `codes` is (rows,) int64."""

    codes: Codes
    names: list[str]

    @property
    def words(self) -> list[str]:
        """The word of each row."""
        return [self.names[code] for code in self.codes.tolist()]

    @classmethod
    def of(cls, words: Iterable[str]) -> Words:
        """The words of the rows, in order."""
        numbers: dict[str, int] = {}
        codes = [numbers.setdefault(word, len(numbers)) for word in words]
        return cls(np.array(codes, np.int64), list(numbers))


class EvaluationSet(msgspec.Struct, frozen=True):
    """`features` (rows, features) float32 and `labels` (rows,) float32, and what slices need.

    `groups` says which rows compete in a ranking, `times_s` when a row was predicted and `ages_s`
    how much later its label came, both float64; `before` is the label that was known last at that
    time. NaN where unknown. `devices` and `fields` may be empty: such a set has no such slices.
    `sessions` say whose row it is; they may be empty, too, and are not saved.
    """

    features: Matrix
    labels: Matrix
    groups: Codes = np.empty(0, np.int64)
    times_s: Floats = np.empty(0)
    ages_s: Floats = np.empty(0)
    before: Matrix = np.empty(0, np.float32)
    devices: Words = Words.of(())
    fields: dict[str, Words] = {}
    sessions: Words = Words.of(())

    def __post_init__(self) -> None:
        count = len(self.labels)
        if len(self.groups) != count:
            msgspec.structs.force_setattr(self, "groups", np.zeros(count, np.int64))
        for name, kind in (("times_s", np.float64), ("ages_s", np.float64), ("before", np.float32)):
            if len(getattr(self, name)) != count:
                msgspec.structs.force_setattr(self, name, np.full(count, np.nan, kind))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: npt.NDArray[np.intp]) -> EvaluationSet:
        """The rows at these positions."""

        def taken(words: Words) -> Words:
            if not words.names:
                return words
            return Words.of([words.names[code] for code in words.codes[index].tolist()])

        return EvaluationSet(
            **{name: getattr(self, name)[index] for name in _ARRAYS},
            devices=taken(self.devices),
            fields={name: taken(words) for name, words in self.fields.items()},
            sessions=taken(self.sessions),
        )

    def set_aside(self, share: int, seed: int) -> tuple[EvaluationSet, EvaluationSet]:
        """All but one row in `share`, shuffled, and those, in order; by chance, as `seed` says.

        Rows that compete are in one of the two together.
        """
        random = np.random.default_rng(seed)
        order = random.permutation(len(self))
        aside = np.arange(len(self)) < len(self) // share
        if self.groups.any():
            groups = random.permutation(np.unique(self.groups))
            aside = np.isin(self.groups[order], groups[: len(groups) // share])
        return self.take(order[~aside]), self.take(np.sort(order[aside]))


class ScoredSet(msgspec.Struct, frozen=True):
    """How a package did on a set; NaN where a number is undefined, as `Task` says."""

    rows: int
    quality: float
    loss: float
    calibration: float


_NOTHING = ScoredSet(0, float("nan"), float("nan"), float("nan"))


def is_held_out(example: Example, group: str = "") -> bool:
    """Whether this example belongs to the hold-out: one in ten, by its content.

    Where rows compete, those that share the field `group` are held out together or not at all.
    """
    if group:
        return zlib.crc32(f"{example.fields.get(group, '')}".encode()) % HOLD_OUT_SHARE == 0
    key = f"{example.device}|{example.time_s}".encode()
    return zlib.crc32(example.features, zlib.crc32(key)) % HOLD_OUT_SHARE == 0


def probabilities(runner: Runner, features: Matrix) -> Matrix:
    """First output of every row, shape (rows,)."""
    answers: Matrix = score_batch(runner, features)[:, 0]
    return answers


def score(task: Task, rows: EvaluationSet, outputs: Matrix, where: Mask | None = None) -> ScoredSet:
    """How good the answers (rows, outputs) to the set are, or those to its rows `where`."""
    chosen = slice(None) if where is None else where
    labels, groups, outputs = rows.labels[chosen], rows.groups[chosen], outputs[chosen]
    if not len(labels):
        return _NOTHING
    if not np.isfinite(outputs).all():
        return msgspec.structs.replace(_NOTHING, rows=len(labels))
    return ScoredSet(
        len(labels),
        task.quality(labels, outputs, groups),
        float(task.losses(labels, outputs, groups).mean()),
        task.calibration(labels, outputs),
    )


def row_us(runner: Runner, rows: EvaluationSet) -> float:
    """What one row costs, in µs: the median of the first rows, the least of several rounds, since
    a busy machine only adds to it. NaN for an empty set. Raises: PackageError `run_failed`.
    """
    packed = [row.astype("<f4").tobytes() for row in rows.features[:LATENCY_ROWS]]
    medians: list[float] = []
    until_s = time.perf_counter() + LATENCY_S
    while (
        packed and len(medians) < LATENCY_ROUNDS and (not medians or time.perf_counter() < until_s)
    ):
        medians.append(statistics.median(_times_us(runner, packed)))
    return min(medians, default=float("nan"))


def _times_us(runner: Runner, packed: list[bytes]) -> list[float]:
    times = []
    for row in packed:
        started_ns = time.perf_counter_ns()
        runner.answer(row)
        times.append((time.perf_counter_ns() - started_ns) / 1000)
    return times


class _Saved(msgspec.Struct):
    """A set as MessagePack: arrays little-endian, of the types that `EvaluationSet` names."""

    width: int
    arrays: dict[str, bytes]
    words: dict[str, tuple[bytes, list[str]]]
    version: int = SET_VERSION


_ARRAYS = {
    "features": "<f4",
    "labels": "<f4",
    "groups": "<i8",
    "times_s": "<f8",
    "ages_s": "<f8",
    "before": "<f4",
}


def save_set(path: Path, rows: EvaluationSet) -> None:
    """Keep a set on disk. Raises: OSError."""
    words = {"": rows.devices} | rows.fields  # no field has an empty name
    saved = _Saved(
        rows.features.shape[1],
        {name: getattr(rows, name).astype(kind).tobytes() for name, kind in _ARRAYS.items()},
        {name: (each.codes.astype("<i8").tobytes(), each.names) for name, each in words.items()},
    )
    write_atomic(path, msgspec.msgpack.encode(saved))


def load_set(path: Path) -> EvaluationSet:
    """What `save_set` wrote, in this or an earlier release.

    Raises: OSError, msgspec.DecodeError, ConfigError `bad_version`.
    """
    saved = msgspec.msgpack.decode(path.read_bytes(), type=_Saved | tuple[bytes, bytes, int])
    if isinstance(saved, tuple):
        features, labels, width = saved
        saved = _Saved(width, {"features": features, "labels": labels}, {})
    if saved.version != SET_VERSION:
        raise ConfigError(
            "bad_version",
            f"{path} is of version {saved.version}; this reads {SET_VERSION} and before",
            "serve with what wrote it",
        )
    found = {name: np.frombuffer(data, _ARRAYS[name]) for name, data in saved.arrays.items()}
    arrays: dict[str, Any] = {
        name: values.astype(values.dtype.newbyteorder("=")) for name, values in found.items()
    }
    arrays["features"] = arrays["features"].reshape(-1, saved.width)
    words = {
        name: Words(np.frombuffer(codes, "<i8").astype(np.int64), names)
        for name, (codes, names) in saved.words.items()
    }
    return EvaluationSet(**arrays, devices=words.pop("", Words.of(())), fields=words)
