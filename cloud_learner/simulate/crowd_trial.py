"""One campaign over a crowd, from the offer to its end, on a clock that is told to move.

Why: what a rollout promises is promised of whole campaigns: that a bad release is stopped before
many have it, a good one arrives, and liars change neither.

Invariants: plans go to the crowd as the bytes that a publisher signs, and come back through the
device's own reader; the campaign is the one that serves. Who has the release is counted after each
step, over all devices, those without a network included.

Knows nothing about signatures, files and brokers.
"""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np

from cloud_learner.rollout.campaign import Campaign
from cloud_learner.rollout.state import Offer, Rules
from cloud_learner.simulate.crowd import DAY_S, FAMILY, Crowd
from edge_runtime.rollout.plan import Plan, bucket, decode_plan, encode_plan, model_path

DAYS_MAX = 60
STAGES = (1.0, 5.0, 25.0, 50.0, 100.0)
RULES = Rules(family=FAMILY, selector={}, stages=STAGES, pairs_max=12_000, stage_s=14 * DAY_S)


class Course(msgspec.Struct, kw_only=True):
    """How a campaign went: its `ending`, or "" if it had none within DAYS_MAX.

    `peak` is the largest percentage of all devices that had the release at any moment, `allowed`
    the largest that a plan allowed. `beyond` counts the moments at which a device had it that no
    plan published by then gave it to. `failures` are of requests that the release answered.
    """

    ending: str = ""
    days: float = 0.0
    peak: float = 0.0
    allowed: float = 0.0
    beyond: int = 0
    pairs: int = 0
    failures: int = 0
    plans: list[Plan] = []


def campaign_over(crowd: Crowd, rules: Rules = RULES) -> Course:
    """Try the crowd's model on it, under `rules`."""
    campaign, course, now_s = Campaign(rules), Course(), 0.0
    for release in ("r1", "r2"):
        campaign.offer(offer(release), now_s)
    plan = _published(campaign, course)
    buckets = np.array([bucket(plan.salt, name) for name in crowd.names])
    while not campaign.state.decisions and now_s < DAYS_MAX * DAY_S:
        reports, examples = crowd.step(plan, now_s)
        now_s += crowd.world.step_s
        _watch(course, crowd, buckets, plan)
        campaign.tick(now_s)
        for report in reports:
            campaign.report(report, now_s)
        campaign.examples(examples, now_s)
        if campaign.state.outbox:
            plan = _published(campaign, course)
        campaign.fed.clear()
    course.days, course.failures = now_s / DAY_S, crowd.failures
    if campaign.state.decisions:
        course.ending = campaign.state.decisions[-1].reason
        course.pairs = campaign.state.decisions[-1].pairs
    return course


def offer(release: str) -> Offer:
    """A candidate that passed the offline gate."""
    sha256 = hashlib.sha256(release.encode()).hexdigest()
    return Offer(
        release=release,
        path=model_path(FAMILY, release),
        sha256=sha256,
        counter=int(release.removeprefix("r")),
        file="",
        learned_through_s=0.0,
        arrived_s=0.0,
    )


def _published(campaign: Campaign, course: Course) -> Plan:
    """Take the plans that the campaign owes; the newest is what devices hear of."""
    for step in list(campaign.state.outbox):
        if step.plan is not None:
            course.plans.append(decode_plan(encode_plan(step.plan)))
        campaign.published()
    return course.plans[-1]


def _watch(course: Course, crowd: Crowd, buckets: np.ndarray, plan: Plan) -> None:
    """Count who has the release now."""
    course.peak = max(course.peak, 100 * float(crowd.tries.mean()))
    if plan.canary is not None:
        course.allowed = max(course.allowed, plan.percent)
    course.beyond += bool((crowd.tries & (buckets >= course.allowed / 100)).any())
