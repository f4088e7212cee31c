"""The report: its keys, its goals, its file, the result table and the picture."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from cloud_learner.console.report import NUMBERS, Report, WorldsAuc, judge, reached, write_report
from cloud_learner.console.result import result_table
from edge_runtime.errors import CapacityError

KEYS = [
    "predictions",
    "elapsed_s",
    "auc",
    "events_answered",
    "events_archived",
    "events_lost_in_linger",
    "learned_twice",
    "freshness_p50_s",
    "freshness_p99_s",
    "swap_failures",
    "predict_p50_us",
    "predict_p99_us",
    "int8_gap_auc",
    "candidates",
    "releases",
    "promoted",
    "micro_batches_skipped",
    "offline_gate_stopped",
    "canary_rolled_back",
    "forged_refused",
    "sigkill_recovered",
]


def report(**values):
    good = {
        "predictions": 100_000,
        "elapsed_s": 93.2,
        "auc": WorldsAuc(0.612, 0.668, 0.740, 0.748),
        "events_answered": 300_002,
        "events_archived": 300_000,
        "events_lost_in_linger": 2,
        "learned_twice": 0,
        "freshness_p50_s": 0.8,
        "freshness_p99_s": 2.3,
        "swap_failures": 0,
        "predict_p50_us": 88.0,
        "predict_p99_us": 640.0,
        "int8_gap_auc": 0.0002,
        "candidates": 190,
        "releases": 20,
        "promoted": 14,
        "micro_batches_skipped": 0,
        "offline_gate_stopped": 1,
        "canary_rolled_back": 1,
        "forged_refused": 2,
        "sigkill_recovered": True,
        "details": {"client_p50_us": 210.0, "client_p99_us": 1400.0, "teacher_gap_auc": 0.001},
    }
    return Report(**{**good, **values})


def missed(given, *, full=False):
    return [line.what.strip() for line in judge(given, full=full) if line.ok is False]


def test_the_file_holds_exactly_the_promised_keys_and_the_details(tmp_path):
    write_report(tmp_path / "demo" / "report.json", report())

    written = json.loads((tmp_path / "demo" / "report.json").read_bytes())
    assert list(written) == [*KEYS, "details"]
    assert list(written["auc"]) == [
        "static_frozen",
        "static_continual",
        "windows_frozen",
        "windows_continual",
    ]


def test_a_number_that_was_not_measured_is_null_in_the_file_and_reaches_nothing(tmp_path):
    unmeasured = report(freshness_p99_s=math.nan, details={})
    write_report(tmp_path / "report.json", unmeasured)

    assert json.loads((tmp_path / "report.json").read_bytes())["freshness_p99_s"] is None
    assert len(missed(unmeasured)) == 4
    assert len([line for line in judge(unmeasured) if line.value == "not measured"]) == 4


def test_a_report_that_cannot_be_written_is_said_in_our_words(tmp_path):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(CapacityError, match=r"report\.json was not written"):
        write_report(tmp_path / "file" / "report.json", report())


def test_a_good_run_reaches_every_goal():
    assert missed(report()) == []
    assert reached(judge(report()))


@pytest.mark.parametrize(
    "bad",
    [
        {"predictions": 99_999},
        {"elapsed_s": 120.1},
        {"auc": WorldsAuc(0.6, 0.6, 0.7, 0.7449)},
        {"auc": WorldsAuc(0.6, 0.6, 0.748, 0.748)},
        {"events_archived": 299_999},
        {"events_archived": 300_001},
        {"learned_twice": 1},
        {"freshness_p50_s": 1.51},
        {"freshness_p99_s": 4.01},
        {"swap_failures": 1},
        {"predict_p50_us": 151.0},
        {"predict_p99_us": 1001.0},
        {"int8_gap_auc": 0.0011},
        {"candidates": 59},
        {"releases": 7},
        {"promoted": 4},
        {"offline_gate_stopped": 0},
        {"canary_rolled_back": 0},
        {"forged_refused": 1},
        {"sigkill_recovered": False},
    ],
)
def test_a_goal_missed_by_a_little_is_missed(bad):
    given = report(**bad)

    assert len(missed(given)) == 1
    assert not reached(judge(given))


def test_the_whole_year_has_goals_of_its_own():
    year = report(predictions=336_776, elapsed_s=400.0, auc=WorldsAuc(0.618, 0.675, 0.757, 0.7765))

    assert missed(year, full=True) == []
    assert missed(report(auc=year.auc), full=True) == ["real predictions"]
    assert missed(
        msgspec.structs.replace(year, auc=WorldsAuc(0.64, 0.675, 0.760, 0.7735)), full=True
    ) == ["over windows + frozen", "over static + frozen"]


def test_every_number_stands_on_a_key_that_the_report_has():
    names = set(msgspec.to_builtins(report())) - {"details"}

    assert {number.key.split(".")[0] for number in NUMBERS} >= names - {"events_archived"}


def printed(lines):
    console = Console(file=io.StringIO(), width=80)
    table = result_table(
        lines,
        report=Path("var/demo/report.json"),
        picture=Path("var/demo/report.svg"),
        next_steps=["make demo ARGS=--full"],
    )
    console.print(table)
    return console.file.getvalue()


def test_the_result_says_in_words_what_was_missed_and_where_to_go_on():
    text = printed(judge(report(elapsed_s=130.0)))

    row = next(line for line in text.splitlines() if line.startswith("live part"))
    assert row.split() == ["live", "part", "130.0", "s", "at", "most", "120.0", "s", "MISSED"]
    goals = sum(number.default is not None for number in NUMBERS)
    assert f"1 of {goals} goals MISSED" in text
    assert text.rstrip().endswith("make demo ARGS=--full")
    assert "var/demo/report.json" in text
    assert "var/demo/report.svg" in text


def test_the_result_keeps_a_line_for_each_number_in_80_columns():
    lines = printed(judge(report())).splitlines()

    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if line.rstrip().endswith("ok")]) == sum(
        number.default is not None for number in NUMBERS
    )
    assert "all" in "".join(lines)
