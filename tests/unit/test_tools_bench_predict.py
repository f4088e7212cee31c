"""tools/bench-predict: its stream suits the package, and its rows say what was missed."""

from __future__ import annotations

import importlib.util
from importlib.machinery import SourceFileLoader
from itertools import pairwise
from pathlib import Path

import pytest

from edge_runtime import factory

TOOL = Path(__file__).parents[2] / "tools" / "bench-predict"


@pytest.fixture(scope="module")
def bench():
    loader = SourceFileLoader("bench_predict", str(TOOL))
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader("bench_predict", loader)
    )
    loader.exec_module(module)
    return module


def test_the_stream_is_seeded_valid_and_rises_in_time(bench, write_package):
    info = factory.inspect(write_package()[0])
    events = list(bench.stream(info, 50, seed=3))
    assert events == list(bench.stream(info, 50, seed=3))
    assert events != list(bench.stream(info, 50, seed=4))
    assert sum(event.kind == "scheduled" for event in events) == 50
    assert all(before.time_s < after.time_s for before, after in pairwise(events))
    for event in events:
        info.interface.check(event.kind, event.time_s, event.fields)


def test_a_row_is_judged_only_where_there_is_something_to_reach(bench):
    assert bench.row("p50", 150.004, "µs", 150) == {
        "what": "p50",
        "value": 150.0,
        "unit": "µs",
        "reach": 150,
        "ok": False,
    }
    assert bench.row("p50", 149.0, "µs", 150)["ok"] is True
    assert bench.row("ratio", 9.0, "times")["ok"] is None


def test_the_table_names_what_was_missed(bench):
    rows = [bench.row("a", 2.0, "µs", 1), bench.row("b", 1.0, "µs", 1), bench.row("c", 1.0, "µs")]
    assert [line.endswith("missed") for line in bench.table(rows).splitlines()] == [
        *(False, True, False, False)
    ]
