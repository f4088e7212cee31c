"""Histograms, and the page that Prometheus reads, judged by Prometheus's own parser."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.api.exposition import exposition
from edge_runtime.config import EdgeConfig
from edge_runtime.inference.prover import Prover
from edge_runtime.metrics import Histogram, Page, metric_name
from edge_runtime.runtime import Runtime

parser = pytest.importorskip("prometheus_client.parser")

STATUS: dict[str, Any] = {
    "device": "EWR",
    "epoch": 3,
    "counters": {"predictions": 7, "swaps": 2},
    "predict_us": {"p50": 1.5},
    "log": {"commits": 5, "pending": 1, "failing": 0},
    "http": {"requests": 9, "open": 2},
    "families": {
        'a "quoted\\ name\n': {
            "plan_seq": 4,
            "arms": [{"arm": "stable", "release": "r1", "since_s": 5.0}],
            "swaps": 1,
            "windows": {"keys": 11},
        },
        "b": {"plan_seq": 0, "arms": [], "swaps": 0},
    },
}


def parsed(text: str) -> dict[str, Any]:
    """Metrics by name; the parser merges a counter's `_total` into its name."""
    metrics = list(parser.text_string_to_metric_families(text))
    names = [metric.name for metric in metrics]
    assert len(set(names)) == len(names)
    return {metric.name: metric for metric in metrics}


def values(metric: Any) -> dict[tuple[str, ...], float]:
    return {tuple(sample.labels.values()): sample.value for sample in metric.samples}


def test_a_histogram_shows_how_many_values_lie_below_each_edge() -> None:
    histogram = Histogram()
    for value_us in (0.5, 3.0, 40.0, 40.0, 5000.0):
        histogram.record(value_us)

    page = Page()
    page.histogram("edge_predict_seconds", histogram)
    metric = parsed(page.text())["edge_predict_seconds"]

    assert metric.type == "histogram"
    buckets = {float(s.labels["le"]): s.value for s in metric.samples if "le" in s.labels}
    edges = list(buckets)
    assert edges == sorted(edges)
    assert (len(edges) <= 30, edges[0] <= 2e-6, edges[-2] > 10, edges[-1]) == (
        *(True, True, True),
        math.inf,
    )
    for edge, below in buckets.items():
        assert below == sum(value / 1e6 <= edge for value in (0.5, 3.0, 40.0, 40.0, 5000.0))
    by_name = {s.name.rpartition("_")[2]: s.value for s in metric.samples if "le" not in s.labels}
    assert by_name["count"] == 5
    assert by_name["sum"] == pytest.approx(5083.5e-6, rel=0.03)


def test_an_empty_histogram_is_all_zero() -> None:
    page = Page()
    page.histogram("edge_infer_seconds", Histogram())

    assert {sample.value for sample in parsed(page.text())["edge_infer_seconds"].samples} == {0.0}


def test_samples_of_one_name_stand_together_in_whatever_order_they_come() -> None:
    page = Page()
    page.gauge("edge_a", 1, {"family": "x"})
    page.counter("edge_b", 2)
    page.gauge("edge_a", 3, {"family": "y"})

    assert page.text().splitlines() == [
        "# TYPE edge_a gauge",
        'edge_a{family="x"} 1',
        'edge_a{family="y"} 3',
        "# TYPE edge_b_total counter",
        "edge_b_total 2",
    ]


@pytest.mark.parametrize("text", ['"', "\\", "\n", "\\n", 'a"b\\c\nd', "é", ""])
def test_any_text_may_be_the_value_of_a_label(text: str) -> None:
    page = Page()
    page.gauge("edge_a", 1, {"family": text})

    assert values(parsed(page.text())["edge_a"]) == {(text,): 1.0}


def test_a_name_is_made_of_what_prometheus_takes() -> None:
    assert metric_name("edge", "a-b.c") == "edge_a_b_c"


def test_every_number_of_the_status_is_on_the_page() -> None:
    histogram = Histogram()
    histogram.record(12.0)

    page = parsed(exposition(STATUS, {"predict": histogram}))

    quoted = 'a "quoted\\ name\n'
    assert page["edge_predict_seconds"].type == "histogram"
    assert (page["edge_predictions"].type, values(page["edge_predictions"])) == (
        "counter",
        {(): 7.0},
    )
    assert values(page["edge_epoch"]) == {(): 3.0}
    assert (page["edge_log_pending"].type, page["edge_log_commits"].type) == ("gauge", "counter")
    assert values(page["edge_http_requests"]) == {(): 9.0}
    assert values(page["edge_family_swaps"]) == {(quoted,): 1.0, ("b",): 0.0}
    assert values(page["edge_family_windows_keys"]) == {(quoted,): 11.0}
    assert page["edge_release_info"].samples[0].labels == {
        "family": quoted,
        "arm": "stable",
        "release": "r1",
    }
    assert values(page["process_resident_memory_bytes"])[()] > 1 << 20


def test_what_only_rises_is_a_counter_and_what_may_fall_is_a_gauge(tmp_path: Path) -> None:
    config = EdgeConfig(
        device="EWR", families=["toy"], state_dir=tmp_path / "state", socket=tmp_path / "edge.sock"
    )
    agent = {"checks": 3, "applied": 1, "refused_bad_plan": 1}
    windows = {"keys": 1, "entries": 1, "keys_evicted": 0, "entries_evicted": 0}
    with Runtime.open(config) as runtime:
        withheld = {"toy": {"sent": 3, "sampled_out": 1, "bytes_today": 900}}
        parts = {"prover": Prover().statistics(), "agent": agent, "withheld": withheld}
        status = runtime.statistics() | parts
        status["families"]["toy"] |= windows | {"arms": [{"run_us": 5.0, "since_s": 1.0}]}
        page = parsed(exposition(status, {}))

    kinds = {name: metric.type for name, metric in page.items()}
    rising = {
        *("edge_agent_applied", "edge_agent_checks", "edge_agent_refused_bad_plan"),
        *("edge_family_labels_forgotten", "edge_family_late_events", "edge_family_run_failures"),
        *("edge_family_swaps", "edge_infers", "edge_log_commits", "edge_log_cut_bytes"),
        *("edge_log_event_appended", "edge_log_event_durable", "edge_log_sync_errors"),
        *("edge_predictions", "edge_prover_proofs", "edge_prover_starts", "edge_requests_dropped"),
        *("edge_shelf_pruned", "edge_snapshots_written", "edge_worker_overloaded"),
        *("edge_withheld_sampled_out", "edge_withheld_sent"),
    }
    falling = {
        *("edge_epoch", "edge_family_draining", "edge_family_entries", "edge_family_keys"),
        *("edge_family_keys_evicted", "edge_family_leases", "edge_family_plan_seq"),
        *("edge_log_bytes", "edge_log_event_segments", "edge_log_failing", "edge_log_linger_ms"),
        *("edge_log_pending", "edge_log_pending_bytes", "edge_predict_us_p99"),
        *("edge_prover_children", "edge_snapshots_seq", "edge_worker_waiting"),
        "edge_withheld_bytes_today",
    }
    assert {name for name in rising if kinds[name] != "counter"} == set()
    assert {name for name in falling if kinds[name] != "gauge"} == set()
    assert [sample.labels for sample in page["edge_withheld_sent"].samples] == [{"family": "toy"}]
