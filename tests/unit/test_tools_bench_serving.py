"""tools/bench-serving: its model is what it says, its probes are right, its rows judge rightly."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edge_runtime import factory

TOOLS = Path(__file__).parents[2] / "tools"
PARTS = ("client", "model", "probes", "rows", "server", "swaps")

# The first column of the table of promises.
LINES = (
    "in-process `infer`, hot, p50",
    "in-process `predict` with 12 windowed features and the log append, hot, p50 / p99",
    "the same, paced",
    "Unix socket round trip of `infer`, hot, p50",
    "HTTP Open Inference JSON, hot, p50, raw client",
    "throughput, Unix socket pipelined: `infer` / `predict` with 12 windows and the log append",
    "100 swaps under load",
    "RSS of the daemon, one small model, all rooms loaded",
    "cold start to ready",
    "CPU at 100 paced events/s",
)


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    sys.path.insert(0, str(TOOLS))
    names = {part: f"bench_serving_{part}" for part in PARTS}
    yield SimpleNamespace(**{part: importlib.import_module(name) for part, name in names.items()})
    sys.path.remove(str(TOOLS))
    for name in names.values():
        del sys.modules[name]


@pytest.fixture(scope="module")
def package(bench, tmp_path_factory) -> Path:
    return bench.model.write_package(tmp_path_factory.mktemp("model") / "bench.onnx")


def test_the_model_has_32_inputs_of_which_12_are_windows(bench, package):
    info = factory.inspect(package)

    assert info.spec.size == 32
    assert sum(feature.window is not None for feature in info.spec.features) == 12


def test_the_events_are_seeded_valid_and_rise_in_time(bench, package):
    interface = factory.inspect(package).interface
    events, again = (
        [*stream.questions(50), *stream.observations(50), *stream.questions(1)]
        for stream in (bench.model.Stream(), bench.model.Stream())
    )

    assert events == again
    assert [interface.kinds[event.kind].predicts for event in events] == [True] * 50 + [
        *([False] * 50),
        True,
    ]
    assert all(before.time_s < after.time_s for before, after in pairwise(events))
    for event in events:
        interface.check(event.kind, event.time_s, event.fields)


def test_answers_of_packages_that_lean_apart_cannot_be_taken_for_each_other(bench, tmp_path):
    x = bench.model.rows(64)
    low, high = (
        bench.probes.Floor(bench.model.write_package(tmp_path / f"{name}.onnx", lean)).run(x)
        for name, lean in bench.swaps.LEANS.items()
    )

    assert low.max() < 0.5 < high.min()


def test_an_answer_is_mixed_when_one_value_is_not_of_the_release_that_it_names(bench):
    def infer(release: str, *values: float) -> bytes:
        data = np.array(values, dtype=np.float32)
        tensor = bench.client.frames.RawTensor("probability", "FP32", data.shape, data.tobytes())
        return bench.client.frames.frame(bench.client.frames.Inferred(1, release, (tensor,)))

    failed = bench.client.frames.frame(bench.client.frames.Failed(1, "overloaded", "no"))

    assert bench.swaps.verdict(infer("low", 0.1, 0.2)) == "whole"
    assert bench.swaps.verdict(infer("high", 0.9, 0.8)) == "whole"
    assert bench.swaps.verdict(infer("low", 0.1, 0.8)) == "mixed"
    assert bench.swaps.verdict(infer("high", 0.1, 0.2)) == "mixed"
    assert bench.swaps.verdict(failed) == "failed"


def test_the_floor_refuses_an_answer_that_is_not_the_models(bench, package):
    floor = bench.probes.Floor(package)
    floor.check("itself", floor.run(floor.x).tolist())

    with pytest.raises(AssertionError, match="somebody"):
        floor.check("somebody", floor.run(floor.x) + 0.01)


def test_a_server_is_asked_measured_pinned_and_gone_at_the_end(bench, package, tmp_path):
    with bench.server.Started(package, tmp_path) as servers:
        echo, path = servers.echo()
        probes = bench.probes.by_echo(bench.probes.Floor(package), echo, path, 50)
        busy = bench.probes.busy(servers, echo, path, 50)

        assert len(probes["echo"]()) == 45
        assert 0 < busy()[0] < 100
        assert echo.rss_mb() > 1
        with echo.on_core(0):
            assert os.sched_getaffinity(echo.pid) == {0}
        assert os.sched_getaffinity(echo.pid) == os.sched_getaffinity(0)

    assert not Path(f"/proc/{echo.pid}").exists()


def test_the_device_answers_as_the_floor_does_over_every_wire(bench, package, tmp_path):
    floor = bench.probes.Floor(package)
    with bench.server.Started(package, tmp_path) as servers:
        device, path, http = servers.device()
        probes = bench.probes.by_socket(floor, servers, device, path, 20)
        probes |= bench.probes.by_http(floor, device, http, 20)
        found = {name: probe() for name, probe in probes.items()}

    assert all(value > 0 for values in found.values() for value in values)


def test_a_peer_that_is_not_installed_is_left_out_with_what_to_do(bench, package, tmp_path):
    with bench.server.Started(package, tmp_path, peers=tmp_path) as servers:
        probes, skipped = bench.probes.peers(bench.probes.Floor(package), servers, 10)

    assert probes == {}
    assert set(skipped) == {"mosec", "mosec JSON", "mlserver"}
    assert all("make bench-peers" in why for why in skipped.values())


def test_every_line_of_the_table_of_promises_has_rows_to_reach(bench):
    rows = bench.rows.rows(bench.rows.Found())

    for line in LINES:
        assert any(row.what.startswith(line) and row.reach is not None for row in rows), line


def test_what_was_not_measured_has_no_value_and_misses_nothing(bench):
    rows = bench.rows.rows(bench.rows.Found())

    assert {(row.value, row.ok) for row in rows} == {(None, None)}


def test_of_times_the_quietest_round_is_judged_against_the_quietest_floor(bench):
    found = bench.rows.Found()
    for floor, infer in ((5.0, 8.0), (50.0, 90.0), (6.0, 9.0)):  # the second round was disturbed
        found.add("floor", [floor])
        found.add("infer", [infer])
    rows = {row.what: row.plain() for row in bench.rows.rows(found)}

    assert rows["in-process `infer`, hot, p50: p50"] == {
        "what": "in-process `infer`, hot, p50: p50",
        "value": 8.0,
        "unit": "µs",
        "reach": 9.0,
        "ok": True,
    }
    assert rows["in-process `infer`, hot, p50: to the floor"]["value"] == 1.6


def test_some_numbers_must_not_be_lower_than_what_there_is_to_reach(bench):
    assert bench.rows.Row("a", 2.0, "times", 3.0).ok is True
    assert bench.rows.Row("a", 2.0, "times", 3.0, least=True).ok is False
    assert bench.rows.Row("a", 3.0, "times", 3.0, least=True).ok is True
    assert bench.rows.Row("a", 3.0, "times").ok is None


def test_the_table_names_what_was_missed_below_its_line(bench):
    rows = [bench.rows.Row("line: one", 2.0, "µs", 1), bench.rows.Row("line: two", 1.0, "µs", 1)]
    lines = bench.rows.table(rows).splitlines()

    assert lines[2] == "line"
    assert lines[3].split() == ["one", "2.00", "µs", "≤", "1", "missed"]
    assert lines[4].split() == ["two", "1.00", "µs", "≤", "1", "ok"]
