"""What happens when the world changes at once, comes back, or does not change at all.

Why: how long a learner is wrong after a change, whether it must learn again what it knew once, and
that it finds no freshness where there can be none.

Invariants: labels are turned at fixed rows, so every seed meets the same worlds.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import msgspec
import numpy as np
from bench_learner_streams import ROOT, Setup, asked_of, first, learned, over_seeds, setup_of, tell
from bench_rows import Row

from cloud_learner.experiment.asked import Asked
from cloud_learner.experiment.freshness import freshness
from cloud_learner.experiment.report import Options, Report
from cloud_learner.stats.scores import auc
from cloud_learner.stats.tasks import Matrix

TURNS = (0.45, 0.6, 0.75, 0.9)  # of the stream: turned, back, turned, back
NEAR = 0.03
WINDOW = 500
DAY_S = 86_400.0


def shift(data: Path, seeds: int, rows: int | None) -> list[Row]:
    """elec2, its labels turned round twice and back."""
    asked = _turned(first(asked_of("electricity", data), rows))
    with_concepts = over_seeds(setup_of("electricity", asked), seeds, _recovery)
    without = over_seeds(setup_of("electricity", asked, drift__concepts=0), seeds, _recovery)
    found = []
    for number, name in enumerate(("turned", "back", "turned again", "back again")):
        found += [
            Row(f"sudden shift, {name}: micro-batches to recover", with_concepts[str(number)], ""),
            Row(f"sudden shift, {name}: without recall", without[str(number)], ""),
        ]
    return [*found, Row("sudden shift: alarms of the loss", with_concepts["alarms"], "")]


def _recovery(setup: Setup, seed: int) -> dict[str, float]:
    course = learned(setup, seed)
    truth, answers = course.truth, course.answers["student"][:, 0]
    total = len(setup.stream.asked)
    starts = [int(np.searchsorted(truth.rows, share * total)) for share in TURNS]
    ends = [*starts[1:], len(truth)]
    size = setup.family(seed).config.learning.batch_size
    before = slice(max(0, starts[0] - 5 * WINDOW), starts[0])
    usual = auc(truth.labels[before], answers[before])
    found = {
        str(number): _batches(truth.labels[start:end], answers[start:end], usual, size)
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    }
    return {**found, "alarms": float(sum(alarm.source == "loss" for alarm in course.alarms))}


def _batches(labels: Matrix, answers: Matrix, usual: float, size: int) -> float:
    """Micro-batches until the AUC of the next `WINDOW` rows is near what it used to be."""
    for at in range(0, len(labels) - WINDOW, size):
        if auc(labels[at : at + WINDOW], answers[at : at + WINDOW]) >= usual - NEAR:
            return at / size
    return math.nan


def _turned(asked: Asked) -> Asked:
    places = np.arange(len(asked)) / len(asked)
    turned = np.searchsorted(TURNS, places, side="right") % 2 == 1
    labels = np.where(turned, 1 - asked.labels, asked.labels).astype(np.float32)
    return msgspec.structs.replace(asked, labels=labels)


def control(data: Path, rows: int) -> list[Row]:
    """The freshness experiment on flights: in order, and at shuffled times."""
    asked_of("flight_delay", data)  # writes the file
    with tempfile.TemporaryDirectory() as folder:
        path = _cut(data / "flight_delay.parquet", Path(folder) / "flights.parquet", rows)
        report = freshness(
            ROOT / "models/flight_delay",
            path,
            Options.of("never,7d,1d", "incremental", 1, 1),
            Path(folder) / "out",
            tell=tell,
        )
    low, high = report.control.recency.low, report.control.recency.high
    return [
        Row("flights, shuffled time: interval of freshness, low", low, "NE", 0.0),
        Row("flights, shuffled time: interval of freshness, high", high, "NE", 0.0, True),
        Row("flights, in order: NE lost by never shipping", _lost(report), "NE"),
    ]


def _lost(report: Report) -> float:
    """By the slowest cadence of the production cycle, against the fastest."""
    slowest = max(report.lines, key=lambda line: line.every_s)
    return slowest.over_fastest.mean if slowest.over_fastest is not None else math.nan


def _cut(source: Path, target: Path, rows: int) -> Path:
    import duckdb

    with duckdb.connect() as database:
        database.execute("SET TimeZone = 'UTC'")
        database.sql(
            f"SELECT * FROM '{source}' ORDER BY event_time LIMIT {3 * rows}"
        ).write_parquet(str(target))
    return target
