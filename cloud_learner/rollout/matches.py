"""Contests in the place of a trial: the campaign that holds them, and the plans they come to.

Why: a family has one live campaign, and its devices one plan. A contest changes what answers as a
trial does, so it stands in the same place, is paused, ended and told of by the same words, and
candidates wait for it.

    idle --contest--> every device runs all of its releases --over, deadline--> won | kept --> idle
                                                             --abort--> as it was before

Invariants: only releases that were stable once take part, and the one that is stable now does; they
join one by one, a plan each, since a plan brings one release to the devices. Once it is over, the
winner is stable: where an interval says so, or as the one with the largest share; ended by a
person, it changes nothing. While paused, answers count and no plan is written. Nobody is put into
quarantine by a contest.

Knows nothing about what wins; otherwise as the campaign.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from cloud_learner.rollout import control, plans
from cloud_learner.rollout.answering import Answering
from cloud_learner.rollout.campaign import DECISIONS_MAX, Campaign
from cloud_learner.rollout.contest import Contest, Terms, check
from cloud_learner.rollout.control import Control
from cloud_learner.rollout.journal import Fed, Header, Signed, slim
from cloud_learner.rollout.state import Decision, Ending, Match, Offer, Rules, State, Step
from cloud_learner.store.examples import Example
from edge_runtime.errors import RequestError
from edge_runtime.rollout.plan import Stage
from edge_runtime.wire.messages import Report


class Matches(Campaign):
    """A campaign that holds contests, too."""

    def __init__(self, rules: Rules, state: State | None = None) -> None:
        super().__init__(rules, state)
        self._answering = Answering(rules.family)

    @property
    def stage(self) -> str:
        """As of the campaign, or contest."""
        return "contest" if self.state.match is not None else super().stage

    def examples(self, examples: Iterable[Example], now_s: float) -> bool:
        """Add joined examples to what is live; returns whether any of them counted."""
        match, counted = self.state.match, False
        if match is None:
            return super().examples(examples, now_s)
        for each in examples:
            if self.state.match is not match:
                break
            if match.contest.examples([slim(each)]):
                self._feed(match, Fed(now_s=now_s, example=slim(each)))
                self._conclude(match, now_s)
                counted = True
        return counted

    def report(self, report: Report, now_s: float, signed: Signed | None = None) -> bool:
        """Take what a device says about itself; returns whether it counted."""
        self._answering.hear(report)
        return super().report(report, now_s, signed)

    def tick(self, now_s: float) -> bool:
        """Let time pass; returns whether anything came of it."""
        match = self.state.match
        if match is None:
            return super().tick(now_s)
        if now_s >= match.deadline_s:
            self._feed(match, Fed(now_s=now_s))
            self._close(match, self._ending(match), now_s, "its time is over")
        elif match.contest.is_due(now_s) and not self.state.paused:
            self.draw(self._answering.since(match.contest.terms.releases), now_s)
        else:
            return False
        return True

    def draw(self, answered: list[int], now_s: float) -> None:
        """Other shares, by a plan; each release of the contest has `answered` so often since."""
        match = self.state.match
        assert match is not None
        self._feed(match, Fed(now_s=now_s, answered=answered))
        match.contest.draw(answered, now_s)
        note = f"{match.contest.verdict}; {plans.digest(match)}"
        self._plan("shares", note, evidence=match.contest.statistics())

    def control(self, told: Control, now_s: float) -> None:
        """Do what a person says. Raises: RequestError as `control.check` and `contest.check`."""
        if told.verb == "contest":
            self._begin(told, now_s)
        else:
            super().control(told, now_s)

    def _begin(self, told: Control, now_s: float) -> None:
        state, rules = self.state, self.rules
        terms, offers = self._checked(told)
        names = terms.releases
        before = Header(state=msgspec.structs.replace(state, decisions=[], outbox=[]), rules=rules)
        match = Match(
            rules=rules,
            contest=Contest.begin(terms, rules.family, rules.outcome, rules.task, now_s),
            offers=offers,
            stages=(Stage(state.seq + 1, 100.0, now_s),),
            journal=f"{state.seq + 1:08d}-contest.jsonl",
        )
        self._write(match, msgspec.json.encode(before))
        bare = msgspec.structs.replace(told, approval=None)
        self._feed(match, Fed(now_s=now_s, control=bare))
        state.match = match
        self._answering.since(names)
        for match.joined in range(2, len(offers) + 1):
            note = f"{' and '.join(names)} serve together; contest by {told.by}: {told.reason}"
            self._plan("contest", note, release=offers[match.joined - 1])

    def _checked(self, told: Control) -> tuple[Terms, list[Offer]]:
        """The terms of a contest and its releases, the stable one first."""
        state, terms = self.state, told.terms
        control.check(state, told)
        if state.live is not None or state.paused:
            raise RequestError(
                "not_idle",
                f"{self.rules.family} is {self.stage}{', paused' if state.paused else ''}; "
                "nothing was changed",
                "wait until it is idle, or abort what is live, or resume",
            )
        if self.rules.is_by_arrival:
            raise RequestError(
                "labels_by_arrival",
                "labels count as they arrive, so outcomes that come early would decide; "
                "nothing was changed",
                "[label] policy of the family must be mature or weighted",
            )
        if terms is None:
            raise RequestError("bad_contest", "a contest has terms; nothing was changed")
        check(terms, self._stable.release)
        offers = self._offers(terms.releases)
        names = tuple(offer.release for offer in offers)
        return msgspec.structs.replace(terms, releases=names), offers

    def _offers(self, names: Iterable[str]) -> list[Offer]:
        """The releases of these names, the stable one first."""
        proven = {offer.release: offer for offer in [*self.state.proven, self._stable]}
        unknown = [name for name in names if name not in proven]
        if unknown:
            raise RequestError(
                "unknown_release",
                f"{', '.join(unknown)} never served all devices; nothing was changed",
                f"a contest is between some of: {', '.join(proven)}",
            )
        return sorted((proven[name] for name in names), key=lambda each: each != self._stable)

    def _go_on(self, told: Control, now_s: float) -> None:
        match = self.state.match
        if match is None:
            super()._go_on(told, now_s)
        elif told.verb in ("approve", "resume"):
            match.approved |= told.verb == "approve"
            self._conclude(match, now_s)

    def _abort(self, now_s: float, why: str) -> None:
        if self.state.match is None:
            super()._abort(now_s, why)
        else:
            self._close(self.state.match, "aborted", now_s, why)

    def _conclude(self, match: Match, now_s: float) -> None:
        """End a contest that is over; unless a person holds it back."""
        if not match.contest.is_over or self.state.paused:
            return
        if match.rules.approve and not match.approved:
            if not match.waiting:
                match.waiting = True
                facts, note = match.contest.statistics(), f"{match.contest.verdict}; it waits"
                self.state.outbox.append(Step(None, None, facts, "waits", note))
            return
        self._close(match, self._ending(match), now_s)

    def _ending(self, match: Match) -> Ending:
        """Whether another release than the stable one has won, and may follow it."""
        winner = match.contest.winner
        may = match.approved or not match.rules.approve
        return "won" if may and winner not in (None, self._stable.release) else "kept"

    def _close(self, match: Match, reason: Ending, now_s: float, why: str = "") -> None:
        """One decision, its plan for all devices, and what waits."""
        state, contest = self.state, match.contest
        if reason == "won":
            state.serve(next(each for each in match.offers if each.release == contest.winner))
            state.stages = (Stage(state.seq + 1, 100.0, now_s),)
        state.match = None
        serves = f"{self._stable.release} serves"
        note = "; ".join(filter(None, (serves, contest.verdict, why, plans.digest(match))))
        self._plan(reason, note, evidence=contest.statistics(), of=match.journal)
        answered = contest.ledger.answered
        decision = Decision(self._stable.release, reason, state.seq, answered, note)
        state.decisions = [*state.decisions, decision][-DECISIONS_MAX:]
        self._next(now_s)
