"""The campaign: one canary at a time, the newest waits, evidence alone decides."""

from __future__ import annotations

import hashlib
import itertools
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_learner.rollout.campaign import Campaign
from cloud_learner.rollout.state import Offer, Rules, State
from cloud_learner.store.examples import Example
from edge_runtime.rollout.plan import Variant, decode_plan, encode_plan
from edge_runtime.wire.messages import ArmReport, Report, Scored

NOW_S = 1_000.0
RULES = Rules(family="flight_delay", selector={"airport": "EWR"}, pairs_max=3000)


def offer(counter, sha256=None) -> Offer:
    return Offer(
        release=f"r{counter}",
        path=f"m/flight_delay/r{counter}.onnx",
        sha256=sha256 or hashlib.sha256(bytes([counter])).hexdigest(),
        counter=counter,
        file=f"/registry/{counter}",
        learned_through_s=0.0,
        arrived_s=0.0,
    )


def wave(seq):
    """Answers that never vary, or are always the same, are no evidence."""
    return 0.02 * (seq % 5 - 2)


def examples(old, new, count, *, stable="r1", canary="r2", start=1):
    """`count` pairs of which every fourth has label 1."""
    return [
        Example(
            device="EWR",
            epoch=1,
            seq=seq,
            family="flight_delay",
            time_s=float(seq),
            label_time_s=0.0,
            features=b"",
            spec="",
            label=float(seq % 4 == 0),
            propensity=0.5,
            scored=[
                Scored(stable, "stable", [old + wave(seq)]),
                Scored(canary, "canary", [new + 1.01 * wave(seq)]),
            ],
            arrived_s=0.0,
            matured_s=0.0,
        )
        for seq in range(start, start + count)
    ]


def report(release="r2") -> Report:
    """The canary's device has `release` in memory."""
    arms = [ArmReport("flight_delay", "canary", release, 0.0)]
    return Report(1, "EWR", 1, 0.0, {"airport": "EWR"}, arms, 2, {}, {}, [], 0, 0)


def on_trial(*later: int) -> Campaign:
    """r1 is stable, r2 on trial, `later` were offered after it; nothing left to publish."""
    campaign = Campaign(RULES)
    for counter in (1, 2, *later):
        campaign.offer(offer(counter), NOW_S)
    campaign.report(report(), NOW_S)
    drain(campaign)
    return campaign


def drain(campaign):
    steps = list(campaign.state.outbox)
    for _ in steps:
        campaign.published()
    assert not campaign.state.outbox
    return steps


def equal(count=3000, **more):
    return examples(0.25, 0.25, count, **more)


def broken(count=3000, **more):
    return examples(0.1, 0.9, count, **more)


def slightly_worse(count=3000, **more):
    """Worse by just the margin, without noise: neither gate can ever be reached."""
    return examples(0.25, 0.30, count, **more)


def test_the_first_release_goes_to_all_devices_without_a_trial():
    campaign = Campaign(RULES)
    assert campaign.stage == "empty"
    campaign.offer(offer(1), NOW_S)
    (step,) = drain(campaign)
    assert campaign.stage == "idle"
    assert (step.plan.seq, step.plan.stable.release, step.plan.canary) == (1, "r1", None)
    assert (step.plan.selector, step.plan.reason, step.release) == ({}, "first_release", offer(1))
    assert campaign.state.counts.decided == 0


def test_the_variants_of_an_offer_stand_in_each_plan_that_names_it():
    campaign = Campaign(RULES)
    variants = (Variant("int8", "m/f/r1.onnx", "ab" * 32), Variant("float32", "x", "cd" * 32))
    campaign.offer(msgspec.structs.replace(offer(1), variants=variants), NOW_S)
    campaign.offer(offer(2), NOW_S)

    first, second = (step.plan for step in campaign.state.outbox)

    assert first.stable.variants == variants
    assert (second.stable.variants, second.canary.variants) == (variants, ())


def test_a_campaign_of_before_variants_goes_on():
    old = json.loads(msgspec.json.encode(on_trial().state))
    for offered in (old["stable"], old["trial"]["offer"]):
        del offered["variants"]

    campaign = Campaign(RULES, msgspec.json.decode(json.dumps(old), type=State))

    assert campaign.state == on_trial().state


