"""HTTP: /edge/v1 and /metrics over a real runtime with a real log, and the server on its socket."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.api.http import HttpServer
from edge_runtime.runtime import Runtime

parser = pytest.importorskip("prometheus_client.parser")

NOW_S = 1_360_000_000.0
SCHEDULED = {
    "kind": "scheduled",
    "time_s": NOW_S,
    "fields": {"carrier": "UA", "distance": 998.0},
}
DEPARTED = {"kind": "departed", "time_s": NOW_S - 60, "fields": {"carrier": "UA", "delay": 3.0}}


@pytest.fixture
def toy(serve: Callable[..., Any], write_package: Callable[..., tuple[Path, str]]) -> Any:
    return serve(write_package()[0])


def test_an_event_is_observed_predicted_and_labelled(toy: Any) -> None:
    assert toy.json("POST", "/edge/v1/observe/toy", DEPARTED) == (200, {"seq": 1})

    status, prediction = toy.json("POST", "/edge/v1/predict/toy", SCHEDULED)

    assert (status, sorted(prediction)) == (200, ["arm", "id", "outputs", "release"])
    assert prediction["id"].endswith(".2")
    assert len(prediction["outputs"]) == 1
    label = {"prediction_id": prediction["id"], "value": 1, "time_s": NOW_S + 60, "final": True}
    assert toy.json("POST", "/edge/v1/label", label) == (200, {"seq": 1})
    counters = toy.json("GET", "/edge/v1/status")[1]["counters"]
    assert [counters[name] for name in ("observations", "predictions", "labels")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("predict/other", SCHEDULED, 404, "unknown_family"),
        ("predict/toy", SCHEDULED | {"kind": "landed"}, 400, "unknown_kind"),
        ("predict/toy", SCHEDULED | {"fields": {"carrier": "UA"}}, 400, "missing_field"),
        (
            "predict/toy",
            SCHEDULED | {"fields": {"carrier": "UA", "distance": 1.0, "x": 1}},
            400,
            "unknown_field",
        ),
        (
            "predict/toy",
            SCHEDULED | {"fields": {"carrier": 5, "distance": 1.0}},
            400,
            "wrong_type",
        ),
        ("predict/toy", SCHEDULED | {"time_s": "now"}, 400, "bad_request"),
        ("predict/toy", SCHEDULED | {"time": 5}, 400, "bad_request"),
        ("predict/toy", {"kind": "scheduled"}, 400, "bad_request"),
        ("predict/toy", b"", 400, "bad_request"),
        ("predict/toy", json.dumps(SCHEDULED).replace("998.0", "NaN").encode(), 400, "bad_request"),
        ("predict/toy", json.dumps(SCHEDULED).replace("998.0", "1e999").encode(), 400, "bad_req"),
        ("observe/toy", b"[" * 100_000, 400, "bad_request"),
        ("label", {"prediction_id": "x.1.1", "value": 1}, 400, "unknown_prediction"),
        ("label", {"prediction_id": "x.1.1"}, 400, "bad_request"),
        ("session/toy/user-42/predict", SCHEDULED, 404, "not_found"),
        ("nothing", {}, 404, "not_found"),
    ],
)
def test_what_is_refused_says_code_and_hint_and_leaves_no_trace(
    toy: Any, path: str, body: Any, status: int, code: str
) -> None:
    found, said = toy.json("POST", f"/edge/v1/{path}", body)

    assert (found, sorted(said)) == (status, ["code", "error", "hint"])
    assert said["code"].startswith(code)
    assert toy.runtime.log.handed_out("event") == 0
    assert toy.json("POST", "/edge/v1/predict/toy", SCHEDULED)[0] == 200


def test_the_page_for_prometheus_tells_of_what_was_asked(toy: Any) -> None:
    toy.json("POST", "/edge/v1/predict/toy", SCHEDULED)
    toy.json("POST", "/edge/v1/predict/toy", {})

    status, headers, text = toy.ask("GET", "/metrics")

    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    metrics = {
        metric.name: metric for metric in parser.text_string_to_metric_families(text.decode())
    }
    assert metrics["edge_predictions"].samples[0].value == 1
    assert metrics["edge_http_requests"].samples[0].value == 3
    assert metrics["edge_http_refused"].samples[0].value == 1
    counts = {s.name: s.value for s in metrics["edge_predict_seconds"].samples}
    assert counts["edge_predict_seconds_count"] == 1
    assert metrics["edge_release_info"].samples[0].labels["family"] == "toy"
    assert {"edge_infer_seconds", "process_resident_memory_bytes"} <= set(metrics)


def test_http_is_served_on_a_unix_socket_too(
    write_package: Callable[..., tuple[Path, str]], tmp_path: Path
) -> None:
    path = tmp_path / "http.sock"

    async def scene() -> None:
        with Runtime.open(package=write_package()[0]) as runtime:
            server = HttpServer(runtime, runtime.statistics)
            await server.start(None, path, mode=0o660)
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            assert (server.port, server.statistics()["open"]) == (None, 1)
            await server.close()
            assert (await reader.read()).endswith(b'{"live":true}')
            assert not path.exists()
            writer.close()

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("predict/toy", SCHEDULED | {"kind": "a" * 400_000}, "unknown_kind"),
        ("observe/toy", SCHEDULED | {"fields": {"a" * 400_000: 1}}, "unknown_field"),
        ("observe/toy", SCHEDULED | {"a" * 400_000: 1}, "bad_request"),
        ("label", {"prediction_id": "a" * 400_000, "value": 1}, "unknown_prediction"),
        ("label", {"prediction_id": "x.1.1", "value": 1, "family": "a" * 400_000}, "unknown_"),
    ],
)
def test_a_long_word_is_told_back_cut(toy: Any, path: str, body: Any, code: str) -> None:
    status, said = toy.json("POST", f"/edge/v1/{path}", body)

    assert status in (400, 404)
    assert said["code"].startswith(code)
    assert len(str(said)) < 600


@pytest.mark.parametrize("path", ["predict/toy", "observe/toy", "label"])
def test_an_event_larger_than_the_log_takes_is_refused_before_it_is_read(
    toy: Any, path: str
) -> None:
    body = json.dumps(SCHEDULED).encode() + b" " * (512 << 10)

    status, said = toy.json("POST", f"/edge/v1/{path}", body)

    assert (status, said["code"]) == (413, "body_too_large")
