"""Contests in a campaign: the plans they come to, who waits, what ends them, and told once more."""

from __future__ import annotations

import hashlib

import msgspec
import pytest

from cloud_learner.rollout.contest import Terms
from cloud_learner.rollout.control import Control
from cloud_learner.rollout.matches import Matches
from cloud_learner.rollout.replay import replayed
from cloud_learner.rollout.state import Offer, Rules, State
from cloud_learner.rollout.status import status
from cloud_learner.simulate.customers import Customers
from edge_runtime.errors import RequestError
from edge_runtime.rollout.plan import decode_plan, encode_plan
from edge_runtime.wire.messages import ArmReport, Report

RULES = Rules(family="ads", selector={"place": "here"}, outcome="reward", stage_s=100_000.0)
AB = Terms(kind="ab", releases=("r1", "r2"), answers=4000)
BANDIT = Terms(kind="bandit", releases=("r2", "r1"), every_s=600.0)


def offer(counter) -> Offer:
    return Offer(
        release=f"r{counter}",
        path=f"m/ads/r{counter}.onnx",
        sha256=hashlib.sha256(bytes([counter])).hexdigest(),
        counter=counter,
        file=f"/registry/{counter}",
        learned_through_s=0.0,
        arrived_s=0.0,
    )


def served(*counters, rules=RULES) -> Matches:
    """All of these were stable, the last one is; nothing left to publish."""
    campaign = Matches(rules, State(seq=5))
    for counter in counters:
        campaign.state.serve(offer(counter))
    return campaign


def contest(terms=AB) -> Control:
    return Control(verb="contest", by="anna", reason="which one?", terms=terms)


def say(verb, reason="so it be") -> Control:
    return Control(verb=verb, by="anna", reason=reason)


def drain(campaign):
    steps = list(campaign.state.outbox)
    for _ in steps:
        campaign.published()
    return steps


def play(campaign, world, *, until_s, start_s=0.0, per_step=100, seed=1):
    """Customers of devices that follow the plans; labels come at once. Returns all steps."""
    customers, steps = Customers("ads", 10, world, delay_s=0.0, seed=seed), []
    customers.follow(plan_now(campaign))
    for now_s in range(int(start_s) + 60, int(until_s) + 1, 60):
        customers.ask(per_step, now_s)
        campaign.examples(customers.matured(now_s), float(now_s))
        campaign.tick(float(now_s))
        for step in drain(campaign):
            steps.append(step)
            if step.plan is not None:
                customers.follow(step.plan)
    return steps


def plan_now(campaign):
    from cloud_learner.rollout.plans import plan_of

    return plan_of(campaign.state, campaign.rules, "contest", "")


def better(release, _now_s):
    return 0.3 if release == "r2" else 0.1


def test_an_ab_test_is_one_plan_for_every_device_with_equal_shares():
    campaign = served(1, 2)
    campaign.control(contest(), 50.0)
    (step,) = drain(campaign)
    plan = decode_plan(encode_plan(step.plan))
    assert campaign.stage == "contest"
    assert [(arm.release, arm.weight) for arm in plan.arms] == [("r2", 0.5), ("r1", 0.5)]
    assert (plan.selector, plan.percent, plan.not_after_s) == ({}, 100.0, 100_050.0)
    assert (plan.seq, plan.reason, step.release) == (6, "contest", offer(1))
    assert plan.note == "r2 and r1 serve together; contest by anna: which one?"
    assert plan.salt == campaign.state.match.contest.salt


def test_several_releases_join_one_by_one_a_plan_each():
    campaign = served(1, 2, 3)
    campaign.control(contest(Terms(kind="bandit", releases=("r1", "r2", "r3"))), 0.0)
    first, second = drain(campaign)
    assert [arm.release for arm in first.plan.arms] == ["r3", "r1"]
    assert [arm.release for arm in second.plan.arms] == ["r3", "r1", "r2"]
    assert (first.release, second.release) == (offer(1), offer(2))
    assert sum(arm.weight for arm in second.plan.arms) == pytest.approx(1)
    for step in (first, second):
        decode_plan(encode_plan(step.plan))


def test_the_winner_of_an_ab_test_serves_and_may_compete_again():
    campaign = served(2, 1)
    campaign.control(contest(), 0.0)
    *_, last = play(campaign, better, until_s=60 * 60)
    assert (last.plan.reason, last.plan.stable.release, last.plan.canary) == ("won", "r2", None)
    assert "r2 earns" in last.plan.note
    assert "points more than r1" in last.plan.note
    assert last.evidence["r1_answered"] + last.evidence["r2_answered"] == AB.answers
    assert campaign.stage == "idle"
    assert campaign.state.fallback == offer(1)
    decision = campaign.state.decisions[-1]
    assert (decision.release, decision.reason, decision.pairs) == ("r2", "won", AB.answers)
    campaign.control(contest(), 4000.0)
    assert campaign.stage == "contest"


