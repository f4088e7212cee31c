"""Placement: what a device runs now under a plan, and what it waits for."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edge_runtime.rollout.placement import Here, Placement, due, placed
from edge_runtime.rollout.plan import Plan, PlanArm, Stage, Window, bucket, model_path

DAY_S = 86_400.0
NIGHT_S = 20_000 * DAY_S
"""Midnight, UTC, of some day."""
HERE = Here("d1")


def arm(number: int, weight: float = 1.0, **changes: object) -> PlanArm:
    name = f"r{number}"
    one = PlanArm(name, model_path("f", name), f"{number:064x}", number, weight)
    return msgspec.structs.replace(one, **changes)


def plan(seq: int, stable: int, *trials: int, **changes: object) -> Plan:
    arms = [arm(number, 0.2) for number in trials]
    facts = {"canary": arms[0] if arms else None, "others": tuple(arms[1:]), "salt": "s"}
    return Plan(family="f", seq=seq, stable=arm(stable), **(facts | changes))  # type: ignore[arg-type]


def runs(placement: Placement, here: Here = HERE) -> list[str]:
    return [each.release for each in here.arms(placement.plan)]


def closed(**changes: object) -> dict[str, object]:
    """A plan's window from two to three in the night; NIGHT_S lies outside of it."""
    return {"window": Window(120, 180)} | changes


def test_without_anything_to_wait_for_a_plan_is_followed_at_once() -> None:
    new = plan(2, 2, 3)
    assert placed(new, plan(1, 1), HERE, NIGHT_S) == Placement(new)


@pytest.mark.parametrize("new", [plan(2, 2, **closed()), plan(2, 1, 2, **closed())])
def test_what_is_new_waits_for_the_window_and_what_runs_goes_on(new: Plan) -> None:
    before = plan(1, 1)
    found = placed(new, before, HERE, NIGHT_S)
    assert found == Placement(before, "window", NIGHT_S + 7200)
    assert placed(new, before, HERE, NIGHT_S + 7200) == Placement(new)
    assert placed(new, before, HERE, NIGHT_S + 10_799) == Placement(new)
    late = placed(new, before, HERE, NIGHT_S + 10_800)
    assert (late.waits, late.until_s) == ("window", NIGHT_S + DAY_S + 7200)


@pytest.mark.parametrize(
    ("hour", "is_open"), [(21.9, False), (22, True), (23.9, True), (0, True), (2, False)]
)
def test_a_window_may_go_past_midnight(hour: float, is_open: bool) -> None:
    new = plan(2, 2, window=Window(22 * 60, 60))
    found = placed(new, plan(1, 1), HERE, NIGHT_S + hour * 3600)
    assert (found.plan == new) == is_open
    assert is_open or found.until_s % DAY_S == 22 * 3600


def test_a_window_of_a_whole_day_is_none() -> None:
    new = plan(2, 2, window=Window(60, 60))
    assert placed(new, plan(1, 1), HERE, NIGHT_S) == Placement(new)


def test_the_jitter_is_a_share_of_its_own_for_each_device_and_begins_with_the_stage() -> None:
    new = plan(2, 2, jitter_s=600.0, stages=(Stage(2, 100, NIGHT_S),))
    waits = {}
    for number in range(500):
        found = placed(new, plan(1, 1), Here(f"d{number}"), NIGHT_S)
        assert found.waits == "jitter"
        waits[number] = found.until_s - NIGHT_S
        again = placed(new, plan(1, 1), Here(f"d{number}"), NIGHT_S + 300)
        assert found.until_s == again.until_s if again.waits else waits[number] <= 300
    assert 0 < min(waits.values()) < 10
    assert 590 < max(waits.values()) < 600
    assert placed(new, plan(1, 1), HERE, NIGHT_S + 600) == Placement(new)


