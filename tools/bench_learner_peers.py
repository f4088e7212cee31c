"""river's best beside ours: an adaptive random forest and a Hoeffding tree on the same stream.

Why: river is what the field learns streams with. Its models learn from each row by itself, at once;
ours learn micro-batches and end as one small int8 network.

Invariants: same rows, same features, same warm-up, each row answered before it is learned.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_learner_streams import Setup, asked_of, first, learned, setup_of, tell
from bench_rows import Row

from cloud_learner.experiment.prequential import stream_start_s
from cloud_learner.experiment.scoring import Truth, truth_of
from cloud_learner.stats.tasks import Matrix

TREES = 10


def peers(data: Path, names: tuple[str, ...], rows: int | None) -> list[Row]:
    """Each family's stream, learned by ours and by both peers."""
    from river.forest import ARFClassifier
    from river.tree import HoeffdingTreeClassifier

    makers: dict[str, Callable[[], Any]] = {
        "river ARF": lambda: ARFClassifier(n_models=TREES, seed=1),
        "river Hoeffding tree": HoeffdingTreeClassifier,
    }
    found: list[Row] = []
    for name in names:
        setup = setup_of(name, first(asked_of(name, data), rows))
        found += _rows_of(f"{name}, ours", *_ours(setup))
        for peer, make in makers.items():
            tell(f"{name}: {peer}")
            found += _rows_of(f"{name}, {peer}", *_peer(setup, make()))
    return found


def _rows_of(what: str, truth: Truth, answers: Matrix, seconds: float) -> list[Row]:
    measures = truth.measures(answers)
    rows = [Row(f"{what}: accuracy", measures.accuracy, "")]
    if truth.task.kind == "binary":
        rows.append(Row(f"{what}: AUC", measures.quality, ""))
    return [*rows, Row(f"{what}: examples/s", len(truth) / seconds, "1/s")]


def _ours(setup: Setup) -> tuple[Truth, Matrix, float]:
    started_s = time.process_time()
    course = learned(setup, 0)
    return course.truth, course.answers["student"], time.process_time() - started_s


def _peer(setup: Setup, model: Any) -> tuple[Truth, Matrix, float]:
    family, asked = setup.family(0), setup.stream.asked
    task = family.config.task
    truth = truth_of(task, asked, stream_start_s(asked), family.config.label.window_s)
    answers = np.zeros((len(asked), task.outputs), np.float32)
    started_s = time.process_time()
    for row, values in enumerate(asked.features.tolist()):
        named = dict(zip(family.spec.names, values, strict=True))
        for label, chance in model.predict_proba_one(named).items():
            if task.kind == "multiclass":
                answers[row, label] = chance
            elif label:
                answers[row, 0] = chance
        if np.isfinite(asked.labels[row]):
            model.learn_one(named, int(asked.labels[row]))
    return truth, answers[truth.rows], time.process_time() - started_s
