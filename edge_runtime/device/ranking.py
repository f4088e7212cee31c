"""Ranking: which of many candidates a session is shown, and how likely that was.

Why: what is shown is what can be learned from; a ranking that never tries anything else learns only
that it was right. So candidates are ordered by what the session makes of them and by how unsure it
is (LinUCB, Li et al. 2010), and a share of the places is filled at random.

Invariants: only what is shown is logged, each with its place and the probability with which it
stood there, given those above it. That is exact: it, and what was drawn, follow from the log. One
arm answers a whole ranking: the one that the number of its first prediction draws. What is shown
was admitted before any of it moves a window; a ranking that is refused left no trace.

Knows nothing about sessions' store, sockets and disks.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.device.adapting import Adapting
from edge_runtime.device.asking import Asking
from edge_runtime.device.candidates import Candidates
from edge_runtime.device.serving import Serving
from edge_runtime.device.visitor import Visitor
from edge_runtime.device.words import Event
from edge_runtime.errors import HeadwaterError, PackageError, RequestError
from edge_runtime.events.log import RECORD_BYTES_MAX
from edge_runtime.inference.history import Number
from edge_runtime.inference.package import Matrix
from edge_runtime.inference.scoring import Scores, Table, score_table
from edge_runtime.inference.slot import Arm
from edge_runtime.metrics import Histogram
from edge_runtime.personal.ranking import optimistic
from edge_runtime.rollout.plan import choose
from edge_runtime.wire import codec
from edge_runtime.wire.messages import Fields, PredictionRecord, Shown

CANDIDATES_MAX = 1024

Floats = npt.NDArray[np.floating]


class Ranked(msgspec.Struct, frozen=True):
    """A candidate that is shown: number `index` of those given, known by `id` from now on.

    `score` is the session's answer to it, without the bonus for being unsure, `base` the model's;
    `chance` is the probability with which it stands here, given those above it.
    """

    id: str
    index: int
    score: float
    base: float
    chance: float
    release: str
    arm: str


class _View(msgspec.Struct, frozen=True):
    """What models and a session make of candidates: `base` answers, the session's `shifts`, and
    the `bonus` by which they are ordered; all of shape (candidates,).
    """

    arms: Sequence[Arm]
    table: Table
    base: Floats
    task: str
    shifts: Floats
    bonus: Floats
    explore: float


class _Shown(msgspec.Struct, frozen=True):
    """A candidate that will be shown: its record, and that in bytes."""

    index: int
    shift: float
    scores: Scores
    record: PredictionRecord
    data: bytes


class Ranking:
    """Rankings of the sessions of `adapting`; `latency` is of whole rankings."""

    def __init__(
        self,
        asking: Asking,
        adapting: Adapting,
        serving: Serving,
        refused: Callable[[HeadwaterError], None],
    ) -> None:
        self._asking, self._adapting, self._serving = asking, adapting, serving
        self._refused = refused
        self.latency = Histogram()

    def rank(
        self,
        visitor: Visitor,
        event: Event,
        fields: Sequence[Fields],
        k: int,
        features: Matrix | None,
    ) -> list[Ranked]:
        """See `Session.rank`."""
        with self._counted():
            _check_counts(len(fields), k)
            scored = self._scored(visitor.family, event, fields, features)
            with self._asking.turn:
                return self._ranked(visitor, k, *scored)

    async def rank_async(
        self,
        visitor: Visitor,
        event: Event,
        fields: Sequence[Fields],
        k: int,
        features: Matrix | None,
        *,
        timeout_s: float | None,
    ) -> list[Ranked]:
        """See `Session.rank_async`."""
        serving, count = self._serving, len(fields)
        with self._counted():
            _check_counts(count, k)
            if count <= serving.model(visitor.family).quick_rows:
                scored = self._scored(visitor.family, event, fields, features)
            else:
                scored = await serving.worker.submit(
                    lambda _: [self._scored(visitor.family, event, fields, features)],
                    None,
                    rows=count,
                    timeout_s=serving.deadline_s if timeout_s is None else timeout_s,
                )
            with self._asking.turn:
                return self._ranked(visitor, k, *scored)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        started_ns = time.perf_counter_ns()
        try:
            yield
        except HeadwaterError as error:
            self._refused(error)
            raise
        self.latency.record((time.perf_counter_ns() - started_ns) / 1000)

    def _scored(
        self, name: str, event: Event, fields: Sequence[Fields], features: Matrix | None
    ) -> tuple[Sequence[Arm], Candidates, Table]:
        """What the arms that serve now make of each candidate; others are answered meanwhile."""
        with self._asking.turn:
            family = self._asking.family(name)
            candidates = Candidates(family, event, fields, features)
            lease = family.pipeline.slot.lease()
        with lease as arms:
            return arms, candidates, score_table(arms, candidates.tables)

    def _ranked(
        self, visitor: Visitor, k: int, arms: Sequence[Arm], candidates: Candidates, table: Table
    ) -> list[Ranked]:
        first = self._asking.next_number()
        view = self._view(visitor, arms, table, _base(arms, table, candidates.salt, first))
        values = (_odds(view.base) if view.task == "binary" else view.base) + view.bonus
        order = np.argsort(-values, kind="stable").tolist()
        if not np.isfinite(view.base).all():
            order = [index for index in order if math.isfinite(view.base[index])]
        if not order:
            raise PackageError("run_failed", "the model has no answer to any candidate")
        places = enumerate(_places(order, k, view.explore, candidates.salt, first), 1)
        shown = [_admitted(candidates, view, first, (place, *placed)) for place, placed in places]
        self._asking.counts["predictions"] += len(shown)
        return [self._show(visitor, candidates, each) for each in shown]

    def _view(self, visitor: Visitor, arms: Sequence[Arm], table: Table, base: Floats) -> _View:
        nothing = np.zeros(len(base), np.float32)
        policy = arms[0].info.policy if arms[0].info is not None else None
        if policy is None or table.embeddings is None:
            return _View(arms, table, base, "", nothing, nothing, 0.0)
        head = visitor.head(arms[0])
        believed = head or self._adapting.blank(policy.prior)
        with np.errstate(over="ignore", invalid="ignore"):  # embeddings may be of any size
            moved, bonus = optimistic(believed, table.embeddings, policy.optimism)
        return _View(arms, table, base, policy.prior.task, moved, bonus, policy.explore)

    def _show(self, visitor: Visitor, candidates: Candidates, shown: _Shown) -> Ranked:
        """Log a candidate, let it move the windows, and remember it for its label."""
        record, asking = shown.record, self._asking
        number = asking.next_number()
        own = asking.logged(candidates.family, record, number, shown.data)
        asking.moved(candidates.family, (record.kind, record.time_s, record.fields))
        told = visitor.told(shown.scores, number, own, record.scored[0], shown.shift)
        chance = record.shown.chance if record.shown is not None else 1.0
        return Ranked(
            own, shown.index, told.outputs[0], told.base[0], chance, told.release, told.arm
        )


def _admitted(
    candidates: Candidates, view: _View, first: Number, placed: tuple[int, int, float]
) -> _Shown:
    """A candidate that may be shown, as it will be logged. Raises: RequestError."""
    place, index, chance = placed
    said = candidates.said(index)
    candidates.admit(said)
    scores = candidates.scores(index, view.arms, view.table)
    shift = float(view.shifts[index])
    shown = Shown(place, len(view.base), chance)
    record = candidates.family.record(scores, said, first, adapted=shift != 0.0, shown=shown)
    data = codec.encode(record)
    if len(data) > RECORD_BYTES_MAX:
        raise RequestError(
            "too_large",
            f"a candidate takes {len(data)} bytes, the log at most {RECORD_BYTES_MAX}; nothing "
            "was logged",
            "send shorter texts",
        )
    return _Shown(index, shift, scores, record, data)


def _check_counts(count: int, k: int) -> None:
    if not count or k < 1:
        raise RequestError(
            "no_candidates",
            f"{k} of {count} candidates were asked for; nothing was logged",
            "give at least one, and ask for at least one",
        )
    if count > CANDIDATES_MAX:
        raise RequestError(
            "too_many_candidates",
            f"{count} candidates were given, at most {CANDIDATES_MAX} are ranked; "
            "nothing was logged",
            "choose among them first, with a cheaper rule",
        )


def _base(arms: Sequence[Arm], table: Table, salt: str, first: Number) -> Floats:
    """The answers of the arm that is drawn, or else of the stable one. Raises: PackageError."""
    drawn = table.answers[choose([arm.weight for arm in arms], salt, *first)]
    answers = table.answers[0] if isinstance(drawn, PackageError) else drawn
    if isinstance(answers, PackageError):
        raise answers
    return answers


def _odds(chances: Floats) -> Floats:
    """Log odds to be ordered by: infinite at 0 and 1; NaN stays what it is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(chances / (1 - chances))


def _places(
    order: list[int], k: int, explore: float, salt: str, first: Number
) -> Iterator[tuple[int, float]]:
    """The candidate of each place, and the probability with which it stands there: the best that is
    left or, with probability `explore`, any that is left.
    """
    count = min(k, len(order))
    seed = f"{salt}|rank|{first[0]}|{first[1]}".encode()
    points = np.frombuffer(hashlib.shake_256(seed).digest(8 * count), ">u8") / 2.0**64
    for point in points.tolist():
        left = len(order)
        at = min(int(point / explore * left), left - 1) if point < explore else 0
        yield order.pop(at), explore / left + (0.0 if at else 1 - explore)
