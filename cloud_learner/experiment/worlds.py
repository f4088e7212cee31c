"""Comparison worlds: what other ways of working would have answered to the very same events.

Why: "fresh and with windows is better" is a claim that one run must prove, side by side.

The worlds are scored from the archive of examples, each once with its last final label, by the
code that serves: packages through the runner, features as they were logged. Frozen worlds keep the
model of the bootstrap's period; the static ones see no window. The continual static world learns by
the ordinary cycle and serves each of its releases at once, with no canary to wait for.

Invariants: the same archive content gives the same bits: rows are ordered by time, device and the
order on the device, and nothing depends on epochs or wall time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.cycle import Candidate, Cycle
from cloud_learner.evaluate.offline import probabilities
from cloud_learner.store.archive import Archive
from cloud_learner.store.examples import Batch, Example
from cloud_learner.train.dataset import Matrix, Rows
from cloud_learner.train.family import Family
from edge_runtime.inference.runner import Runner

RELEASE_BATCHES = 4  # the continual static world serves a new release after so many micro-batches
REFERENCE_ROWS = 5000
PROGRESS_BATCHES = 50

_EXAMPLES = """
SELECT device, time_s, label_time_s, features, label, scored[1].outputs[1] AS served
FROM examples
WHERE family = '{family}' AND spec = '{spec}' AND final AND NOT early
QUALIFY row_number() OVER (PARTITION BY device, epoch, seq ORDER BY revision DESC) = 1
ORDER BY time_s, device, epoch, seq
"""

Progress = Callable[[str], None]


class History(msgspec.Struct, frozen=True):
    """All examples of the archive in order, as they stand now; arrays share the first dimension."""

    devices: list[str]
    times_s: npt.NDArray[np.float64]
    known_s: npt.NDArray[np.float64]
    features: Matrix
    labels: Matrix
    served: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.labels)


def history(archive: Archive, family: Family) -> History:
    """Read the archive's examples of the family as it is; those of other feature specs are left."""
    sql = _EXAMPLES.format(family=family.name, spec=family.spec.hash)
    table: Any = archive.query(sql).fetchnumpy()
    features = np.concatenate([np.empty(0, np.float32), *table["features"]])
    return History(
        devices=[str(name) for name in table["device"]],
        times_s=np.asarray(table["time_s"], np.float64),
        known_s=np.asarray(table["label_time_s"], np.float64),
        features=features.astype(np.float32).reshape(-1, family.spec.size),
        labels=np.asarray(table["label"], np.float32),
        served=np.asarray(table["served"], np.float64),
    )


def frozen(package: Path, past: History) -> Matrix:
    """Scores of one package for every row: the world that stopped learning."""
    return probabilities(Runner(package), past.features)


def static_worlds(
    family: Family, past: History, learned_through_s: float, progress: Progress
) -> tuple[Matrix, Matrix]:
    """Scores of the world without windows, frozen and continual."""
    static = [f.name for f in family.spec.features if f.window is None]
    columns = [family.spec.names.index(name) for name in family.spec.subset(static).names]
    features = np.ascontiguousarray(past.features[:, columns])
    before = (past.times_s < learned_through_s) & (past.known_s < learned_through_s)
    known = Rows(features[before], past.labels[before])
    cycle = Cycle(family.restricted(static), known.features[:REFERENCE_ROWS], family.spec)
    cycle.pretrain(known)
    kept = _scores(cycle.candidate(), features)
    scores = kept.copy()
    matured_s = past.times_s + family.config.label.window_s
    batches = _batches(family, past, learned_through_s)
    for number, rows in enumerate(batches, start=1):
        cycle.learn(Batch(number, [example(family, past, row) for row in rows]))
        if number % RELEASE_BATCHES == 0:
            start = int(np.searchsorted(past.times_s, matured_s[rows[-1]]))
            scores[start:] = _scores(cycle.candidate(), features[start:])
        if number % PROGRESS_BATCHES == 0:
            progress(f"static and continual: {number} of {len(batches)} micro-batches")
    return kept, scores


def _batches(family: Family, past: History, learned_through_s: float) -> list[npt.NDArray[np.intp]]:
    """Rows of each micro-batch: what the learner had, no label that came after its window."""
    in_time = past.known_s <= past.times_s + family.config.label.window_s
    rows = np.flatnonzero((past.times_s >= learned_through_s) & in_time)
    size = family.config.learning.batch_size
    return [rows[at : at + size] for at in range(0, len(rows) - size + 1, size)]


def example(family: Family, past: History, row: int) -> Example:
    """A row as the example that the learner had, but for what never orders or trains."""
    return Example(
        device=past.devices[row],
        epoch=0,
        seq=int(row),
        family=family.name,
        time_s=float(past.times_s[row]),
        label_time_s=float(past.known_s[row]),
        features=past.features[row].astype("<f4").tobytes(),
        spec=family.spec.hash,
        label=float(past.labels[row]),
        propensity=1.0,
        scored=[],
        arrived_s=0.0,
        matured_s=0.0,
    )


def _scores(candidate: Candidate, features: Matrix) -> Matrix:
    with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
        path = Path(folder) / "world.onnx"
        path.write_bytes(candidate.package)
        return probabilities(Runner(path), features)
