"""Promises C3-C6, C8 and C10 of a campaign, named by their numbers, on an injected clock.

The fleet is the devices' own plan code: who tries what, each device reads from the plan by itself.
"""

from __future__ import annotations

import hashlib
import itertools

import msgspec
import pytest

from cloud_learner.rollout.campaign import Campaign
from cloud_learner.rollout.control import Control
from cloud_learner.rollout.replay import replayed
from cloud_learner.rollout.state import Offer, Rules, State
from cloud_learner.store.examples import Example
from edge_runtime.errors import RequestError
from edge_runtime.rollout.plan import arms_for, bucket, encode_plan
from edge_runtime.update.approval import Approval
from edge_runtime.wire.messages import ArmReport, Report, Scored, ShadowReport

DAY_S = 86_400.0
RULES = Rules(family="coin", selector={"site": "a"}, stages=(1.0, 10.0, 50.0, 100.0), stage_s=DAY_S)


def offer(counter, **more) -> Offer:
    return Offer(
        release=f"r{counter}",
        path=f"m/coin/r{counter}.onnx",
        sha256=hashlib.sha256(b"%d" % counter).hexdigest(),
        counter=counter,
        file="",
        learned_through_s=0.0,
        arrived_s=0.0,
        **more,
    )


class World:
    """A campaign and a fleet that does what its newest plan says, at once."""

    def __init__(self, rules=RULES, devices=500, site="a") -> None:
        self.campaign = Campaign(rules)
        self.now_s, self.number, self.seq = 1_000.0, 0, 0
        self.plans = []
        self.attributes = {"site": site}
        self.devices = [f"device-{number}" for number in range(devices)]
        self.silent: set[str] = set()
        self.journal: list[bytes] = []
        self.offer(offer(1))

    def offer(self, offered) -> str:
        why = self.campaign.offer(offered, self.now_s)
        self.publish()
        return why

    def publish(self) -> None:
        for step in list(self.campaign.state.outbox):
            if step.plan is not None:
                self.plans.append(step.plan)
            self.campaign.published()

    @property
    def plan(self):
        return self.plans[-1]

    def trying(self) -> list[str]:
        """The devices that run something on trial, as they see it."""
        plan = self.plan
        return [n for n in self.devices if len(arms_for(plan, n, self.attributes)) > 1]

    def report(self, **counts) -> None:
        """Every device that speaks reports once."""
        self.number += 1
        for name in self.devices:
            if name not in self.silent:
                self.campaign.report(self.told(name, **counts), self.now_s)
                self.publish()

    def told(self, name, *, failed=0, agreed=1.0) -> Report:
        """After ten requests more: so many failures of the canary, or rows that a shadow scored."""
        count, arms, shadows = self.number * 10, [], []
        for arm, each in arms_for(self.plan, name, self.attributes):
            if each.mode == "live":
                bad = failed if arm == "canary" else 0
                arms.append(ArmReport("coin", arm, each.release, 0.0, answered=count, failed=bad))
            else:
                names = ("coin", each.release, self.plan.stable.release)
                sums = (count, 0, int(count * agreed), 0, 0.1 * count, 0.01 * count, 50.0 * count)
                shadows.append(ShadowReport(*names, *sums))
        facts = (1, name, 1, self.now_s, self.attributes, arms, self.plan.seq)
        return Report(*facts, {}, {}, [], 0, 0, number=self.number, shadows=shadows)

    def labels(self, count, old=0.25, new=0.25) -> None:
        """So many labels, from the devices that try it, one after the other."""
        trying = itertools.cycle([name for name in self.trying() if name not in self.silent])
        canary = self.campaign.state.canary
        assert canary is None or set(self.trying()) - self.silent, "nobody tries it"
        for name in itertools.islice(trying, count):
            if canary is None or self.campaign.state.canary != canary:
                return
            self.seq += 1
            stable, wave = self.campaign.state.stable.release, 0.02 * (self.seq % 5 - 2)
            answers = [(stable, old + wave), (canary.release, new + 1.01 * wave)]
            scored = [Scored(release, "", [answer]) for release, answer in answers]
            facts = (name, 1, self.seq, "coin", float(self.seq), 0.0, b"", "")
            example = Example(*facts, float(self.seq % 4 == 0), 0.5, scored, 0.0, 0.0)
            self.campaign.examples([example], self.now_s)
            self.publish()

    def wait(self, seconds) -> None:
        self.now_s += seconds
        self.campaign.tick(self.now_s)
        self.publish()

    def say(self, verb, **more) -> None:
        told = Control(verb=verb, by="anna", reason="a test", **more)
        self.campaign.control(told, self.now_s)
        self.publish()


