"""Which devices a stage is on, of those that reports tell of, and which of them have shown it.

Why: evidence of three devices says little of the three hundred that should have tried a release
and say nothing. Who should have, the cloud computes itself, as each device does.

Invariants: a member stays one for the life of a trial, since percentages only rise. A device has
shown a stage when its report, in it, has the release in memory; until then it is silent. Labels
show nothing: they may be of predictions made before. What a device counts only adds up, so a report
that tells nothing but more answers may be left out.

Knows nothing about decisions.
"""

from __future__ import annotations

from cloud_learner.rollout.state import Trial
from edge_runtime.rollout.plan import bucket
from edge_runtime.wire.messages import Report

REPORT_S = 10.0
"""How long a device's mere answers may wait; a failure and a new plan do not."""


class Turnout:
    """What reports tell of devices, as long as this process lives."""

    def __init__(self) -> None:
        self._fleet: dict[str, dict[str, str]] = {}
        self._told: dict[str, tuple[float, tuple[int, ...]]] = {}

    def begin(self, trial: Trial) -> None:
        """A stage begins: nobody has shown it yet."""
        known = {*trial.members, *self._fleet}
        trial.members = {name: False for name in sorted(known) if self.belongs(trial, name)}

    def hears(self, trial: Trial, report: Report, now_s: float) -> bool:
        """Whether a report may count: of a device of this stage, with something new."""
        self.know(report)
        if not self.belongs(trial, report.device):
            return False
        is_shown = trial.members.setdefault(report.device, False)
        is_first = not is_shown and self.shows(trial, report)
        return is_first or self._has_news(trial, report, now_s)

    def know(self, report: Report) -> None:
        """Remember the device for stages to come."""
        self._fleet[report.device] = report.attributes

    @staticmethod
    def shows(trial: Trial, report: Report) -> bool:
        """Whether the device has the release in memory."""
        mine = trial.rules.family, trial.offer.release
        arms = [(arm.family, arm.release) for arm in report.arms]
        return mine in [*arms, *((each.family, each.release) for each in report.shadows)]

    def belongs(self, trial: Trial, device: str) -> bool:
        """Whether the present stage is on a device; of one that was not heard yet, if it may be."""
        if device in trial.members:
            return True
        attributes = self._fleet.get(device, trial.rules.selector)
        if any(attributes.get(key) != value for key, value in trial.rules.selector.items()):
            return False
        return bucket(trial.salt, device) < trial.percent / 100

    def _has_news(self, trial: Trial, report: Report, now_s: float) -> bool:
        arms = [arm for arm in report.arms if arm.family == trial.rules.family]
        failed = (report.epoch, report.plan_seq, *(arm.failed for arm in arms))
        told_s, before = self._told.get(report.device, (0.0, ()))
        if before == failed and 0 <= now_s - told_s < REPORT_S:
            return False
        self._told[report.device] = now_s, failed
        return True
