"""The controller: what is committed, published and recorded, and what a crash leaves behind."""

from __future__ import annotations

import asyncio
import hashlib
from types import SimpleNamespace

import msgspec
import pytest

from cloud_learner.controller import Controller
from cloud_learner.helm import Helm
from cloud_learner.orders import Order
from cloud_learner.packed import encoded
from cloud_learner.rollout.contest import Terms
from cloud_learner.rollout.control import Control
from cloud_learner.rollout.state import Offer, Rules
from cloud_learner.steering import Word
from cloud_learner.store.examples import Example
from cloud_learner.store.lineage import Lineage
from edge_runtime.bus.base import Message
from edge_runtime.clock import ManualClock
from edge_runtime.errors import ConfigError, RequestError, TransportError, TrustError
from edge_runtime.rollout.plan import encode_plan
from edge_runtime.update.approval import Approval
from edge_runtime.wire.messages import ArmReport, Report, Scored

RULES = Rules(family="flight_delay", selector={"airport": "EWR"})


class Publisher:
    """Keeps what it was asked to publish; fails with `error` while that is set."""

    def __init__(self, error=None):
        self.published = []
        self.error = error
        self.running = 0

    async def __call__(self, release, plan, approval):
        assert self.running == 0, "two publications at once"
        self.running += 1
        await asyncio.sleep(0)
        self.running -= 1
        if self.error:
            raise self.error
        self.published.append((release.release if release else None, plan.seq, plan.reason))


def offer(counter, arrived_s=0.0):
    return Offer(
        release=f"r{counter}",
        path=f"m/flight_delay/r{counter}.onnx",
        sha256=hashlib.sha256(bytes([counter])).hexdigest(),
        counter=counter,
        file=f"registry/{counter}",
        learned_through_s=0.0,
        arrived_s=arrived_s,
    )


def examples(old, new, count, start=1):
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
                Scored("r1", "stable", [old + 0.02 * (seq % 5 - 2)]),
                Scored("r2", "canary", [new + 0.021 * (seq % 5 - 2)]),
            ],
            arrived_s=0.0,
            matured_s=0.0,
        )
        for seq in range(start, start + count)
    ]


def report(device="EWR", *, time_s=0.0, arm="canary", release="r2", since_s=0.0, refused=None):
    arms = [ArmReport("flight_delay", arm, release, since_s)]
    return Report(1, device, 1, time_s, {"airport": device}, arms, 2, {}, refused or {}, [], 0, 0)


def play(home, publisher, script, rules=RULES):
    """Run `script(controller)` on the state in `home`; returns the last status."""

    async def main():
        lineage = Lineage(home / "lineage")
        controller = Controller(
            rules, home / "campaign.json", publisher, lineage, ManualClock(100.0)
        )
        try:
            await controller.start()
            await script(controller)
            return controller.status()
        finally:
            await controller.close()

    return asyncio.run(main())


async def nothing(controller):
    pass


async def two_offers(controller):
    await controller.offer(offer(1))
    await controller.offer(offer(2))


def test_each_plan_is_published_once_in_order_with_the_package_it_names(tmp_path):
    publisher = Publisher()

    async def script(controller):
        await two_offers(controller)
        await controller.offer(offer(3))
        await controller.examples(examples(0.1, 0.9, 200))

    status = play(tmp_path, publisher, script)
    assert publisher.published == [
        ("r1", 1, "first_release"),
        ("r2", 2, "canary"),
        (None, 3, "harm"),
        ("r3", 4, "canary"),
    ]
    assert (status["stage"], status["unpublished"]) == ("canary", 0)


def test_calls_at_the_same_time_change_the_campaign_one_after_the_other(tmp_path):
    publisher = Publisher()

    async def script(controller):
        calls = [controller.offer(offer(counter)) for counter in (1, 2, 3, 4)]
        await asyncio.gather(*calls, controller.examples(examples(0.1, 0.9, 200)))

    status = play(tmp_path, publisher, script)
    assert [seq for _, seq, _ in publisher.published] == [1, 2, 3, 4]
    assert status["counts"]["superseded"] == 1


