"""The freshness experiment on a stream whose truth turns slowly: what must be found is found."""

from __future__ import annotations

import csv
import json
import math
import types
from xml.etree import ElementTree as ET

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from cloud_learner.cli import main
from cloud_learner.console.freshness_figure import freshness_figure, short, spoken, take_away
from cloud_learner.console.freshness_table import table
from cloud_learner.experiment.freshness import freshness
from cloud_learner.experiment.report import Options
from edge_runtime.errors import ConfigError

HOUR_S, DAY_S = 3600.0, 86_400.0
FAMILY = """
name = "compass"
[events.asked]
predicts = true
fields = { x = "float", z = "float", y = "float" }
[label]
window_s = 3600.0
[rollout]
selector = { site = "a" }
[learning]
batch_size = 24
device_cap = 24
seed = 5
bootstrap_passes = 8
reservoir_rows = 96
contributors = 0
[learning.fast]
window_rows = 48
passes = 4
learning_rate = 0.1
keep = 0.0
[learning.stable]
on = false
[learning.scratch]
learning_rate = 0.1
[learning.student]
replay_rows = 48
passes = 8
learning_rate = 0.1
"""
FEATURES = """
version = 1
[[features]]
name = "x"
field = "x"
bounds = [-9.0, 9.0]
[[features]]
name = "z"
field = "z"
bounds = [-9.0, 9.0]
[[features]]
name = "y_1h"
window = { over = "asked", value = "y", statistic = "mean", span_s = 3600.0 }
"""
NETWORK = """
from torch import nn


def build_teacher(spec, rows):
    network = nn.Linear(spec.size, 1)
    nn.init.constant_(network.weight, 0.1)
    return network


build_student = build_teacher
"""


@pytest.fixture(scope="module", name="compass")
def fixture_compass(tmp_path_factory):
    """A family, and data files of it: the answer lies in a direction that turns with the days."""
    folder = tmp_path_factory.mktemp("compass")
    for name, text in (("family", FAMILY), ("features", FEATURES)):
        (folder / f"{name}.toml").write_text(text)
    (folder / "network.py").write_text(NETWORK)

    def write(name, *, days=40, turns=0.6, every_s=HOUR_S / 2, tilt=0.0):
        random = np.random.default_rng(6)
        path = folder.parent / f"{folder.name}-{name}.csv"
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["event_time", "x", "z", "y", "label", "label_time"])
            for time_s in np.arange(0, days * DAY_S, every_s):
                x, z, y = random.normal(size=3).round(6).tolist()
                angle = 2 * math.pi * turns * time_s / (days * DAY_S)
                chance = 1 / (1 + math.exp(-3 * (x * math.cos(angle) + z * math.sin(angle)) - tilt))
                known = _utc(time_s + 600)
                rows.writerow([_utc(time_s), x, z, y, float(random.random() < chance), known])
        return path

    return types.SimpleNamespace(folder=folder, write=write)


def _utc(time_s):
    return np.datetime64(int(1.7e9 + time_s), "s").astype(str) + "Z"


def options(cadence="never,10d,1d,12h", policy="incremental", offsets=2, seeds=1):
    return Options.of(cadence, policy, offsets, seeds)


@pytest.fixture(scope="module", name="found")
def fixture_found(compass, tmp_path_factory):
    """One experiment, in this process."""
    out = tmp_path_factory.mktemp("out")
    told = []
    data = compass.write("turning")
    chosen = options(policy="incremental,fast,scratch:5d")
    report = freshness(compass.folder, data, chosen, out, tell=told.append, workers=1)
    return types.SimpleNamespace(report=report, out=out, told=told, data=data)


def lines(report, policy="incremental"):
    return {line.cadence: line for line in report.lines if line.policy == policy}