def on_trial(**more) -> World:
    world = World(**more)
    world.offer(offer(2))
    world.report()
    return world


def through(world: World) -> list[float]:
    """Let an equal release go as far as it gets; the percentages of its plans."""
    for _ in range(60):
        if world.campaign.state.trial is None:
            break
        world.report()
        world.labels(100)
    return [plan.percent for plan in world.plans if plan.canary is not None]


def test_a_release_goes_through_its_stages_each_with_more_of_the_same_devices():
    world = on_trial()
    before = set(world.trying())
    while world.campaign.state.trial is not None:
        world.report()
        world.labels(50)
        if world.campaign.state.trial is not None:
            assert before <= set(world.trying())
            before = set(world.trying())

    trials = [plan for plan in world.plans if plan.canary is not None]
    assert [plan.percent for plan in trials] == [1.0, 10.0, 50.0, 100.0]
    assert len({plan.salt for plan in trials}) == 1
    assert [len(plan.stages) for plan in trials] == [1, 2, 3, 4]
    assert (world.plan.reason, world.plan.stable.release) == ("promoted", "r2")
    assert world.plan.stages == trials[-1].stages
    assert world.plan.fallback.release == "r1"


def test_no_release_leaves_the_first_stage_before_it_is_shown_to_be_not_worse():
    world = on_trial()
    while len(world.plan.stages) == 1:
        assert not world.campaign.state.evidence.not_worse
        world.labels(1)

    assert world.campaign.state.evidence.not_worse
    assert world.campaign.state.evidence.pairs > 1000


def test_a_history_that_ends_below_all_devices_tells_how_it_came_to_all():
    world = on_trial(rules=msgspec.structs.replace(RULES, stages=(20.0,)))

    through(world)

    assert [stage.percent for stage in world.plan.stages] == [20.0, 100.0]
    assert world.plan.stages[-1].seq == world.plan.seq


@pytest.mark.parametrize("site", ["a", "b"])
def test_c3_a_stage_without_eligible_or_reporting_devices_holds_and_ends_at_its_deadline(site):
    world = World(site=site)
    world.silent = set(world.devices)  # with site b nobody is eligible; with a nobody reports
    world.offer(offer(2))
    for _ in range(23):
        world.report()
        world.wait(3600.0)
        assert world.campaign.stage == "canary"

    world.wait(3600.0)

    assert (world.plan.reason, world.plan.stable.release) == ("undecided", "r1")
    assert world.plan.percent == 100.0
    assert world.plan.canary is None


def test_c3_evidence_of_a_stage_before_does_not_advance_a_stage_in_which_nobody_shows_it():
    world = on_trial()
    world.labels(3000)
    assert world.plan.percent == 10.0
    stage = world.campaign.state.trial.stages

    world.silent = set(world.devices)
    world.report()

    assert not any(world.campaign.state.trial.members.values())
    assert world.campaign.state.trial.stages == stage


def test_c4_silent_devices_are_unknown_and_failed_at_the_deadline():
    world = World(rules=msgspec.structs.replace(RULES, stages=(50.0,)))
    world.report()  # the fleet is known before
    world.offer(offer(2))
    inside = world.trying()
    world.silent = set(inside[::3])
    world.report()
    members = world.campaign.state.trial.members
    assert set(members) == set(inside)
    assert {name for name, shown in members.items() if not shown} == world.silent

    world.now_s += DAY_S
    world.campaign.tick(world.now_s)

    (step,) = world.campaign.state.outbox
    assert step.evidence["devices_failed"] == len(world.silent)
    assert step.evidence["devices_trying"] == len(inside) - len(world.silent)
    assert step.plan.reason == "undecided"


