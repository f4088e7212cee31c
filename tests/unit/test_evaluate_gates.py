"""The offline gate's rules: each fails when it should, and no data is never a pass."""

from __future__ import annotations

import math

import msgspec
import pytest

from cloud_learner.evaluate.gates import Evidence, Limits, judge, outcome
from cloud_learner.evaluate.offline import ScoredSet

LIMITS = Limits(
    static_drop_max=0.01,
    recent_drop_max=0.02,
    quality_min=0.6,
    int8_gap_max=0.001,
    calibration_min=0.7,
    calibration_max=1.4,
    recent_rows_min=300,
)
GOOD = ScoredSet(rows=1000, auc=0.75, brier=0.15, calibration=1.0)
EVIDENCE = Evidence(
    static=GOOD,
    static_float=GOOD,
    recent=GOOD,
    serving_static=GOOD,
    serving_recent=GOOD,
    recent_float=GOOD,
)
SHARED = ("static_auc", "static_drop", "recent_drop", "calibration_low", "calibration_high")
NAN = math.nan


def scored(**changes):
    return msgspec.structs.replace(GOOD, **changes)


def outcomes(**changes):
    """The rules that did not pass, with their outcomes."""
    verdicts = judge(msgspec.structs.replace(EVIDENCE, **changes), LIMITS)
    return {verdict.rule: verdict.outcome for verdict in verdicts if verdict.outcome != "pass"}


def test_good_evidence_passes_every_rule():
    verdicts = judge(EVIDENCE, LIMITS)

    assert outcomes() == {}
    assert outcome(verdicts) == "pass"
    assert {v.rule for v in verdicts} == {
        *SHARED,
        "int8_gap",
        *(f"float32_{rule}" for rule in SHARED),
    }


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        (
            {"static": scored(auc=0.59), "static_float": scored(auc=0.59)},
            {"static_auc", "float32_static_auc"},
        ),
        (
            {"static": scored(auc=0.7395), "static_float": scored(auc=0.7402)},
            {"static_drop"},
        ),
        (
            {"static": scored(auc=0.7402), "static_float": scored(auc=0.7395)},
            {"float32_static_drop"},
        ),
        ({"static_float": scored(auc=0.752)}, {"int8_gap"}),
        ({"static_float": scored(auc=0.748)}, {"int8_gap"}),
        ({"recent": scored(auc=0.729)}, {"recent_drop"}),
        ({"recent": scored(calibration=0.69)}, {"calibration_low"}),
        ({"recent": scored(calibration=1.41)}, {"calibration_high"}),
        ({"recent_float": scored(auc=0.729)}, {"float32_recent_drop"}),
        ({"recent_float": scored(calibration=1.41)}, {"float32_calibration_high"}),
    ],
)
def test_each_rule_fails_alone_when_its_limit_is_passed(changes, rules):
    if "static_auc" in rules:
        changes["serving_static"] = None  # the first release has nothing to drop from
    assert outcomes(**changes) == dict.fromkeys(rules, "fail")


@pytest.mark.parametrize(
    "changes",
    [
        {"static": scored(auc=0.7401), "static_float": scored(auc=0.7401)},
        {"static_float": scored(auc=0.7509)},
        {"recent": scored(auc=0.7301)},
        {"recent": scored(calibration=0.71)},
        {"recent": scored(calibration=1.39)},
    ],
)
def test_a_limit_that_is_kept_passes(changes):
    assert outcomes(**changes) == {}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"static": scored(auc=NAN)}, "static_auc"),
        ({"static_float": scored(auc=NAN)}, "int8_gap"),
        ({"serving_static": scored(auc=NAN)}, "static_drop"),
        ({"recent": scored(auc=NAN)}, "recent_drop"),
        ({"serving_recent": scored(auc=NAN)}, "recent_drop"),
        ({"recent": scored(calibration=NAN)}, "calibration_low"),
        ({"recent": scored(rows=299)}, "recent_rows"),
        ({"recent": ScoredSet(0, NAN, NAN, NAN)}, "recent_rows"),
    ],
)
def test_what_is_undefined_holds(changes, rule):
    found = outcomes(**changes)

    assert found[rule] == "hold"
    assert set(found.values()) == {"hold"}
    assert outcome(judge(msgspec.structs.replace(EVIDENCE, **changes), LIMITS)) == "hold"


def test_a_rule_that_fails_outweighs_rules_that_hold():
    evidence = msgspec.structs.replace(
        EVIDENCE, recent=scored(rows=3), static=scored(auc=0.5), static_float=scored(auc=0.5)
    )

    assert outcome(judge(evidence, LIMITS)) == "fail"


@pytest.mark.parametrize(
    ("variants", "changes"),
    [
        (("int8",), {"recent_float": scored(auc=0.5)}),
        (("float32",), {"recent": scored(auc=0.5), "static": scored(auc=0.5)}),
    ],
)
def test_a_form_that_does_not_ship_is_not_judged(variants, changes):
    limits = msgspec.structs.replace(LIMITS, variants=variants)
    evidence = msgspec.structs.replace(EVIDENCE, **changes)

    assert outcome(judge(evidence, limits)) == "pass"
    assert outcome(judge(evidence, LIMITS)) == "fail"


def test_no_verdict_at_all_is_no_pass():
    assert outcome([]) == "hold"


def test_before_the_stream_only_the_static_set_is_judged():
    evidence = Evidence(GOOD, GOOD, None, None, None)

    rules = [v.rule for v in judge(evidence, LIMITS)]
    assert rules == ["static_auc", "int8_gap", "float32_static_auc"]
    assert outcome(judge(evidence, LIMITS)) == "pass"


def test_a_reason_tells_what_was_found_and_what_it_must_reach():
    (verdict,) = [
        v
        for v in judge(msgspec.structs.replace(EVIDENCE, recent=scored(auc=0.5)), LIMITS)
        if v.outcome == "fail"
    ]

    assert verdict.reason == "AUC on the recent hold-out is 0.5000, must be at least 0.7300"
