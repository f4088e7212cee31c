"""What tools/bench-learner learns: real data as streams, and whole courses over seeds.

Why: every number of the learner is a mean over seeds of the same stream through the production
joiner, batcher and cycle; so the stream is made once, and the seeds share nothing but it.

Invariants: what a seed gives depends on the seed alone, not on how many run beside it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from cloud_learner.experiment.arms import seeded
from cloud_learner.experiment.asked import Asked, read_asked
from cloud_learner.experiment.prequential import Course, course
from cloud_learner.experiment.stream import Stream, streamed
from cloud_learner.train.family import Family
from cloud_learner.train.modules import load_module

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 2

Measure = Callable[["Setup", int], dict[str, float]]


class Setup(NamedTuple):
    """A family over a stream, small enough to be sent to another process."""

    folder: Path
    changes: dict[str, Any]
    stream: Stream
    after_s: float | None = None

    def family(self, seed: int) -> Family:
        """The family of one seed."""
        return changed(seeded(Family.load(self.folder), seed), self.changes)


class UnavailableError(Exception):
    """The data is not here; the text says why."""


def changed(family: Family, changes: dict[str, Any]) -> Family:
    """The family with other values of dotted keys, such as `label.policy`."""
    plain = msgspec.to_builtins(family.config)
    for key, value in changes.items():
        *path, last = key.split(".")
        table = functools.reduce(lambda found, name: found.setdefault(name, {}), path, plain)
        table[last] = value
    return family.declared_otherwise(msgspec.convert(plain, type(family.config)))


def asked_of(name: str, folder: Path) -> Asked:
    """The predictions of a family's own data. Raises: UnavailableError."""
    family = ROOT / "models" / name
    path = folder / f"{name}.parquet"
    if not path.exists():
        try:
            load_module(family / "data.py").write_data(path)
        except FileNotFoundError as error:
            raise UnavailableError(str(error)) from error
    return read_asked(Family.load(family), path)


def first(asked: Asked, rows: int | None) -> Asked:
    """The first predictions alone; all of them for None."""
    if rows is None or rows >= len(asked):
        return asked
    return msgspec.structs.replace(
        asked,
        devices=asked.devices[:rows],
        times_s=asked.times_s[:rows],
        known_s=asked.known_s[:rows],
        features=asked.features[:rows],
        labels=asked.labels[:rows],
        fields=asked.fields[:rows],
        end_s=float(asked.times_s[rows]),
    )


def setup_of(name: str, asked: Asked, after_s: float | None = None, **changes: Any) -> Setup:
    """The stream of a family; `changes` of its declaration, with `__` for a dot."""
    folder = ROOT / "models" / name
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    family = changed(Family.load(folder), dotted)
    return Setup(folder, dotted, streamed(family, asked), after_s)


def over_seeds(setup: Setup, seeds: int, measure: Measure) -> dict[str, float]:
    """Means of what `measure` gives for each seed; two seeds at once."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(PROCESSES, seeds), context, initializer=_settle) as pool:
        found = list(pool.map(functools.partial(measure, setup), range(seeds)))
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def learned(setup: Setup, seed: int) -> Course:
    """The whole course of one seed."""
    return course(setup.family(seed), setup.stream, after_s=setup.after_s)


def quality(setup: Setup, seed: int) -> dict[str, float]:
    """Quality, normalised loss, accuracy and calibration of each part, as `part.measure`."""
    found = learned(setup, seed)
    return {
        f"{part}.{name}": value
        for part, answers in found.answers.items()
        for name, value in msgspec.structs.asdict(found.truth.measures(answers)).items()
    }


def mean(values: Sequence[float]) -> float:
    """Of all values that there are."""
    return float(np.nanmean(values))


def tell(text: str) -> None:
    """Narration, over itself on a terminal."""
    end = "\r" if sys.stderr.isatty() else "\n"
    print(f"{text:78}", end=end, file=sys.stderr, flush=True)


def _settle() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
