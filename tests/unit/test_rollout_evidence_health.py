"""Health: which reports of a device count, and what they say of failures and of a shadow."""

from __future__ import annotations

import math

import msgspec
import pytest

from cloud_learner.rollout.health import Counters, Health
from cloud_learner.stats.counting import RATIOS, CountingTest
from edge_runtime.wire.messages import ArmReport, Report, ShadowReport


def new_health() -> Health:
    return Health(family="f", stable="old", canary="new", failures=CountingTest(alpha=0.01))


def report(number, trial=None, stable=(0, 0), *, device="a", epoch=1, plan=5, shadows=(), **arm):
    """What a device says; `trial` and `stable` are answered and failed since its start."""
    arms = [ArmReport("f", "stable", "old", 0.0, answered=stable[0], failed=stable[1])]
    if trial:
        about = {"family": "f", "arm": "canary", "release": "new", "serving_since_s": 0.0} | arm
        arms.append(ArmReport(**about, answered=trial[0], failed=trial[1]))
    more = {"number": number, "shadows": list(shadows)}
    return Report(1, device, epoch, 0.0, {}, arms, plan, {}, {}, [], 0, 0, **more)


def shadow(rows, *, agreed=0, bad=0, distance=0.0, release="new", against="old"):
    return ShadowReport("f", release, against, rows, 3, agreed, bad, distance, 0.0, 0.0)


def after(*reports) -> Health:
    health = new_health()
    for each in reports:
        health.add(each)
    return health


def gains(trial, failures, share):
    return [
        trial * math.log(ratio) - failures * math.log(share * ratio + 1 - share) for ratio in RATIOS
    ]


def test_failures_count_with_the_share_of_answers_since_the_last_failure():
    health = after(
        report(0, (0, 0), (0, 0)),
        report(1, (2, 0), (8, 0)),
        report(2, (4, 1), (16, 0)),
        report(3, (10, 1), (20, 2)),
    )
    first, second = gains(1, 1, 4 / 20), gains(0, 2, 6 / 10)
    assert health.failures.gains == pytest.approx(
        [a + b for a, b in zip(first, second, strict=True)]
    )
    assert health.total == Counters(10, 1, 20, 2)


def test_what_a_device_counted_before_its_first_report_under_a_plan_says_nothing():
    health = after(report(7, (50, 40), (1000, 0)), report(8, (51, 40), (1004, 1)))
    assert (health.failures.failures, health.total.answered) == (1, 1)
    health.add(report(9, (90, 80), (1100, 1), plan=6))
    assert health.failures.failures == 1
    health.add(report(10, (91, 81), (1104, 1), plan=6))
    assert health.failures.failures == 2


def test_counters_begin_at_nought_with_a_new_process():
    health = after(
        report(0, (0, 0)),
        report(4, (30, 1), (70, 0)),
        report(0, (2, 1), (8, 0), epoch=2),
    )
    assert health.total == Counters(32, 2, 78, 0)
    assert health.failures.gains == pytest.approx(
        [a + b for a, b in zip(gains(1, 1, 0.3), gains(1, 1, 0.2), strict=True)]
    )


@pytest.mark.parametrize(("epoch", "number"), [(2, 3), (2, 2), (1, 9)])
def test_a_report_that_is_not_above_the_last_is_dropped_and_counted(epoch, number):
    health = after(report(0, (0, 0), epoch=2), report(3, (10, 0), (40, 0), epoch=2))
    before = msgspec.json.encode(health)
    assert not health.add(report(number, (99, 99), (99, 0), epoch=epoch))
    assert health.stale == 1
    health.stale = 0
    assert before == msgspec.json.encode(health)


@pytest.mark.parametrize(
    ("trial", "stable"),
    [((5, 0), (40, 0)), ((20, 0), (3, 0)), ((11, 2), (41, 0)), ((10, 0), (41, 2))],
)
def test_counters_that_go_back_or_fail_more_than_they_answer_begin_anew(trial, stable):
    health = after(report(0, (0, 0)), report(1, (10, 0), (40, 0)), report(2, trial, stable))
    assert (health.unusable, health.failures.failures) == (1, 0)
    assert health.total == Counters(10, 0, 40, 0)
    health.add(report(3, (trial[0] + 1, trial[1] + 1), (stable[0] + 3, stable[1])))
    assert health.failures.gains == pytest.approx(gains(1, 1, 1 / 4))