def test_a_decision_is_in_lineage_with_its_evidence(tmp_path):
    async def script(controller):
        await two_offers(controller)
        await controller.report(report())
        await controller.examples(examples(0.25, 0.25, 4000))

    play(tmp_path, Publisher(), script)
    entries = list(Lineage(tmp_path / "lineage").read())
    assert [entry["kind"] for entry in entries] == ["plan", "plan", "decision"]
    decision = entries[-1]
    assert (decision["reason"], decision["plan_seq"]) == ("promoted", 3)
    assert decision["stable"] == offer(2).sha256
    assert decision["evidence"]["e_noninferior"] >= decision["evidence"]["e_noninferior_reach"]
    assert decision["evidence"]["pairs"] > 100


def test_evidence_and_stage_survive_a_restart(tmp_path):
    publisher = Publisher()

    async def first(controller):
        await two_offers(controller)
        await controller.report(report())
        await controller.examples(examples(0.25, 0.25, 500))

    async def second(controller):
        assert controller.status()["evidence"]["pairs"] == 500
        await controller.examples(examples(0.25, 0.25, 4000))

    async def whole(controller):
        await two_offers(controller)
        await controller.report(report())
        await controller.examples(examples(0.25, 0.25, 4000))

    play(tmp_path / "halves", publisher, first)
    halves = play(tmp_path / "halves", publisher, second)
    assert [seq for _, seq, _ in publisher.published] == [1, 2, 3]
    (decided,), (other,) = (
        halves["decisions"],
        play(tmp_path / "w", Publisher(), whole)["decisions"],
    )
    facts = ("release", "reason", "plan_seq", "pairs")
    assert [decided[name] for name in facts] == [other[name] for name in facts]


def test_a_plan_that_could_not_be_published_is_published_at_the_next_call(tmp_path):
    publisher = Publisher(TransportError("unreachable", "no broker"))

    async def script(controller):
        await two_offers(controller)
        status = controller.status()
        assert (status["unpublished"], status["failures"]) == (2, 2)
        assert "no broker" in status["last_failure"]
        publisher.error = None
        await controller.report(report())

    status = play(tmp_path, publisher, script)
    assert publisher.published == [("r1", 1, "first_release"), ("r2", 2, "canary")]
    assert status["unpublished"] == 0


def test_a_plan_that_a_crash_left_unpublished_is_published_at_start(tmp_path):
    play(tmp_path, Publisher(TransportError("unreachable", "no broker")), two_offers)
    publisher = Publisher()
    play(tmp_path, publisher, nothing)
    assert publisher.published == [("r1", 1, "first_release"), ("r2", 2, "canary")]


def test_a_plan_that_was_published_is_not_published_again_at_start(tmp_path):
    play(tmp_path, Publisher(), two_offers)
    publisher = Publisher()
    status = play(tmp_path, publisher, nothing)
    assert publisher.published == []
    assert (status["stage"], status["plan_seq"]) == ("canary", 2)


def test_a_plan_whose_acknowledgement_was_lost_is_published_again_under_its_number(tmp_path):
    class Deaf(Publisher):
        async def __call__(self, release, plan, approval):
            await super().__call__(release, plan, approval)
            if len(self.published) == 1:
                raise TransportError("timeout", "no answer")

    publisher = Deaf()
    status = play(tmp_path, publisher, two_offers)
    assert [seq for _, seq, _ in publisher.published] == [1, 1, 2]
    assert status["unpublished"] == 0


def test_nothing_is_published_before_it_is_on_disk(tmp_path):
    publisher = Publisher()
    home = tmp_path / "home"

    async def script(controller):
        home.write_bytes(b"a file where the directory should be")
        await controller.offer(offer(1))
        assert publisher.published == []
        assert "disk_failed" in controller.status()["last_failure"]
        home.unlink()
        await controller.report(report())

    async def main():
        lineage = Lineage(tmp_path / "lineage")
        controller = Controller(
            RULES, home / "campaign.json", publisher, lineage, ManualClock(100.0)
        )
        await script(controller)
        await controller.close()

    asyncio.run(main())
    assert publisher.published == [("r1", 1, "first_release")]
    assert (home / "campaign.json").exists()


def test_a_refused_publication_is_raised_and_stays_owed(tmp_path):
    async def script(controller):
        with pytest.raises(TrustError):
            await controller.offer(offer(1))
        assert controller.status()["unpublished"] == 1

    play(tmp_path, Publisher(TrustError("below_threshold", "gate did not sign")), script)


