"""tools/bench-updates: its parts run against a real broker and a real device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "bench-updates"


def test_a_large_download_outlives_the_broker_and_trust_is_weighed() -> None:
    only = ["--only", "resume", "memory"]
    done = subprocess.run(
        [sys.executable, TOOL, "--quick", "--json", *only],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = {row["what"]: row["value"] for row in json.loads(done.stdout)["rows"]}
    assert rows["hash right after the broker's death"] == 1
    assert 0 < rows["the model's share that was there when the broker died"] < 1
    assert rows["the model's share that was fetched again"] < 0.5
    assert 0 < rows["added by trust to the daemon's RSS"] < 100
