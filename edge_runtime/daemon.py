"""The daemon: the one place where a device's rooms are wired together and started.

Why: one task group and one order of ending, so that nothing is left running or half said.

Order of ending: stop the cloud side (agent, uplink, bus); stop listening and let written answers
leave; make the log durable, write the windows, give the state directory back. A second signal ends
the process at once, which costs no more than a power cut: what came within the linger.

Knows how rooms fit together, and nothing of what they do.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

from edge_runtime import notify
from edge_runtime.api.http import HOST, HttpServer
from edge_runtime.api.socket import SocketServer
from edge_runtime.config import EdgeConfig
from edge_runtime.cpus import flush_denormals
from edge_runtime.device import standing
from edge_runtime.device.starts import Starts
from edge_runtime.errors import ConfigError
from edge_runtime.inference.worker import WORKER_THREAD
from edge_runtime.runtime import Runtime

LEAVE_S = 5.0
SWITCH_INTERVAL_S = 0.0005
"""How long another thread may keep the interpreter from an answer; by default it is ten times so
long, which shows in the slowest thousandth of answers."""

Parts = dict[str, Callable[[], Mapping[str, Any]]]
"""The rooms that are at work, by name, each with its counts."""

log = logging.getLogger("edge_runtime.daemon")


def run(config: EdgeConfig, on_ready: Callable[[Runtime], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; `on_ready` is called once every listener is up.

    Raises: ConfigError before anything is served.
    """
    import uvloop

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to end in order
    _allow_connections()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(config, on_ready))


async def serve(config: EdgeConfig, on_ready: Callable[[Runtime], None] | None = None) -> None:
    """Serve on the running loop until a signal comes."""
    root = _read_root(config)
    _check_access(config)
    flush_denormals()
    starts = Starts(config)
    starts.begin()
    with Runtime.open(config) as runtime:
        # Until here a signal ends the process at once, for a model may hang when it is loaded.
        stop = _stop_on_signals(asyncio.get_running_loop())
        parts: Parts = {"starts": starts.statistics, "watch": runtime.watch.statistics}
        async with _listening(runtime, parts) as where:
            log.info("%s serves %s at %s", config.device, _served(runtime), where)
            notify.ready(f"serves {_served(runtime)}")
            if on_ready is not None:
                on_ready(runtime)
            async with _cloud_side(runtime, root, parts) as works:
                local = [notify.watchdog(), starts.settle(), runtime.watch.run()]
                await _run_until(stop, *local, *works)
            notify.stopping()
    starts.well()
    starts.close()
    log.info("%s stopped", config.device)
    _leave_behind()


def _leave_behind() -> None:
    """All is durable now: a thread that hangs in a model must not keep the process, and must not
    be there when the interpreter is taken down, which would end it with an abort.
    """
    if any(each.name == WORKER_THREAD for each in threading.enumerate()):
        os._exit(0)
    timer = threading.Timer(LEAVE_S, os._exit, (0,))
    timer.daemon = True
    timer.start()


@asynccontextmanager
async def _listening(runtime: Runtime, parts: Parts) -> AsyncIterator[str]:
    """The Unix socket and, where it is configured, HTTP; gives where they listen, in words."""
    config = runtime.config
    mode, group = config.socket_bits, config.socket_group
    server = SocketServer(runtime, lambda: _status(runtime, parts))
    http = HttpServer(
        runtime, lambda: _status(runtime, parts), body_bytes_max=config.http.body_max_mb << 20
    )
    where, parts["socket"] = [str(config.socket)], server.statistics
    await server.start(config.socket, mode, group)
    try:
        if config.http.enabled:
            await http.start(config.http.port, config.http.socket, mode=mode, group=group)
            parts["http"] = http.statistics
            where += [f"http://{HOST}:{http.port}"] if http.port is not None else []
            where += [f"{config.http.socket} (HTTP)"] if config.http.socket is not None else []
        yield " and ".join(where)
    finally:
        await server.close()
        await http.close()


@asynccontextmanager
async def _cloud_side(
    runtime: Runtime, root: bytes, parts: Parts
) -> AsyncIterator[list[Coroutine[Any, Any, None]]]:
    """What has to run for a device that has a broker; its rooms are loaded only then."""
    if not runtime.config.nats:
        yield []
        return
    from edge_runtime.uplinked import cloud_side

    async with cloud_side(runtime, root, parts) as works:
        yield works


async def _run_until(stop: asyncio.Event, *works: Coroutine[Any, Any, None]) -> None:
    """Run `works` side by side until `stop`; should one of them fail, end all of them with it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work) for work in works]
        await stop.wait()
        for task in tasks:
            task.cancel()


def _allow_connections() -> None:
    """A shell's soft bound on open files is far below what socket and HTTP may hold."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _read_root(config: EdgeConfig) -> bytes:
    if config.root is None:
        return b""
    try:
        return config.root.read_bytes()
    except OSError as error:
        raise ConfigError(
            "no_root", f"the trusted root cannot be read: {error}", "see root in the configuration"
        ) from error


def _check_access(config: EdgeConfig) -> None:
    """Before anything is served. Raises: ConfigError for a key or certificate that is none."""
    if config.nats:
        from edge_runtime.bus.access import of_device

        of_device(config).open(config.nats)


def _stop_on_signals(loop: asyncio.AbstractEventLoop) -> asyncio.Event:
    stop = asyncio.Event()

    def end() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    return stop


def _status(runtime: Runtime, parts: Parts) -> dict[str, Any]:
    status = runtime.statistics() | {name: statistics() for name, statistics in parts.items()}
    return status | {"health": standing.health(runtime.config, status)}


def _served(runtime: Runtime) -> str:
    return ", ".join(
        family if runtime.ready(family) else f"{family} (no release yet)"
        for family in runtime.families
    )
