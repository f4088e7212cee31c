"""Scoring: what each of the arms of a family answers to the same event.

Why: a release on trial may cost a request its run and nothing else. What one arm does wrong is told
in the place of its own answer, and the others answer all the same.

Invariants: answers stand in the order of the arms, the stable one first; each is a list of numbers,
or the error that there is in its place. Where several arms run, each run is timed, and `running` of
its runner says so as long as it lasts. An arm that was given up is not run.

Knows nothing about weights and plans, nor which answer is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import get_ident
from time import perf_counter_ns
from typing import cast

import msgspec
import numpy as np

from edge_runtime.errors import PackageError
from edge_runtime.inference.slot import Arm
from edge_runtime.personal.prior import Matrix, Vector

Row = bytes | PackageError
"""Features, float32 little-endian, or why there are none."""

Rows = list[Row]
"""The features of one event: a row for each arm, those that answer first."""

Answer = list[float] | PackageError
Answers = tuple[list[Answer], Sequence[int], Vector | None]
"""What each arm answered to an event; the nanoseconds that a row took it, none for a lone arm,
which nobody compares with another; and the embedding of the stable one, if it gives any."""


class Scores(msgspec.Struct, frozen=True):
    """What `arms` made of an event: of its `rows`, one for each arm and shadow, their `answers`;
    `salt` was the family's when they did.
    """

    arms: Sequence[Arm]
    rows: Rows
    answers: Answers
    salt: str


class Table(msgspec.Struct, frozen=True):
    """What arms made of a table of rows: the first number of each answer, of shape (rows,), NaN for
    a row on which the model fails, or the error where it fails on all; the nanoseconds that a row
    took; the stable arm's embeddings, if any.
    """

    answers: list[Vector | PackageError]
    took_ns: list[int]
    embeddings: Matrix | None


GIVEN_UP = PackageError("run_failed", "the release was left on this device; it is not run any more")


def score(arms: Sequence[Arm], rows: Rows) -> Answers:
    """What each of `arms` answers to its row; rows beyond them are nobody's.

    The embedding lies in the runner's memory: it holds until the next answer.
    """
    if len(arms) > 1:
        return _each(arms, rows)
    runner, row = arms[0].runner, rows[0]
    if isinstance(row, PackageError):
        return [row], (), None
    try:
        return [runner.answer(row)], (), runner.embedding
    except PackageError as error:
        return [error], (), None


def score_many(arms: Sequence[Arm], many: Sequence[Rows]) -> list[Answers]:
    """As `score` for each of `many`, in one run of each arm; on any thread."""
    took_ns: list[int] = []
    columns: list[list[Answer]] = []
    if not many:
        return []
    embeddings: Sequence[Vector | None] = [None] * len(many)
    for index, arm in enumerate(arms):
        started_ns = _begun(arm, len(many))
        try:
            if not index and arm.runner.width:
                embeddings, column = _embedded(arm, [rows[0] for rows in many])
            else:
                column = _column(arm, [rows[index] for rows in many])
            columns.append(column)
        finally:
            took_ns.append(_ended(arm, started_ns) // len(many))
    return [
        (list(answers), took_ns, embedding)
        for answers, embedding in zip(zip(*columns, strict=True), embeddings, strict=True)
    ]


def score_table(arms: Sequence[Arm], tables: Sequence[Matrix | PackageError]) -> Table:
    """What each of `arms` answers to its table, (rows, features), in one run, or why it has none;
    on any thread.
    """
    answers: list[Vector | PackageError] = []
    took_ns: list[int] = []
    embeddings = None
    for index, (arm, x) in enumerate(zip(arms, tables, strict=False)):
        if isinstance(x, PackageError):
            answers.append(x)
            took_ns.append(0)
            continue
        started_ns = _begun(arm, len(x))
        try:
            if arm.runner.given_up:
                answers.append(GIVEN_UP)
            elif not index and arm.runner.width:
                embeddings, column = _every(arm.runner.embed, x)
                answers.append(column[:, 0])
            else:
                answers.append(_every(partial(_alone, arm), x)[0][:, 0])
        except PackageError as error:
            answers.append(error)
        finally:
            took_ns.append(_ended(arm, started_ns) // len(x))
    return Table(answers, took_ns, embeddings)


def read(rows: Sequence[Row]) -> list[bytes]:
    """Rows of features. Raises: PackageError, the first that stands in the place of one."""
    for row in rows:
        if isinstance(row, PackageError):
            raise row
    return cast("list[bytes]", rows)


def _every(run: Callable[[Matrix], tuple[Matrix, ...]], x: Matrix) -> tuple[Matrix, ...]:
    """What `run` makes of each row; NaN of one on which it fails. Raises: PackageError, of all."""
    try:
        return run(x)
    except PackageError as error:
        failed = error
    found: list[tuple[Matrix, ...] | None] = []
    for at in range(len(x) if len(x) > 1 else 0):
        try:
            found.append(run(x[at : at + 1]))
        except PackageError:
            found.append(None)
    made = next((each for each in found if each is not None), None)
    if made is None:
        raise failed
    missing = tuple(np.full_like(each, np.nan) for each in made)
    return tuple(np.concatenate(each) for each in zip(*(e or missing for e in found), strict=True))


def _alone(arm: Arm, x: Matrix) -> tuple[Matrix]:
    """What an arm answers to each row of `x` whatever stands beside it."""
    if arm.runner.batchable:
        return (arm.runner.run(x),)
    return (np.concatenate([arm.runner.run(row[None]) for row in x]),)


def _each(arms: Sequence[Arm], rows: Rows) -> Answers:
    answers: list[Answer] = []
    took_ns: list[int] = []
    for arm, row in zip(arms, rows, strict=False):
        started_ns = _begun(arm, 1)
        try:
            given_up = arm.runner.given_up
            answers.append(GIVEN_UP if given_up else arm.runner.answer(*read([row])))
        except PackageError as error:
            answers.append(error)
        finally:  # also of a run that Ctrl-C ended: it does not hang
            took_ns.append(_ended(arm, started_ns))
    return answers, took_ns, arms[0].runner.embedding if type(answers[0]) is list else None


def _embedded(arm: Arm, rows: Rows) -> tuple[Sequence[Vector | None], list[Answer]]:
    try:
        x = np.frombuffer(b"".join(read(rows)), "<f4").reshape(len(rows), arm.runner.features)
        embeddings, answers = arm.runner.embed(x)
    except PackageError:
        return [None] * len(rows), _column(arm, rows)
    return list(embeddings), [*answers.tolist()]


def _column(arm: Arm, rows: Rows) -> list[Answer]:
    if arm.runner.given_up:
        return [GIVEN_UP for _ in rows]
    try:
        return [*arm.runner.answer_many(read(rows))]
    except PackageError as error:
        if len(rows) == 1:
            return [error]
        return [answer for row in rows for answer in _column(arm, [row])]


def _begun(arm: Arm, rows: int) -> int:
    started_ns = perf_counter_ns()
    arm.runner.running[get_ident()] = started_ns, rows
    return started_ns


def _ended(arm: Arm, started_ns: int) -> int:
    del arm.runner.running[get_ident()]
    return perf_counter_ns() - started_ns
