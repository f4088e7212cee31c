"""The tree of a rollout: what it draws of a real campaign's status."""

from __future__ import annotations

import hashlib
import io

from rich.console import Console

from cloud_learner.console.rollout import tree
from cloud_learner.rollout.campaign import Campaign
from cloud_learner.rollout.contest import Terms
from cloud_learner.rollout.control import Control
from cloud_learner.rollout.matches import Matches
from cloud_learner.rollout.state import Offer, Rules
from cloud_learner.rollout.status import DEVICES_MAX, status
from edge_runtime.wire.messages import ArmReport, Report

RULES = Rules(family="coin", selector={}, stages=(50.0, 100.0), stage_s=7200.0)


def offer(counter) -> Offer:
    facts = {"file": "", "learned_through_s": 0.0, "arrived_s": 0.0}
    sha256 = hashlib.sha256(bytes([counter])).hexdigest()
    name = f"r{counter}"
    return Offer(release=name, path=f"m/coin/{name}.onnx", sha256=sha256, counter=counter, **facts)


def reports(count) -> dict[str, Report]:
    arms = [ArmReport("coin", "stable", "r1", 0.0), ArmReport("coin", "canary", "r2", 0.0)]
    names = [f"device-{number}" for number in range(count)]
    return {name: Report(1, name, 1, 0.0, {}, arms, 2, {}, {}, [], 0, 0) for name in names}


def said(campaign, found, *, full=True) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(tree({**status(campaign, found, 600.0), "last_failure": "no broker"}, full=full))
    return console.file.getvalue()


def on_trial(count=8):
    campaign, found = Campaign(RULES), reports(count)
    for counter in (1, 2):
        campaign.offer(offer(counter), 0.0)
    for report in list(found.values())[1:]:
        campaign.report(report, 0.0)
    return campaign, found


def test_stages_gates_and_who_has_shown_it_are_drawn():
    campaign, found = on_trial()
    text = said(campaign, found)
    members = campaign.state.trial.members

    for fact in ("coin: canary, plan 2", "stable r1 on device-0", "100 %  ahead", "not worse"):
        assert fact in text
    assert f"50 %   now    {len(members)} of {len(members)} devices have shown it" in text
    assert "0 labels, ends in 110 min" in text


def test_what_a_person_said_is_drawn():
    campaign, found = on_trial()
    told = [("hold", {"device": "device-1"}), ("pin", {"device": "device-2", "release": "r2"})]
    for verb, more in [*told, ("pause", {})]:
        campaign.control(Control(verb=verb, by="anna", reason="a test", **more), 0.0)
    text = said(campaign, found)

    for fact in ("coin: canary, paused", "held: device-1", "pinned: device-2=r2"):
        assert fact in text
    assert "not published yet: no broker" in text
    assert "held" not in said(campaign, found, full=False)


def test_decisions_are_drawn_with_their_reason():
    campaign, found = on_trial()
    campaign.control(Control(verb="abort", by="anna", reason="a test"), 0.0)

    assert "aborted   r2 is rolled back to r1, aborted after 0 paired labels" in said(
        campaign, found
    )


def test_a_large_fleet_makes_no_larger_a_status():
    campaign, found = on_trial(3 * DEVICES_MAX)
    plain = status(campaign, found, 600.0)

    assert len(plain["devices"]) == len(plain["stable"]["devices"]) == DEVICES_MAX
    assert "and 92 more" in said(campaign, found)


def test_a_contest_is_drawn_with_shares_answers_and_its_verdict():
    campaign = Matches(RULES)
    for counter in (1, 2):
        campaign.state.serve(offer(counter))
    terms = Terms(kind="ab", releases=("r1", "r2"))
    campaign.control(Control(verb="contest", by="anna", reason="which?", terms=terms), 0.0)
    text = said(campaign, reports(2))

    for fact in (
        "coin: contest",
        "r2 ━━━━╌╌╌╌  50% of answers, 0 count on device-0 device-1",
        "r1",
    ):
        assert fact in text
    assert "ab: too early to say of r1 and r2: 0 and 0 answers of 500" in text
    assert "ends in 110 min at the latest" in text
