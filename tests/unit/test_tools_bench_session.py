"""tools/bench-session: its parts run against the device's own sessions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "bench-session"


def measured(*only: str) -> dict[str, float]:
    """What each row says after a quick run of these parts."""
    done = subprocess.run(
        [sys.executable, TOOL, "--quick", "--json", "--only", *only],
        capture_output=True,
        text=True,
        check=True,
    )
    return {row["what"]: row["value"] for row in json.loads(done.stdout)["rows"]}


def test_costs_are_measured_and_the_bounds_hold() -> None:
    rows = measured("latency", "memory", "hostile")

    assert 0 < rows["memory per session, 64-dim"] <= 24
    for what, value in rows.items():
        if "share used" in what or "trust region" in what:
            assert 0 < value <= 1, what
        if "bit-equal" in what or "oldest out" in what:
            assert value == 1, what
        if "p50" in what:
            assert value > 0, what


def test_data_that_are_not_there_are_left_out(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HEADWATER_DATA", str(tmp_path))

    assert measured("movielens") == {}
