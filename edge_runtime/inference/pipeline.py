"""The pipeline: features and runner, the one way from an event to an answer.

Why: the device and every gate that judges a release run this code, and no other.

Event time: an event more than `skew_s_max` ahead is refused; ahead of the machine's time where the
interface says `clock = "wall"`, else ahead of the newest event, to which the time is added that has
passed since it came, so that a device may have been silent for long; the first event of a process
is not judged so. An event more than `lateness_s_max` behind the newest one is answered and counted,
and does not move the windows.

Invariants: `answer` and `admit` change nothing, and `move` cannot fail, so that a caller can log in
between. An event is answered before it moves the windows, so it never counts in its own. Whether
an event moves the windows depends on the events before it alone, so that replaying a log gives the
same bits.

Knows nothing about logs, plans or labels. All calls belong to one thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import msgspec
import numpy as np

from edge_runtime.clock import Clock, SystemClock
from edge_runtime.errors import ConfigError, PackageError, RequestError
from edge_runtime.features.engine import Engine, Vector
from edge_runtime.features.spec import Spec
from edge_runtime.inference.package import Interface, Matrix
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.slot import Arm, Slot
from edge_runtime.wire.messages import Fields

SNAPSHOT_VERSION = 1
BATCH_ROWS = 1024


class Answer(msgspec.Struct, frozen=True):
    """What the arms said to one event.

    `vector` (features,) is what the answering arm was given, of the feature spec with hash `spec`;
    `outputs[i]` are the values of `arms[i]`; arm `index` answers.
    """

    vector: Vector
    index: int
    outputs: list[list[float]]
    arms: tuple[Arm, ...]
    spec: str


class _State(msgspec.Struct, array_like=True):
    version: int
    newest_s: float
    lateness_s: float
    engines: list[tuple[str, bytes]]


_decoder = msgspec.msgpack.Decoder(_State)


class Pipeline:
    """One family: its slot, its windows and its event clock."""

    def __init__(self, family: str, clock: Clock | None = None) -> None:
        self.slot = Slot(family)
        self._clock = clock or SystemClock()
        self._engines: dict[str, Engine] = {}
        self._interface: Interface | None = None
        self._newest_s = -math.inf
        self._moved_at_s = -math.inf
        self._lateness_s = 0.0
        self._late_events = 0
        self._run_failures = 0

    def answer(
        self, kind: str, time_s: float, fields: Fields, choose: Callable[[tuple[Arm, ...]], int]
    ) -> Answer:
        """Let every arm score the event; `choose` says which one answers. The event is admitted.

        Raises: RequestError (no_release, not_predicted, event_from_future, and those of
        `Interface.check`); PackageError (run_failed).
        """
        with self.slot.lease() as arms:
            interface = self._admit(kind, time_s, fields)
            if not interface.kinds[kind].predicts:
                raise _not_predicted(interface, kind)
            return self._score(arms, time_s, fields, choose(arms))

    def admit(self, kind: str, time_s: float, fields: Fields) -> None:
        """Say whether the windows may see an event. Raises: RequestError, as `answer`."""
        self._admit(kind, time_s, fields)

    def move(self, kind: str, time_s: float, fields: Fields) -> None:
        """Let the windows see an event that was just admitted."""
        if time_s > self._newest_s:
            self._moved_at_s = self._clock.now_s()
        self.replay(kind, time_s, fields)

    def replay(self, kind: str, time_s: float, fields: Fields) -> None:
        """Let the windows see an event of an earlier run, as it stands in the log."""
        if time_s > self._newest_s:
            self._newest_s = time_s
        elif time_s < self._newest_s - self._lateness_s:
            self._late_events += 1
            return
        for engine in self._engines.values():
            engine.observe(kind, time_s, fields)

    def swap(self, arms: Iterable[Arm]) -> None:
        """Serve `arms`. Windows go on: a new feature spec takes over what is known already.

        Raises: PackageError, with what serves unchanged.
        """
        arms = tuple(arms)
        self.slot.swap(arms)
        if arms:
            self._interface = arms[0].info.interface
            self._lateness_s = self._interface.lateness_s_max
            self._engines = _engines_for(arms, self._engines)

    def snapshot(self) -> bytes:
        """Windows and event clock, to be given to `restore` after a restart."""
        engines = [(each.spec.to_json(), each.snapshot()) for each in self._engines.values()]
        return msgspec.msgpack.encode(
            _State(SNAPSHOT_VERSION, self._newest_s, self._lateness_s, engines)
        )

    def restore(self, data: bytes) -> None:
        """Take windows and event clock from a snapshot; before any event, with arms or without.

        Raises: RequestError `bad_snapshot`, with nothing changed.
        """
        state = _decode(data)
        known = _restored(state)
        self._newest_s = state.newest_s
        if self.slot.arms:
            self._engines = _engines_for(self.slot.arms, known)
        else:
            self._engines, self._lateness_s = known, state.lateness_s

    def statistics(self) -> dict[str, int]:
        """Counts of this family: events, swaps, and what the windows hold."""
        counts = {"late_events": self._late_events, "run_failures": self._run_failures}
        counts |= self.slot.statistics()
        for engine in self._engines.values():
            for name, value in engine.statistics().items():
                counts[name] = counts.get(name, 0) + value
        return counts

    @property
    def newest_s(self) -> float:
        """The event clock: the time of the newest event; minus infinity before the first."""
        return self._newest_s

    def _admit(self, kind: str, time_s: float, fields: Fields) -> Interface:
        interface = self._interface
        if interface is None or not self.slot.arms:
            raise RequestError(
                "no_release",
                f"{self.slot.family} has no release yet; nothing can be answered or observed",
                "wait for the first release, or put a factory package on the shelf",
            )
        interface.check(kind, time_s, fields)
        wall = interface.clock == "wall"
        if wall or time_s > self._newest_s + interface.skew_s_max:
            self._check_skew(interface, kind, time_s)
        return interface

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

    def _score(self, arms: tuple[Arm, ...], time_s: float, fields: Fields, index: int) -> Answer:
        vectors = {spec: engine.vector(time_s, fields) for spec, engine in self._engines.items()}
        try:
            outputs = [arm.runner.answer(vectors[arm.info.spec.hash]) for arm in arms]
        except PackageError:
            self._run_failures += 1
            raise
        spec = arms[index].info.spec.hash
        return Answer(vectors[spec], index, outputs, arms, spec)


def score_batch(runner: Runner, x: Matrix) -> Matrix:
    """Answers, float32 (rows, outputs), of a model for rows of features, float32 (rows, features).

    What every gate scores with. Raises: PackageError `run_failed`.
    """
    answers = np.empty((len(x), runner.outputs), dtype=np.float32)
    rows = np.ascontiguousarray(x, dtype=np.float32)
    for start in range(0, len(rows), BATCH_ROWS):
        answers[start : start + BATCH_ROWS] = runner.run(rows[start : start + BATCH_ROWS])
    return answers


def _engines_for(arms: Iterable[Arm], known: dict[str, Engine]) -> dict[str, Engine]:
    """One engine for each feature spec of `arms`: the known one, or a new one that inherits."""
    engines: dict[str, Engine] = {}
    for arm in arms:
        spec, lateness_s = arm.info.spec, arm.info.interface.lateness_s_max
        engine = known.get(spec.hash)
        if engine is None or engine.lateness_s != lateness_s:
            engine = Engine(spec, lateness_s=lateness_s)
            engine.inherit(known.values())
        engines[spec.hash] = engine
    return engines


def _restored(state: _State) -> dict[str, Engine]:
    engines = {}
    for text, snapshot in state.engines:
        try:
            engine = Engine(Spec.from_json(text), lateness_s=state.lateness_s)
        except ConfigError as error:
            raise RequestError("bad_snapshot", f"the snapshot's feature spec: {error}") from error
        engine.restore(snapshot)
        engines[engine.spec.hash] = engine
    return engines


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