@pytest.mark.parametrize("policy", ["incremental", "fast", "scratch:5d"])
def test_where_the_truth_turns_fresher_is_better_and_it_is_sure(found, policy):
    by = lines(found.report, policy)

    assert by["never"].loss > by["10d"].loss > by["1d"].loss, by
    assert by["10d"].over_fastest.low > 0
    assert by["1d"].over_slower.high < 0
    assert by["1d"].quality > by["never"].quality
    assert [name for name, line in by.items() if line.is_knee] in (["1d"], ["12h"])


def test_newer_data_explain_it_and_at_shuffled_times_they_are_worth_nothing(found):
    real, control = found.report.newer_data, found.report.control

    assert real.recency.low > 0.1
    assert control.recency.covers_zero, control
    assert found.report.control_is_clean


def test_costs_are_of_what_was_shipped_and_every_pass_counts(found):
    by, scratch = lines(found.report), lines(found.report, "scratch:5d")
    batches = found.report.micro_batches

    assert (by["never"].updates, by["never"].sample_passes, by["never"].bytes_shipped) == (0, 0, 0)
    assert 2 <= by["10d"].updates <= 4
    assert by["12h"].updates <= batches
    assert by["1d"].bytes_shipped == by["1d"].updates * found.report.package_bytes > 0
    # From scratch every day on five days is about five times what learning on costs fast alone.
    once = lines(found.report, "fast")["1d"].sample_passes
    assert 3 < scratch["1d"].sample_passes / once < 7
    assert scratch["1d"].sample_passes > scratch["10d"].sample_passes
    assert scratch["1d"].cpu_s > 0


def test_a_step_has_its_price_where_it_brings_something(found):
    _, step, last = [step for step in found.report.steps if step.policy == "incremental"]

    assert (step.slower, step.faster, step.is_sure) == ("10d", "1d", True)
    assert step.gain_percent > 5
    by = lines(found.report)
    more = by["1d"].bytes_shipped - by["10d"].bytes_shipped
    assert step.bytes_per_percent == pytest.approx(more / found.report.days / step.gain_percent)
    assert (last.slower, last.faster) == ("1d", "12h")
    assert last.is_sure == (last.bytes_per_percent is not None)


def test_models_are_compared_with_data(found):
    by = {(line.model, line.cadence): line.loss for line in found.report.grid}

    assert {model for model, _ in by} == {"without windows", "student", "teacher"}
    assert by["teacher", "1d"] < by["teacher", "never"]
    assert by["without windows", "1d"] < by["student", "never"]  # data beat the model here


def test_persistence_and_majority_stand_beside(found):
    beside = found.report.baselines

    assert beside["majority"].loss == pytest.approx(1.0, abs=0.02)
    assert beside["majority"].quality == 0.5
    assert math.isnan(beside["persistence"].loss)
    assert 0.4 < beside["persistence"].accuracy < 0.6
    by = lines(found.report)
    persisting = beside["persistence"].accuracy
    expected = (by["1d"].accuracy - persisting) / (1 - persisting)
    assert by["1d"].kappa == pytest.approx(expected)