def test_freshness_runs_from_the_last_label_to_the_first_device_that_serves(tmp_path):
    async def script(controller):
        await controller.offer(offer(1))
        await controller.offer(offer(2, arrived_s=50.0))
        await controller.report(report(time_s=1, arm="stable", release="r1", since_s=40.0))
        assert controller.status()["freshness_s"] == []
        await controller.report(report(time_s=2, since_s=51.25))
        await controller.report(report(time_s=3, since_s=51.25))
        await controller.report(report("JFK", time_s=4, since_s=59.0))

    publisher = Publisher()
    assert play(tmp_path, publisher, script)["freshness_s"] == [1.25]

    async def device_restarted(controller):
        await controller.report(report(time_s=9, since_s=99.0))

    assert play(tmp_path, publisher, device_restarted)["freshness_s"] == [1.25]


def test_an_old_report_does_not_replace_a_newer_one(tmp_path):
    async def script(controller):
        await two_offers(controller)
        await controller.report(report(time_s=90.0, refused={"below_threshold": 2}))
        await controller.report(report(time_s=80.0))

    device = play(tmp_path, Publisher(), script)["devices"]["EWR"]
    assert device["refused"] == {"below_threshold": 2}
    assert device["age_s"] == 10.0


def test_status_shows_arms_and_gates_as_plain_data(tmp_path):
    async def script(controller):
        await two_offers(controller)
        await controller.report(report("EWR", arm="canary", release="r2"))
        await controller.report(report("JFK", arm="stable", release="r1"))
        await controller.examples(examples(0.25, 0.25, 40))

    status = play(tmp_path, Publisher(), script)
    assert msgspec.json.decode(msgspec.json.encode(status)) == status
    assert (status["stable"]["release"], status["stable"]["devices"]) == ("r1", ["JFK"])
    assert (status["canary"]["release"], status["canary"]["devices"]) == ("r2", ["EWR"])
    gates = {gate["gate"]: gate for gate in status["gates"]}
    assert (gates["paired_labels"]["value"], gates["paired_labels"]["reach"]) == (40, 8000)
    assert 1 < gates["not_worse"]["value"] < gates["not_worse"]["reach"] == 50
    assert gates["harm"]["value"] <= 1 < gates["harm"]["reach"]


APPROVE = Control(verb="approve", by="anna", reason="a test")


async def passed(controller):
    """r2 has passed its first stage, and waits."""
    await two_offers(controller)
    await controller.report(report())
    await controller.examples(examples(0.25, 0.25, 4000))
    assert controller.status()["waits"] == "approve"


def test_what_waits_for_a_person_is_in_lineage_with_its_evidence_and_publishes_nothing(tmp_path):
    publisher = Publisher()

    play(tmp_path, publisher, passed, msgspec.structs.replace(RULES, approve=True))

    assert [reason for _, _, reason in publisher.published] == ["first_release", "canary"]
    entry = list(Lineage(tmp_path / "lineage").read("decision"))[-1]
    assert (entry["reason"], entry["evidence"]["pairs"] > 1000) == ("waits", True)


def test_the_gates_approval_is_of_the_plan_that_is_published_also_after_a_crash(tmp_path):
    class Approved(Publisher):
        async def __call__(self, release, plan, approval):
            await super().__call__(release, plan, approval)
            self.approved = encode_plan(plan), approval

    publisher, seen = Approved(), []

    async def approve(plan):
        seen.append(plan)
        return Approval("a key", "a signature")

    async def script(controller):
        await passed(controller)
        publisher.error = TransportError("unreachable", "no broker")
        await controller.control(APPROVE, approve)

    rules = msgspec.structs.replace(RULES, approve=True)
    play(tmp_path, publisher, script, rules)
    publisher.error = None
    play(tmp_path, publisher, nothing, rules)

    assert publisher.published[-1][2] == "promoted"
    assert publisher.approved == (seen[0], Approval("a key", "a signature"))


def test_what_the_gate_does_not_approve_changes_nothing(tmp_path):
    async def approve(_plan):
        raise RequestError("not_approved", "no")

    async def script(controller):
        await passed(controller)
        with pytest.raises(RequestError):
            await controller.control(APPROVE, approve)

    status = play(tmp_path, Publisher(), script, msgspec.structs.replace(RULES, approve=True))
    assert (status["waits"], status["plan_seq"]) == ("approve", 2)


