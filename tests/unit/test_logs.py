"""Logs as lines for people and as JSON: seen in the stderr of a real process."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAY = """
import logging
from edge_runtime import logs

logs.setup({format!r}, {level!r})
log = logging.getLogger("edge_runtime.daemon")
log.debug("detail %d", 1)
log.info("%s serves\\nü", "EWR")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("broken")
"""


def said(shape: str, level: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SAY.format(format=shape, level=level)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=30,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json_is_one_object_per_line_with_stable_keys() -> None:
    info, broken = (json.loads(line) for line in said("json", "info"))
    age = datetime.now(UTC) - datetime.fromisoformat(info.pop("time"))
    assert timedelta(0) <= age < timedelta(minutes=1)
    assert info == {"level": "info", "logger": "edge_runtime.daemon", "message": "EWR serves\nü"}
    assert list(broken) == ["time", "level", "logger", "message", "exception"]
    assert (broken["level"], broken["message"]) == ("error", "broken")
    assert broken["exception"].endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("level", "messages"),
    [("debug", ["detail 1", "EWR serves\nü", "broken"]), ("error", ["broken"])],
)
def test_what_is_below_the_level_is_left_out(level: str, messages: list[str]) -> None:
    assert [json.loads(line)["message"] for line in said("json", level)] == messages


def test_text_has_time_level_and_message() -> None:
    first = said("text", "info")[0]
    date, _, rest = first.partition(" ")
    assert datetime.fromisoformat(date)
    assert rest.endswith(" INFO EWR serves")
