"""The offline gate's rules: each fails when it should, and no data is never a pass."""

from __future__ import annotations

import math

import msgspec
import pytest

from cloud_learner.evaluate.gates import Evidence, Limits, Measured, judge, outcome
from cloud_learner.evaluate.offline import ScoredSet
from cloud_learner.stats.tasks import Task

LIMITS = Limits(
    static_drop_max=0.01,
    recent_drop_max=0.02,
    quality_min=0.6,
    int8_gap_max=0.001,
    calibration_min=0.7,
    calibration_max=1.4,
    recent_rows_min=300,
    tighten=0.5,
)
NAN = math.nan
GOOD = ScoredSet(rows=1000, quality=0.75, loss=0.5, calibration=1.0)
SLICES = {"device": {"EWR": GOOD, "JFK": GOOD}, "keys": {"new": GOOD, "known": GOOD}}
FORM = Measured(
    size_bytes=20_000,
    latency_us=15.0,
    broken_rows=0,
    static=GOOD,
    recent=GOOD,
    slices=SLICES,
    ages=[GOOD, GOOD, GOOD],
    over_persistence=0.2,
)
SMALL = {"device": 3, "keys": 0, "carrier": 7}
SHARED = (
    *("finite_answers", "size", "latency", "static_quality", "static_drop", "recent_drop"),
    *("slice_device", "slice_keys", "slice_carrier"),
    *("calibration_low", "calibration_high", "calibration_by_age", "persistence"),
)


def scored(**changes):
    return msgspec.structs.replace(GOOD, **changes)


def form(**changes):
    return msgspec.structs.replace(FORM, **changes)


def evidence(int8=FORM, float32=FORM, serving=FORM):
    return Evidence(
        forms={"int8": int8, "float32": float32},
        serving=serving,
        small_slices=SMALL,
        largest_share=0.4,
    )


def limits(**changes):
    return msgspec.structs.replace(LIMITS, **changes)


def outcomes(given, bounds=LIMITS, *, alarmed=False):
    """The rules that decide and did not pass, with their outcomes."""
    verdicts = judge(given, bounds, alarmed=alarmed)
    return {v.rule: v.outcome for v in verdicts if v.outcome != "pass" and v.decides}


def with_slice(sort, value, **changes):
    return form(slices=SLICES | {sort: SLICES[sort] | {value: scored(**changes)}})


def with_age(at, ratio, rows=1000):
    ages = [GOOD, GOOD, GOOD]
    ages[at] = scored(calibration=ratio, rows=rows)
    return form(ages=ages)


def verdict(rule, given, bounds=LIMITS, *, alarmed=False):
    return next(v for v in judge(given, bounds, alarmed=alarmed) if v.rule == rule)


def test_good_evidence_passes_every_rule():
    verdicts = judge(evidence(), LIMITS)

    assert outcomes(evidence()) == {}
    assert outcome(verdicts) == "pass"
    assert {v.rule for v in verdicts} == {
        *SHARED,
        "int8_gap",
        *(f"float32_{rule}" for rule in SHARED),
        "recent_devices",
    }


@pytest.mark.parametrize(
    ("given", "rules"),
    [
        (evidence(form(broken_rows=1)), {"finite_answers"}),
        (evidence(form(size_bytes=8_000_001)), {"size"}),
        (evidence(form(latency_us=5001.0)), {"latency"}),
        (evidence(float32=form(size_bytes=8_000_001)), {"float32_size"}),
        (
            evidence(form(static=scored(quality=0.7395)), form(static=scored(quality=0.7402))),
            {"static_drop"},
        ),
        (
            evidence(form(static=scored(quality=0.7402)), form(static=scored(quality=0.7395))),
            {"float32_static_drop"},
        ),
        (evidence(float32=form(static=scored(quality=0.752))), {"int8_gap"}),
        (evidence(form(recent=scored(quality=0.729))), {"recent_drop"}),
        (evidence(form(recent=scored(calibration=0.69))), {"calibration_low"}),
        (evidence(form(recent=scored(calibration=1.41))), {"calibration_high"}),
        (evidence(float32=form(recent=scored(quality=0.729))), {"float32_recent_drop"}),
        (evidence(with_slice("device", "JFK", quality=0.69)), {"slice_device"}),
        (evidence(with_slice("keys", "new", quality=0.69)), {"slice_keys"}),
        (evidence(with_age(2, 1.41)), {"calibration_by_age"}),
        (evidence(with_age(0, 0.69)), {"calibration_by_age"}),
    ],
)
def test_each_rule_fails_alone_when_its_limit_is_passed(given, rules):
    assert outcomes(given) == dict.fromkeys(rules, "fail")


