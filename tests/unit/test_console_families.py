"""The table of families: which one stands still, and why."""

from __future__ import annotations

from cloud_learner.console.families import table, text


def said(*, failure: str = "", resting: int = 0, canary: str | None = None) -> dict:
    counters = {"cycles": 1234, "batches_waiting": 2, "micro_batches_failed": 1}
    arm = {"release": canary, "devices": []} if canary else None
    rollout = {"stage": "canary", "stable": {"release": "r00001-aa"}, "canary": arm}
    return {
        "clock_s": 1.36e9,
        "failure": failure,
        "counters": {**counters, "resting": resting},
        "rollout": rollout,
    }


def test_each_family_has_a_line_and_each_failure_one_more():
    lines = table(
        {
            "dice": said(failure="batch 7: no", resting=1),
            "coin": said(canary="r00002-bb"),
        }
    ).splitlines()

    assert lines[1].split() == [
        *("coin", "canary", "r00001-aa", "r00002-bb", "2013-02-04", "17:46", "UTC"),
        *("1,234", "2", "1"),
    ]
    assert lines[2].split()[:4] == ["dice", "rests", "r00001-aa", "-"]
    assert lines[3:] == ["dice: batch 7: no"]


def test_numbers_over_all_families_follow_the_table():
    lines = text({"stage": "idle", "families": {"coin": said()}, "cycles": 9}).splitlines()

    assert [line.split() for line in lines[2:]] == [["stage", "idle"], ["cycles", "9"]]


def test_a_family_that_has_reached_no_time_says_so():
    never = said() | {"clock_s": None}

    assert table({"coin": never}).splitlines()[1].split()[4] == "-"
