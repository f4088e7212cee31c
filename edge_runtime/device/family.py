"""One family on this device: its pipeline, the plan that it follows, its place in log and report.

Why: the runtime speaks for the device; what belongs to one model line stands here.

Invariants: plan and arms change together. Which arm answers is a function of the plan, the device
and the prediction's own number, so it can be checked from the log. A release on trial that has no
usable answer costs the request nothing: the stable one answers. A trial that failed a gate is given
up in the same request; leaving it for good is the business of whom `wake` wakes.

Knows nothing about the log, the disk or the other families.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import msgspec

from edge_runtime.clock import Clock
from edge_runtime.device.shadowing import Comparison, Shadowing
from edge_runtime.errors import HeadwaterError, PackageError
from edge_runtime.events.log import RECORD_BYTES_MAX
from edge_runtime.features.engine import Engine
from edge_runtime.inference.package import PackageInfo
from edge_runtime.inference.pipeline import Pipeline
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.scoring import GIVEN_UP, Answer, Scores
from edge_runtime.inference.slot import Arm
from edge_runtime.rollout.health import Looks, Trial
from edge_runtime.rollout.plan import LocalGates, Plan, choose, propensity
from edge_runtime.wire import codec
from edge_runtime.wire.messages import (
    ArmReport,
    Fields,
    PredictionRecord,
    Scored,
    ShadowReport,
    Shown,
)

FACTORY = "factory"
"""The `reason` of a plan that was not signed but put on the shelf by hand."""

LEFT = "left"
"""What a report calls a release on trial that the device has left by itself."""

log = logging.getLogger("edge_runtime")


class Seat:
    """An arm's place here: since when, what it was asked, and what is seen of it."""

    __slots__ = ("answered", "failed", "key", "looks", "since_s", "trial")

    def __init__(self, key: tuple[str, str], since_s: float) -> None:
        self.key, self.since_s = key, since_s
        self.answered = self.failed = 0
        self.looks = Looks()
        self.trial: Trial | None = None


