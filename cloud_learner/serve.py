"""Serving a learner's home until it is told to stop: broker, loop, signals, priority.

Why: the command and a simulation with other hosts in it must serve in the same way.

Invariants: results (the broker's url) go to stdout, narration to stderr. SIGINT and SIGTERM end it
in order, with all that was committed kept. The process runs at idle priority: answers come first.

Knows nothing about what a host does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import click
import uvloop

from cloud_learner.admission import Admissions
from cloud_learner.broker import Broker
from cloud_learner.config import Home
from cloud_learner.gatehouse import Gatehouse
from cloud_learner.host import Host
from cloud_learner.release.keys import load_signer
from cloud_learner.train.family import Family
from edge_runtime.bus import nats as bus_nats
from edge_runtime.bus.access import Access
from edge_runtime.bus.base import Bus
from edge_runtime.clock import Clock, SystemClock

SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep the interpreter from the loop, which reads what devices send."""


class Serves(Protocol):
    """What is served: a host, or a simulation's in its place."""

    def run(self) -> Coroutine[Any, Any, None]:
        """Serve until cancelled."""


MakeHost = Callable[[Home, Sequence[Family], Bus, Clock], Serves]


def serve_home(
    home: Home, nats: str, make_host: MakeHost = Host, *, access: Access | None = None
) -> None:
    """Serve `home` over the broker at `nats`, or over a child of our own where that is empty.

    The child lets in whom the home admits. `access` is how we come in; by default by our own key.

    All families of the home are served; one that is added is served from the next start on.

    Raises: ConfigError (no_home, already_owned, bad_family, ...), with nothing started.
    """
    admissions = Admissions(home)
    families = load_families(home)
    with contextlib.ExitStack() as stack:
        stack.enter_context(home.owned())
        url = nats or stack.enter_context(Broker.start(home.broker, admissions.rules())).url
        _yield_to_others()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        _tell(f"serving {home.root} at {url}; stop with Ctrl-C")
        click.echo(url)
        if access is None or not (access.key or access.credentials):
            access = replace(access or Access(), key=admissions.access().key)
        bus = bus_nats.connect(url, name="learner", access=access)
        uvloop.run(_serve(bus, lambda bus: make_host(home, families, bus, SystemClock())))


def serve_gate(home: Home, nats: str, access: Access) -> None:
    """Serve a gate's own home over the broker at `nats`.

    Raises: ConfigError (no_home, no_key, already_owned, bad_family, ...), with nothing started.
    """
    families = load_families(home)
    load_signer(home.root, "gate")
    with home.owned():
        _tell(f"judging for {', '.join(each.name for each in families)} at {nats}")
        bus = bus_nats.connect(nats, name="gate", access=access)
        uvloop.run(_serve(bus, lambda bus: Gatehouse(home, families, bus, SystemClock())))


def load_families(home: Home) -> list[Family]:
    """The families of a home. Raises: ConfigError."""
    return [Family.load(Path(origin.folder)) for origin in home.origins().values()]


async def _serve(connecting: Coroutine[Any, Any, Bus], make: Callable[[Bus], Serves]) -> None:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    bus = await connecting
    try:
        await make(bus).run()
    except asyncio.CancelledError:
        _tell("stopped; all that was committed is kept")
    finally:
        await bus.close()


def _yield_to_others() -> None:
    """Idle priority: answers come first, learning takes what is left."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):
        os.nice(19)


def _tell(text: str) -> None:
    click.echo(text, err=True)
