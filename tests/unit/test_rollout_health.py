"""When a device leaves a release by itself: decided from what is seen of it alone."""

from __future__ import annotations

import random

import pytest

from edge_runtime.rollout.health import (
    BAD_LOOKS,
    HANG_S,
    HANG_TIMES,
    SLOW_RUNS,
    Looks,
    Trial,
    is_stuck,
)
from edge_runtime.rollout.plan import LocalGates

GATES = LocalGates(failures=3, slowdown=20.0, memory_mb=0.0)
STABLE_NS = 10_000


def trial(added_mb: float = 0.0, **gates: float) -> Trial:
    return Trial(LocalGates(**{"failures": 3, "slowdown": 20.0, **gates}), added_mb)  # type: ignore[arg-type]


def after(seen: Trial, *runs: int | None) -> str:
    """The gate that was failed after runs of so many nanoseconds; None for one without answer."""
    for took_ns in runs:
        seen.saw(took_ns or 0, STABLE_NS, usable=took_ns is not None)
    return seen.gate


def test_it_is_left_at_the_third_failure_in_a_row_and_no_sooner() -> None:
    assert after(trial(), None, None) == ""
    assert after(trial(), None, None, None) == "failures"
    assert after(trial(), None, None, STABLE_NS, None, None) == ""
    assert after(trial(failures=1), None) == "failures"
    assert after(trial(failures=0), *[None] * 1000) == ""


def test_it_is_left_when_most_of_its_runs_are_too_slow_and_not_for_outliers() -> None:
    slow, fine = 21 * STABLE_NS, 19 * STABLE_NS
    assert after(trial(), *[slow] * (SLOW_RUNS - 1)) == ""
    assert after(trial(), *[slow] * SLOW_RUNS) == "slowdown"
    assert after(trial(), *[fine] * 1000) == ""
    assert after(trial(slowdown=0.0), *[10**12] * 1000) == ""
    chance = random.Random(1)
    stalls = [10**9 if chance.random() < 0.25 else fine for _ in range(10_000)]
    assert after(trial(), *stalls) == ""


def test_a_failure_does_not_count_as_a_quick_run() -> None:
    runs = [None if turn % 2 else 21 * STABLE_NS for turn in range(2 * SLOW_RUNS)]
    assert after(trial(), *runs) == "slowdown"


def test_memory_is_judged_when_it_is_loaded() -> None:
    assert trial(added_mb=101.0, memory_mb=100.0).gate == "memory"
    assert trial(added_mb=100.0, memory_mb=100.0).gate == ""
    assert trial(added_mb=1e6, memory_mb=0.0).gate == ""


@pytest.mark.parametrize(
    ("since_s", "stable_s", "slowdown", "gate"),
    [
        (HANG_S, 1e-5, 20.0, ""),
        (HANG_S * 1.1, 1e-5, 20.0, "hung"),
        (HANG_S * 1.1, 1e-5, 0.0, "hung"),
        (19.0, 1.0, 20.0, ""),
        (21.0, 1.0, 20.0, "hung"),
        (HANG_TIMES * 0.9, 1.0, 0.0, ""),
    ],
)
def test_a_run_that_does_not_end_is_judged_by_what_the_stable_release_takes(
    since_s: float, stable_s: float, slowdown: float, gate: str
) -> None:
    seen = trial(slowdown=slowdown)
    assert [seen.waits(1, since_s, stable_s) for _ in range(2)] == ["", gate]


def test_a_process_that_stood_still_is_no_run_that_hangs() -> None:
    seen = trial()
    assert [seen.waits(run, 1e6, 1e-5) for run in (1, 2, 3)] == ["", "", ""]


def test_the_first_verdict_stays() -> None:
    seen = trial()
    assert after(seen, None, None, None) == "failures"
    assert seen.waits(1, 1e9, 1e-5) == after(seen, *[STABLE_NS] * 1000) == "failures"


def looks(*numbers: tuple[int, int]) -> list[str]:
    """What each look says, after so many answers and failures more than at the look before."""
    found, answered, failed = Looks(), 0, 0
    said = []
    for fresh, bad in numbers:
        answered, failed = answered + fresh, failed + bad
        said.append(found.look(answered, failed))
    return said


def test_the_stable_release_is_left_after_looks_that_found_bad_answers_alone() -> None:
    bad = [(2, 2)] * BAD_LOOKS
    assert looks(*bad) == ["bad"] * (BAD_LOOKS - 1) + ["leave"]
    assert looks(*bad[1:], (0, 0), (2, 2))[-2:] == ["", "leave"]
    assert looks(*bad[1:], (9, 8), (2, 2))[-2:] == ["", "bad"]
    assert looks(*[(1, 0), (0, 0)] * 9) == [""] * 18


def test_a_run_on_the_worker_is_stuck_after_looks_enough_of_which_the_last_were_useless() -> None:
    assert [is_stuck(looks, 2.0) for looks in (BAD_LOOKS - 1, BAD_LOOKS)] == [False, True]
    assert [is_stuck(looks, 20.0) for looks in (BAD_LOOKS, 19, 20)] == [False, False, True]
