"""The cloud side of a daemon: bus, uplink, updates and the agent, wired together.

Why: a device without a broker needs none of it, and what is not loaded costs neither memory nor
time to start.

Knows how these rooms fit together, and nothing of what they do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from edge_runtime.bus.access import of_device
from edge_runtime.bus.nats import connect
from edge_runtime.clock import Clock, SystemClock
from edge_runtime.config import EdgeConfig
from edge_runtime.errors import HeadwaterError
from edge_runtime.events.uplink import Uplink
from edge_runtime.events.watermarks import ends
from edge_runtime.events.withhold import Withhold
from edge_runtime.inference.prover import Prover
from edge_runtime.rollout.agent import Agent
from edge_runtime.rollout.plan import Plan, PlanArm, Variant
from edge_runtime.runtime import Runtime
from edge_runtime.update.client import UpdateClient
from edge_runtime.update.fetcher import BusFetcher
from edge_runtime.update.shelf import Shelf
from edge_runtime.update.trust import Freshness

log = logging.getLogger("edge_runtime.daemon")


@asynccontextmanager
async def cloud_side(
    runtime: Runtime,
    root: bytes,
    parts: dict[str, Callable[[], Mapping[str, Any]]],
    shared: Prover | None = None,
) -> AsyncIterator[list[Coroutine[Any, Any, None]]]:
    """What has to run while `runtime` serves, connected to its broker; its counts go to `parts`.

    `root` is the trusted root of signed metadata. `shared` proves packages for several runtimes of
    one process, and stays open; without it, one is made here.
    """
    config, journal, clock = runtime.config, runtime.journal, SystemClock()
    name, prover = f"edge-runtime {config.device}", shared or Prover()
    access = of_device(config)
    bus = await connect(config.nats, name=name, access=access)
    client = _open_client(config, root, BusFetcher(bus, asyncio.get_running_loop()), clock)
    try:
        withhold = _withhold(config, journal.log.epoch, clock)
        uplink = Uplink(
            journal.log,
            bus,
            config.device,
            clock,
            trim_floor=journal.trim_floor,
            withhold=withhold,
        )
        agent = Agent(
            runtime,
            client,
            runtime.shelf,
            bus,
            attributes=config.attributes,
            poll_s=config.poll_s,
            hold=config.rollout.hold,
            clock=clock,
            prove=prover.prove,
            durable=partial(ends, journal.log),
            sketches=runtime.sketcher.look,
            sign=access.sign,
        )
        journal.on_commit = uplink.wake
        parts |= {
            "uplink": uplink.statistics,
            "agent": lambda: agent.statistics() | runtime.sketcher.statistics(),
            "bus": lambda: bus.statistics() | {"connected": int(bus.connected)},
        }
        parts |= {"prover": prover.statistics, "updates": client.statistics}
        parts |= {"verdicts": client.verdicts, "waits": agent.waits.told}
        if withhold is not None:
            parts["withheld"] = withhold.statistics
        yield [uplink.run(), agent.run()]
    finally:
        journal.on_commit = None
        if shared is None:
            prover.close()
        client.close()
        await bus.close()


def _withhold(config: EdgeConfig, epoch: int, clock: Clock) -> Withhold | None:
    if not config.uplink:
        return None
    return Withhold(config.uplink, config.state_dir / "uplink.quota", clock, epoch)


class _Refusing:
    """Stands in for an update client whose stored trust cannot be read: fail closed, say why.

    `refresh` comes first in every check, so nothing else is ever asked.
    """

    def __init__(self, error: HeadwaterError) -> None:
        self._error = error

    freshness = Freshness()

    def refresh(self) -> None:
        raise self._error

    def plan(self, _family: str) -> Plan:
        raise self._error

    def fetch(self, _arm: PlanArm, _package: Variant, _shelf: Shelf) -> Path:
        raise self._error

    def check_course(self, *_plans: object) -> None:
        raise self._error

    def lowest_counter(self, _family: str) -> int:
        raise self._error

    def close(self) -> None:
        """Nothing is held."""

    def confirm(self, _plan: Plan) -> None:
        raise self._error

    def statistics(self) -> dict[str, int]:
        return {}

    def verdicts(self) -> dict[str, dict[str, Any]]:
        return {}


def _open_client(
    config: EdgeConfig, root: bytes, fetcher: BusFetcher, clock: SystemClock
) -> UpdateClient | _Refusing:
    try:
        return UpdateClient(
            config.state_dir / "update",
            root,
            fetcher,
            clock,
            ask_time=fetcher.ask_time,
            step_max=config.rollout.step_max,
        )
    except HeadwaterError as error:
        log.warning("no updates until this is mended, what runs is unchanged: %s", error)
        return _Refusing(error)
