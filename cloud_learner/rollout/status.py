"""What a campaign is doing, as plain data: stages, gates with their numbers, devices.

Why: the live view, the commands and whoever follows a release read the same words.

Invariants: JSON holds all of it, and it is of bounded size, however large the fleet is. Nothing is
decided by it.

Knows nothing about how it is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import msgspec

from cloud_learner.rollout.campaign import Campaign
from cloud_learner.rollout.state import SHADOW, Match, Offer, Trial
from edge_runtime.wire.messages import Report

DEVICES_MAX = 100


def status(campaign: Campaign, reports: Mapping[str, Report], now_s: float) -> dict[str, Any]:
    """All of it; `reports` are the newest of each device, of which the first few are shown."""
    state, trial = campaign.state, campaign.state.trial
    reports = dict(sorted(islice(reports.items(), DEVICES_MAX)))
    family = campaign.rules.family
    return {
        "family": family,
        "stage": campaign.stage,
        "plan_seq": state.seq,
        "paused": state.paused,
        "hold": state.hold,
        "pins": state.pins,
        "unpublished": len(state.outbox),
        "stable": _arm(state.stable, family, reports),
        "canary": _arm(state.canary, family, reports),
        "pending": state.pending.release if state.pending else None,
        "stages": _stages(trial, now_s) if trial else [],
        "waits": _waits(campaign),
        "evidence": trial.evidence.statistics() if trial else {},
        "gates": _gates(trial) if trial else _ends(state.match) if state.match else [],
        "contest": _contest(state.match, reports, now_s) if state.match else {},
        "counts": msgspec.to_builtins(state.counts),
        "decisions": msgspec.to_builtins(state.decisions[-10:]),
        "devices": {name: _device(report, now_s) for name, report in reports.items()},
    }


def serving_since_s(report: Report, family: str, release: str) -> float | None:
    """Since when a device has had a release in memory; None when it has not."""
    arms = (arm for arm in report.arms if arm.family == family and arm.release == release)
    return next((arm.serving_since_s for arm in arms), None)


def _waits(campaign: Campaign) -> str:
    """What a person has to do before anything advances."""
    live = campaign.state.live
    if campaign.state.paused:
        return "resume"
    return "approve" if live is not None and live.waiting else ""


def _contest(match: Match, reports: Mapping[str, Report], now_s: float) -> dict[str, Any]:
    """Shares, answers and mean rewards by release, and how it stands."""
    contest, family = match.contest, match.rules.family
    rows = zip(match.offers, contest.ledger.arms, contest.shares, strict=True)
    return {
        "kind": contest.terms.kind,
        "outcome": contest.ledger.outcome,
        "verdict": contest.verdict,
        "ends_in_s": match.deadline_s - now_s,
        "arms": [
            {
                **(_arm(offer, family, reports) or {}),
                "share": share,
                "answered": arm.answered,
                "mean": arm.mean if arm.answered else None,
            }
            for offer, arm, share in rows
        ],
        "evidence": contest.statistics(),
    }


def _ends(match: Match) -> list[dict[str, Any]]:
    """What ends a contest by itself."""
    contest = match.contest
    if contest.terms.kind != "ab":
        return []
    row = _gate("answers", contest.ledger.answered, contest.terms.answers, "end")
    return [{**row, "text": f"answers {row['value']:,.0f}/{row['reach']:,.0f}"}]


def _stages(trial: Trial, now_s: float) -> list[dict[str, Any]]:
    """Every stage of a trial, whether it lies behind; of the present one how it stands."""
    stages = trial.rules.stages
    rows = [(SHADOW, "shadow", stages[0])] if trial.rules.shadow_rows else []
    rows += [(number, f"{percent:g} %", percent) for number, percent in enumerate(stages)]
    found: list[dict[str, Any]] = []
    for number, name, percent in rows:
        when = "passed" if number < trial.at else "now" if number == trial.at else "ahead"
        facts = _now(trial, now_s) if when == "now" else {}
        found.append({"stage": name, "percent": percent, "state": when, **facts})
    return found


def _now(trial: Trial, now_s: float) -> dict[str, Any]:
    silent = sum(not shown for shown in trial.members.values())
    return {
        "labels": trial.evidence.pairs - trial.pairs_before,
        "devices": len(trial.members),
        "silent": silent,
        "ends_in_s": trial.deadline_s - now_s,
    }


def _gates(trial: Trial) -> list[dict[str, Any]]:
    """The rules over the evidence, each with its value and what it must reach to act."""
    evidence, rules = trial.evidence, trial.rules
    labels = evidence.pairs - trial.pairs_before
    rows = [
        *evidence.gates(),
        _gate("paired_labels", evidence.pairs, rules.pairs_max, "roll back, undecided"),
    ]
    if trial.at == SHADOW:
        rows.append(_gate("shadow_rows", evidence.health.total.rows, rules.shadow_rows, "advance"))
    elif len(rules.stages) > 1:
        rows.append(_gate("stage_labels", labels, rules.pairs_min, "advance"))
    return [
        {**row, "text": f"{row['gate']} {row['value']:,.4g}/{row['reach']:,.4g}"} for row in rows
    ]


def _gate(gate: str, value: float, reach: float, then: str) -> dict[str, float | str]:
    return {"gate": gate, "value": float(value), "reach": float(reach), "then": then}


def _arm(offer: Offer | None, family: str, reports: Mapping[str, Report]) -> dict[str, Any] | None:
    if offer is None:
        return None
    serving = [
        name
        for name, report in reports.items()
        if serving_since_s(report, family, offer.release) is not None
    ]
    facts = {
        "release": offer.release,
        "sha256": offer.sha256,
        "learned_through_s": offer.learned_through_s,
    }
    return {**facts, "devices": serving}


def _device(report: Report, now_s: float) -> dict[str, Any]:
    return {
        "plan_seq": report.plan_seq,
        "releases": {arm.arm: arm.release for arm in report.arms},
        "variants": {arm.arm: arm.variant for arm in report.arms},
        "refused": dict(report.refused),
        "counters": dict(report.counters),
        "age_s": now_s - report.time_s,
    }
