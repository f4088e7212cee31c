"""The rule of steps: which plan jumps, and which history is another one than this device saw."""

from __future__ import annotations

import msgspec
import pytest

from edge_runtime.errors import TrustError
from edge_runtime.rollout.plan import Plan, PlanArm, Stage, model_path
from edge_runtime.update.approval import check_history, is_jump, payload


def arm(number: int) -> PlanArm:
    name = f"r{number}"
    return PlanArm(name, model_path("f", name), f"{number:064x}", number, 1.0)


def plan(seq: int, stable: int, canary: int, *stages: tuple[int, float], salt: str = "s") -> Plan:
    return Plan(
        family="f",
        seq=seq,
        stable=arm(stable),
        canary=arm(canary) if canary else None,
        salt=salt,
        stages=tuple(Stage(number, percent, 0.0) for number, percent in stages),
    )


@pytest.mark.parametrize(
    ("percents", "largest"),
    [
        ((), 100),
        ((100,), 100),
        ((1, 100), 99),
        ((10, 50), 40),
        ((10, 50, 5, 20), 40),
        ((50, 0, 50), 50),
        ((25, 50, 75, 100), 25),
    ],
)
def test_the_largest_step_of_a_trial_counts(percents: tuple[float, ...], largest: float) -> None:
    new = plan(9, 1, 2, *enumerate(percents, start=1))
    assert not is_jump(new, new.arms, [arm(1)], largest)
    assert is_jump(new, new.arms, [arm(1)], largest - 0.5)


@pytest.mark.parametrize(("percents", "largest"), [((), 100), ((10, 20), 80), ((50, 100), 50)])
def test_what_becomes_stable_has_come_to_all(percents: tuple[float, ...], largest: float) -> None:
    new = plan(9, 2, 0, *enumerate(percents, start=1))
    assert not is_jump(new, new.arms, [arm(1)], largest)
    assert is_jump(new, new.arms, [arm(1)], largest - 0.5)


@pytest.mark.parametrize("has", [[], [arm(2)], [arm(1), arm(2)], [arm(3)]])
def test_who_gains_nothing_newer_is_not_asked(has: list[PlanArm]) -> None:
    new = plan(9, 1, 2)
    assert not is_jump(new, new.arms, has, 0)
    assert is_jump(new, new.arms, [arm(1)], 0)


SEEN = plan(5, 1, 2, (3, 1), (5, 10))


@pytest.mark.parametrize(
    "good",
    [
        SEEN,
        plan(6, 1, 2, (3, 1), (5, 10), (6, 50)),
        plan(6, 2, 0, (3, 1), (5, 10), (6, 100), salt=""),
        plan(9, 1, 3, (8, 1), (9, 100), salt="t"),
        plan(6, 2, 0, salt=""),
        plan(6, 1, 0, (1, 100), salt=""),  # back, with the history of before
        plan(6, 0, 0),
        plan(4, 1, 2, (2, 1), (4, 100)),  # new online keys undid what was seen
    ],
)
def test_a_history_that_goes_on_or_begins_anew_is_taken(good: Plan) -> None:
    check_history(good, SEEN)


@pytest.mark.parametrize(
    "lie",
    [
        plan(6, 1, 2, (3, 1), (6, 10)),
        plan(6, 1, 2, (3, 1), (5, 20)),
        plan(6, 1, 2, (3, 1)),
        plan(6, 1, 2),
        plan(6, 2, 0),
        plan(6, 1, 2, (3, 1), (4, 50), (5, 10)),
        plan(6, 1, 3, (5, 50), (6, 100), salt="t"),
        plan(6, 2, 0, (4, 50), (6, 100), salt=""),
    ],
)
def test_a_history_that_is_not_what_was_seen_is_refused(lie: Plan) -> None:
    with pytest.raises(TrustError) as caught:
        check_history(lie, SEEN)
    assert caught.value.code == "history_rewritten"


def test_after_a_factory_package_everything_is_new() -> None:
    seen = Plan(family="f", seq=1, stable=arm(0), reason="factory")
    check_history(plan(1, 1, 2, (1, 100)), seen)
    with pytest.raises(TrustError):
        check_history(plan(1, 1, 2, (1, 100)), msgspec.structs.replace(seen, stable=arm(1)))


def test_what_is_signed_is_the_plan_s_own_bytes() -> None:
    assert payload(b"{}") == b"headwater-approval-1|{}"
