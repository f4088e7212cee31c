"""Sketches: what models are given, summed up from the log, exact in what they count."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig
from edge_runtime.device.sketching import EVERY_S, RECORDS_MAX, ROWS_MIN
from edge_runtime.features.feature import Column
from edge_runtime.features.histogram import Histograms, buckets_of, counts_of
from edge_runtime.inference.slot import load_arm
from edge_runtime.runtime import Event, Runtime
from edge_runtime.wire import codec
from edge_runtime.wire.messages import ColumnSketch

NUMBER, INDEX = Column("x", 0), Column("carrier", 4)


def bucket_by_the_words(x: float) -> int:
    """As proto/ says it, one number at a time."""
    if abs(x) < 2**-10:
        return 0
    e = int(np.floor(np.log2(abs(x))))
    return int(np.sign(x)) * (4 * (e + 10) + int(np.floor(4 * (abs(x) / 2.0**e - 1))) + 1)


def test_a_number_lies_in_the_bucket_that_the_contract_names():
    random = np.random.default_rng(1)
    values = (random.normal(size=3000) * 10.0 ** random.integers(-6, 30, 3000)).astype("f4")
    edges = np.array([0, -0.0, 2**-10, 1, -1, 1.25, 2, 3e38, -3e38, 1e-45, 9.7e-4], "f4")
    values = np.concatenate([values, edges, -edges])

    found = buckets_of(values, NUMBER)

    assert [bucket_by_the_words(float(x)) for x in values] == found.tolist()
    assert (np.diff(found[np.argsort(values, kind="stable")]) >= 0).all()


def test_an_index_lies_in_the_bucket_of_its_number_and_the_unknown_word_is_0():
    assert buckets_of(np.array([0, 3, 1], "f4"), INDEX).tolist() == [0, 3, 1]
    odd = np.array([-1, np.nan, 1e30, np.inf], "f4")
    assert buckets_of(odd, INDEX).tolist() == [0, 0, 1 << 24, 1 << 24]


def test_histograms_of_parts_add_up_to_that_of_the_whole_and_travel_unchanged():
    random = np.random.default_rng(2)
    rows = np.stack([random.normal(size=900), random.integers(0, 4, 900)], 1).astype("f4")
    whole, parts = Histograms([NUMBER, INDEX]), Histograms([NUMBER, INDEX])
    whole.add(rows)
    for part in np.array_split(rows, 7):
        parts.add(part)

    assert whole.counts == parts.counts
    assert [counts_of(each, 900) for each in whole.sketches()] == whole.counts
    assert [each.name for each in whole.sketches()] == ["x", "carrier"]


@pytest.mark.parametrize(
    ("steps", "counts"),
    [([1, 2], [3]), ([1, 0], [1, 2]), ([1], [4]), ([1, 1], [-1, 4]), ([1 << 25], [3])],
)
def test_what_cannot_be_a_sketch_of_three_rows_is_refused(steps, counts):
    with pytest.raises(ValueError, match="'x'"):
        counts_of(ColumnSketch("x", steps, counts), 3)


class Device:
    """A real runtime with a log on disk, played by hand."""

    def __init__(self, runtime: Runtime, clock: ManualClock) -> None:
        self.runtime, self.clock = runtime, clock
        self.asked: list[list[float]] = []

    def ask(self, count: int, spread: float = 1.0) -> None:
        """So many predictions, made durable."""
        for _ in range(count):
            at = len(self.asked)
            fields = {"carrier": ["UA", "AA", "??"][at % 3], "distance": 100.0 + spread * at}
            self.runtime.predict("toy", Event("scheduled", 1.36e9 + at, fields))
            self.asked.append([at % 3, 100.0 + spread * at])
        self.sync()

    def sync(self) -> None:
        while self.runtime.log.statistics()["pending"]:
            pass

    def look(self):
        return self.runtime.sketcher.look()


@pytest.fixture
def device(tmp_path, write_package):
    clock = ManualClock(1.36e9)
    config = EdgeConfig(
        device="EWR",
        families=["toy"],
        state_dir=tmp_path / "state",
        socket=tmp_path / "edge.sock",
    )
    path, sha256 = write_package()
    with Runtime.open(config, clock=clock) as runtime:
        runtime.swap("toy", [load_arm(path, sha256, "r1", "stable", 1.0)], None)
        yield Device(runtime, clock)


def test_a_sketch_comes_once_a_minute_of_rows_enough_and_is_told_once(device):
    for _ in range(20):
        device.ask(RECORDS_MAX)
        assert device.look() == []
    device.clock.advance(EVERY_S)
    [sketch] = device.look()

    assert (sketch.family, sketch.rows) == ("toy", 20 * RECORDS_MAX)
    assert sketch.until_s == 1.36e9 + 20 * RECORDS_MAX - 1
    columns = {each.name: counts_of(each, sketch.rows) for each in sketch.columns}
    distances = np.array([row[1] for row in device.asked], "f4")
    buckets, counts = np.unique(buckets_of(distances, NUMBER), return_counts=True)
    assert columns["distance"] == dict(zip(buckets.tolist(), counts.tolist(), strict=True))
    assert columns["carrier"][0] == sum(row[0] == 2 for row in device.asked)
    device.clock.advance(EVERY_S)
    assert device.look() == []


def test_too_few_rows_wait_for_more(device):
    device.ask(RECORDS_MAX)
    device.look()
    device.clock.advance(EVERY_S)
    assert device.look() == []
    for _ in range(ROWS_MIN // RECORDS_MAX):
        device.ask(RECORDS_MAX)
        device.look()
    device.clock.advance(EVERY_S)

    assert [each.rows for each in device.look()] == [RECORDS_MAX * (1 + ROWS_MIN // RECORDS_MAX)]


def test_a_flood_costs_no_more_than_a_look_may(device):
    device.ask(20 * RECORDS_MAX)
    device.look()

    assert device.runtime.sketcher.statistics()["sketched_rows"] == RECORDS_MAX


def test_a_sketch_takes_a_few_bytes_for_each_bucket(device):
    for _ in range(32):
        device.ask(RECORDS_MAX, spread=3.7)
        device.look()
    device.clock.advance(EVERY_S)
    [sketch] = device.look()

    size, buckets = len(codec.encode(sketch)), sum(len(each.counts) for each in sketch.columns)
    print(f"{size} bytes for {buckets} buckets of {len(sketch.columns)} columns")
    assert size < 60 + sum(len(each.name) + 8 for each in sketch.columns) + 4 * buckets
