"""The persistence baseline: what is to be had for nothing, by repeating the label before.

Why: on a stream whose labels come in runs, an impressive accuracy may be worth less than no model
at all (Žliobaitė, Bifet, Read, Pfahringer & Holmes, "Evaluation methods and decision theory for
classification of streaming data with temporal dependence", Machine Learning 2015).

Invariants: only rows count before which a label was known. Knows nothing about limits.
"""

from __future__ import annotations

import math

import numpy as np

from cloud_learner.evaluate.offline import EvaluationSet, Matrix
from cloud_learner.stats.tasks import Task


def over_persistence(task: Task, rows: EvaluationSet, outputs: Matrix) -> float:
    """Kappa over persistence, (a - b) / (1 - b) with the accuracies a of the answers and b of the
    label before; of regression, with a mean squared error as 1 - a. At most 1; 0 is no better.

    NaN for ranking, without rows, and where the label before is always right.
    """
    known = np.isfinite(rows.before)
    if task.kind == "ranking" or not known.any() or not np.isfinite(outputs).all():
        return math.nan
    labels, before = rows.labels[known], rows.before[known]
    errors = _errors(task, labels, _answers(task, outputs[known]))
    if not (reach := _errors(task, labels, before)):
        return math.nan
    return 1.0 - errors / reach


def _answers(task: Task, outputs: Matrix) -> Matrix:
    if task.kind == "multiclass":
        outputs = outputs.argmax(1, keepdims=True).astype(np.float32)
    answers: Matrix = outputs[:, 0]
    return answers


def _errors(task: Task, labels: Matrix, answers: Matrix) -> float:
    if task.kind == "regression":
        return float(np.mean((answers.astype(np.float64) - labels) ** 2))
    if task.kind == "binary":
        return float(np.mean((answers >= 0.5) != (labels >= 0.5)))
    return float(np.mean(answers != labels))
