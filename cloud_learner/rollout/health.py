"""What devices report of a trial: its answers and failures beside the stable release's, its shadow.

Why: a release that fails must go at once, on the word of counters, long before any label is known.

A device's counters are added up until one of its reports brings a failure; then all answers since
the last such report say what share of the requests the trial had, and the failures are counted with
that share. A run of a shadow counts as an answer of the trial: on the same requests, it may fail no
more often. (Where each failing request fails whoever runs it, the evidence against "no worse" has a
mean of at most 1, as for answers drawn at random.)

Invariants: of a device only a report above the last (epoch, number) counts; others are dropped and
counted. Counters begin at 0 with a process. What a device counted before its first report under a
plan, or since it last had no trial in memory, says nothing: its shares may have been others.
Counters that go back, or fail more than they answer, are counted as unusable and begin anew. All
state is plain numbers.

Knows nothing about plans, labels or what is decided.
"""

from __future__ import annotations

import msgspec

from cloud_learner.stats.confidence import ConfidenceSequence
from cloud_learner.stats.counting import CountingTest
from edge_runtime.wire.messages import Report, ShadowReport

_NO_PLAN = -1


class Counters(msgspec.Struct, array_like=True, frozen=True):
    """What one device counts of trial and stable release, since the start of its process."""

    answered: int = 0
    failed: int = 0
    stable_answered: int = 0
    stable_failed: int = 0
    rows: int = 0
    dropped: int = 0
    agreed: int = 0
    bad: int = 0
    distance_sum: float = 0.0

    def since(self, before: Counters) -> Counters:
        """What came on top of `before`."""
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(before), strict=True)
        return Counters(*(now - then for now, then in pairs))

    @property
    def is_possible(self) -> bool:
        """Whether a device can have counted this."""
        return (
            0 <= self.failed <= self.answered
            and 0 <= self.stable_failed <= self.stable_answered
            and 0 <= self.agreed <= self.rows
            and 0 <= self.bad <= self.rows
            and 0 <= self.distance_sum <= self.rows
            and self.dropped >= 0
        )


class Device(msgspec.Struct, array_like=True):
    """The last report of a device, and its answers since the last failure, in either arm."""

    epoch: int
    number: int
    plan_seq: int
    counters: Counters
    answers: int = 0
    stable_answers: int = 0


class Health(msgspec.Struct, kw_only=True):
    """`stable` and `canary` as devices report them; `failures` is the test of them.

    `members` is how many devices the trial is on, where that is known; those who lie speak first.
    """

    family: str
    stable: str
    canary: str
    failures: CountingTest
    total: Counters = Counters()
    devices: dict[str, Device] = {}
    members: int = 0
    agreement: ConfidenceSequence = msgspec.field(default_factory=ConfidenceSequence)
    distance: ConfidenceSequence = msgspec.field(default_factory=ConfidenceSequence)
    stale: int = 0
    unusable: int = 0

    def add(self, report: Report) -> bool:
        """Take a report into account; False when it is old or says nothing of the trial."""
        device = self.devices.get(report.device)
        if device and (report.epoch, report.number) <= (device.epoch, device.number):
            self.stale += 1
            return False
        now = self._counters(report)
        if now is None:
            if device:
                device.plan_seq = _NO_PLAN
            return False
        fresh = Device(report.epoch, report.number, report.plan_seq, now)
        self.devices[report.device] = fresh
        if device and device.plan_seq == report.plan_seq:
            restarted = device.epoch < report.epoch
            self._grow(report.device, device, fresh, Counters() if restarted else device.counters)
        return True

    def _counters(self, report: Report) -> Counters | None:
        """What it counts of both; None where the trial is not in its memory."""
        arms = {arm.release: arm for arm in report.arms if arm.family == self.family}
        trial, stable = arms.get(self.canary), arms.get(self.stable)
        shadow = next((each for each in report.shadows if self._is_ours(each)), None)
        if trial is None and shadow is None:
            return None
        return Counters(
            answered=trial.answered if trial else 0,
            failed=trial.failed if trial else 0,
            stable_answered=stable.answered if stable else 0,
            stable_failed=stable.failed if stable else 0,
            rows=shadow.rows if shadow else 0,
            dropped=shadow.dropped if shadow else 0,
            agreed=shadow.agreed if shadow else 0,
            bad=shadow.bad if shadow else 0,
            distance_sum=shadow.distance_sum if shadow else 0.0,
        )

    def _is_ours(self, shadow: ShadowReport) -> bool:
        names = (shadow.family, shadow.release, shadow.against)
        return names == (self.family, self.canary, self.stable)

    def _grow(self, name: str, last: Device, fresh: Device, before: Counters) -> None:
        new = fresh.counters.since(before)
        if not new.is_possible:
            self.unusable += 1
            return
        sums = zip(msgspec.structs.astuple(self.total), msgspec.structs.astuple(new), strict=True)
        self.total = Counters(*(total + each for total, each in sums))
        answers = last.answers + new.answered + new.rows
        stable_answers = last.stable_answers + new.stable_answered
        trial = new.failed + new.bad
        failures = trial + new.stable_failed
        if failures:
            share = answers / (answers + stable_answers)
            self.failures.add(trial, failures, share, name, self.size)
        else:
            fresh.answers, fresh.stable_answers = answers, stable_answers
        if new.rows:
            self.agreement.add(new.agreed / new.rows)
            self.distance.add(new.distance_sum / new.rows)

    @property
    def size(self) -> int:
        """How many devices can speak."""
        return max(self.members, len(self.devices))

    @property
    def harmful(self) -> bool:
        """Whether the trial fails more often, for certain."""
        return self.failures.harmful

    def statistics(self) -> dict[str, float | int]:
        """Numbers of answers, failures and the shadow, flat."""
        total, test = self.total, self.failures
        facts: dict[str, float | int] = {
            "devices": len(self.devices),
            "answered": total.answered,
            "failed": total.failed,
            "stable_reported": total.stable_answered,
            "stable_failed": total.stable_failed,
            "e_failures": test.evidence(self.size),
            "e_failures_reach": 1 / test.alpha,
            "stale": self.stale,
            "impossible": self.unusable,
        }
        low, high = test.interval()
        facts |= {"failure_ratio_low": low, "failure_ratio_high": min(high, 1000.0)}
        if total.rows:
            facts |= {"shadow_rows": total.rows, "shadow_dropped": total.dropped}
            facts |= {"shadow_bad": total.bad, "shadow_agreement": total.agreed / total.rows}
            facts |= {"shadow_agreement_low": self.agreement.interval[0]}
            facts |= {"shadow_distance": total.distance_sum / total.rows}
            facts |= {"shadow_distance_high": self.distance.interval[1]}
        return facts
