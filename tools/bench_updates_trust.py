"""What trust adds to the memory of a process that has all else of a daemon, told as JSON.

Run by tools/bench-updates with a file that says where broker, root and state are.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import edge_runtime.daemon
import edge_runtime.events.uplink
import edge_runtime.rollout.agent  # noqa: F401
from edge_runtime import memory
from edge_runtime.bus.nats import connect
from edge_runtime.clock import SystemClock
from edge_runtime.update.shelf import Shelf


def rss_mb() -> float:
    gc.collect()
    memory.trim()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def measured(url: str, root: bytes, state: str, family: str) -> dict[str, float]:
    bus = await connect(url, name="bench-memory")
    before_mb = rss_mb()
    from edge_runtime.update.client import UpdateClient
    from edge_runtime.update.fetcher import BusFetcher

    fetcher = BusFetcher(bus, asyncio.get_running_loop())
    client = UpdateClient(Path(state), root, fetcher, SystemClock())
    shelf = Shelf(Path(state) / "shelf")

    def follow() -> None:
        client.refresh()
        plan = client.plan(family)
        client.fetch(plan.stable, plan.stable.packages[0], shelf)
        client.confirm(plan)

    await asyncio.to_thread(follow)
    after_mb = rss_mb()
    await bus.close()
    return {"before_mb": before_mb, "added_mb": after_mb - before_mb}


if __name__ == "__main__":
    settings = json.loads(Path(sys.argv[1]).read_text())
    settings["root"] = Path(settings["root"]).read_bytes()
    print(json.dumps(asyncio.run(measured(**settings))))