def test_a_stage_ends_at_its_deadline_with_nobody_saying_anything(tmp_path):
    clock, publisher = ManualClock(100.0), Publisher()

    async def main():
        lineage = Lineage(tmp_path / "lineage")
        controller = Controller(RULES, tmp_path / "campaign.json", publisher, lineage, clock)
        await two_offers(controller)
        clock.advance(RULES.stage_s - 1.0)
        await controller.tick()
        assert controller.status()["stage"] == "canary"
        clock.advance(1.0)
        await controller.tick()
        await controller.close()

    asyncio.run(main())
    assert publisher.published[-1] == (None, 3, "undecided")


WORDS = [
    (Word("abort", "fraud", "anna", "a test"), "unknown_family"),
    (Word("abort"), "unknown_family"),
    (Word("abort", "flight_delay", "anna", ""), "no_reason"),
    (Word("abort", "flight_delay", "", "a test"), "no_reason"),
    (Word("abort", "flight_delay", "anna", "x" * 300), "no_reason"),
    (Word("hold", "flight_delay", "anna", "a test", "no.name"), "bad_name"),
    (Word("abort", "flight_delay", "anna", "a test"), "nothing_on_trial"),
    (
        Word("approve", "flight_delay", "anna", "a test", order=Order("eve", b"", b"")),
        "bad_order",
    ),
]


@pytest.mark.parametrize(("word", "code"), WORDS, ids=[code for _, code in WORDS])
def test_a_word_that_has_no_meaning_is_refused_by_name(tmp_path, word, code):
    async def script(controller):
        await controller.offer(offer(1))
        helm = Helm({"flight_delay": SimpleNamespace(controller=controller)})
        with pytest.raises(RequestError) as caught:
            await helm.work(Message("hw.rollout", b""), encoded(word))
        assert caught.value.code == code
        found = await helm.work(Message("hw.rollout", b""), encoded(Word("status")))
        assert msgspec.json.decode(found)["flight_delay"]["plan_seq"] == 1

    play(tmp_path, Publisher(), script)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"family": "flight_delay", "version": 3}',
        b'{"family": "fraud", "version": 1}',
        b'{"family": "flight_delay", "state": {"seq": "x"}}',
    ],
)
def test_a_state_file_that_cannot_be_read_stops_the_start_and_stays_as_it_is(tmp_path, content):
    (tmp_path / "campaign.json").write_bytes(content)
    publisher = Publisher()
    with pytest.raises(ConfigError) as caught:
        play(tmp_path, publisher, two_offers)
    assert caught.value.code == "bad_controller_state"
    assert (tmp_path / "campaign.json").read_bytes() == content
    assert publisher.published == []


def test_a_contest_survives_a_restart_of_the_controller(tmp_path):
    """With its answers, and each share to the last digit; what it owes is published."""
    rules = msgspec.structs.replace(RULES, outcome="reward")
    terms = Terms(kind="bandit", releases=("r1", "r2"), every_s=1.0)
    told = Control(verb="contest", by="anna", reason="which?", terms=terms)
    labels = [msgspec.structs.replace(each, label=0.0) for each in examples(0.2, 0.2, 20)]
    labels += [
        msgspec.structs.replace(each, label=1.0, scored=each.scored[::-1])
        for each in examples(0.2, 0.2, 20, start=21)
    ]

    async def begin(controller):
        await controller.offer(offer(1))
        controller._campaign.state.proven.append(offer(2))
        await controller.control(told)

    async def first(controller):
        await controller.examples(labels[:25])

    async def second(controller):
        await controller.examples(labels[25:])

    def held(home, *scripts):
        for script in scripts:
            found = play(home, Publisher(), script, rules)
        return found["contest"]

    async def both(controller):
        await controller.examples(labels)

    cut = held(tmp_path / "cut", begin, first, nothing, second)
    whole = held(tmp_path / "whole", begin, both)
    assert cut == whole
    assert [arm["answered"] for arm in cut["arms"]] == [20, 20]
    assert [arm["mean"] for arm in cut["arms"]] == [0.0, 1.0]
    assert cut["kind"] == "bandit"
