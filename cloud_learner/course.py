"""The course of one family: the micro-batches that it has to learn, and how far it is.

Why: several families share one ingest and one trainer's thread, and what goes wrong with one of
them must stay with it.

Invariants: each batch is dealt with once, in order: learned, or passed over and entered in lineage
with the reason. A batch that raises leaves the state as it was before it: the cycle sees to that or
says that it is not whole, and then the last checkpoint and what was learned since bring it back.
What cannot be brought back rests until the next start: nothing more is learned, and the last good
release serves on. `clock_s` never claims what was not dealt with.

`learn`, `candidate`, `keep` and `save` belong to the trainer's thread, all else to the loop. Knows
nothing about ingest, gates and other families.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import Iterable

from cloud_learner.config import FamilyHome
from cloud_learner.cycle import Candidate, Cycle
from cloud_learner.evaluate.alarms import WATCHED
from cloud_learner.evaluate.offline import load_set
from cloud_learner.pooling import NOTHING, Pooling, Served
from cloud_learner.rules import label_rules
from cloud_learner.store.examples import Batch, Certificate
from cloud_learner.store.lineage import Lineage
from cloud_learner.train.family import Family
from cloud_learner.train.teaching import TrainingError
from edge_runtime.errors import CapacityError, HeadwaterError
from edge_runtime.wire.messages import Report

CHECKPOINT_CYCLES = 10
CANDIDATE_S = 0.5  # how long what was learned may wait for its candidate

log = logging.getLogger("cloud_learner")


class Course:
    """Goes on from the checkpoint in `home`; `lineage` is the family's own part.

    Raises: ConfigError, OSError, PackageError.
    """

    def __init__(self, family: Family, home: FamilyHome, lineage: Lineage) -> None:
        self.family, self._home, self._lineage = family, home, lineage
        reference = load_set(home.reference).features
        self.cycle, self.pooling = Cycle(family, reference), Pooling(family.name, reference)
        self.cycle.restore(home.checkpoint)
        self.cycle.take_graph(home.graph)
        self.number = self.saved = self.cycle.number
        self.waiting: deque[Batch] = deque()
        self.clock_s = float("-inf")
        self.candidates = self.skipped = 0
        self.certificate: Certificate | None = None  # of the last batch that was dealt with
        self.failure = ""
        self.rests = False
        self.is_fresh, self._fresh_s = False, math.inf
        self._commits: deque[tuple[int, float]] = deque()
        self._since: list[Batch] = []  # the checkpoint
        trust = self.cycle.teaching.trust
        self._quarantined = {name: each.reason for name, each in trust.quarantined.items()}
        self._released_s = label_rules(family.config, idle_s=0.0).released_s
        told = [e["batch"] for e in lineage.read("alarm") if e["source"] in WATCHED]
        told += [e["batch"] for e in lineage.read("quarantine")]
        self._told = max(told, default=0)
        self._failed = {e["batch"]: bool(e["whole"]) for e in lineage.read("failed") if e["batch"]}

    def take(self, batches: Iterable[Batch], clock_s: float) -> None:
        """What a commit brought, and the event time at which that was all."""
        if self.rests:
            return
        self.waiting.extend(batches)
        last = self.waiting[-1].number if self.waiting else self.number
        self._commits.append((last, clock_s))
        self._settle_clock()

    def hear(self, report: Report) -> None:
        """Take what a device tells of the family's sessions, where it has any."""
        if self.family.config.personal is not None:
            self.pooling.hear(report.device, report.moments)

    def learn(self) -> None:
        """Learn the first batch that waits; whatever it raises ends here."""
        batch = self.waiting[0]
        if not self._failed.get(batch.number, True):
            return  # it left a cycle behind that was not whole
        try:
            self.cycle.learn(batch)
        except Exception as error:  # a family's network is foreign code
            self._pass_over(batch, error)
        else:
            self.failure = ""
            self.is_fresh |= self.cycle.is_taught  # else the candidate would be the one before
        if self.cycle.whole:
            self._tell(batch.number)
            self._since.append(batch)
        else:
            self._bring_back()

    def done(self, now_s: float) -> bool:
        """The first batch that waits has been dealt with; whether a candidate is due.

        It is when no other batch waits, or when what was learned is `CANDIDATE_S` old (`now_s` is
        monotonic): a stream that never pauses must not keep it from the devices.
        """
        if self.rests:
            self.waiting.clear()
            return False
        batch = self.waiting.popleft()
        self.number = batch.number
        self.certificate = batch.certificate(self.family.config.learning.device_cap)
        self.clock_s = max(self.clock_s, self._released_s(batch.examples[-1]))
        self._settle_clock()
        if not self.is_fresh:
            return False
        self._fresh_s = min(self._fresh_s, now_s)
        is_due = not self.waiting or now_s - self._fresh_s >= CANDIDATE_S
        self.skipped += not is_due
        return is_due

    def candidate(self, served: Served = NOTHING, now_s: float = 0.0) -> Candidate | None:
        """The student as it stands, while `served` serves; None where it cannot be made."""
        self.is_fresh, self._fresh_s = False, math.inf
        self.cycle.parent = served.release
        try:
            if self.family.config.personal is not None:
                left_out = self.cycle.teaching.trust.quarantined
                self.cycle.anchor = self.pooling.anchor(served, now_s, left_out)
            candidate = self.cycle.candidate()
        except Exception as error:  # exporting runs the family's network, too
            self.note(error)
            return None
        self.candidates += 1
        return candidate

    def note(self, error: Exception, batch: int = 0, *, whole: bool = True) -> None:
        """Something failed, with this batch or (0) with what was to become of it."""
        code = error.code if isinstance(error, HeadwaterError) else type(error).__name__
        self.failure = f"batch {batch}: {error}" if batch else str(error)
        log.warning("%s: %s", self.family.name, self.failure)
        try:
            self._lineage.append("failed", batch=batch, code=code, reason=str(error), whole=whole)
        except CapacityError as full:
            log.warning("%s", full)

    def keep(self) -> None:
        """Write the checkpoint when enough was learned since the last; call it after each batch.

        Apart from `learn`, for a candidate should not wait for the disk.
        """
        if len(self._since) < CHECKPOINT_CYCLES:
            return
        try:
            self.save()
        except OSError as error:  # tried again after the next batch
            self.failure = f"{self._home.checkpoint} was not written: {error}"
            log.warning("%s: %s", self.family.name, self.failure)

    def save(self) -> None:
        """Write the checkpoint, if there is something new in it. Raises: OSError."""
        if self._since and self.cycle.whole:
            self.cycle.save(self._home.checkpoint)
            self._since.clear()
            self.saved = self.cycle.number

    def statistics(self) -> dict[str, int]:
        """Counters of training."""
        return {
            "cycles": self.number,
            "candidates": self.candidates,
            "micro_batches_skipped": self.skipped,
            "micro_batches_failed": len(self._failed),
            "examples_learned": self.cycle.examples_learned,
            "learned_twice": self.cycle.ledger.learned_twice,
            "other_spec": self.cycle.ledger.other_spec,
            "quarantined_devices": len(self.cycle.teaching.trust.quarantined),
            "quarantined_rows": self.cycle.teaching.trust.counters["quarantined_rows"],
            "trimmed_rows": self.cycle.teaching.trimmed_rows,
            **self.cycle.teaching.concepts.statistics(),
            **self.pooling.statistics(),
            "batches_waiting": len(self.waiting),
            "resting": int(self.rests),
        }

    def _tell(self, number: int) -> None:
        """What was noticed in a batch, once: alarms, and whose rows are not learned."""
        if number <= self._told:
            return
        self._told = number
        alarms = self.cycle.alarms
        trust = self.cycle.teaching.trust
        reasons = {name: each.reason for name, each in trust.quarantined.items()}
        new = {name: why for name, why in reasons.items() if name not in self._quarantined}
        self._quarantined = reasons
        try:
            for alarm in alarms:
                self._lineage.append("alarm", **alarm.facts())
            for device, reason in new.items():
                self._lineage.append("quarantine", batch=number, device=device, reason=reason)
        except CapacityError as full:
            log.warning("%s", full)

    def _pass_over(self, batch: Batch, error: Exception) -> None:
        """Once in lineage, also when a restart comes by again."""
        if batch.number not in self._failed:
            self.note(error, batch.number, whole=self.cycle.whole)
        self._failed[batch.number] = self.cycle.whole

    def _bring_back(self) -> None:
        """The state before the batch: what the checkpoint holds and what was learned since."""
        try:
            self.cycle.restore(self._home.checkpoint)
            for batch in self._since:
                with contextlib.suppress(TrainingError):  # as it was passed over before
                    self.cycle.learn(batch)
            self.save()
        except Exception as error:
            self.rests = True
            self.failure = f"{self.failure}; nothing is learned until the next start: {error}"
            log.exception("%s: %s", self.family.name, self.failure)

    def _settle_clock(self) -> None:
        """Event time is that of a commit when every batch that it brought has been dealt with."""
        done = self.waiting[0].number - 1 if self.waiting else self.number
        while self._commits and self._commits[0][0] <= done:
            self.clock_s = max(self.clock_s, self._commits.popleft()[1])
