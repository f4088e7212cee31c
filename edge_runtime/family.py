"""One family on this device: its pipeline, the plan that it follows, its place in log and report.

Why: the runtime speaks for the device; what belongs to one model line stands here.

Invariants: plan and arms change together. Which arm answers is a function of the plan, the device
and the prediction's own number, so it can be checked from the log.

Knows nothing about the log, the disk or the other families.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from edge_runtime.clock import Clock
from edge_runtime.errors import HeadwaterError
from edge_runtime.inference.pipeline import Answer, Pipeline
from edge_runtime.inference.slot import Arm
from edge_runtime.rollout.plan import Plan, choose, propensity
from edge_runtime.wire.messages import ArmReport, Fields, PredictionRecord, Scored

FACTORY = "factory"
"""The `reason` of a plan that was not signed but put on the shelf by hand."""

log = logging.getLogger("edge_runtime")


class Family:
    """A family by name, on `device`; it answers nothing before it follows its first plan."""

    def __init__(self, name: str, device: str, clock: Clock) -> None:
        self.name = name
        self.pipeline = Pipeline(name, clock)
        self.plan: Plan | None = None
        self._device, self._clock = device, clock
        self._salt = device
        self._since: dict[tuple[str, str], float] = {}

    def follow(self, arms: Sequence[Arm], plan: Plan) -> None:
        """Serve `arms` as `plan` says. Raises: PackageError, with what serves unchanged."""
        self.pipeline.swap(arms)
        self.plan = plan
        self._salt = f"{plan.salt}|{self._device}"
        now_s, known = self._clock.now_s(), self._since
        running = [(arm.name, arm.release) for arm in arms]
        self._since = {key: known.get(key, now_s) for key in running}

    def restore(self, state: bytes) -> bool:
        """Take the windows from a snapshot; False when they cannot be."""
        try:
            self.pipeline.restore(state)
        except HeadwaterError as error:
            log.warning("%s: windows are rebuilt from the log alone: %s", self.name, error)
            return False
        return True

    def chooser(self, epoch: int, seq: int) -> Callable[[Sequence[Arm]], int]:
        """Which arm answers prediction (`epoch`, `seq`)."""
        return lambda arms: choose([arm.weight for arm in arms], self._salt, epoch, seq)

    def record(self, answer: Answer, kind: str, time_s: float, fields: Fields) -> PredictionRecord:
        """What the log keeps of an answer, the arm that answered standing first."""
        arms, index = answer.arms, answer.index
        scored = [
            Scored(arm.release, arm.name, outputs)
            for arm, outputs in zip(arms, answer.outputs, strict=True)
        ]
        if index:
            scored.insert(0, scored.pop(index))
        return PredictionRecord(
            self.name,
            kind,
            time_s,
            fields,
            answer.spec,
            answer.vector.tobytes(),
            propensity([arm.weight for arm in arms], index),
            scored,
        )

    @property
    def plan_seq(self) -> int:
        """The number of the signed plan; 0 for a factory package, and before the first."""
        return 0 if self.plan is None or self.plan.reason == FACTORY else self.plan.seq

    def reports(self) -> list[ArmReport]:
        """The arms in memory, the stable one first."""
        return [
            ArmReport(self.name, arm, release, since_s)
            for (arm, release), since_s in self._since.items()
        ]

    def statistics(self) -> dict[str, Any]:
        """Plan, arms, and what the pipeline counts."""
        arms = [
            {"arm": arm.arm, "release": arm.release, "since_s": arm.serving_since_s}
            for arm in self.reports()
        ]
        return {"plan_seq": self.plan_seq, "arms": arms, **self.pipeline.statistics()}