def test_quality_below_the_least_fails_where_nothing_serves_yet():
    bad = form(static=scored(quality=0.5), recent=None)  # constant answers rank nothing

    assert outcomes(evidence(bad, bad, None)) == {
        "static_quality": "fail",
        "float32_static_quality": "fail",
    }


@pytest.mark.parametrize(
    "given",
    [
        evidence(form(static=scored(quality=0.7401)), form(static=scored(quality=0.7401))),
        evidence(float32=form(static=scored(quality=0.7509))),
        evidence(float32=form(static=scored(quality=0.742))),  # int8 may be the better one
        evidence(form(recent=scored(quality=0.7301))),
        evidence(form(recent=scored(calibration=0.71))),
        evidence(form(recent=scored(calibration=1.39))),
        evidence(with_slice("device", "JFK", quality=0.701)),
        evidence(with_age(1, 1.39)),
        evidence(with_age(1, 9.0, rows=199)),
        evidence(with_age(1, 1.6), serving=with_age(1, 1.7)),  # better than what serves
    ],
)
def test_a_limit_that_is_kept_passes(given):
    assert outcomes(given) == {}


def test_a_group_of_ages_that_got_worse_than_what_serves_fails():
    assert outcomes(evidence(with_age(1, 1.7), serving=with_age(1, 1.6))) == {
        "calibration_by_age": "fail"
    }


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (evidence(form(static=scored(quality=NAN))), "static_quality"),
        (evidence(float32=form(static=scored(quality=NAN))), "int8_gap"),
        (evidence(serving=form(static=scored(quality=NAN))), "static_drop"),
        (evidence(form(recent=scored(quality=NAN))), "recent_drop"),
        (evidence(serving=form(recent=scored(quality=NAN))), "recent_drop"),
        (evidence(form(recent=scored(calibration=NAN))), "calibration_low"),
        (evidence(form(recent=scored(rows=299))), "recent_rows"),
        (evidence(form(recent=ScoredSet(0, NAN, NAN, NAN))), "recent_rows"),
        (evidence(form(latency_us=NAN)), "latency"),
    ],
)
def test_what_is_undefined_holds(given, rule):
    found = outcomes(given)

    assert found[rule] == "hold"
    assert set(found.values()) == {"hold"}
    assert outcome(judge(given, LIMITS)) == "hold"


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (evidence(), "slice_carrier"),  # no value of it is large enough
        (
            evidence(
                form(slices={"keys": {"known": scored(quality=NAN), "new": scored(quality=NAN)}})
            ),
            "slice_keys",
        ),
        (evidence(form(ages=[])), "calibration_by_age"),
        (evidence(form(ages=[scored(calibration=NAN)] * 3)), "calibration_by_age"),
    ],
)
def test_a_part_that_is_too_small_to_judge_is_said_and_holds_nothing(given, rule):
    found = verdict(rule, given)

    assert (found.outcome, found.decides) == ("hold", False)
    assert outcome(judge(given, LIMITS)) == "pass"


