"""The pipeline: an event's features and the windows that it moves, before and after its answer.

Why: the device and every gate that judges a release run this code, and no other.

Event time: an event more than `skew_s_max` ahead is refused; ahead of the machine's time where the
interface says `clock = "wall"`, else ahead of the newest event, to which the time is added that has
passed since it came, so that a device may have been silent for long; the first event of a process
is not judged so. An event more than `lateness_s_max` behind the newest one is answered and counted,
and does not move the windows. A label moves windows over labels, never the event clock.

Invariants: what asks (`admitted`, `rows`, `admit`) changes nothing, and what moves the
windows cannot fail, so that a caller can log in between. An event is answered before it moves the
windows, so it never counts in its own. Whether an event moves the windows depends on the events
before it alone, so that replaying a log gives the same bits.

Knows nothing about logs and plans. All calls belong to one thread at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import msgspec
import numpy as np

from edge_runtime.clock import Clock, SystemClock
from edge_runtime.errors import PackageError, RequestError
from edge_runtime.features.engine import Engine
from edge_runtime.features.feature import LABEL
from edge_runtime.inference import history
from edge_runtime.inference.history import Number
from edge_runtime.inference.package import Interface, Matrix, PackageInfo
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.scoring import Row, Rows
from edge_runtime.inference.slot import Arm, Slot
from edge_runtime.wire.messages import Fields

SNAPSHOT_VERSION = 1
BATCH_ROWS = 1024


class _State(msgspec.Struct, array_like=True):
    version: int
    newest_s: float
    lateness_s: float
    engines: list[tuple[str, bytes]]
    answered: dict[int, dict[int, Fields]] = {}


_decoder = msgspec.msgpack.Decoder(_State)


class Pipeline:
    """One family: its slot, its windows and its event clock.

    While windows are rebuilt elsewhere, lists in `gathering` gather what these see meanwhile.
    """

    def __init__(self, family: str, clock: Clock | None = None) -> None:
        self.slot = Slot(family)
        self._clock = clock or SystemClock()
        self.engines: dict[str, Engine] = {}
        self._of_arms: list[Engine] = []
        self._moving: list[Engine] = []
        self.answered = history.Answered()
        self.gathering: list[list[history.Seen]] = []
        self._interface: Interface | None = None
        self._newest_s = -math.inf
        self._moved_at_s = -math.inf
        self._lateness_s = 0.0
        self._counts = {"late_events": 0, "late_labels": 0}

    # To ask changes nothing.

    def admitted(self, kind: str, time_s: float, fields: Fields) -> tuple[Arm, ...]:
        """The arms that score the event, if it may be asked about.

        Raises: RequestError (no_release, no_features, not_predicted, event_from_future, and those
        of `Interface.check`).
        """
        interface = self.admit(kind, time_s, fields)
        if not interface.kinds[kind].predicts:
            raise _not_predicted(interface, kind)
        return self.slot.arms

    def rows(self, time_s: float, fields: Fields) -> Rows:
        """The feature values of an admitted event, float32 little-endian: one row for each arm that
        answers, then one for each shadow. Where a tokenizer fails, its error stands in their place.
        """
        engines = self._of_arms
        try:
            if len(self.engines) == 1:
                row: Row = engines[0].packed(time_s, fields)
                return [row] * len(engines)
            packed = {id(each): each.packed(time_s, fields) for each in self.engines.values()}
            return [packed[id(engine)] for engine in engines]
        except PackageError:
            return [_tried(engine, time_s, fields) for engine in engines]

    def rows_of_many(self, time_s: float, many: Sequence[Fields]) -> list[Rows]:
        """The rows of each of many admitted events at one time, as `rows` gives them."""
        try:
            packed = {id(each): each.packed_many(time_s, many) for each in self.engines.values()}
        except PackageError:
            return [self.rows(time_s, fields) for fields in many]
        return [[*each] for each in zip(*(packed[id(e)] for e in self._of_arms), strict=True)]

    def admit(self, kind: str, time_s: float, fields: Fields) -> Interface:
        """Say whether the windows may see an event. Raises: RequestError, as `admitted`."""
        interface = self._interface
        if interface is None:
            raise self._no_interface()
        interface.check(kind, time_s, fields)
        if time_s > self._newest_s + interface.skew_s_max or interface.clock == "wall":
            self._check_skew(interface, kind, time_s)
        return interface

    # To move cannot fail.

    def move(self, kind: str, time_s: float, fields: Fields) -> None:
        """Let the windows see an event that was just admitted."""
        if time_s > self._newest_s and kind != LABEL:
            self._moved_at_s = self._clock.now_s()
        self.replay(kind, time_s, fields)

    def replay(self, kind: str, time_s: float, fields: Fields) -> None:
        """Let the windows see an event of an earlier run, as it stands in the log."""
        if kind == LABEL:
            self.answered.forget(fields)
        elif time_s > self._newest_s:
            self._newest_s = time_s
        elif time_s < self._newest_s - self._lateness_s:
            self._counts["late_events"] += 1
            return
        for missed in self.gathering:
            missed.append((kind, time_s, dict(fields)))  # the caller may use its dict again
        for engine in self._moving:
            history.see(engine, kind, time_s, fields)

    def labelled(self, number: Number, value: float, time_s: float) -> Fields | None:
        """What a log must keep so that `replay` lets the windows see the label; None: they do not.

        They see, in event time, the first label of each prediction that `answered` holds.
        """
        fields = self.answered.record(number, value)
        if fields is None or self._interface is None:
            return None
        ahead = time_s > self._newest_s + self._interface.skew_s_max
        if ahead or time_s < self._newest_s - self._lateness_s:
            self._counts["late_labels"] += 1
            return None
        return fields

    # Releases come and go.

    def swap(self, arms: Iterable[Arm], rebuilt: Mapping[str, Engine] = {}) -> None:
        """Serve `arms`. Windows go on: a new feature spec takes over what is known already, and
        what `rebuilt` (engines by spec hash) knows beyond it.

        Raises: PackageError, with what serves unchanged.
        """
        arms = tuple(arms)
        self.slot.swap(arms)
        self._interface = None
        infos = self._infos()
        if infos:
            self._interface = infos[0].interface
            self._lateness_s = self._interface.lateness_s_max
            self.engines = history.engines_for(infos, self.engines, rebuilt)
            self._serve(infos)

    def _serve(self, infos: Sequence[PackageInfo]) -> None:
        self._of_arms = [self.engines[info.spec.hash] for info in infos]
        self._moving = history.with_tables_of_their_own(self.engines.values())
        self.answered.serve(self._of_arms)

    def snapshot(self) -> bytes:
        """Windows and event clock, to be given to `restore` after a restart."""
        engines = [(each.spec.windows_json(), each.snapshot()) for each in self._moving]
        kept = [each for each in engines if each[0]]
        answered = cast("dict[int, dict[int, Fields]]", self.answered.entries)
        return msgspec.msgpack.encode(
            _State(SNAPSHOT_VERSION, self._newest_s, self._lateness_s, kept, answered)
        )

    def lacking(self, data: bytes) -> dict[str, PackageInfo]:
        """Of the packages that serve, by spec hash, those with windows that the snapshot lacks.

        Raises: RequestError `bad_snapshot`.
        """
        known = history.restored(_decode(data).engines, 0.0)
        return history.with_new_windows(self._infos(), known.values())

    def restore(self, data: bytes, rebuilt: Mapping[str, Engine] = {}) -> None:
        """Take windows and event clock from a snapshot, and what it lacks from engines rebuilt up
        to the same event; before any event, with arms or without.

        Raises: RequestError `bad_snapshot`, with nothing changed.
        """
        state = _decode(data)
        known = history.restored(state.engines, state.lateness_s)
        self._newest_s = state.newest_s
        self.answered.load(state.answered)
        infos = self._infos()
        if infos:
            self.engines = history.engines_for(infos, known, rebuilt)
            self._serve(infos)
        else:
            self.engines, self._lateness_s = known, state.lateness_s
            self._moving = list(known.values())

    def _infos(self) -> list[PackageInfo]:
        return [arm.info for arm in self.slot.resident if arm.info is not None]

    def statistics(self) -> dict[str, int]:
        """Counts of this family: events, swaps, and what the windows hold."""
        counts = self._counts | self.slot.statistics()
        counts["labels_forgotten"] = self.answered.forgotten
        for engine in self._moving:
            for name, value in engine.statistics().items():
                counts[name] = counts.get(name, 0) + value
        return counts

    @property
    def newest_s(self) -> float:
        """The event clock: the time of the newest event; minus infinity before the first."""
        return self._newest_s

    def _no_interface(self) -> RequestError:
        if self.slot.arms:
            return RequestError(
                "no_features",
                f"the model of {self.slot.family} carries no feature spec: it takes tensors, "
                "not events",
                "ask it with infer",
            )
        return no_release(self.slot.family)

    def _check_skew(self, interface: Interface, kind: str, time_s: float) -> None:
        now_s = self._clock.now_s()
        if interface.clock == "event":
            now_s = self._newest_s + max(0.0, now_s - self._moved_at_s)
        if time_s > now_s + interface.skew_s_max:
            raise RequestError(
                "event_from_future",
                f"{kind}.time_s {time_s:.3f} is {time_s - now_s:.0f} s ahead of the "
                f"{interface.clock} clock; at most {interface.skew_s_max:g} s are allowed",
                "send seconds since the epoch, UTC",
            )


def _tried(engine: Engine, time_s: float, fields: Fields) -> Row:
    try:
        return engine.packed(time_s, fields)
    except PackageError as error:
        return error


def score_batch(runner: Runner, x: Matrix) -> Matrix:
    """Answers, float32 (rows, scores), of a model for rows of features, float32 (rows, features).

    What every gate scores with. Raises: PackageError `run_failed`.
    """
    answers = np.empty((len(x), runner.scores), dtype=np.float32)
    rows = np.ascontiguousarray(x, dtype=np.float32)
    for start in range(0, len(rows), BATCH_ROWS):
        answers[start : start + BATCH_ROWS] = runner.run(rows[start : start + BATCH_ROWS])
    return answers


def no_release(family: str) -> RequestError:
    """The error about a family that serves nothing yet."""
    return RequestError(
        "no_release",
        f"{family} has no release yet; nothing can be answered or observed",
        "wait for the first release, or put a factory package on the shelf",
    )


def _decode(data: bytes) -> _State:
    try:
        state = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise RequestError("bad_snapshot", f"the pipeline's snapshot is: {error}") from error
    if state.version != SNAPSHOT_VERSION:
        raise RequestError(
            "bad_snapshot", f"snapshot version {state.version}; this reads {SNAPSHOT_VERSION}"
        )
    return state


def _not_predicted(interface: Interface, kind: str) -> RequestError:
    asking = [name for name, each in interface.kinds.items() if each.predicts]
    return RequestError(
        "not_predicted",
        f"{kind!r} is a kind of {interface.family} that is only observed",
        f"a prediction is asked for with: {', '.join(asking)}",
    )
