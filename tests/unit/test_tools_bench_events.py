"""tools/bench-events: its events are what it says, its rows judge rightly, its parts run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def model():
    sys.path.insert(0, str(TOOLS))
    try:
        yield importlib.import_module("bench_events_model")
    finally:
        sys.path.remove(str(TOOLS))


def test_events_are_seeded_differ_and_take_200_bytes(model):
    found = model.encoded(2000, seed=3)
    assert found == model.encoded(2000, seed=3)
    assert found != model.encoded(2000, seed=4)
    assert len(set(found)) == 2000
    assert sum(map(len, found)) / 2000 == pytest.approx(200, abs=5)


@pytest.mark.parametrize(
    ("value", "reach", "at_least", "ok"),
    [
        (1.0, 1.0, False, True),
        (1.1, 1.0, False, False),
        (0.9, 1.0, True, False),
        (5, None, 0, None),
    ],
)
def test_a_row_is_judged_by_its_own_direction(model, value, reach, at_least, ok):
    row = importlib.import_module("bench_rows").Row("what", value, "s", reach, bool(at_least))
    assert row.ok is ok
    assert row.plain() == {"what": "what", "value": value, "unit": "s", "reach": reach, "ok": ok}


def test_parts_run_and_measure_what_they_name():
    command = [sys.executable, TOOLS / "bench-events", "--quick", "--json"]
    only = ["--only", "throughput", "crash-states"]
    done = subprocess.run([*command, *only], capture_output=True, text=True, check=True)
    rows = {row["what"]: row["value"] for row in json.loads(done.stdout)["rows"]}
    assert rows["crash states enumerated"] >= 200
    assert rows["crash states with a violation"] == 0
    assert 1.0 < rows["write amplification on the device"] < 1.5
    assert all(rows[what] > 0 for what in rows if what.startswith(("durable", "reopening")))