def test_a_device_without_the_trial_in_memory_is_none_of_it():
    health = new_health()
    assert not health.add(report(0))
    assert not health.add(report(1, (5, 5), release="other"))
    assert not health.add(report(2, (5, 5), family="g"))
    assert health == new_health()


def test_answers_that_were_given_while_the_trial_was_gone_are_left_out():
    health = after(
        report(0, (0, 0)),
        report(1, None, (500, 0)),
        report(2, (0, 0), (900, 0)),
        report(3, (2, 1), (908, 0)),
    )
    assert health.failures.gains == pytest.approx(gains(1, 1, 0.2))


def test_devices_are_taken_each_by_itself():
    reports = [
        report(number, (number, number // 2), (4 * number, 0), device=device)
        for number in range(4)
        for device in "ab"
    ]
    health = after(*reports)
    assert len(health.devices) == 2
    assert health.failures.devices["a"] == health.failures.devices["b"]


def test_a_bad_run_of_a_shadow_counts_as_a_failure_of_the_trial():
    health = after(
        report(0, None, (0, 0), shadows=[shadow(0)]),
        report(1, None, (50, 0), shadows=[shadow(10, agreed=9, bad=1, distance=0.5)]),
    )
    assert health.failures.gains == pytest.approx(gains(1, 1, 10 / 60))
    facts = health.statistics()
    assert (facts["shadow_rows"], facts["shadow_bad"]) == (10, 1)
    assert (facts["shadow_agreement"], facts["shadow_distance"]) == (0.9, 0.05)
    assert facts["shadow_agreement_low"] < 0.9
    assert facts["shadow_distance_high"] > 0.05


def test_a_shadow_of_another_release_or_against_another_is_none_of_it():
    health = new_health()
    assert not health.add(report(0, None, shadows=[shadow(9, release="other")]))
    assert not health.add(report(1, None, shadows=[shadow(9, against="older")]))


@pytest.mark.parametrize("distance", [math.nan, math.inf, -1.0, 11.0])
def test_a_distance_that_cannot_be_is_unusable(distance):
    health = after(
        report(0, None, shadows=[shadow(0)]),
        report(1, None, shadows=[shadow(10, distance=distance)]),
    )
    assert (health.unusable, health.total) == (1, Counters())


def test_a_shadow_that_fails_where_the_stable_release_fails_is_not_harmful():
    reports = [
        report(n, None, (100 * n, 2 * n), shadows=[shadow(50 * n, bad=n)]) for n in range(200)
    ]
    health = after(*reports)
    assert not health.harmful
    assert max(health.failures.gains) < 0


def test_a_shadow_that_says_nonsense_on_one_row_in_a_hundred_is_seen():
    reports = [report(n, None, (100 * n, 0), shadows=[shadow(100 * n, bad=n)]) for n in range(20)]
    assert after(*reports).harmful


def test_stored_health_goes_on_where_it_stopped():
    reports = [report(n, (n, n // 3), (4 * n, n // 5)) for n in range(60)]
    whole, first = after(*reports), after(*reports[:25])
    again = msgspec.json.decode(msgspec.json.encode(first), type=Health)
    for each in reports[25:]:
        again.add(each)
    assert whole == again


def test_all_numbers_are_finite_even_before_the_first():
    facts = new_health().statistics()
    assert all(math.isfinite(value) for value in facts.values())
    assert facts["e_failures"] == pytest.approx(1.0)


def test_of_all_who_may_speak_some_lie_not_of_the_first_who_do():
    def heard(members):
        health = new_health()
        health.members = members
        for number in range(30):
            for liar in ("liar-1", "liar-2"):
                health.add(
                    report(number, (20 * number, 20 * number), (80 * number, 0), device=liar)
                )
        return health.harmful

    assert heard(members=0)
    assert not heard(members=200)