def test_c4_a_device_of_the_stage_before_is_silent_in_the_next_until_it_shows_it_again():
    world = on_trial()
    first = world.trying()
    world.labels(2500)

    members = world.campaign.state.trial.members

    assert world.plan.percent == 10.0
    assert set(first) <= set(members)


def test_c5_a_release_that_fails_is_rolled_back_by_a_plan_at_once_and_within_its_stage():
    world = on_trial()
    inside = world.trying()
    assert len(inside) == sum(bucket(world.plan.salt, name) < 0.01 for name in world.devices)

    world.labels(200, old=0.1, new=0.9)

    assert (world.plan.reason, world.plan.canary) == ("harm", None)
    assert [plan.percent for plan in world.plans if plan.canary] == [1.0]
    assert world.campaign.state.decisions[-1].pairs < 100


def test_c5_when_three_of_ten_canaries_fail_the_plan_back_is_there_with_the_next_report():
    world = on_trial(rules=msgspec.structs.replace(RULES, stages=(10.0, 100.0)))
    inside = world.trying()
    failing = set(inside[: round(0.3 * len(inside))])
    while world.campaign.state.trial is not None and world.number < 10:
        world.number += 1
        for name in inside:
            failed = 2 * world.number if name in failing else 0
            told = world.told(name, failed=failed)
            world.campaign.report(told, world.now_s)
            world.publish()

    assert (world.plan.reason, world.plan.canary) == ("harm", None)
    assert "by failures" in world.plan.note
    assert world.number <= 4
    assert all(plan.percent == 10.0 for plan in world.plans if plan.canary)


def test_c5_while_nobody_decides_no_device_tries_it_beyond_its_time():
    world = on_trial()

    assert world.plan.not_after_s == world.campaign.state.trial.began_s + DAY_S


def test_c6_a_candidate_every_half_second_for_hours_neither_starves_nor_doubles_a_trial():
    world = World(
        rules=msgspec.structs.replace(RULES, stages=(50.0, 100.0), stage_s=1800.0), devices=20
    )
    candidates = 7200 * 3
    for counter in range(2, candidates + 2):
        world.now_s += 0.5
        world.offer(offer(counter))
        if counter % 20 == 0:
            world.report()
            # every other one is never labelled, and ends by its deadline
            if world.campaign.state.counts.decided % 2 == 0:
                world.labels(100)
            world.wait(0.0)
        assert sum(len(plan.trials) for plan in world.plans[-1:]) <= 1

    counts, state = world.campaign.state.counts, world.campaign.state
    assert counts.decided >= 10
    assert {"promoted", "undecided"} <= {plan.reason for plan in world.plans}
    waiting = (state.canary is not None) + (state.pending is not None)
    assert counts.offered == 1 + counts.superseded + counts.decided + waiting + counts.refused
    assert [plan.seq for plan in world.plans] == list(range(1, len(world.plans) + 1))
    # the newest of then was tried each time
    tried = [plan.canary.counter for plan in world.plans if plan.reason == "canary"]
    assert tried == sorted(tried)
    assert counts.superseded > 0.99 * candidates - counts.decided


def test_c6_an_operators_release_waits_before_the_learners():
    world = on_trial()
    world.offer(offer(3))
    world.offer(offer(4, by="anna"))
    world.offer(offer(5))
    assert world.campaign.state.pending.release == "r4"

    world.offer(offer(6, by="ben", stages=(30.0,), selector={"site": "b"}))
    world.labels(200, old=0.1, new=0.9)

    assert world.plan.canary.release == "r6"
    assert (world.plan.selector, world.plan.percent) == ({"site": "b"}, 30.0)
    assert world.campaign.state.counts.superseded == 3


