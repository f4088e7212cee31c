"""The faults' part of tools/bench-events: deaths of the broker, bad connections, crash states.

Why: a promise about faults is a number, too: how many were tried, and what came of them.

Invariants: the same functions as the tests call, with larger counts.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from bench_rows import Row
from crash_states import explore

from cloud_learner.broker import Broker
from cloud_learner.simulate.chaos import half_open
from cloud_learner.simulate.deaths import broker_deaths

HALF_OPEN_S = 15.0


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


def half_open_connections(home: Path, connections: int) -> list[Row]:
    """Connections whose other side is gone without a word, with a megabyte unsent each."""
    with Broker.start(home / "broker") as broker:
        found = asyncio.run(half_open(broker.url, connections))
    in_time = sum(took_s <= HALF_OPEN_S for took_s in found)
    name = "half-open connection: noticed and replaced"
    return [
        Row(f"{name} in 15 s, of {connections}", in_time, "", connections, at_least=True),
        Row(f"{name}, the slowest", max(found), "s", HALF_OPEN_S),
    ]


def crash_states(states: int, seed: int) -> list[Row]:
    """What a power cut may leave of the log, and what must hold in each."""
    checked, violations = explore(states, seed)
    for each in violations[:10]:
        print(each, file=sys.stderr)
    return [
        Row("crash states enumerated", checked, "", states, at_least=True),
        Row("crash states with a violation", len(violations), "", 0),
    ]