class Family:
    """A family by name, on `device`; it answers nothing before it follows its first plan.

    `salt` is the plan's and the device's, of which each prediction draws its arm. `shadowing`
    compares shadows, if any; `wake` is called when there is a trial to watch, and when to leave it;
    `followed` when other arms serve.
    """

    def __init__(self, name: str, device: str, clock: Clock) -> None:
        self.name = name
        self.pipeline = Pipeline(name, clock)
        self.plan: Plan | None = None
        self._device, self._clock = device, clock
        self.shadowing: Shadowing | None = None
        self.wake: Callable[[], None] = lambda: None
        self.followed: Callable[[Family], None] = lambda _family: None
        self.salt = device
        self._run_failures = 0
        self._seats: dict[Runner, Seat] = {}
        self._comparisons: tuple[Comparison, ...] = ()
        self._left: list[ArmReport] = []

    def follow(
        self, arms: Sequence[Arm], plan: Plan | None, rebuilt: Mapping[str, Engine] = {}
    ) -> None:
        """Serve `arms` as `plan` says; None where a file is served that no plan speaks of.

        Raises: PackageError, with what serves unchanged.
        """
        gates = LocalGates() if plan is None else plan.gates
        seats = {arm.runner: self._seat(arm, gates) for arm in arms}
        self._seats = self._seats | seats  # before the swap, for who asks meanwhile
        self.pipeline.swap(arms, rebuilt)
        if plan is None or self.plan is None or plan.seq != self.plan.seq:
            self._left = []
        self.plan, self._seats = plan, seats
        self.salt = f"{plan.salt}|{self._device}" if plan is not None else self._device
        if self.shadowing is not None:
            self._comparisons = self.shadowing.of(
                self.pipeline.slot, self._comparisons, self._judge
            )
        self.followed(self)
        for arm, trial in self.trials():
            self.heed(arm, trial)
            self.wake()

    def without(self, release: str) -> list[Arm]:
        """The arms in memory but for those of `release`, of which the next report tells the last
        that is known.
        """
        reports = [each for each in self.reports() if each.arm != LEFT]
        left = [each for each in reports if each.release == release]
        self._left += [msgspec.structs.replace(each, arm=LEFT) for each in left]
        return [arm for arm in self.pipeline.slot.resident if arm.release != release]

    def trials(self) -> list[tuple[Arm, Trial]]:
        """What is on trial here, shadows included, with what is seen of it."""
        seats = [(arm, self._seats.get(arm.runner)) for arm in self.pipeline.slot.resident]
        return [(arm, seat.trial) for arm, seat in seats if seat is not None and seat.trial]

    def lacking(self, state: bytes) -> dict[str, PackageInfo] | None:
        """The packages, by spec hash, with windows that a snapshot lacks; None: it is unusable."""
        try:
            return self.pipeline.lacking(state)
        except HeadwaterError as error:
            log.warning("%s: windows are rebuilt from the log alone: %s", self.name, error)
            return None

    def record(
        self,
        scores: Scores,
        said: tuple[str, float, Fields],
        number: tuple[int, int],
        *,
        adapted: bool = False,
        shown: Shown | None = None,
    ) -> PredictionRecord:
        """What the log keeps of prediction `number`, the arm that answers standing first.

        `said` is the event: kind, time and fields. Of a ranking, all candidates that are shown have
        the arm that the `number` of the first draws.
        Raises: PackageError `run_failed`, where neither the arm that was drawn nor the stable one
        has an answer.
        """
        arms, answers = scores.arms, scores.answers[0]
        usable = [type(each) is list and isfinite(sum(each)) for each in answers]
        if len(arms) > 1:
            index, chance = self._drawn(scores, usable, number)
        else:
            index, chance = 0, 1.0
            self._count(arms[0], usable[0])
        if not all(usable):
            self._run_failures += sum(
                isinstance(e, PackageError) and e is not GIVEN_UP for e in answers
            )
        answer = answers[index]
        if isinstance(answer, PackageError):
            raise answer
        scored = [Scored(arms[index].release, arms[index].name, answer)]
        if len(arms) > 1:
            scored += _others(arms, answers, usable, index)
        if self._comparisons and usable[0]:
            self._offer(scores)
        arm, row = arms[index], scores.rows[index]
        assert arm.info is not None
        assert type(row) is bytes
        return PredictionRecord(
            self.name, *said, arm.info.spec.hash, row, chance, scored, adapted, shown
        )

    def _drawn(
        self, scores: Scores, usable: Sequence[bool], number: tuple[int, int]
    ) -> tuple[int, float]:
        """The index of the arm that answers, and how likely it was to be that one: the stable arm
        has its own share, and those of all arms that have no usable answer to this event.
        """
        arms, (answers, took_ns, _) = scores.arms, scores.answers
        weights = [arm.weight for arm in arms]
        index = choose(weights, scores.salt, *number)
        asked = 0 if answers[index] is GIVEN_UP else index
        self._count(arms[asked], usable[asked])
        self._judge(arms, usable, took_ns)
        if index and usable[index]:
            return index, propensity(weights, index)
        others = zip(weights[1:], usable[1:], strict=True)
        return 0, (weights[0] + sum(w for w, good in others if not good)) / sum(weights)

    def _judge(self, arms: Sequence[Arm], usable: Sequence[bool], took_ns: Sequence[int]) -> None:
        """Look what the trials did with a row to which the stable arm knew an answer."""
        if not usable[0]:
            return
        for arm, good, own_ns in zip(arms[1:], usable[1:], took_ns[1:], strict=True):
            seat = self._seats.get(arm.runner)
            if seat is not None and seat.trial is not None:
                seat.trial.saw(own_ns, took_ns[0], usable=good)
                self.heed(arm, seat.trial)

    def heed(self, arm: Arm, trial: Trial) -> None:
        """Let an arm that failed a gate answer no more, from now on."""
        if trial.gate and not arm.runner.given_up:
            arm.runner.give_up()
            self.wake()

    def _count(self, arm: Arm, good: bool) -> None:
        seat = self._seats.get(arm.runner)
        if seat is not None:  # else it was replaced since it ran
            seat.answered += 1
            seat.failed += not good

    def _offer(self, scores: Scores) -> None:
        """Let the shadows be compared, unless others serve by now than those that ran."""
        arms, rows, given = scores.arms, scores.rows, scores.answers[0][0]
        if arms is self.pipeline.slot.arms and self.shadowing is not None:
            for index, comparison in enumerate(self._comparisons, len(arms)):
                self.shadowing.offer(comparison, [rows[0], rows[index]], given)

    def records_fit(self, many: Sequence[Fields]) -> bool:
        """Whether each answer to events with such fields is sure to be taken by the log."""
        arms = self.pipeline.slot.arms
        scored = sum(len(arm.release) + len(arm.name) + 9 * arm.runner.scores for arm in arms)
        beside = 512 + scored + 4 * max((arm.runner.features for arm in arms), default=0)
        try:
            sizes = [len(codec.encode(fields)) + beside for fields in many]
        except (TypeError, ValueError, OverflowError):  # a value that no record can carry
            return False
        return max(sizes, default=0) <= RECORD_BYTES_MAX

    def look(self) -> str:
        """Look at what the stable arm answered since the last look, as `Looks.look`."""
        for arm in self.pipeline.slot.arms[:1]:
            seat = self._seats[arm.runner]
            return seat.looks.look(seat.answered, seat.failed)
        return ""

    @property
    def plan_seq(self) -> int:
        """The number of the signed plan; 0 for a factory package, and before the first."""
        return 0 if self.plan is None or self.plan.reason == FACTORY else self.plan.seq

    def reports(self) -> list[ArmReport]:
        """The arms in memory, the stable one first, then those that were left under this plan."""
        return [*map(self._report, self.pipeline.slot.resident), *self._left]

    def shadow_reports(self) -> list[ShadowReport]:
        """What comparing the shadows gave."""
        return [each.report(self.name) for each in self._comparisons]

    def statistics(self) -> dict[str, Any]:
        """Plan, arms, and what the pipeline counts."""
        counters = {arm.release: arm.counter for arm in self.plan.arms} if self.plan else {}
        facts = {arm.release: arm.facts for arm in self.pipeline.slot.resident}
        unknown: dict[str, Any] = {"provenance": {}, "bucket_us": {}}
        arms = [
            {
                "arm": arm.arm,
                "release": arm.release,
                "since_s": arm.serving_since_s,
                "variant": arm.variant,
                "run_us": arm.run_us,
                "answered": arm.answered,
                "failed": arm.failed,
                "counter": counters.get(arm.release, 0),
                **facts.get(arm.release, unknown),
            }
            for arm in self.reports()
        ]
        shadows = [msgspec.structs.asdict(each) for each in self.shadow_reports()]
        counts = self.pipeline.statistics() | {"run_failures": self._run_failures}
        return {"plan_seq": self.plan_seq, "arms": arms, "shadows": shadows, **counts}

    def _report(self, arm: Arm) -> ArmReport:
        seat = self._seats.get(arm.runner) or Seat((arm.name, arm.release), self._clock.now_s())
        run_us = arm.runner.run_us or 0.0
        place = self.name, arm.name, arm.release, seat.since_s
        return ArmReport(*place, arm.variant, run_us, seat.answered, seat.failed)

    def _seat(self, arm: Arm, gates: LocalGates) -> Seat:
        """The seat that a release had under this name, or a new one."""
        key = arm.name, arm.release
        fresh = Seat(key, self._clock.now_s())
        seat = next((each for each in self._seats.values() if each.key == key), fresh)
        if arm.name != "stable" and (seat.trial is None or seat.trial.gates != gates):
            seat.trial = Trial(gates, arm.added_mb)
        return seat


def _others(
    arms: Sequence[Arm], answers: Sequence[Answer], usable: Sequence[bool], index: int
) -> list[Scored]:
    """What the arms that did not answer would have said."""
    found = enumerate(zip(arms, answers, usable, strict=True))
    return [
        Scored(arm.release, arm.name, values)
        for at, (arm, values, good) in found
        if good and at != index and isinstance(values, list)
    ]