def test_c8_where_approval_is_required_each_advance_waits_for_it_and_is_logged():
    world = on_trial(rules=msgspec.structs.replace(RULES, stages=(10.0, 100.0), approve=True))
    plans = len(world.plans)
    for _ in range(60):
        world.labels(50)
        world.report()
    state = world.campaign.state
    assert len(world.plans) == plans
    assert state.trial.waiting

    world.say("approve")
    assert (world.plan.percent, state.trial.waiting) == (100.0, False)
    world.report()
    world.labels(200)
    assert world.plan.percent == 100.0
    assert world.campaign.stage == "canary"
    world.say("approve")

    assert world.plan.reason == "promoted"


def test_c8_a_decision_that_waits_is_a_step_without_a_plan_and_with_its_evidence():
    world = on_trial(rules=msgspec.structs.replace(RULES, approve=True))
    campaign = world.campaign
    world.publish = lambda: None
    world.labels(4000)

    noted = [step for step in campaign.state.outbox if step.plan is None]

    assert [step.reason for step in noted] == ["waits"]
    assert noted[0].evidence["pairs"] > 1000


def test_c8_nothing_is_approved_before_it_has_passed():
    world = on_trial(rules=msgspec.structs.replace(RULES, approve=True))

    with pytest.raises(RequestError) as caught:
        world.say("approve")

    assert caught.value.code == "nothing_to_approve"


def test_c8_the_plan_that_an_approval_leads_to_is_foreseen_to_the_byte():
    world = on_trial(rules=msgspec.structs.replace(RULES, approve=True))
    world.labels(4000)
    told = Control(verb="approve", by="anna", reason="a test")
    plans, state = len(world.plans), msgspec.json.encode(world.campaign.state)

    foreseen = world.campaign.foreseen(told, world.now_s)
    assert msgspec.json.encode(world.campaign.state) == state
    approval = Approval("a key", "a signature")
    world.campaign.control(msgspec.structs.replace(told, approval=approval), world.now_s)

    steps = [step for step in world.campaign.state.outbox if step.plan is not None]
    assert [(encode_plan(step.plan), step.approval) for step in steps] == [
        (encode_plan(foreseen), approval)
    ]
    assert len(world.plans) == plans


def test_a_shadow_is_scored_and_never_answers_until_so_many_rows_were_compared():
    world = World(rules=msgspec.structs.replace(RULES, stages=(20.0, 100.0), shadow_rows=500))
    world.offer(offer(2))
    assert (world.plan.reason, world.plan.canary.mode, world.plan.percent) == (
        *("shadow", "shadow"),
        20.0,
    )
    for _ in range(4):
        world.now_s += 20.0
        world.report(agreed=1.0)

    assert world.campaign.stage == "canary"
    assert (world.plan.reason, world.plan.canary.mode) == ("stage", "live")
    assert [stage.percent for stage in world.plan.stages] == [20.0]
    assert world.campaign.state.evidence.health.total.rows >= 500


def test_a_shadow_that_decides_otherwise_more_often_than_not_stays_one_until_its_deadline():
    world = World(rules=msgspec.structs.replace(RULES, stages=(20.0, 100.0), shadow_rows=500))
    world.offer(offer(2))
    for _ in range(40):
        world.now_s += 20.0
        world.report(agreed=0.1)
    assert world.campaign.stage == "shadow"

    world.wait(DAY_S)

    assert world.plan.reason == "undecided"


def test_a_paused_campaign_gathers_evidence_stops_harm_and_lets_nothing_advance_or_begin():
    world = on_trial()
    world.offer(offer(3))
    world.say("pause")
    plans = len(world.plans)
    world.labels(3000)
    assert world.campaign.state.evidence.not_worse
    assert len(world.plans) == plans

    world.labels(2000, old=0.1, new=0.9)

    assert (world.plan.reason, world.plan.canary) == ("harm", None)
    assert world.campaign.state.pending.release == "r3"
    world.say("resume")
    assert world.plan.canary.release == "r3"


