"""Candidates: what may be shown, admitted as events, with the rows that the models are given.

Why: two hundred candidates are two hundred events of which ten are logged; what they share is
looked at once.

Invariants: candidates move no window. Without rows of the caller's all were admitted, with them the
first and, by `admit`, each that is shown. A candidate's rows are those that its record will hold.

Knows nothing about sessions and logs. Made in the turn of who asks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.device.family import Family
from edge_runtime.device.words import Event
from edge_runtime.errors import PackageError, RequestError
from edge_runtime.inference.package import Matrix
from edge_runtime.inference.scoring import Answer, Rows, Scores, Table, read
from edge_runtime.inference.slot import Arm
from edge_runtime.wire.messages import Fields

Said = tuple[str, float, Fields]


class Candidates:
    """`fields` that complete `event`, each to one of `family`; `tables` holds a row of features for
    each, (candidates, F), by arm, or why an arm has none.

    With `features`, of the stable arm's spec, the windows are asked only for arms of another spec.
    Raises: RequestError, as `Pipeline.admitted`, and (wrong_shape, not_finite).
    """

    def __init__(
        self, family: Family, event: Event, fields: Sequence[Fields], features: Matrix | None
    ) -> None:
        self.family, self.salt = family, family.salt
        self._event, self._fields = event, fields
        pipeline = family.pipeline
        arms = pipeline.admitted(*self.said(0))
        self._are_admitted = features is None or len(pipeline.engines) > 1
        if features is not None:
            features = _fitting(features, len(fields), arms[0])
        if features is not None and not self._are_admitted:
            self._rows: Sequence[Rows] | _Given = _Given(features, len(pipeline.slot.resident))
            self.tables: Sequence[Matrix | PackageError] = [features] * len(arms)
            return
        many = [{**event.fields, **each} for each in fields]
        for each in many:
            pipeline.admitted(event.kind, event.time_s, each)
        self._rows = pipeline.rows_of_many(event.time_s, many)
        if features is not None:
            _replace(self._rows, features, pipeline.slot.resident)
        self.tables = _tables(self._rows, arms, one=len(pipeline.engines) == 1)

    def said(self, index: int) -> Said:
        """The event that a candidate completes."""
        event = self._event
        return event.kind, event.time_s, {**event.fields, **self._fields[index]}

    def admit(self, said: Said) -> None:
        """Let a candidate be shown, if that was not looked at before. Raises: RequestError."""
        if not self._are_admitted:
            self.family.pipeline.admitted(*said)

    def scores(self, index: int, arms: Sequence[Arm], table: Table) -> Scores:
        """What the arms made of one candidate."""
        answers: list[Answer] = [
            each if isinstance(each, PackageError) else [float(each[index])]
            for each in table.answers
        ]
        embedding = None if table.embeddings is None else table.embeddings[index]
        return Scores(arms, self._rows[index], (answers, table.took_ns, embedding), self.salt)


class _Given:
    """The rows that the caller gave, the same for each of `resident` arms."""

    def __init__(self, features: Matrix, resident: int) -> None:
        self._features, self._resident = features, resident

    def __getitem__(self, index: int) -> Rows:
        return [self._features[index].tobytes()] * self._resident


def _fitting(features: Matrix, count: int, stable: Arm) -> Matrix:
    wanted = count, stable.runner.features
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold is not finite
            found = np.ascontiguousarray(features, "<f4")
    except (TypeError, ValueError, OverflowError) as error:
        raise _wrong_shape(count, f"are no table of numbers, {wanted}: {error}") from None
    if found.shape != wanted:
        raise _wrong_shape(count, f"have shape {found.shape}, not {wanted}")
    if not np.isfinite(found).all():
        raise RequestError(
            "not_finite",
            "the features of the candidates hold numbers that are not finite; nothing was logged",
            "leave the candidate out, or give what stands for a missing value in the feature spec",
        )
    return found


def _wrong_shape(count: int, why: str) -> RequestError:
    return RequestError(
        "wrong_shape",
        f"the features of {count} candidates {why}; nothing was logged",
        "give a row for each candidate, in the order of the feature spec",
    )


def _replace(many: Sequence[Rows], features: Matrix, resident: Sequence[Arm]) -> None:
    """The given row in the place of each that the stable arm's features would give."""
    hashes = [arm.info.spec.hash if arm.info is not None else "" for arm in resident]
    for rows, given in zip(many, features, strict=True):
        rows[:] = [
            given.tobytes() if own == hashes[0] else row
            for row, own in zip(rows, hashes, strict=True)
        ]


def _tables(many: Sequence[Rows], arms: Sequence[Arm], *, one: bool) -> list[Matrix | PackageError]:
    tables = [_table([rows[at] for rows in many]) for at in range(1 if one else len(arms))]
    return tables * len(arms) if one else tables


def _table(rows: Rows) -> Matrix | PackageError:
    try:
        return np.frombuffer(b"".join(read(rows)), "<f4").reshape(len(rows), -1)
    except PackageError as error:
        return error
