"""Lineage: what was appended is read, whole, whatever a crash did to the last line."""

from __future__ import annotations

import os
import resource
import signal

import pytest

from cloud_learner.store.lineage import Lineage
from edge_runtime.clock import ManualClock
from edge_runtime.errors import CapacityError, ConfigError


def test_entries_come_back_in_order_with_time_and_facts(tmp_path):
    clock = ManualClock(50.0)
    lineage = Lineage(tmp_path, clock)
    lineage.append("candidate", sha256="aa", parents=["bb"], evidence=None)
    clock.advance(1.0)
    lineage.append("verdict", sha256="aa", passed=False)
    assert list(lineage.read()) == [
        {"kind": "candidate", "time_s": 50.0, "sha256": "aa", "parents": ["bb"], "evidence": None},
        {"kind": "verdict", "time_s": 51.0, "sha256": "aa", "passed": False},
    ]


def test_one_kind_can_be_read_alone(tmp_path):
    lineage = Lineage(tmp_path)
    lineage.append("plan", plan_seq=1)
    lineage.append("release", release="r1")
    lineage.append("plan", plan_seq=2)
    assert [entry["plan_seq"] for entry in lineage.read("plan")] == [1, 2]


def test_a_new_lineage_is_empty(tmp_path):
    assert list(Lineage(tmp_path / "new").read()) == []


def test_a_kind_that_does_not_exist_is_a_defect(tmp_path):
    with pytest.raises(AssertionError):
        Lineage(tmp_path).append("rumour", what="x")


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_line_torn_by_a_crash_is_cut_and_the_rest_stays(tmp_path, kept):
    lineage = Lineage(tmp_path, ManualClock(1.0))
    lineage.append("plan", plan_seq=1)
    size = (tmp_path / "lineage.jsonl").stat().st_size
    lineage.append("plan", plan_seq=2)
    whole = (tmp_path / "lineage.jsonl").stat().st_size
    os.truncate(tmp_path / "lineage.jsonl", size + kept if kept > 0 else whole + kept)
    again = Lineage(tmp_path, ManualClock(2.0))
    again.append("plan", plan_seq=3)
    assert [entry["plan_seq"] for entry in again.read()] == [1, 3]


def test_a_damaged_line_is_named(tmp_path):
    lineage = Lineage(tmp_path)
    lineage.append("plan", plan_seq=1)
    with (tmp_path / "lineage.jsonl").open("ab") as file:
        file.write(b"{garbage\n")
    with pytest.raises(ConfigError) as caught:
        list(lineage.read())
    assert caught.value.code == "lineage_damaged"
    assert "line 2" in caught.value.message


def test_a_full_disk_is_a_named_error_and_keeps_what_stands(tmp_path):
    lineage = Lineage(tmp_path)
    lineage.append("plan", plan_seq=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(CapacityError) as caught:
            lineage.append("plan", note="x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.code == "disk_full"
    lineage.append("plan", plan_seq=2)
    assert [entry["plan_seq"] for entry in lineage.read()] == [1, 2]


def test_a_family_reads_its_own_entries_and_its_name_stands_in_what_it_adds(tmp_path):
    whole = Lineage(tmp_path, ManualClock(1.0))
    coin, dice = whole.of("coin"), whole.of("dice")
    coin.append("release", counter=1)
    dice.append("release", counter=7)
    coin.append("plan", family="coin", plan_seq=2)
    assert [entry["counter"] for entry in coin.read("release")] == [1]
    assert [entry["counter"] for entry in dice.read()] == [7]
    assert [entry["family"] for entry in whole.read()] == ["coin", "dice", "coin"]
