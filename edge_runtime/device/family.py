"""One family on this device: its pipeline, the plan that it follows, its place in log and report.

Why: the runtime speaks for the device; what belongs to one model line stands here.

Invariants: plan and arms change together. Which arm answers is a function of the plan, the device
and the prediction's own number, so it can be checked from the log.

Knows nothing about the log, the disk or the other families.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from edge_runtime.clock import Clock
from edge_runtime.errors import HeadwaterError
from edge_runtime.events.log import RECORD_BYTES_MAX
from edge_runtime.features.engine import Engine
from edge_runtime.inference.package import PackageInfo
from edge_runtime.inference.pipeline import Pipeline, Rows
from edge_runtime.inference.slot import Arm
from edge_runtime.rollout.plan import Plan, choose, propensity
from edge_runtime.wire import codec
from edge_runtime.wire.messages import ArmReport, Fields, PredictionRecord, Scored

FACTORY = "factory"
"""The `reason` of a plan that was not signed but put on the shelf by hand."""

log = logging.getLogger("edge_runtime")


class Scores(msgspec.Struct, frozen=True):
    """What `arms` made of an event: of its `rows`, one for each arm, their `outputs`; `salt` was
    the family's when they did.
    """

    arms: Sequence[Arm]
    rows: Rows
    outputs: Sequence[list[float]]
    salt: str


class Family:
    """A family by name, on `device`; it answers nothing before it follows its first plan.

    `salt` is the plan's and the device's, of which each prediction draws its arm.
    """

    def __init__(self, name: str, device: str, clock: Clock) -> None:
        self.name = name
        self.pipeline = Pipeline(name, clock)
        self.plan: Plan | None = None
        self._device, self._clock = device, clock
        self.salt = device
        self.answers = 0
        self.newest: Scored | None = None
        self._since: dict[tuple[str, str], float] = {}

    def follow(
        self, arms: Sequence[Arm], plan: Plan | None, rebuilt: Mapping[str, Engine] = {}
    ) -> None:
        """Serve `arms` as `plan` says; None where a file is served that no plan speaks of.

        Raises: PackageError, with what serves unchanged.
        """
        now_s, known = self._clock.now_s(), self._since
        since = {key: known.get(key, now_s) for key in ((arm.name, arm.release) for arm in arms)}
        self._since = known | since  # before the swap, for who asks from another thread meanwhile
        self.pipeline.swap(arms, rebuilt)
        self.plan, self._since = plan, since
        self.salt = f"{plan.salt}|{self._device}" if plan is not None else self._device

    def lacking(self, state: bytes) -> dict[str, PackageInfo] | None:
        """The packages, by spec hash, with windows that a snapshot lacks; None: it is unusable."""
        try:
            return self.pipeline.lacking(state)
        except HeadwaterError as error:
            log.warning("%s: windows are rebuilt from the log alone: %s", self.name, error)
            return None

    def record(
        self, scores: Scores, said: tuple[str, float, Fields], number: tuple[int, int]
    ) -> PredictionRecord:
        """What the log keeps of prediction `number`, the arm that answers standing first.

        `said` is the event: kind, time and fields.
        """
        arms = scores.arms
        weights = [arm.weight for arm in arms]
        index = choose(weights, scores.salt, *number)
        arm = arms[index]
        assert arm.info is not None
        scored = [
            Scored(each.release, each.name, values)
            for each, values in zip(arms, scores.outputs, strict=True)
        ]
        if index:
            scored.insert(0, scored.pop(index))
        self.answers, self.newest = self.answers + 1, scored[0]
        return PredictionRecord(
            self.name,
            *said,
            arm.info.spec.hash,
            scores.rows[index],
            propensity(weights, index),
            scored,
        )

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

    def live(self) -> tuple[int, int, Scored | None]:
        """Answers so far, runs that failed so far, and the newest answer."""
        return self.answers, self.pipeline.statistics()["run_failures"], self.newest

    @property
    def plan_seq(self) -> int:
        """The number of the signed plan; 0 for a factory package, and before the first."""
        return 0 if self.plan is None or self.plan.reason == FACTORY else self.plan.seq

    def reports(self) -> list[ArmReport]:
        """The arms in memory, the stable one first."""
        since, now_s = self._since, self._clock.now_s()
        return [
            ArmReport(
                self.name,
                arm.name,
                arm.release,
                since.get((arm.name, arm.release), now_s),
                arm.variant,
                arm.runner.run_us or 0.0,
            )
            for arm in self.pipeline.slot.arms
        ]

    def statistics(self) -> dict[str, Any]:
        """Plan, arms, and what the pipeline counts."""
        counters = {arm.release: arm.counter for arm in self.plan.arms} if self.plan else {}
        infos = {arm.release: arm.info for arm in self.pipeline.slot.arms}
        arms = [
            {
                "arm": arm.arm,
                "release": arm.release,
                "since_s": arm.serving_since_s,
                "variant": arm.variant,
                "run_us": arm.run_us,
                "counter": counters.get(arm.release, 0),
                "provenance": info.provenance if (info := infos.get(arm.release)) else {},
            }
            for arm in self.reports()
        ]
        return {"plan_seq": self.plan_seq, "arms": arms, **self.pipeline.statistics()}