def test_the_files_say_what_was_found_and_from_what(found):
    written = json.loads((found.out / "freshness.json").read_bytes())
    rows = list(csv.DictReader((found.out / "freshness.csv").read_text().splitlines()))

    assert [len(written[key]) for key in ("data_sha256", "family_sha256")] == [64, 64]
    assert written["seeds"] == [5]
    assert {"version", "sha256"} == written["code"].keys()
    assert {"processors", "python", "torch"} <= written["machine"].keys()
    assert len(rows) == 3 * 4 + 2 * 4 + 2
    assert float(rows[0]["loss"]) == pytest.approx(written["lines"][0]["loss"])
    assert not any("cpu" in name or "wall" in name for name in rows[0])
    assert sorted(path.name for path in found.out.iterdir()) == [
        "freshness.csv",
        "freshness.json",
        "freshness.svg",
    ]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_file_gives_the_same_bytes_in_one_process_or_two(compass, tmp_path, workers):
    data = compass.write("short", days=6, every_s=HOUR_S / 10)
    chosen = options("never,1d", "fast")
    for name, count in (("one", 1), ("again", workers)):
        out = tmp_path / name
        freshness(compass.folder, data, chosen, out, tell=lambda _: None, workers=count)

    for name in ("freshness.csv", "freshness.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_picture_is_whole_and_says_what_to_do(found):
    text = freshness_figure(found.report)
    root = ET.fromstring(text)
    words = " ".join(root.itertext())

    assert take_away(list(lines(found.report).values())) in words
    for policy in ("incremental", "fast", "scratch:5d"):
        assert policy in words
    assert "none, as it must be" in words
    assert "nan" not in text


def line(found, cadence, loss, *, is_knee=False):
    some = lines(found.report)["1d"]
    every_s = math.inf if cadence == "never" else 1.0
    return msgspec.structs.replace(
        some, cadence=cadence, every_s=every_s, loss=loss, is_knee=is_knee
    )


def test_the_take_away_follows_the_knee(found):
    def said(knee):
        some = [("never", 0.8), ("7d", 0.6), ("1h", 0.5)]
        return take_away([line(found, name, loss, is_knee=name == knee) for name, loss in some])

    assert said("never") == "Fresher brings nothing here: never is as good as every hour"
    assert said("7d") == (
        "Every 7 days is enough: 25.0 % less error than never; faster is no better"
    )
    assert said("1h") == "The fresher, the better, up to every hour: 37.5 % less error than never"


def test_numbers_and_cadences_are_for_people(found):
    assert [short(each) for each in (0, 950, 1234, 25_000_000)] == ["0", "950", "1.23 k", "25 M"]
    assert [spoken(line(found, name, 1.0)) for name in ("never", "1d", "5m")] == [
        "never",
        "every day",
        "every 5 minutes",
    ]


def test_the_table_names_the_knee_and_what_it_takes(found):
    text = table(found.report)

    assert text.count("<- enough") == 3
    assert "models against data" in text
    assert "at shuffled times" in text
    assert "clean" in text
    assert max(map(len, text.splitlines()[:14])) <= 110


BAD = {
    "too little": ({"days": 2, "every_s": HOUR_S}, "never,1h", "too_few_rows"),
    "a cadence that does not fit": ({"days": 30}, "never,30d,1d", "bad_cadence"),
    "one class": ({"days": 30, "tilt": 99.0}, "never,1d", "one_class"),
}


def test_an_experiment_whose_control_found_something_gives_no_advice(found):
    shown = table(msgspec.structs.replace(found.report, control_is_clean=False))

    assert "NOT CLEAN" in shown
    assert "<- enough" not in shown
    assert not any(sentence in shown for sentence in found.report.sentences)
    assert found.report.sentences


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(compass, tmp_path, case):
    shape, cadence, code = BAD[case]
    data = compass.write(case.split()[0], **shape)

    with pytest.raises(ConfigError) as caught:
        freshness(
            compass.folder, data, options(cadence), tmp_path / "out", tell=lambda _: None, workers=1
        )

    assert caught.value.code == code
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_left_alone(compass, found, tmp_path):
    (tmp_path / "out").write_text("mine")

    with pytest.raises(ConfigError, match="is a file; it is unchanged"):
        freshness(compass.folder, found.data, options(), tmp_path / "out", tell=lambda _: None)

    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "hourly", "scratch", "scratch:7", "fast,fast"])
def test_what_is_no_policy_is_refused(text):
    with pytest.raises(ConfigError) as caught:
        options(policy=text)

    assert caught.value.code == "bad_policy"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cadence", "1d,7x"], "'7x' is no span of time"),
        (["--policy", "scratch"], "is no span of time"),
        (["--seeds", "0"], "0 is not in the range"),
    ],
)
def test_a_wrong_option_is_told_and_is_usage(compass, found, tmp_path, arguments, said):
    out = tmp_path / "out"
    given = ["freshness", str(compass.folder), str(found.data), *arguments, "--out", str(out)]

    done = CliRunner().invoke(main, given, catch_exceptions=False)

    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr
    assert not out.exists()