def test_what_passed_while_it_was_paused_advances_when_it_is_resumed():
    world = on_trial()
    world.say("pause")
    world.labels(3000)
    assert world.plan.percent == 1.0

    world.say("resume")

    assert world.plan.percent == 10.0


def test_an_aborted_release_is_rolled_back_and_never_comes_back():
    world = on_trial()
    world.say("abort")

    assert (world.plan.reason, world.plan.canary) == ("aborted", None)
    assert "abort by anna: a test" in world.plan.note
    again = msgspec.structs.replace(offer(7), sha256=offer(2).sha256)
    assert "rolled back before" in world.offer(again)
    assert world.campaign.stage == "idle"


def test_a_device_is_held_pinned_and_freed_by_plans_that_leave_the_stage_as_it_is():
    world = on_trial()
    stages = world.plan.stages
    world.say("hold", device="device-1")
    assert world.plan.hold == ("device-1",)
    world.say("pin", device="device-2", release="r2")
    assert (world.plan.hold, world.plan.pins) == (("device-1",), {"device-2": "r2"})
    assert world.plan.stages == stages
    world.say("free", device="device-1")
    assert world.plan.hold == ()
    world.say("abort")
    assert world.plan.pins == {}  # no plan names r2 any more

    with pytest.raises(RequestError) as caught:
        world.say("free", device="device-9")
    assert caught.value.code == "not_held"
    with pytest.raises(RequestError) as caught:
        world.say("pin", device="device-2", release="r2")
    assert caught.value.code == "unknown_release"


def test_rules_are_those_of_the_trials_start():
    world = on_trial()
    state = msgspec.json.decode(msgspec.json.encode(world.campaign.state), type=State)
    world.campaign = Campaign(msgspec.structs.replace(RULES, stages=(100.0,)), state)

    assert through(world)[-3:] == [10.0, 50.0, 100.0]


def written(world: World) -> dict[str, list[bytes]]:
    """The journals that a controller would have written."""
    found: dict[str, list[bytes]] = {}
    for name, line in world.campaign.fed:
        found.setdefault(name, []).append(line)
    return found


def eventful() -> World:
    """Three trials: one promoted through all that may happen, one that harms, one aborted."""
    world = on_trial()
    world.offer(offer(3))
    world.say("pause")
    world.labels(2500)
    world.say("hold", device="device-4")
    world.say("resume")
    through(world)
    world.report()
    world.offer(offer(4))
    world.labels(300, old=0.1, new=0.9)
    world.offer(offer(5))
    world.report()
    world.say("abort")
    return world


def test_c10_each_decision_is_come_to_again_from_what_the_trial_was_told():
    world = eventful()
    again = [plan for lines in written(world).values() for plan in replayed(lines)]

    assert {plan.reason for plan in world.plans} >= {
        "canary",
        "stage",
        "promoted",
        "harm",
        "aborted",
    }
    assert [encode_plan(plan) for plan in again] == [encode_plan(plan) for plan in world.plans[1:]]


@pytest.mark.parametrize("what", ["changed", "left out", "doubled", "swapped"])
def test_c10_a_journal_that_was_changed_comes_to_other_plans(what):
    world = eventful()
    name, lines = next(iter(written(world).items()))
    plans = [plan for plan in world.plans if plan.seq >= int(name[:8])]
    at = next(n for n, line in enumerate(lines) if b'"example"' in line)
    changed = {
        "changed": [*lines[:at], lines[at].replace(b",0.5,", b",0.4,", 1), *lines[at + 1 :]],
        "left out": [*lines[:at], *lines[at + 1 :]],
        "doubled": [*lines[: at + 1], *lines[at:]],
        "swapped": [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]],
    }[what]
    assert changed != lines

    try:
        again = list(replayed(changed))
    except RequestError:
        return
    decided = [plan.note for plan in again if plan.reason not in ("canary", "control")]
    told = [plan.note for plan in plans if plan.reason not in ("canary", "control")]
    assert all(one != other for one, other in zip(decided, told, strict=False))
