"""tools/bench-updates: its parts run against a real broker and a real device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "bench-updates"


def measured(*only: str) -> dict[str, float]:
    """What each row says after a quick run of these parts."""
    done = subprocess.run(
        [sys.executable, TOOL, "--quick", "--json", "--only", *only],
        capture_output=True,
        text=True,
        check=True,
    )
    return {row["what"]: row["value"] for row in json.loads(done.stdout)["rows"]}


def test_a_large_download_outlives_the_broker_and_trust_is_weighed() -> None:
    rows = measured("resume", "memory")
    assert rows["hash right after the broker's death"] == 1
    assert 0 < rows["the model's share that was there when the broker died"] < 1
    assert rows["the model's share that was fetched again"] < 0.5
    assert 0 < rows["added by trust to the daemon's RSS"] < 100


@pytest.mark.slow
def test_releases_go_the_whole_path_from_their_own_labels() -> None:
    rows = measured("path")
    assert rows["releases that went the whole path"] >= 3
    whole = "the whole path: a micro-batch's last mature label to its release serving on the canary"
    assert 0 < rows["of it, from the gate's verdict on, p50"] < rows[f"{whole}, p50"]
