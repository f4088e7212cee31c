"""The campaign of a family: which release is stable, which is on trial, and the plans that say so.

Why: learning, releasing and promoting are three speeds. Candidates come every half second, the
canary needs thousands of labels; this is the place where they wait for each other.

    idle --offer--> canary --evidence--> promoted | rolled back --> idle, or canary (pending)

Invariants: one live canary; while it is undecided the newest offer waits and replaces an older one;
a canary leaves only by a verdict of its evidence or, when `pairs_max` did not suffice, as
undecided; no evidence means no change. A package that was rolled back is never on trial again,
under whatever name. `seq` rises by one with every plan, and each plan is a step that stays in
`outbox` until `published` is called for it: state first, then I/O.

Knows nothing about files, time, keys or the network; stores nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from cloud_learner.rollout.evidence import ArmTally, PairEvidence
from cloud_learner.stats.sequential import PairedTest
from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from edge_runtime.rollout.plan import Plan, PlanArm, Variant

Stage = Literal["empty", "idle", "canary"]
Reason = Literal["first_release", "canary", "promoted", "harm", "undecided"]

# The newest decisions, for people; lineage keeps them all.
DECISIONS_MAX = 100


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How a family's campaign decides. `margin` is of bounded losses, `canary_share` of answers.

    The numbers were found by simulation: with differences of standard deviation 0.03 / 0.04 / 0.05
    an equal model is promoted after 1,900 / 2,300 / 2,600 paired labels (median), one that answers
    the opposite is stopped after 20, one worse by the margin is promoted in 2 % of campaigns.
    """

    family: str
    selector: dict[str, str]
    canary_share: float = 0.2
    margin: float = 0.0025
    alpha_promote: float = 0.02
    alpha_stop: float = 0.01
    pairs_max: int = 8000
    task: Task = Task()


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate that passed the offline gate, ready to be released.

    `file` is where the package lies, `path` its name in the signed metadata; `counter` rises with
    every offer of the family. `learned_through_s` is the event time up to which it has learned,
    `arrived_s` the wall time at which its last micro-batch's last mature label arrived. `variants`
    are those of the plan's arm. `verdict` goes into the signed metadata.
    """

    release: str
    path: str
    sha256: str
    counter: int
    file: str
    learned_through_s: float
    arrived_s: float
    variants: tuple[Variant, ...] = ()
    verdict: dict[str, Any] = {}


class Step(msgspec.Struct, frozen=True):
    """I/O that a change of state owes: publish `plan`, with `release` when it is new to devices.

    `evidence` holds the numbers of the decision behind it; empty when no evidence was asked.
    """

    plan: Plan
    release: Offer | None
    evidence: dict[str, float | int | str]


class Decision(msgspec.Struct, frozen=True):
    """How a canary ended, and the plan sequence number that says so."""

    release: str
    reason: Reason
    plan_seq: int
    pairs: int
    note: str


class Counts(msgspec.Struct):
    """What became of all offers; `decided` = `promoted` + `rolled_back`."""

    offered: int = 0
    refused: int = 0
    superseded: int = 0
    decided: int = 0
    promoted: int = 0
    rolled_back: int = 0


class State(msgspec.Struct, kw_only=True):
    """All that a campaign must remember over a restart."""

    seq: int = 0
    stable: Offer | None = None
    canary: Offer | None = None
    pending: Offer | None = None
    evidence: PairEvidence | None = None
    quarantined: list[str] = []
    decisions: list[Decision] = []
    counts: Counts = msgspec.field(default_factory=Counts)
    outbox: list[Step] = []


class Campaign:
    """Moves `state` by offers and evidence, and leaves the plans that follow in its outbox."""

    def __init__(self, rules: Rules, state: State | None = None) -> None:
        assert 0 <= rules.canary_share < 1, "the stable arm must answer too"
        self.rules = rules
        self.state = state or State()

    @property
    def stage(self) -> Stage:
        """Where the family stands: before its first release, without or with a canary."""
        if self.state.stable is None:
            return "empty"
        return "idle" if self.state.canary is None else "canary"

    def offer(self, offer: Offer) -> None:
        """Put a new candidate on trial, or in the waiting place. The very first becomes stable."""
        state = self.state
        state.counts.offered += 1
        if self._refused(offer):
            state.counts.refused += 1
        elif state.stable is None:
            state.stable = offer
            self._plan("first_release", f"{offer.release} is the first release", offer)
        elif state.canary is None:
            self._start(offer)
        else:
            state.counts.superseded += state.pending is not None
            state.pending = offer

    def examples(self, examples: Iterable[Example]) -> bool:
        """Add joined examples to the evidence, and end the trial when they suffice.

        Returns whether any of them counted.
        """
        evidence = self.state.evidence
        if evidence is None:
            return False
        before = evidence.pairs
        verdict = evidence.add(examples)
        if verdict == "promote":
            self._end(evidence, "promoted")
        elif verdict == "stop":
            self._end(evidence, "harm")
        elif evidence.pairs >= self.rules.pairs_max:
            self._end(evidence, "undecided")
        return evidence.pairs > before

    def published(self) -> None:
        """The oldest step of the outbox has been done."""
        self.state.outbox.pop(0)

    def _refused(self, offer: Offer) -> bool:
        """Rolled back before, the very package that is live, or older than one that is."""
        live = [arm for arm in (self.state.stable, self.state.canary, self.state.pending) if arm]
        return offer.sha256 in self.state.quarantined or any(
            offer.sha256 == arm.sha256 or offer.counter <= arm.counter for arm in live
        )

    def _start(self, offer: Offer) -> None:
        rules, stable = self.rules, self.state.stable
        assert stable is not None
        self.state.canary = offer
        self.state.evidence = PairEvidence(
            family=rules.family,
            stable=ArmTally(stable.release),
            canary=ArmTally(offer.release),
            test=PairedTest.start(rules.margin, rules.alpha_promote, rules.alpha_stop),
            task=rules.task,
        )
        where = " ".join(f"{key}={value}" for key, value in rules.selector.items())
        note = f"{offer.release} is on trial against {stable.release} on {where or 'all devices'}"
        self._plan("canary", note, offer)

    def _end(
        self, evidence: PairEvidence, reason: Literal["promoted", "harm", "undecided"]
    ) -> None:
        """One decision, its plan for all devices, and the waiting candidate's turn."""
        state, canary, pending = self.state, self.state.canary, self.state.pending
        assert canary is not None
        note = describe(evidence, reason)
        state.counts.decided += 1
        if reason == "promoted":
            state.counts.promoted += 1
            state.stable = canary
        else:
            state.counts.rolled_back += 1
            state.quarantined.append(canary.sha256)
        state.canary = state.pending = state.evidence = None
        self._plan(reason, note, None, evidence.statistics())
        decision = Decision(canary.release, reason, state.seq, evidence.pairs, note)
        state.decisions = [*state.decisions, decision][-DECISIONS_MAX:]
        if pending is not None:
            self._start(pending)

    def _plan(
        self,
        reason: Reason,
        note: str,
        release: Offer | None,
        evidence: dict[str, float | int | str] | None = None,
    ) -> None:
        state, share = self.state, self.rules.canary_share
        assert state.stable is not None
        state.seq += 1
        plan = Plan(
            family=self.rules.family,
            seq=state.seq,
            stable=_arm(state.stable, 1.0 - share if state.canary else 1.0),
            canary=_arm(state.canary, share) if state.canary else None,
            selector=self.rules.selector if state.canary else {},
            # Fixed for the life of one trial, another for the next.
            salt=state.canary.sha256[:16] if state.canary else "",
            reason=reason,
            note=note,
        )
        state.outbox.append(Step(plan, release, evidence or {}))


def describe(evidence: PairEvidence, reason: Literal["promoted", "harm", "undecided"]) -> str:
    """The decision in one sentence with its numbers, for the plan's note and for lineage."""
    facts = evidence.statistics()
    old, new = evidence.stable.release, evidence.canary.release
    numbers = (
        f"after {evidence.pairs:,} paired labels: mean loss {facts['canary_loss']:.4f} against "
        f"{facts['stable_loss']:.4f}, mean difference {facts['mean_difference']:+.4f}"
    )
    test = evidence.test
    if reason == "promoted":
        e, reach = test.noninferior.evidence, 1 / test.alpha_promote
        return f"{new} replaces {old} {numbers}; e {e:.1f} >= {reach:.0f} that it is not worse"
    if reason == "harm":
        e, reach = test.harm.evidence, 1 / test.alpha_stop
        return f"{new} is rolled back to {old} {numbers}; e {e:.1f} >= {reach:.0f} that it is worse"
    return f"{new} is rolled back to {old}, undecided {numbers}; margin {test.margin}"


def _arm(offer: Offer, weight: float) -> PlanArm:
    return PlanArm(offer.release, offer.path, offer.sha256, offer.counter, weight, offer.variants)
