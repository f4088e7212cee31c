"""What is learned for tools/bench-intent, by the learner's own cycle, and kept for the next run.

Why: minutes of training are not to be repeated for a second look at a latency.

How: `whole` learns all intents at once, as a bootstrap does. `growth` begins with 50 intents; 27
more come in three steps, as micro-batches of examples that hold nothing but what is new.

Invariants: what is kept is named by what it was learned from and by the family's folder; whoever
changes the family, changes the name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_rows import Row

from cloud_learner.cycle import Cycle
from cloud_learner.experiment.features import featured
from cloud_learner.experiment.replay import read_rows
from cloud_learner.store.examples import Batch, Example
from cloud_learner.train.dataset import Matrix, Rows
from cloud_learner.train.family import Family
from cloud_learner.train.modules import load_module

FOLDER = Path(__file__).parents[1] / "models" / "intent"
REFERENCE_ROWS = 256


class Course:
    """The family, its texts, and what was learned of them, kept in `var`."""

    def __init__(self, var: Path, *, quick: bool) -> None:
        self.family, self.data = Family.load(FOLDER), load_module(FOLDER / "data.py")
        self.var = var / f"{_name_of(FOLDER)}{'-quick' if quick else ''}"
        self.var.mkdir(parents=True, exist_ok=True)
        sources = (
            (self.data.SAMPLE,) * 2 if quick else ("banking77/train.csv", "banking77/test.csv")
        )
        self.texts, self.known = self._read("known", sources[0])
        self.new_texts, self.test = self._read("test", sources[1])

    def whole(self) -> Cycle:
        """A cycle that has learned all at once."""
        cycle, kept = self._cycle(), self.var / "whole.ckpt"
        if not kept.exists():
            cycle.pretrain(self.known)
            cycle.save(kept)
        cycle.restore(kept)
        return cycle

    def grown(self) -> list[dict[str, float]]:
        """Of the start and each step: accuracy on the intents of the start, and on those since."""
        kept = self.var / "growth.json"
        if not kept.exists():
            kept.write_text(json.dumps(list(self._growing())))
        return list(json.loads(kept.read_text()))

    def _growing(self) -> Iterator[dict[str, float]]:
        cycle, (first, *_) = self._cycle(), self.data.STEPS
        ends = [*self.data.STEPS[1:], len(self.data.INTENTS)]
        cycle.pretrain(self.known.take(np.flatnonzero(self.known.labels < first)))
        yield self._right(cycle, first, first)
        for start, end in zip(self.data.STEPS, ends, strict=True):
            labels = self.known.labels
            for batch in self._batches(np.flatnonzero((start <= labels) & (labels < end)), cycle):
                cycle.learn(batch)
            yield self._right(cycle, first, end)

    def _batches(self, at: Any, cycle: Cycle) -> Iterator[Batch]:
        size = self.family.config.learning.batch_size
        for some in np.array_split(at, -(-len(at) // size)) if len(at) else ():
            yield Batch(cycle.number + 1, [self._example(int(row)) for row in some])

    def _example(self, row: int) -> Example:
        time_s = 60.0 * row
        return Example(
            *("bench", 1, row, self.family.name, time_s, time_s + 1),
            *(self.known.features[row].astype("<f4").tobytes(), self.family.spec.hash),
            *(float(self.known.labels[row]), 1.0, [], time_s + 2, time_s + 2),
        )

    def _right(self, cycle: Cycle, first: int, end: int) -> dict[str, float]:
        hit, labels = (
            cycle.answers(self.test.features).argmax(1) == self.test.labels,
            self.test.labels,
        )
        groups = {"old": labels < first, "new": (first <= labels) & (labels < end)}
        return {
            name: 100 * float(hit[chosen].mean()) for name, chosen in groups.items() if chosen.any()
        }

    def _cycle(self) -> Cycle:
        return Cycle(self.family, self.known.features[:REFERENCE_ROWS])

    def _read(self, name: str, source: str) -> tuple[list[str], Rows]:
        path = self.var / f"{name}.parquet"
        self.data.write_data(path, source)
        rows = read_rows(path, self.family.interface, task=self.family.config.task)
        found = list(featured(rows, self.family.interface, self.family.spec))
        labels = np.array([row.label for row, _ in found], np.float32)
        features: Matrix = np.stack([vector for _, vector in found if vector is not None])
        return [str(row.fields["text"]) for row, _ in found], Rows(features, labels)


def growth(course: Course) -> list[Row]:
    """The rows of the part `growth`."""
    start, *steps = course.grown()
    what = "after adding 27 intents in 3 steps"
    lost = start["old"] - steps[-1]["old"]
    rows = [Row(f"{what}: points of accuracy that the old 50 intents lose", lost, "points", 2)]
    for number, right in enumerate((start, *steps)):
        for name, value in right.items():
            rows.append(
                Row(f"growth: after {number} steps, accuracy on {name} intents", value, "%")
            )
    return rows


def _name_of(folder: Path) -> str:
    files = (path for path in sorted(folder.glob("*.*")) if path.suffix != ".md")
    content = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(content).hexdigest()[:12]