def test_the_next_offer_goes_on_trial_where_the_selector_says():
    campaign = Campaign(RULES)
    campaign.offer(offer(1), NOW_S)
    drain(campaign)
    campaign.offer(offer(2), NOW_S)
    (step,) = drain(campaign)
    assert campaign.stage == "canary"
    assert step.plan.canary is not None
    assert (step.plan.stable.release, step.plan.canary.release) == ("r1", "r2")
    assert (step.plan.selector, step.release) == ({"airport": "EWR"}, offer(2))
    assert (step.plan.stable.weight, step.plan.canary.weight) == (0.8, 0.2)


def test_while_a_canary_is_undecided_the_newest_offer_waits_and_older_ones_are_superseded():
    campaign = on_trial(3, 4, 5)
    assert campaign.state.canary == offer(2)
    assert campaign.state.pending == offer(5)
    assert campaign.state.counts.superseded == 2
    assert campaign.state.seq == 2


def test_an_equal_canary_is_promoted_to_all_devices():
    campaign = on_trial()
    assert campaign.examples(equal(), NOW_S)
    (step,) = drain(campaign)
    assert campaign.stage == "idle"
    assert (step.plan.stable.release, step.plan.canary, step.plan.selector) == ("r2", None, {})
    assert (step.plan.reason, step.release) == ("promoted", None)
    assert step.evidence["pairs"] == campaign.state.decisions[-1].pairs
    assert msgspec.to_builtins(campaign.state.counts) == {
        "offered": 2,
        "refused": 0,
        "superseded": 0,
        "decided": 1,
        "promoted": 1,
        "rolled_back": 0,
    }


def test_a_broken_canary_is_rolled_back_by_a_new_plan():
    campaign = on_trial()
    campaign.examples(broken(), NOW_S)
    (step,) = drain(campaign)
    assert (step.plan.seq, step.plan.stable.release, step.plan.canary) == (3, "r1", None)
    assert step.plan.reason == "harm"
    assert step.evidence["pairs"] < 100
    assert "r2 is rolled back to r1" in step.plan.note
    assert f"after {step.evidence['pairs']} paired labels" in step.plan.note
    assert (campaign.state.counts.promoted, campaign.state.counts.rolled_back) == (0, 1)


def test_a_canary_that_stays_undecided_to_the_last_label_is_rolled_back():
    campaign = on_trial()
    stream = slightly_worse(RULES.pairs_max)
    campaign.examples(stream[:-1], NOW_S)
    assert campaign.stage == "canary"
    campaign.examples(stream[-1:], NOW_S)
    assert campaign.stage == "idle"
    (step,) = drain(campaign)
    assert (step.plan.reason, step.plan.stable.release) == ("undecided", "r1")
    assert "undecided after 3,000 paired labels" in step.plan.note


@pytest.mark.parametrize("stream", [equal, broken, slightly_worse])
def test_after_a_decision_the_waiting_candidate_is_tried_against_the_stable_of_then(stream):
    campaign = on_trial(3, 4)
    campaign.examples(stream(), NOW_S)
    decided, trial = drain(campaign)
    assert decided.plan.canary is None
    assert trial.plan.canary is not None
    assert (decided.plan.seq, trial.plan.seq) == (3, 4)
    assert trial.plan.stable.release == decided.plan.stable.release
    assert (trial.plan.canary.release, trial.release) == ("r4", offer(4))
    assert campaign.state.pending is None
    assert campaign.state.evidence is not None
    assert campaign.state.evidence.pairs == 0


def test_labels_of_the_last_trial_say_nothing_of_the_next():
    campaign = on_trial(3)
    campaign.examples(broken(), NOW_S)
    assert not campaign.examples(broken(start=5000), NOW_S)
    assert campaign.state.canary == offer(3)


def test_no_evidence_holds():
    campaign = on_trial()
    assert not campaign.examples([], NOW_S)
    assert not campaign.examples(equal(canary="r9"), NOW_S)
    assert campaign.stage == "canary"
    assert not campaign.state.outbox


