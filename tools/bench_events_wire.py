"""The network's part of tools/bench-events: draining a backlog, bytes on the wire, online latency.

Why: what a device buffered has to reach a real broker that syncs every write, faster than it came,
and in few bytes where bytes cost money.

Invariants: a real nats-server with `sync_interval: always` and the product's own log, uplink, bus
and ingest; bytes are counted by a relay between device and server, so they are what TCP carries.

Knows nothing about how any of them work.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from bench_events_model import POOL, encoded, quantiles
from bench_rows import Row

from cloud_learner.broker import Broker
from cloud_learner.simulate.rig import Cloud, dialling, until
from edge_runtime.bus.base import Bus
from edge_runtime.bus.nats import connect
from edge_runtime.clock import SystemClock
from edge_runtime.config import LogConfig
from edge_runtime.events.log import EventLog
from edge_runtime.events.uplink import Uplink
from edge_runtime.wire import subjects

DEVICE = "bench"
STREAM_BYTES = 8 << 30
ONLINE_HZ = 200
WAIT_S = 300.0


async def make_streams(bus: Bus) -> None:
    """The streams of a learner, without its bounds: here nobody reads what is drained."""
    make = bus.ensure_stream
    events, state = subjects.EVENTS_STREAM, subjects.STATE_STREAM
    await make(events, [subjects.EVENTS_ALL], max_bytes=STREAM_BYTES, discard_new=True)
    await make(state, subjects.STATE_ALL, max_bytes=1 << 26, per_subject=1, discard_new=False)


def logged(folder: Path) -> EventLog:
    """A log that lingers as a daemon's does by default."""
    usual = LogConfig()
    return EventLog(
        folder, device=DEVICE, linger_ms=usual.linger_ms, linger_max_ms=usual.linger_max_ms
    )


def filled(folder: Path, count: int) -> EventLog:
    """A log with so many events that nobody has taken yet."""
    log, pool = EventLog(folder, device=DEVICE, bytes_max=4 << 30), encoded(POOL, 2)
    for at in range(count):
        log.append("event", pool[at % POOL])
        if at % 4096 == 0:
            while log.statistics()["pending_bytes"] > 8 << 20:
                time.sleep(0.001)
    while log.durable("event")[1] < count:
        time.sleep(0.001)
    return log


@asynccontextmanager
async def uplinked(log: EventLog, bus: Bus) -> AsyncIterator[Uplink]:
    """An uplink that drains `log` meanwhile."""
    uplink = Uplink(log, bus, DEVICE, SystemClock())
    log.on_commit = uplink.wake
    task = asyncio.create_task(uplink.run())
    try:
        yield uplink
    finally:
        log.on_commit = None
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def drain(home: Path, count: int) -> list[Row]:
    """How fast a backlog reaches JetStream, and how many bytes that takes."""
    with Broker.start(home / "broker") as broker, filled(home / "log", count) as log:
        async with relay(broker.url) as (url, sent):
            bus = await connect(url, name="bench")
            await make_streams(bus)
            started_s, before = time.perf_counter(), sent[0]
            async with uplinked(log, bus) as uplink:
                await until(lambda: uplink.statistics()["records"] >= count, WAIT_S)
            relayed_s, wire = time.perf_counter() - started_s, sent[0] - before
            await bus.close()
        rate = await drained_directly(broker.url, log, count)
    what = "backlog drain to JetStream with `sync_interval: always`"
    return [
        Row(what, rate, "events/s", 200_000, at_least=True),
        Row(f"{what}, through a relay", count / relayed_s, "events/s"),
        Row("bytes on the wire per 200 B event", wire / count, "bytes", 100),
    ]


async def drained_directly(url: str, log: EventLog, count: int) -> float:
    """Events a second, from the start of an uplink to the last acknowledgement."""
    bus = await connect(url, name="bench")
    started_s = time.perf_counter()
    async with uplinked(log, bus) as uplink:
        await until(lambda: uplink.statistics()["records"] >= count, WAIT_S)
    took_s = time.perf_counter() - started_s
    await bus.close()
    return count / took_s


@asynccontextmanager
async def relay(url: str) -> AsyncIterator[tuple[str, list[int]]]:
    """A relay before the server at `url`: its own url, and the bytes that it passed on so far."""
    host, port = url.removeprefix("nats://").rsplit(":", 1)
    sent, pumps = [0], set()

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, at: int) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                sent[0] += len(data) if at == 0 else 0
                sink.write(data)
                await sink.drain()
        sink.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        for source, sink, at in ((reader, back, 0), (there, writer, 1)):
            pumps.add(asyncio.create_task(pump(source, sink, at)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}", sent
    finally:
        server.close()
        for task in pumps:
            task.cancel()


async def online(home: Path, seconds: float) -> list[Row]:
    """From an append on the device to the commit at the learner, while events trickle in."""
    pool, count = encoded(POOL, 3), int(seconds * ONLINE_HZ)
    appended, learned = np.zeros(count + 1), np.zeros(count + 1)
    with Broker.start(home / "broker") as broker, logged(home / "log") as log:
        lane, reached = (DEVICE, log.epoch, "event"), 0

        def note(_commit: object) -> None:
            nonlocal reached
            seq = cloud.mark(lane)
            learned[reached + 1 : seq + 1] = time.perf_counter()
            reached = seq

        cloud = await Cloud.start(home / "learner", dialling(broker.url), note)
        bus = await connect(broker.url, name=DEVICE)
        async with uplinked(log, bus):
            start_s = time.perf_counter()
            for at in range(count):
                await asyncio.sleep(max(0.0, start_s + at / ONLINE_HZ - time.perf_counter()))
                seq = log.append("event", pool[at])
                appended[seq] = time.perf_counter()
            await cloud.until(lambda: reached >= count)
        await bus.close()
        await cloud.stop()
    p50, p99 = quantiles(1000 * (learned - appended)[ONLINE_HZ:])
    what = f"append to learner, online, {ONLINE_HZ} events/s"
    return [Row(f"{what}, p50", p50, "ms", 40.0), Row(f"{what}, p99", p99, "ms", 120.0)]
