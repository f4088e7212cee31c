"""The plan that a campaign's state comes to, and its decisions in a sentence.

Why: what devices are told follows from the state alone, so that the same state is the same plan.

Invariants: the salt is that of the trial, for all its life; what is on trial is told until when;
nobody is pinned to a release that the plan does not name. The sentence of a decision ends with the
digest of all that it rests on, so that the plan's signature covers that, too.

Knows nothing about when a plan is written.
"""

from __future__ import annotations

from cloud_learner.rollout.control import releases
from cloud_learner.rollout.state import Ending, Offer, Reason, Rules, State, Told, Trial
from edge_runtime.rollout.plan import Plan, PlanArm

DIGEST_CHARS = 32


def plan_of(state: State, declared: Rules, reason: Reason, note: str) -> Plan:
    """The plan number `state.seq` of a family that has a stable release."""
    live = state.live
    rules = live.rules if live else declared
    stable, *trials = _arms(state, rules)
    return Plan(
        family=rules.family,
        seq=state.seq,
        stable=stable,
        canary=trials[0] if trials else None,
        others=tuple(trials[1:]),
        selector=rules.selector if state.trial else {},
        salt=live.salt if live else "",
        stages=live.stages if live else state.stages,
        window=rules.window,
        jitter_s=rules.jitter_s,
        not_after_s=live.deadline_s if live else 0.0,
        gates=rules.gates,
        fallback=_arm(state.fallback, 1.0) if state.fallback else None,
        hold=tuple(state.hold),
        pins={name: each for name, each in state.pins.items() if each in releases(state)},
        reason=reason,
        note=note,
    )


def begun(trial: Trial, stable: Offer) -> str:
    """That a trial begins, and where."""
    rules = trial.rules
    where = " ".join(f"{key}={value}" for key, value in rules.selector.items())
    share = "" if trial.percent == 100 else f"{trial.percent:g} % of "
    how = "is scored in the shadow of" if trial.at < 0 else "is on trial against"
    return f"{trial.offer.release} {how} {stable.release} on {share}{where or 'all devices'}"


def advanced(trial: Trial) -> str:
    """Why the next stage begins."""
    where = f"{trial.percent:g} % of devices try {trial.offer.release}"
    return f"{where} {_numbers(trial)}; {digest(trial)}"


def ended(trial: Trial, stable: Offer, reason: Ending, why: str = "") -> str:
    """The decision in one sentence with its numbers, for the plan's note and for lineage."""
    new, old, found = trial.offer.release, stable.release, trial.evidence
    said = {
        "promoted": f"{new} replaces {old} {_numbers(trial)}",
        "harm": f"{new} is rolled back to {old} {_numbers(trial)}; by {found.harm}",
        "undecided": f"{new} is rolled back to {old}, undecided {_numbers(trial)}",
        "aborted": f"{new} is rolled back to {old}, aborted {_numbers(trial)}",
    }[reason]
    return f"{said}{f'; {why}' if why else ''}; {digest(trial)}"


def digest(told: Told) -> str:
    """What a decision rests on, in so many characters that a signature of them counts."""
    return f"evidence {told.digest[:DIGEST_CHARS]}"


def facts(trial: Trial, *, is_over: bool = False) -> dict[str, float | int | str]:
    """The numbers behind a decision, flat; devices that kept silent have failed once it is over."""
    silent = sum(not shown for shown in trial.members.values())
    return {
        **trial.evidence.statistics(),
        "stage": "shadow" if trial.at < 0 else f"{trial.percent:g} %",
        "devices_trying": len(trial.members) - silent,
        "devices_failed" if is_over else "devices_silent": silent,
        "digest": trial.digest,
    }


def _numbers(trial: Trial) -> str:
    facts, pairs = trial.evidence.statistics(), trial.evidence.pairs
    if not pairs:
        return "after 0 paired labels"
    losses = [float(facts[name]) for name in ("canary_loss", "stable_loss", "mean_difference")]
    told = "after {:,} paired labels: mean loss {:.4f} against {:.4f}, mean difference {:+.4f}"
    return told.format(pairs, *losses)


def _arms(state: State, rules: Rules) -> list[PlanArm]:
    """What the plan names, the stable release first."""
    if (match := state.match) is not None:
        joined = zip(match.offers[: match.joined], match.contest.shares, strict=False)
        return [_arm(offer, share) for offer, share in joined]
    assert state.stable is not None
    if state.trial is None:
        return [_arm(state.stable, 1.0)]
    return [_arm(state.stable, 1.0 - rules.canary_share), _trial_arm(state.trial)]


def _trial_arm(trial: Trial) -> PlanArm:
    arm = _arm(trial.offer, trial.rules.canary_share)
    if trial.at >= 0:
        return arm
    return PlanArm(
        arm.release, arm.path, arm.sha256, arm.counter, arm.weight, arm.variants, "shadow"
    )


def _arm(offer: Offer, weight: float) -> PlanArm:
    return PlanArm(offer.release, offer.path, offer.sha256, offer.counter, weight, offer.variants)
