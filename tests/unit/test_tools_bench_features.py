"""tools/bench-features: it runs, its peer agrees with the engine, and its rows can be judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "bench-features"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, check=False
    )


def test_a_short_run_compares_every_answer_with_the_peer_and_judges_its_rows():
    done = run("--events", "400", "--json")

    assert done.stderr == ""
    found = json.loads(done.stdout)
    rows = {row["what"]: row for row in found["rows"]}
    assert rows["answer of twelve windows, hot, p50"]["reach"] == 5.0
    assert rows["observe an event, hot, p50"]["reach"] == 3.0
    assert rows["numpy to the engine"]["ok"] is True
    assert all(row["value"] > 0 for row in found["rows"])
    assert found["machine"].keys() == {"cpus", "arch", "python"}
    assert done.returncode == int(any(row["ok"] is False for row in found["rows"]))


def test_the_table_names_what_it_measures():
    lines = run("--events", "200").stdout.splitlines()

    assert lines[0].split() == ["what", "value", "unit", "reach"]
    assert any(line.startswith("numpy to the engine") for line in lines)
