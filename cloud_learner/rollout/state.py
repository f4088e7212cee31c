"""What a campaign goes by and what it remembers: rules, offers, the trial, decisions, plans owed.

Why: the campaign moves this and nothing else, so that whoever stores it stores the whole campaign.

Invariants: plain values only. The rules of a trial are those at its start, for all its life: what
is declared anew counts from the next trial on.

Knows nothing about how any of it comes about.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from cloud_learner.rollout.contest import Contest
from cloud_learner.rollout.evidence import TrialEvidence
from cloud_learner.rollout.rewards import Outcome
from cloud_learner.stats.tasks import Task
from edge_runtime.rollout.plan import LocalGates, Plan, Stage, Variant, Window
from edge_runtime.update.approval import Approval

Ending = Literal["promoted", "harm", "undecided", "aborted", "won", "kept"]
Reason = (
    Literal["first_release", "shadow", "canary", "stage", "waits", "control", "contest", "shares"]
    | Ending
)

AGREEMENT_MIN = 0.5
"""A shadow that surely decides otherwise more often than not is another model, and stays one."""

PROVEN_MAX = 10
"""So many releases that were stable are remembered, for contests."""

SHADOW = -1
"""The stage before the first: the release is scored there and never answers."""


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How a family's campaign decides. `margin` is of bounded losses, `canary_share` of answers.

    The numbers were found by simulation: with differences of standard deviation 0.03 / 0.04 / 0.05
    an equal model is promoted after 1,900 / 2,300 / 2,600 paired labels (median), one that answers
    the opposite is stopped after 20, one worse by the margin is promoted in 2 % of campaigns.

    A stage is left after `pairs_min` labels of its own at least. The first is left after thousands,
    so the number matters for those behind it: it is what a loss of 5 % of all answers shows in.
    """

    family: str
    selector: dict[str, str]
    canary_share: float = 0.2
    margin: float = 0.0025
    alpha_promote: float = 0.02
    alpha_stop: float = 0.01
    pairs_min: int = 100
    pairs_max: int = 8000
    stages: tuple[float, ...] = (100.0,)
    stage_s: float = 604_800.0
    shadow_rows: int = 0
    approve: bool = False
    window: Window | None = None
    jitter_s: float = 0.0
    gates: LocalGates = LocalGates()
    task: Task = Task()
    outcome: Outcome = "quality"
    is_by_arrival: bool = False


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate that passed the offline gate, ready to be released.

    `file` is where the package lies, `path` its name in the signed metadata; `counter` rises with
    every offer of the family. `learned_through_s` is the event time up to which it has learned,
    `arrived_s` the wall time at which its last micro-batch's last mature label arrived. `variants`
    are those of the plan's arm. `verdict` goes into the signed metadata. `by` names the operator
    who handed it in, who may wish for `stages` and a `selector` of its own.
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
    by: str = ""
    stages: tuple[float, ...] = ()
    selector: dict[str, str] | None = None

    def rules(self, declared: Rules) -> Rules:
        """The rules of its trial."""
        selector = declared.selector if self.selector is None else self.selector
        stages = self.stages or declared.stages
        return msgspec.structs.replace(declared, selector=selector, stages=stages)


class Step(msgspec.Struct, frozen=True):
    """I/O that a change of state owes: publish `plan`, with `release` when it is new to devices.

    `evidence` holds the numbers of the decision behind it; empty when no evidence was asked. A
    decision that changes nothing on devices has no plan, and is only recorded.
    """

    plan: Plan | None
    release: Offer | None
    evidence: dict[str, float | int | str]
    reason: Reason = "control"
    note: str = ""
    journal: str = ""
    approval: Approval | None = None


class Decision(msgspec.Struct, frozen=True):
    """How a trial ended, and the plan sequence number that says so."""

    release: str
    reason: Ending
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


class Told(msgspec.Struct, kw_only=True):
    """What keeps a journal: `digest` chains all that it was told, which lies in the first
    `journal_bytes` of the file `journal`. With `waiting` it has passed, and a person must approve.
    """

    waiting: bool = False
    approved: bool = False
    journal: str = ""
    journal_bytes: int = 0
    digest: str = ""


