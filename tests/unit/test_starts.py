"""Starts that did not end well: what is left for them, and what never is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.config import EdgeConfig
from edge_runtime.device.starts import STARTS_MAX, Starts
from edge_runtime.rollout.plan import Plan, PlanArm, model_path
from edge_runtime.update.shelf import Shelf


@pytest.fixture
def config(tmp_path: Path) -> EdgeConfig:
    return EdgeConfig(
        device="EWR",
        families=["toy", "other"],
        state_dir=tmp_path / "state",
        socket=tmp_path / "edge.sock",
        attributes={"site": "a"},
    )


@pytest.fixture
def start(config: EdgeConfig) -> Callable[..., Starts]:
    """`start()` is a start that dies; `start(well=True)` one that goes well."""

    def begin(*, well: bool = False) -> Starts:
        starts = Starts(config)
        starts.begin()
        if well:
            starts.well()
        starts.close()
        return starts

    return begin


def sha256(release: str) -> str:
    return release[1] * 64


def arm(release: str) -> PlanArm:
    return PlanArm(release, model_path("toy", release), sha256(release), 1, 1.0)


def follow(config: EdgeConfig, seq: int, stable: str, canary: str = "", **selector: str) -> None:
    trial = arm(canary) if canary else None
    plan = Plan(family="toy", seq=seq, stable=arm(stable), canary=trial, selector=selector)
    Shelf(config.state_dir / "shelf").save_current(plan)


def left(config: EdgeConfig) -> dict[str, str]:
    return Shelf(config.state_dir / "shelf").quarantined()


def test_after_too_many_starts_the_newest_release_is_left_and_the_last_never(config, start) -> None:
    follow(config, 1, "r1")
    follow(config, 2, "r2")
    for _ in range(STARTS_MAX):
        assert start().statistics()["releases_left"] == 0
        assert left(config) == {}
    assert start().statistics() == {"starts": 1, "releases_left": 1}
    assert left(config) == {sha256("r2"): "crash_loop"}
    for _ in range(3 * STARTS_MAX):
        assert start().statistics()["releases_left"] == 0
    assert set(left(config)) == {sha256("r2")}


def test_a_start_that_goes_well_makes_those_before_it_count_no_more(config, start) -> None:
    follow(config, 1, "r1")
    follow(config, 2, "r2")
    for turn in range(4 * STARTS_MAX):
        start(well=turn % STARTS_MAX == STARTS_MAX - 1)
    assert left(config) == {}


@pytest.mark.parametrize(("site", "first"), [("a", "r3"), ("b", "r2")])
def test_a_canary_that_this_device_tries_is_left_first(config, start, site, first) -> None:
    follow(config, 1, "r1")
    follow(config, 2, "r2", "r3", site=site)
    for _ in range(STARTS_MAX + 1):
        start()
    assert set(left(config)) == {sha256(first)}
    for _ in range(STARTS_MAX):
        start()
    assert set(left(config)) == {sha256(first), sha256("r2")}


def test_a_second_process_counts_for_nothing(config) -> None:
    first = Starts(config)
    first.begin()
    for _ in range(2 * STARTS_MAX):
        second = Starts(config)
        second.begin()
        second.well()
        second.close()
    assert json.loads((config.state_dir / "starts.json").read_text())["starts"] == 1


@pytest.mark.parametrize("data", [b"", b"{}", b"\x00" * 9, b'{"version":1,"starts":-7}'])
def test_a_count_that_cannot_be_read_begins_anew(config, start, data) -> None:
    start()
    (config.state_dir / "starts.json").write_bytes(data)
    assert start().statistics()["starts"] == 1


def test_where_nothing_can_be_written_nothing_is_counted(config, start) -> None:
    config.state_dir.write_bytes(b"")
    assert start().statistics() == {"starts": 0, "releases_left": 0}