def test_a_slice_tells_which_value_lost_most_and_how_many_were_judged():
    found = verdict("slice_device", evidence(with_slice("device", "JFK", quality=0.74)))

    assert found.reason == (
        "AUC lost at device=JFK is 0.0100, must be at most 0.0500 (2 judged, 3 too small)"
    )


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (
            evidence(form(static=scored(quality=0.744)), form(static=scored(quality=0.744))),
            "static_drop",
        ),
        (evidence(form(recent=scored(quality=0.735))), "recent_drop"),
        (evidence(with_slice("device", "EWR", quality=0.72)), "slice_device"),
    ],
)
def test_while_an_alarm_stands_less_may_be_lost_and_the_reason_says_so(given, rule):
    assert outcomes(given) == {}
    assert outcomes(given, alarmed=True)[rule] == "fail"
    assert verdict(rule, given, alarmed=True).reason.endswith("; an alarm stands: x0.5")
    assert "alarm" not in verdict(rule, given).reason
    assert outcomes(evidence(), alarmed=True) == {}


def test_persistence_is_always_told_and_decides_where_a_least_is_set():
    bad = evidence(form(over_persistence=-0.34), form(over_persistence=-0.34))
    told = verdict("persistence", bad)

    assert (told.outcome, told.found, told.decides) == ("fail", -0.34, False)
    assert told.reason == "kappa over persistence is -0.3400, 0 is no better; no limit is set"
    assert outcome(judge(bad, LIMITS)) == "pass"
    assert outcomes(bad, limits(persistence_min=0.0)) == {
        "persistence": "fail",
        "float32_persistence": "fail",
    }
    unknown = evidence(form(over_persistence=NAN))
    assert outcomes(unknown, limits(persistence_min=0.0)) == {"persistence": "hold"}


def test_a_hold_out_that_one_device_feeds_is_told():
    lone = msgspec.structs.replace(evidence(), largest_share=1.0)

    found = verdict("recent_devices", lone)

    assert (found.outcome, found.found, found.decides) == ("fail", 1.0, False)
    assert verdict("recent_devices", evidence()).outcome == "pass"


def test_scores_that_only_order_are_not_asked_for_calibration():
    ranking = limits(task=Task(kind="ranking", group="query"))
    given = evidence(form(recent=scored(calibration=NAN)), form(recent=scored(calibration=NAN)))

    assert outcomes(given, ranking) == {}
    assert verdict("static_quality", given, ranking).reason.startswith("NDCG on the static set")


def test_a_rule_that_fails_outweighs_rules_that_hold():
    assert outcome(judge(evidence(form(recent=scored(rows=3), size_bytes=10**9)), LIMITS)) == "fail"


@pytest.mark.parametrize(
    ("variants", "given"),
    [
        (("int8",), evidence(float32=form(recent=scored(quality=0.5)))),
        (
            ("float32",),
            evidence(form(recent=scored(quality=0.5), static=scored(quality=0.5))),
        ),
    ],
)
def test_a_form_that_does_not_ship_is_not_judged(variants, given):
    assert outcome(judge(given, limits(variants=variants))) == "pass"
    assert outcome(judge(given, LIMITS)) == "fail"


def test_no_verdict_that_decides_is_no_pass():
    assert outcome([]) == "hold"
    assert outcome([verdict("slice_carrier", evidence())]) == "hold"


def test_before_the_stream_only_the_package_and_the_static_set_are_judged():
    first = form(recent=None)
    shared = ["finite_answers", "size", "latency", "static_quality"]

    verdicts = judge(evidence(first, first, None), LIMITS)

    assert [v.rule for v in verdicts] == [
        *shared,
        "int8_gap",
        *(f"float32_{rule}" for rule in shared),
    ]
    assert outcome(verdicts) == "pass"


def test_a_reason_tells_what_was_found_and_what_it_must_reach():
    found = verdict("recent_drop", evidence(form(recent=scored(quality=0.5))))

    assert found.reason == "AUC on the recent hold-out is 0.5000, must be at least 0.7300"