def test_the_jitter_says_nothing_about_the_bucket() -> None:
    pairs = [(bucket("s", f"d{n}"), bucket("s|jitter", f"d{n}")) for n in range(2000)]
    early = [jitter for place, jitter in pairs if place < 0.01 or place > 0.99]
    assert 0.3 < sum(early) / len(early) < 0.7


def test_with_a_window_the_jitter_begins_when_that_opens() -> None:
    new = plan(2, 2, **closed(jitter_s=600.0, stages=(Stage(2, 100, NIGHT_S),)))
    ends = {placed(new, plan(1, 1), Here(f"d{n}"), NIGHT_S).until_s - NIGHT_S for n in range(99)}
    assert 7200 < min(ends) < max(ends) < 7800


@pytest.mark.parametrize(
    "delay", [closed(), {"jitter_s": 1e9, "stages": (Stage(1, 100, NIGHT_S),)}]
)
@pytest.mark.parametrize(
    ("new", "before", "left"),
    [
        (plan(3, 1), plan(2, 1, 2), ["r1"]),  # the trial is gone
        (plan(3, 1), plan(2, 2), ["r1"]),  # back to a lower counter
        (plan(3, 1, 4), plan(2, 1, 2), ["r1"]),  # the trial is gone, another waits
        (plan(3, 3), plan(2, 1, 2), ["r1"]),  # the trial is gone, the new stable one waits
        (plan(3, 1, 2, 4), plan(2, 1, 2, 3), ["r1", "r2"]),
        (plan(3, 1, 3), plan(2, 1, 2, 3), ["r1", "r3"]),
        (plan(3, 2, 3), plan(2, 1, 2), ["r1", "r2"]),  # its promotion waits, too
    ],
)
def test_what_is_withdrawn_never_waits(
    delay: Mapping[str, object], new: Plan, before: Plan, left: list[str]
) -> None:
    new = msgspec.structs.replace(new, **delay)
    found = placed(new, before, HERE, NIGHT_S)
    assert runs(found) == left
    again = placed(new, found.plan, HERE, NIGHT_S)
    assert (again.plan, again.waits) == (found.plan, found.waits)


def test_a_shadow_that_shall_answer_waits_and_one_that_shall_not_any_more_does_not() -> None:
    live, shadow = plan(2, 1, 2, **closed()), plan(3, 1, 2, **closed())
    shadow = msgspec.structs.replace(shadow, canary=arm(2, 0.2, mode="shadow"))
    found = placed(live, shadow, HERE, NIGHT_S)
    assert (found.plan.canary, found.waits) == (arm(2, 0.2, mode="shadow"), "window")
    assert placed(shadow, live, HERE, NIGHT_S) == Placement(shadow)


def test_other_weights_are_no_change_of_what_runs() -> None:
    new = plan(3, 1, 2, **closed())
    new = msgspec.structs.replace(new, canary=arm(2, 0.7))
    assert placed(new, plan(2, 1, 2), HERE, NIGHT_S) == Placement(new)


def test_a_device_that_the_change_does_not_touch_follows_it() -> None:
    away = next(f"d{n}" for n in range(999) if bucket("s", f"d{n}") > 0.5)
    new = plan(2, 1, 2, **closed(stages=(Stage(2, 10, NIGHT_S),)))
    assert placed(new, plan(1, 1), Here(away), NIGHT_S) == Placement(new)


@pytest.mark.parametrize("new", [plan(2, 2), plan(2, 1, 2), plan(2, 0), plan(2, 1)])
@pytest.mark.parametrize("by", ["plan", "configuration"])
def test_a_device_on_hold_changes_nothing(new: Plan, by: str) -> None:
    before = plan(1, 1, 3)
    if by == "plan":
        new, here = msgspec.structs.replace(new, hold=("d0", "d1")), HERE
    else:
        here = Here("d1", hold=True)
    assert placed(new, before, here, NIGHT_S) == Placement(before, "hold")
    assert placed(before, before, here, NIGHT_S) == Placement(before)


