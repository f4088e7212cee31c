"""The faults' part of tools/bench-events: deaths of the broker, bad connections, crash states.

Why: a promise about faults is a number, too: how many were tried, and what came of them.

Invariants: the same functions as the tests call, with larger counts.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from bench_events_model import Row

from cloud_learner.simulate.deaths import broker_deaths


def tell(text: str) -> None:
    """Progress, on a line of its own."""
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def deaths(home: Path, times: int, seed: int) -> list[Row]:
    """The broker is killed under load."""
    found = asyncio.run(broker_deaths(home / "deaths", times, seed, tell))
    name = f"server killed and restarted {times} times under load"
    return [
        Row(f"{name}, {found.predicted:,} predictions, lost", found.lost, "", 0),
        Row(f"{name}, learned twice", found.learned_twice, "", 0),
        Row(f"{name}, longest device stall", max(found.stalls_s), "s", 5.0),
    ]