def test_where_no_winner_is_sure_nothing_changes():
    campaign = served(2, 1)
    campaign.control(contest(), 0.0)
    *_, last = play(campaign, lambda _release, _now_s: 0.2, until_s=60 * 60)
    assert (last.plan.reason, last.plan.stable.release, last.plan.canary) == ("kept", "r1", None)
    assert "no difference of r2 to r1 larger than" in last.plan.note


def test_the_shares_of_a_bandit_change_by_plans_alone_at_the_stated_interval():
    campaign = served(1, 2)
    campaign.control(contest(BANDIT), 0.0)
    drain(campaign)
    steps = play(campaign, lambda release, _now_s: 0.3 if release == "r1" else 0.1, until_s=6000)
    assert [step.plan.reason for step in steps] == ["shares"] * 10
    assert [step.plan.seq for step in steps] == list(range(7, 17))
    shares = [[arm.weight for arm in step.plan.arms] for step in steps]
    assert min(map(min, shares)) >= BANDIT.floor
    assert shares[-1] == [0.05, 0.95]
    assert steps[-1].evidence["r1_share"] == 0.95
    assert len({step.plan.salt for step in steps}) == 1


def test_a_bandit_ends_at_its_deadline_with_the_release_of_the_largest_share():
    campaign = served(1, 2, rules=msgspec.structs.replace(RULES, stage_s=6000.0))
    campaign.control(contest(BANDIT), 0.0)
    *_, last = play(campaign, lambda release, _now_s: 0.1 + 0.2 * (release == "r1"), until_s=6000)
    assert (last.plan.reason, last.plan.stable.release) == ("won", "r1")
    assert "its time is over" in last.plan.note


def test_reports_tell_how_many_answers_are_under_way():
    campaign = served(1, 2)
    campaign.control(contest(BANDIT), 0.0)
    for answered in (10, 40):
        arms = [ArmReport("ads", "stable", "r2", 0.0, answered=answered)]
        arms.append(ArmReport("ads", "canary", "r1", 0.0, answered=2 * answered))
        campaign.report(Report(1, "d1", 1, 0.0, {}, arms, 6, {}, {}, [], 0, 0), 1.0)
    campaign.tick(600.0)
    policy = campaign.state.match.contest.policy
    assert policy.arms["r1"].pending == pytest.approx(2 * policy.arms["r2"].pending)
    assert 0 < policy.arms["r2"].pending <= 30


def test_candidates_wait_while_a_contest_runs_and_have_their_turn_after_it():
    campaign = served(1, 2)
    campaign.control(contest(), 0.0)
    campaign.offer(offer(3), 1.0)
    campaign.offer(offer(4), 2.0)
    assert campaign.stage == "contest"
    assert campaign.state.pending == offer(4)
    assert campaign.state.counts.superseded == 1
    campaign.control(say("abort"), 3.0)
    assert campaign.state.trial.offer == offer(4)


def test_a_person_ends_a_contest_and_nothing_changes():
    campaign = served(2, 1)
    campaign.control(contest(), 0.0)
    play(campaign, better, until_s=900)
    campaign.control(say("abort", "enough"), 1000.0)
    (step,) = drain(campaign)
    assert (step.plan.reason, step.plan.stable.release, step.plan.canary) == ("aborted", "r1", None)
    assert "abort by anna: enough" in step.plan.note
    assert campaign.state.quarantined == []


def test_while_paused_answers_count_and_no_plan_is_written():
    campaign = served(1, 2)
    campaign.control(contest(BANDIT), 0.0)
    campaign.control(say("pause"), 1.0)
    drain(campaign)
    assert play(campaign, better, until_s=3000) == []
    assert campaign.state.match.contest.ledger.answered == 50 * 100
    campaign.control(say("resume"), 3000.0)
    drain(campaign)
    assert [step.plan.reason for step in play(campaign, better, until_s=3060, start_s=3000)] == [
        "shares"
    ]


def test_a_paused_ab_test_ends_when_it_is_resumed():
    campaign = served(2, 1)
    campaign.control(contest(), 0.0)
    campaign.control(say("pause"), 1.0)
    play(campaign, better, until_s=3600)
    assert campaign.stage == "contest"
    campaign.control(say("resume"), 3601.0)
    assert (campaign.stage, campaign.state.stable) == ("idle", offer(2))