def test_on_hold_a_trial_outlives_its_end() -> None:
    before = plan(1, 1, 2, not_after_s=NIGHT_S)
    assert placed(before, before, Here("d1", hold=True), NIGHT_S) == Placement(before, "hold")


@pytest.mark.parametrize("delay", [closed(), {"hold": ("d1",)}])
@pytest.mark.parametrize("before", [None, plan(1, 1), plan(1, 5, 1)])
def test_who_runs_nothing_or_what_is_banned_waits_for_nothing(
    delay: Mapping[str, object], before: Plan | None
) -> None:
    new = plan(2, 7, **delay)
    assert placed(new, before, HERE, NIGHT_S, lowest_counter=4) == Placement(new)


def test_a_trial_ends_at_its_time_and_not_before() -> None:
    new = plan(1, 1, 2, not_after_s=NIGHT_S)
    assert placed(new, new, HERE, NIGHT_S - 1) == Placement(new, until_s=NIGHT_S)
    over = placed(new, new, HERE, NIGHT_S)
    assert (runs(over), over.until_s) == (["r1"], math.inf)
    assert placed(new, over.plan, HERE, NIGHT_S) == over
    assert placed(new, plan(1, 1), HERE, NIGHT_S).plan.trials == []


def test_a_pinned_device_runs_what_it_is_pinned_to() -> None:
    new = plan(2, 1, 2, 3, pins={"d1": "r3"})
    assert runs(placed(new, plan(1, 1), HERE, NIGHT_S)) == ["r3"]
    assert runs(placed(new, plan(1, 1), Here("d2"), NIGHT_S), Here("d2")) == ["r1", "r2", "r3"]
    waits = msgspec.structs.replace(new, window=Window(120, 180))
    assert placed(waits, plan(1, 1), HERE, NIGHT_S).waits == "window"
    assert placed(waits, new, HERE, NIGHT_S) == Placement(waits)
    back = plan(3, 1, 2, **closed())
    assert runs(placed(back, new, HERE, NIGHT_S)) == ["r1"]


def test_a_trial_that_failed_here_is_left_out_and_the_others_run() -> None:
    new, left = plan(2, 1, 2, 3), {arm(2).sha256}
    assert [each.release for each in due(new, NIGHT_S, left).arms] == ["r1", "r3"]
    assert runs(placed(new, plan(1, 1), HERE, NIGHT_S, left=left)) == ["r1", "r3"]


def test_a_stable_release_that_failed_here_is_missed_and_trials_that_are_gone_go() -> None:
    before, new = plan(1, 1, 2), plan(2, 3, 4)
    found = placed(new, before, HERE, NIGHT_S, left={arm(3).sha256})
    assert (runs(found), found.waits) == (["r1"], "quarantine")


releases = st.integers(1, 6)
trials = st.lists(releases, max_size=3, unique=True)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    on_trial = draw(trials)
    stable = draw(releases.filter(lambda number: number not in on_trial))
    wait = draw(st.sampled_from([{}, closed(), {"hold": ("d1",)}, {"pins": {"d1": "r2"}}]))
    return plan(2, stable, *on_trial, **wait)


@given(plans(), plans(), st.sets(releases, max_size=2), st.floats(NIGHT_S, NIGHT_S + DAY_S))
def test_a_placement_is_one_and_runs_nothing_that_nobody_asked_for(
    new: Plan, before: Plan, left: set[int], now_s: float
) -> None:
    packages = {arm(number).sha256 for number in left}
    assume(not any(each.sha256 in packages for each in HERE.arms(before)))
    found = placed(new, before, HERE, now_s, left=packages)
    assert placed(new, found.plan, HERE, now_s, left=packages).plan == found.plan
    had, shall, now = (
        {each.release for each in HERE.arms(each)} for each in (before, new, found.plan)
    )
    assert now <= had | shall
    if found.waits in ("window", "jitter"):
        stable = HERE.arms(found.plan)[0].release
        assert now - {stable} <= had & shall, "what is new has waited, what is gone is gone"