class Trial(Told, kw_only=True):
    """A release on trial: stage `at` of its rules, since `began_s`, with the history `stages`.

    `members` are devices of the present stage, as far as they are known: whether they have shown in
    it that the release is in their memory. `pairs_before` were counted when the stage began.
    """

    rules: Rules
    offer: Offer
    evidence: TrialEvidence
    at: int = 0
    began_s: float = 0.0
    stages: tuple[Stage, ...] = ()
    pairs_before: int = 0
    members: dict[str, bool] = {}

    @classmethod
    def start(cls, rules: Rules, offer: Offer, stable: str) -> Trial:
        """A trial that has been told nothing yet."""
        evidence = TrialEvidence.start(
            rules.family,
            stable,
            offer.release,
            rules.task,
            margin=rules.margin,
            alpha_promote=rules.alpha_promote,
            alpha_stop=rules.alpha_stop,
        )
        at = SHADOW if rules.shadow_rows else 0
        return cls(rules=rules, offer=offer, evidence=evidence, at=at)

    @property
    def deadline_s(self) -> float:
        """When the present stage ends, whatever is known by then; wall time."""
        return self.began_s + self.rules.stage_s

    @property
    def has_passed(self) -> bool:
        """Whether the present stage may be left for the next; without a device that shows it, no
        evidence of others suffices.
        """
        evidence, rules = self.evidence, self.rules
        if not any(self.members.values()):
            return False
        if self.at == SHADOW:
            health = evidence.health
            is_enough = health.total.rows >= rules.shadow_rows
            return is_enough and health.agreement.interval[1] >= AGREEMENT_MIN
        return evidence.not_worse and evidence.pairs - self.pairs_before >= rules.pairs_min

    @property
    def salt(self) -> str:
        """What devices draw their buckets and answers by; another for the next trial."""
        return self.offer.sha256[:16]

    @property
    def percent(self) -> float:
        """The devices that the present stage is on; those of the first where it is the shadow."""
        return self.rules.stages[max(self.at, 0)]


class Match(Told, kw_only=True):
    """A contest between `offers`, the first of which is stable; `joined` of them are in the plan.

    It is on every device.
    """

    rules: Rules
    contest: Contest
    offers: list[Offer]
    stages: tuple[Stage, ...]
    joined: int = 2

    @property
    def deadline_s(self) -> float:
        """When it ends, whatever is known by then; wall time."""
        return self.contest.began_s + self.rules.stage_s

    @property
    def salt(self) -> str:
        """What devices draw their answers by."""
        return self.contest.salt


class State(msgspec.Struct, kw_only=True):
    """All that a campaign must remember over a restart.

    `fallback` is the stable release before this one, and `stages` the history of how this one came
    to be it. `proven` are the newest releases that were stable once. `hold` and `pins` stand in
    every plan until they are taken back.
    """

    seq: int = 0
    stable: Offer | None = None
    fallback: Offer | None = None
    proven: list[Offer] = []
    trial: Trial | None = None
    match: Match | None = None
    pending: Offer | None = None
    stages: tuple[Stage, ...] = ()
    paused: bool = False
    hold: list[str] = []
    pins: dict[str, str] = {}
    quarantined: list[str] = []
    decisions: list[Decision] = []
    counts: Counts = msgspec.field(default_factory=Counts)
    outbox: list[Step] = []

    @property
    def live(self) -> Trial | Match | None:
        """What holds the place of the one live campaign."""
        return self.trial or self.match

    @property
    def canary(self) -> Offer | None:
        """The release on trial."""
        return self.trial.offer if self.trial else None

    @property
    def evidence(self) -> TrialEvidence | None:
        """What is known about it."""
        return self.trial.evidence if self.trial else None

    def serve(self, offer: Offer) -> None:
        """From now on it is stable, and may take part in contests."""
        self.fallback, self.stable = self.stable, offer
        others = [each for each in self.proven if each.sha256 != offer.sha256]
        self.proven = [*others, offer][-PROVEN_MAX:]

    def why_refused(self, offer: Offer) -> str:
        """Why: rolled back before, the very package that is live, or older than one that is."""
        if offer.sha256 in self.quarantined:
            return f"{offer.sha256[:12]} was rolled back before; it is never tried again"
        for arm in (self.stable, self.canary, self.pending):
            if arm and offer.sha256 == arm.sha256:
                return f"{offer.sha256[:12]} is {arm.release}, which is live or waits already"
            if arm and offer.counter <= arm.counter:
                return f"{offer.release} is older than {arm.release}"
        return ""