def test_examples_without_a_canary_change_nothing():
    campaign = Campaign(RULES)
    assert not campaign.examples(equal(), NOW_S)
    assert campaign.state == State()


def test_a_package_that_was_rolled_back_is_never_tried_again_under_another_name():
    campaign = on_trial()
    campaign.examples(broken(), NOW_S)
    drain(campaign)
    campaign.offer(offer(3, sha256=offer(2).sha256), NOW_S)
    assert campaign.stage == "idle"
    assert campaign.state.counts.refused == 1
    assert not campaign.state.outbox


@pytest.mark.parametrize("again", [offer(1), offer(2), offer(9, sha256=offer(1).sha256)])
def test_an_offer_that_is_live_already_or_older_is_refused(again):
    campaign = on_trial()
    campaign.offer(again, NOW_S)
    assert campaign.state.pending is None
    assert campaign.state.counts.refused == 1


def test_each_trial_draws_its_answers_anew():
    campaign = Campaign(RULES)
    for counter in (1, 2, 3):
        campaign.offer(offer(counter), NOW_S)
    campaign.examples(broken(), NOW_S)
    salts = [step.plan.salt for step in drain(campaign) if step.plan.canary]
    assert len(set(salts)) == 2


def test_a_campaign_goes_on_from_its_stored_state():
    whole, first = on_trial(3), on_trial(3)
    stream = equal()
    whole.examples(stream, NOW_S)
    first.examples(stream[:500], NOW_S)
    stored = msgspec.json.decode(msgspec.json.encode(first.state), type=State)
    again = Campaign(RULES, stored)
    again.examples(stream[500:], NOW_S)
    whole.state.trial.members = {}  # who is there, reports say anew
    assert whole.state == again.state
    assert whole.state.counts.promoted == 1


actions = st.lists(
    st.one_of(
        st.just("offer"),
        st.just("offer rolled back again"),
        st.sampled_from([equal, broken, slightly_worse]),
    ),
    max_size=14,
)


@given(actions)
def test_in_any_order_of_events_plans_are_valid_rise_by_one_and_never_revive_a_release(actions):
    rules = msgspec.structs.replace(RULES, pairs_max=60, margin=0.05)
    campaign, counter, start = Campaign(rules), 0, 1
    for action in actions:
        state = campaign.state
        if action in ("offer", "offer rolled back again"):
            counter += 1
            old = state.quarantined[0] if state.quarantined and action != "offer" else None
            campaign.offer(offer(counter, sha256=old), NOW_S)
        elif state.canary and state.stable:
            names = {"stable": state.stable.release, "canary": state.canary.release}
            campaign.report(report(state.canary.release), NOW_S)
            campaign.examples(action(60, start=start, **names), NOW_S)
            start += 60
    plans = [step.plan for step in drain(campaign)]
    assert [plan.seq for plan in plans] == list(range(1, len(plans) + 1))
    assert all(decode_plan(encode_plan(plan)) == plan for plan in plans)
    rolled_back: set[str] = set()
    for before, plan in itertools.pairwise(plans):
        if plan.reason in ("harm", "undecided"):
            assert before.canary is not None
            rolled_back.add(before.canary.sha256)
        assert rolled_back.isdisjoint(arm.sha256 for arm in plan.arms)
    counts = campaign.state.counts
    waiting = sum(x is not None for x in (campaign.state.canary, campaign.state.pending))
    first = campaign.state.stable is not None
    assert counts.decided == counts.promoted + counts.rolled_back
    assert counts.offered == first + counts.refused + counts.superseded + counts.decided + waiting


def test_what_follows_the_verdict_is_not_counted_however_it_is_grouped():
    stream, at_once, one_by_one = broken(200), on_trial(), on_trial()
    at_once.examples(stream, NOW_S)
    for each in stream:
        one_by_one.examples([each], NOW_S)

    (decision,) = at_once.state.decisions
    assert decision.reason == "harm"
    assert decision.pairs < len(stream)
    assert one_by_one.state == at_once.state
