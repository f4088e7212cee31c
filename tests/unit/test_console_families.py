"""The table of families: which one stands still, and why."""

from __future__ import annotations

import msgspec

from cloud_learner.console.families import table, text
from cloud_learner.store.examples import Batch, Example


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


def test_what_waits_for_a_gate_is_said():
    waiting = said() | {"gate": {"apart": True, "waits": "nobody answers [no_answer]"}}
    waiting["rollout"] |= {"unpublished": 1, "last_failure": "no signature"}

    assert table({"coin": waiting}).splitlines()[2:] == [
        "coin: gate: nobody answers [no_answer]",
        "coin: not published yet: no signature",
    ]


def test_alarms_that_stand_and_what_is_expected_without_labels_are_said_in_words():
    def alarm(source, kind, name=""):
        facts = {"name": name, "found": 0.4123, "reach": 0.25, "batch": 7, "time_s": 1.36e9}
        return {"source": source, "kind": kind, **facts}

    alarms = [alarm("loss", "gradual"), alarm("sketch", "sudden", "x"), alarm("later", "odd")]
    found = {"measure": "AUC", "rows": 900, "expected": 0.7412, "reached": 0.7634}
    lines = table({"coin": said() | {"alarms": alarms, "expected": found}}).splitlines()

    since = "0.412 beyond 0.25, since 2013-02-04 17:46 UTC"
    assert lines[2:] == [
        f"coin: alarm: the loss rose bit by bit, {since}",
        f"coin: alarm: by what devices tell, feature x changed suddenly, {since}",
        f"coin: alarm: later changed odd, {since}",
        "coin: expected AUC 0.741 without labels, 0.763 reached",
    ]


def test_the_last_micro_batch_says_what_one_device_had_of_it_and_could_have_had():
    examples = [
        Example("ab"[at > 5], 1, at, "coin", 1.0, 1.0, b"", "", 1.0, 1.0, [], 0.0, 0.0)
        for at in range(8)
    ]
    certificate = msgspec.to_builtins(Batch(12, examples).certificate(6))
    lines = table({"coin": said() | {"certificate": certificate}}).splitlines()

    assert lines[2:] == [
        "coin: micro-batch 12: 8 examples of 2 devices; one has 75.0% of them, 75.0% at most"
    ]


def test_what_is_not_expected_yet_has_no_line():
    found = {"measure": "AUC", "rows": 0, "expected": None, "reached": None}

    assert len(table({"coin": said() | {"alarms": [], "expected": found}}).splitlines()) == 2


def test_numbers_over_all_families_follow_the_table():
    lines = text({"stage": "idle", "families": {"coin": said()}, "cycles": 9}).splitlines()

    assert [line.split() for line in lines[2:]] == [["stage", "idle"], ["cycles", "9"]]


def test_a_family_that_has_reached_no_time_says_so():
    never = said() | {"clock_s": None}

    assert table({"coin": never}).splitlines()[1].split()[4] == "-"
