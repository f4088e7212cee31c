"""The campaign of a family: which release is stable, which is on trial, and the plans that say so.

Why: learning, releasing and promoting are three speeds. Candidates come every half second, a trial
needs thousands of labels; this is the place where they wait for each other.

    idle --offer--> shadow --> stage 1 --> ... --> stage n --> promoted --> idle, or the next
                    any of them --> rolled back --> idle, or the next

Invariants: one live trial; while it is undecided the newest offer waits and replaces an older one,
an operator's before the learner's. A stage is left by harm, at once; by evidence that the release
is not worse, with labels of the stage's own and a device that has shown it; by its deadline, or by
`pairs_max` labels that did not suffice, as undecided; or by a person. No evidence means no change.
A package that was rolled back is never on trial again, under whatever name. `seq` rises by one with
every plan, and each plan is a step that stays in `outbox` until `published` is called for it: state
first, then I/O. All that a trial is told is in `fed`: told again, it comes to the same plans.

Knows nothing about files, clocks, keys or the network; stores nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from cloud_learner.rollout import control, journal, plans
from cloud_learner.rollout.control import Control
from cloud_learner.rollout.journal import Fed, Header, Signed, slim
from cloud_learner.rollout.state import (
    SHADOW,
    Decision,
    Ending,
    Offer,
    Reason,
    Rules,
    State,
    Step,
    Told,
    Trial,
)
from cloud_learner.rollout.turnout import Turnout
from cloud_learner.store.examples import Example
from edge_runtime.rollout.plan import Plan, Stage
from edge_runtime.wire.messages import Report

# The newest decisions, for people; lineage keeps them all.
DECISIONS_MAX = 100


class Campaign:
    """Moves `state` by offers, evidence, people and time (`now_s`, wall time), and leaves the plans
    that follow in its outbox.
    """

    def __init__(self, rules: Rules, state: State | None = None) -> None:
        assert 0 <= rules.canary_share < 1, "the stable arm must answer too"
        self.rules = rules
        self.state = state or State()
        self.fed: list[tuple[str, bytes]] = []
        self._turnout = Turnout()

    @property
    def stage(self) -> str:
        """Where the family stands: empty, idle, or with a release in the shadow or the canary."""
        if self.state.stable is None:
            return "empty"
        trial = self.state.trial
        return "idle" if trial is None else "shadow" if trial.at == SHADOW else "canary"

    def offer(self, offer: Offer, now_s: float) -> str:
        """Put a new candidate on trial, or in the waiting place. The very first becomes stable.

        Returns why it was refused, or nothing.
        """
        state = self.state
        state.counts.offered += 1
        if why := state.why_refused(offer):
            state.counts.refused += 1
            return why
        if state.stable is None:
            state.serve(offer)
            self._plan("first_release", f"{offer.release} is the first release", release=offer)
        elif state.live is None and not state.paused:
            self._start(offer, now_s)
        elif state.pending is not None and state.pending.by and not offer.by:
            state.counts.superseded += 1
        else:
            state.counts.superseded += state.pending is not None
            state.pending = offer
        return ""

    def examples(self, examples: Iterable[Example], now_s: float) -> bool:
        """Add joined examples to the evidence, one by one, so that it does not matter how they are
        grouped, until the trial ends; returns whether any of them was about it.
        """
        trial, counted = self.state.trial, False
        both = {self._stable.release, trial.offer.release} if trial else set()
        for each in examples:
            if trial is None or self.state.trial is not trial:
                break
            is_ours = {scored.release for scored in each.scored} == both
            if is_ours and self._turnout.belongs(trial, each.device):
                self._count(trial, slim(each), now_s)
                counted = True
        return counted

    def report(self, report: Report, now_s: float, signed: Signed | None = None) -> bool:
        """Take what a device says about itself; returns whether it was about the trial.

        Only devices of the present stage count; others are remembered for those to come.
        """
        trial = self.state.trial
        if trial is None:
            self._turnout.know(report)
            return False
        if not self._turnout.hears(trial, report, now_s):
            return False
        self._hear(trial, report, now_s, signed)
        return True

    def tick(self, now_s: float) -> bool:
        """Let time pass; returns whether a stage has come to its deadline."""
        trial = self.state.trial
        if trial is None or now_s < trial.deadline_s:
            return False
        self._feed(trial, Fed(now_s=now_s))
        self._end(trial, "undecided", now_s, "its time is over")
        return True

    def control(self, told: Control, now_s: float) -> None:
        """Do what a person says. Raises: RequestError as `control.check`, nothing changed."""
        state, live = self.state, self.state.live
        control.check(state, told)
        if live is not None:
            # The gate approves the plan that follows, whose note has the digest of this.
            bare = msgspec.structs.replace(told, approval=None)
            self._feed(live, Fed(now_s=now_s, control=bare))
        control.apply(state, told)
        said = f"{told.verb} by {told.by}: {told.reason}"
        if told.verb == "abort":
            self._abort(now_s, said)
        elif told.verb in ("hold", "pin", "free"):
            self._plan("control", f"{told.device}: {said}")
        else:
            state.outbox.append(Step(None, None, {}, "control", said))
            self._go_on(told, now_s)

    def foreseen(self, told: Control, now_s: float) -> Plan | None:
        """The plan that `told` would lead to at once. Raises: as `control`; nothing is changed."""
        copy = msgspec.json.decode(msgspec.json.encode(self.state), type=State)
        again = type(self)(self.rules, copy)
        again.control(told, now_s)
        plans_ = [step.plan for step in copy.outbox[len(self.state.outbox) :] if step.plan]
        return plans_[0] if plans_ else None

    def published(self) -> None:
        """The oldest step of the outbox has been done."""
        self.state.outbox.pop(0)

    @property
    def _stable(self) -> Offer:
        assert self.state.stable is not None
        return self.state.stable

    def _start(self, offer: Offer, now_s: float) -> None:
        state, rules = self.state, offer.rules(self.rules)
        before = Header(state=msgspec.structs.replace(state, decisions=[], outbox=[]), rules=rules)
        trial = Trial.start(rules, offer, self._stable.release)
        trial.journal = f"{state.seq + 1:08d}-{offer.release}.jsonl"
        self._write(trial, msgspec.json.encode(before))
        self._feed(trial, Fed(now_s=now_s, offer=offer))
        state.trial = trial
        self._enter(trial, now_s)
        note = plans.begun(trial, self._stable)
        self._plan("canary" if trial.at == 0 else "shadow", note, release=offer)

    def _enter(self, trial: Trial, now_s: float) -> None:
        """Begin the stage `trial.at`: nobody of it has shown anything yet."""
        trial.began_s, trial.pairs_before = now_s, trial.evidence.pairs
        trial.waiting = trial.approved = False
        if not trial.stages or trial.stages[-1].percent != trial.percent:
            stage = Stage(self.state.seq + 1, trial.percent, now_s)
            trial.stages = (*trial.stages, stage)
        self._turnout.begin(trial)

    def _count(self, trial: Trial, example: Example, now_s: float) -> None:
        members = self._members(trial)
        self._feed(trial, Fed(now_s=now_s, members=members, example=example))
        trial.evidence.expect(members)
        if trial.evidence.examples([example]):
            self._judge(trial, now_s)

    def _hear(self, trial: Trial, report: Report, now_s: float, signed: Signed | None) -> None:
        members = self._members(trial)
        self._feed(trial, Fed.of_report(now_s, members, report, signed))
        trial.evidence.expect(members)
        trial.members[report.device] |= self._turnout.shows(trial, report)
        trial.evidence.report(report)
        self._judge(trial, now_s)

    def _members(self, trial: Trial) -> int:
        return len(trial.members)

    def _judge(self, trial: Trial, now_s: float) -> None:
        evidence, rules = trial.evidence, trial.rules
        if evidence.harm:
            self._end(trial, "harm", now_s)
        elif trial.has_passed:
            self._advance(trial, now_s)
        elif evidence.pairs >= rules.pairs_max and not evidence.not_worse:
            self._end(trial, "undecided", now_s)

    def _go_on(self, told: Control, now_s: float) -> None:
        """What had to wait for a person."""
        state, trial = self.state, self.state.trial
        if trial is not None and told.verb in ("approve", "resume"):
            trial.approved |= told.verb == "approve"
            owed = len(state.outbox)
            self._judge(trial, now_s)
            if told.approval is not None and len(state.outbox) > owed:
                step = msgspec.structs.replace(state.outbox[owed], approval=told.approval)
                state.outbox[owed] = step
        elif told.verb == "resume":
            self._next(now_s)

    def _abort(self, now_s: float, why: str) -> None:
        assert self.state.trial is not None, "checked"
        self._end(self.state.trial, "aborted", now_s, why)

    def _next(self, now_s: float) -> None:
        """The waiting candidate's turn."""
        state = self.state
        if state.pending is not None and state.live is None and not state.paused:
            offer, state.pending = state.pending, None
            self._start(offer, now_s)

    def _advance(self, trial: Trial, now_s: float) -> None:
        """Begin the next stage, or end the trial well; unless a person holds it back."""
        if self.state.paused:
            return
        if trial.rules.approve and not trial.approved:
            if not trial.waiting:
                trial.waiting = True
                note = f"{trial.offer.release} has passed its stage, and waits to be approved"
                facts = plans.facts(trial)
                self.state.outbox.append(Step(None, None, facts, "waits", note))
            return
        if trial.at + 1 == len(trial.rules.stages):
            self._end(trial, "promoted", now_s)
            return
        facts, trial.at = plans.facts(trial), trial.at + 1
        self._enter(trial, now_s)
        self._plan("stage", plans.advanced(trial), evidence=facts)

    def _end(self, trial: Trial, reason: Ending, now_s: float, why: str = "") -> None:
        """One decision, its plan for all devices, and what waits."""
        state, facts = self.state, plans.facts(trial, is_over=reason == "undecided")
        note = plans.ended(trial, self._stable, reason, why)
        state.counts.decided += 1
        if reason == "promoted":
            state.counts.promoted += 1
            state.serve(trial.offer)
            state.stages = trial.stages
            if trial.percent < 100:
                state.stages = (*trial.stages, Stage(state.seq + 1, 100.0, now_s))
        else:
            state.counts.rolled_back += 1
            state.quarantined.append(trial.offer.sha256)
        state.trial = None
        self._plan(reason, note, evidence=facts, of=trial.journal)
        pairs = trial.evidence.pairs
        decision = Decision(trial.offer.release, reason, state.seq, pairs, note)
        state.decisions = [*state.decisions, decision][-DECISIONS_MAX:]
        self._next(now_s)

    def _plan(
        self,
        reason: Reason,
        note: str,
        *,
        release: Offer | None = None,
        evidence: dict[str, float | int | str] | None = None,
        of: str = "",
    ) -> None:
        state = self.state
        state.seq += 1
        plan = plans.plan_of(state, self.rules, reason, note)
        state.pins = plan.pins
        where = state.live.journal if state.live else of
        state.outbox.append(Step(plan, release, evidence or {}, reason, note, where))

    def _feed(self, trial: Told, fed: Fed) -> None:
        self._write(trial, msgspec.json.encode(fed))

    def _write(self, trial: Told, line: bytes) -> None:
        if journal.add(trial, line) and trial.journal:
            self.fed.append((trial.journal, line))