def test_where_a_person_must_approve_the_winner_waits():
    campaign = served(2, 1, rules=msgspec.structs.replace(RULES, approve=True))
    campaign.control(contest(), 0.0)
    with pytest.raises(RequestError, match="nothing_to_approve"):
        campaign.control(say("approve"), 1.0)
    *_, last = play(campaign, better, until_s=3600)
    assert (last.reason, last.plan, campaign.stage) == ("waits", None, "contest")
    assert status(campaign, {}, 3600.0)["waits"] == "approve"
    campaign.control(say("approve"), 3601.0)
    assert campaign.state.stable == offer(2)


def test_without_approval_the_deadline_keeps_what_served():
    campaign = served(2, 1, rules=msgspec.structs.replace(RULES, approve=True, stage_s=7200.0))
    campaign.control(contest(), 0.0)
    *_, last = play(campaign, better, until_s=7200)
    assert (last.plan.reason, last.plan.stable.release) == ("kept", "r1")


@pytest.mark.parametrize(
    ("terms", "rules", "code"),
    [
        (Terms(kind="ab", releases=("r2", "r7")), RULES, "unknown_release"),
        (Terms(kind="ab", releases=("r1", "r3")), RULES, "stable_not_in_contest"),
        (Terms(kind="ab", releases=("r1",)), RULES, "bad_contest"),
        (None, RULES, "bad_contest"),
        (AB, msgspec.structs.replace(RULES, is_by_arrival=True), "labels_by_arrival"),
    ],
)
def test_a_contest_that_cannot_be_held_is_refused_and_changes_nothing(terms, rules, code):
    campaign = served(3, 1, 2, rules=rules)
    before = msgspec.json.encode(campaign.state)
    with pytest.raises(RequestError) as caught:
        campaign.control(contest(terms), 0.0)
    assert caught.value.code == code
    assert (msgspec.json.encode(campaign.state), campaign.fed) == (before, [])


def test_there_is_one_live_campaign():
    campaign = served(1, 2)
    campaign.offer(offer(3), 0.0)
    with pytest.raises(RequestError, match="not_idle"):
        campaign.control(contest(), 1.0)
    with pytest.raises(RequestError, match="no_release"):
        Matches(RULES).control(contest(), 1.0)


def test_any_release_of_a_contest_can_be_pinned():
    campaign = served(1, 2)
    campaign.control(contest(), 0.0)
    pin = Control(verb="pin", by="anna", reason="try", device="d1", release="r1")
    campaign.control(pin, 1.0)
    assert drain(campaign)[-1].plan.pins == {"d1": "r1"}


def test_a_contest_goes_on_from_its_stored_state():
    def restarted(campaign):
        stored = msgspec.json.decode(msgspec.json.encode(campaign.state), type=State)
        return Matches(RULES, stored)

    whole, cut = served(1, 2), served(1, 2)
    for campaign in (whole, cut):
        campaign.control(contest(BANDIT), 0.0)
        drain(campaign)
    examples = Customers("ads", 5, better, delay_s=0.0)
    examples.follow(plan_now(whole))
    examples.ask(3000, 10.0)
    told = examples.matured(10.0)
    for at in range(0, 3000, 500):
        whole.examples(told[at : at + 500], 20.0)
        cut.examples(told[at : at + 500], 20.0)
        cut = restarted(cut)
    for campaign in (whole, cut):
        campaign.tick(600.0)
    assert cut.state == whole.state
    assert cut.state.outbox[-1].plan.reason == "shares"


@pytest.mark.parametrize("terms", [AB, BANDIT])
def test_told_once_more_a_contest_comes_to_the_same_plans(terms):
    campaign = served(2, 1, rules=msgspec.structs.replace(RULES, stage_s=6000.0))
    campaign.control(contest(terms), 0.0)
    steps = drain(campaign) + play(campaign, better, until_s=6000, per_step=50)
    plans = [step.plan for step in steps if step.plan is not None]
    assert plans[-1].reason == "won"
    assert list(replayed([line for _, line in campaign.fed])) == plans
    assert {name for name, _ in campaign.fed} == {"00000006-contest.jsonl"}


def test_status_tells_shares_answers_and_the_verdict_as_plain_data():
    campaign = served(1, 2)
    campaign.control(contest(), 0.0)
    play(campaign, better, until_s=600)
    found = msgspec.json.decode(msgspec.json.encode(status(campaign, {}, 600.0)))
    assert found["stage"] == "contest"
    assert [arm["release"] for arm in found["contest"]["arms"]] == ["r2", "r1"]
    assert sum(arm["answered"] for arm in found["contest"]["arms"]) == 1000
    assert found["contest"]["verdict"].startswith("too early to say")
    assert found["gates"][0]["text"] == "answers 1,000/4,000"
