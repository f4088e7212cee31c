"""The picture: rolling AUC against a plain count, and an SVG that says all it shows."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from datetime import UTC, datetime

import numpy as np
import pytest

from cloud_learner.console.figure import (
    DAY_S,
    ReleaseMark,
    Series,
    draw,
    quality_figure,
    rolling_auc,
    take_away,
)
from cloud_learner.stats.scores import auc
from edge_runtime.errors import CapacityError

START_S = datetime(2013, 2, 1, tzinfo=UTC).timestamp()
SVG = "{http://www.w3.org/2000/svg}"


def line(overall, days=60, level=None):
    ends = [START_S + day * DAY_S for day in range(days)]
    return Series(ends, [level or overall] * days, overall)


WORLDS = {
    "static_frozen": line(0.612),
    "static_continual": line(0.668),
    "windows_frozen": line(0.740),
    "windows_continual": line(0.748),
}
RELEASES = [
    ReleaseMark(START_S + 3 * DAY_S, "promoted"),
    ReleaseMark(START_S + 9 * DAY_S, "promoted"),
    ReleaseMark(START_S + 20 * DAY_S, "rolled back"),
]


def texts(svg):
    return [node.text for node in ET.fromstring(svg).iter(f"{SVG}text")]


def test_each_window_is_scored_by_itself_whatever_the_order_of_rows():
    rng = np.random.default_rng(3)
    times = rng.uniform(0, 100, 500)
    labels, scores = rng.integers(0, 2, 500), rng.random(500)

    ends, values = rolling_auc(times, labels, scores, 20, 7)

    assert ends[0] == pytest.approx(times.min() + 20)
    assert np.diff(ends) == pytest.approx(7)
    assert times.max() - 7 < ends[-1] <= times.max()
    for end, value in zip(ends, values, strict=True):
        inside = (times > end - 20) & (times <= end)
        assert value == auc(labels[inside], scores[inside])


def test_a_stream_shorter_than_a_window_is_one_window():
    ends, values = rolling_auc([0.0, 1.0], [0, 1], [0.1, 0.9], 100, 10)

    assert (list(ends), list(values)) == ([1.0], [1.0])


def test_a_window_of_one_class_is_nan_and_no_rows_are_no_windows():
    assert math.isnan(rolling_auc([0.0, 1.0], [1, 1], [0.1, 0.9], 100, 10)[1][0])
    assert [len(part) for part in rolling_auc([], [], [], 100, 10)] == [0, 0]


def test_the_picture_names_every_world_its_auc_and_every_release():
    said = texts(draw(WORLDS, RELEASES))

    for words in (
        "AUC 0.748: Headwater",
        "AUC 0.612: how most companies run",
        "2 promoted",
        "1 rolled back",
        "0 on trial",
        "event time (UTC), 2013",
        "AUC",
    ):
        assert words in said


def test_worlds_and_outcomes_differ_by_more_than_colour():
    root = ET.fromstring(draw(WORLDS, RELEASES))
    dashes = {node.get("stroke-dasharray") for node in root.iter() if node.get("stroke-dasharray")}

    assert len(dashes) == len(WORLDS)


def test_the_picture_has_a_title_a_description_and_its_own_background():
    root = ET.fromstring(draw(WORLDS, RELEASES))

    named = root.get("aria-labelledby").split()
    assert [root.find(f"{SVG}{name}").get("id") for name in named] == named
    assert "windows + continual (headwater) 0.7480" in root.find(f"{SVG}desc").text.lower()
    assert root.find(f"{SVG}rect").get("width") == root.get("width")


def test_the_take_away_lifts_only_when_it_did():
    assert take_away(WORLDS) == "Fresh features and continual learning lift AUC from 0.612 to 0.748"
    lost = {**WORLDS, "windows_frozen": line(0.75)}
    assert "lift" not in take_away(lost)
    assert "0.748" in take_away(lost)


def test_a_gap_in_the_data_is_a_gap_in_the_line():
    broken = Series([START_S + d * DAY_S for d in range(5)], [0.7, 0.71, math.nan, 0.7, 0.7], 0.7)

    svg = draw({"windows_continual": broken}, [])
    paths = [node.get("d") for node in ET.fromstring(svg).iter(f"{SVG}path")]
    assert max(path.count("M") for path in paths) == 2
    assert "nan" not in svg


def test_labels_of_lines_that_end_together_do_not_overlap():
    same = {world: line(0.7) for world in WORLDS}
    root = ET.fromstring(draw(same, []))
    heights = sorted(
        float(node.get("y"))
        for node in root.iter(f"{SVG}text")
        if node.get("class") == "name" and node.text != "Releases"
    )

    assert len(heights) == 4
    assert min(np.diff(heights)) >= 40
    assert heights[0] > 100
    assert heights[-1] < 420


@pytest.mark.parametrize("days", [1, 5, 40, 120, 365])
def test_a_stream_of_any_length_gets_a_few_ticks(days):
    root = ET.fromstring(draw({"windows_continual": line(0.7, days + 1)}, []))
    ticks = [node for node in root.iter(f"{SVG}text") if node.get("class") == "tick mid"]

    assert 2 <= len(ticks) <= 14


@pytest.mark.parametrize("series", [{}, dict.fromkeys(WORLDS, Series([], [], math.nan))])
def test_an_empty_run_still_gives_a_picture(series):
    assert ET.fromstring(draw(series, [])).tag == f"{SVG}svg"


def test_the_same_data_gives_the_same_bytes_in_the_file(tmp_path):
    quality_figure(WORLDS, RELEASES, tmp_path / "a.svg")
    quality_figure(dict(reversed(WORLDS.items())), RELEASES, tmp_path / "b.svg")

    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_picture_that_cannot_be_written_is_said_in_our_words(tmp_path):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(CapacityError, match=r"report\.svg was not written"):
        quality_figure(WORLDS, RELEASES, tmp_path / "file" / "report.svg")
