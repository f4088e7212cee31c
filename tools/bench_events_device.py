"""The device's part of tools/bench-events: append, durable, how fast, reopening, what flash pays.

Why: the log promises to cost the answers about a microsecond and to be durable within its linger;
SQLite with the same group commit is what one would otherwise take.

Invariants: log and peer are driven by the same code, one after the other in rounds, on the same
disk; the first moments of a round do not count.

Knows nothing about brokers or learners.
"""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from bench_events_model import POOL, encoded, quantiles
from bench_rows import Row

from edge_runtime.events.log import EventLog

LINGER_MS = 5.0
LOADED_HZ, LIGHT_HZ = 50_000, 10_000
WARM_UP_S = 0.5
PENDING_BYTES = 8 << 20  # a producer that is faster than the disk waits here
TAIL = 35_000
ROOT = Path(__file__).resolve().parents[1]


DYING = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from edge_runtime.events.log import EventLog
log = EventLog(Path(sys.argv[1]), device="bench", bytes_max=4 << 30)
for _ in range({TAIL}):
    log.append("event", bytes(200))
while log.durable("event")[1] < {TAIL}:
    pass
os._exit(0)
"""
"""Leaves most of a segment behind, and closes nothing."""


class Buffer(Protocol):
    """What is measured: a durable buffer with a group commit on its own thread."""

    on_commit: Callable[[], None] | None

    def add(self, data: bytes) -> int: ...

    def done(self) -> int: ...

    def waiting_bytes(self) -> int: ...

    def close(self) -> None: ...


class OurLog:
    """The event log, class event."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = EventLog(
            folder, device="bench", linger_ms=LINGER_MS, linger_max_ms=0, bytes_max=4 << 30
        )
        self._append = self.log.append
        self.on_commit: Callable[[], None] | None = None
        self.log.on_commit = self._committed

    def add(self, data: bytes) -> int:
        return self._append("event", data)

    def done(self) -> int:
        return self.log.durable("event")[1]

    def waiting_bytes(self) -> int:
        return self.log.statistics()["pending_bytes"]

    def close(self) -> None:
        self.log.close()

    def _committed(self) -> None:
        if self.on_commit is not None:
            self.on_commit()


class SqliteBuffer:
    """The peer: SQLite in WAL mode, `synchronous = FULL`, a transaction for each linger."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.on_commit: Callable[[], None] | None = None
        self._path, self._last, self._done = folder / "buffer.db", 0, 0
        self._wake, self._closing = threading.Event(), False
        self._pending: list[bytes] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sqlite-commit")
        self._thread.start()
        self._ready.wait()

    def add(self, data: bytes) -> int:
        self._last = seq = self._last + 1
        self._pending.append(data)
        if not self._wake.is_set():
            self._wake.set()
        return seq

    def done(self) -> int:
        return self._done

    def waiting_bytes(self) -> int:
        return 204 * len(self._pending)

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        database = sqlite3.connect(self._path, isolation_level=None)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("CREATE TABLE events (seq INTEGER PRIMARY KEY, data BLOB NOT NULL)")
        self._ready.set()
        while not self._closing or self._pending:
            self._wake.wait()
            self._wake.clear()
            time.sleep(LINGER_MS / 1000)
            batch = self._pending[: len(self._pending)]
            database.execute("BEGIN")
            database.executemany(
                "INSERT INTO events VALUES (?, ?)", list(enumerate(batch, self._done + 1))
            )
            database.execute("COMMIT")
            del self._pending[: len(batch)]
            self._done += len(batch)
            if self.on_commit is not None:
                self.on_commit()
        database.close()


class Paced:
    """Appends `pace_hz` a second; what each append took, and how long until it was durable."""

    def __init__(self, buffer: Buffer, pool: list[bytes], pace_hz: int, seconds: float) -> None:
        self._pace_hz, self._skip = pace_hz, int(WARM_UP_S * pace_hz)
        count = self._skip + int(seconds * pace_hz)
        self._begun, self._ended = np.zeros(count, "i8"), np.zeros(count, "i8")
        self._durable: list[tuple[int, int]] = []
        buffer.on_commit = lambda: self._durable.append((buffer.done(), time.perf_counter_ns()))
        self._append(buffer, pool, count)
        while buffer.done() < count:
            time.sleep(0.001)
        buffer.on_commit = None

    def _append(self, buffer: Buffer, pool: list[bytes], count: int) -> None:
        """As an event loop does: what came within a millisecond, then a pause."""
        begun, ended, clock, add = self._begun, self._ended, time.perf_counter_ns, buffer.add
        start_ns, size, each_ms = clock(), len(pool), self._pace_hz // 1000
        for first in range(0, count, each_ms):
            for at in range(first, min(first + each_ms, count)):
                data = pool[at % size]
                begun[at] = clock()
                add(data)
                ended[at] = clock()
            left_ns = start_ns + (first + each_ms) * 1_000_000_000 // self._pace_hz - clock()
            if left_ns > 0:
                time.sleep(left_ns / 1e9)

    def append_us(self) -> tuple[float, float]:
        """p50 and p99 of an append."""
        return quantiles((self._ended - self._begun)[self._skip :] / 1000)

    def durable_ms(self) -> tuple[float, float]:
        """p50 and p99 from the append to the commit that made it durable."""
        upto = np.array([seq for seq, _ in self._durable])
        at_ns = np.array([ns for _, ns in self._durable])
        seqs = np.arange(1, len(self._begun) + 1)
        found = at_ns[np.searchsorted(upto, seqs)] - self._begun
        return quantiles(found[self._skip :] / 1e6)


def latency(home: Path, rounds: int, seconds: float) -> list[Row]:
    """Append and durable latency, and the same of the peer; of each the quietest round.

    Judged under load. When little comes, both wait for the linger most of the time.
    """
    pool, rows = encoded(POOL, 1), []
    for pace_hz, reach in ((LOADED_HZ, True), (LIGHT_HZ, False)):
        times: dict[str, list[tuple[float, float]]] = {"append": [], "ours": [], "peer": []}
        for number in range(rounds):
            for name, make in (("ours", OurLog), ("peer", SqliteBuffer)):
                buffer = make(home / f"{name}-{pace_hz}-{number}")
                paced = Paced(buffer, pool, pace_hz, seconds)
                buffer.close()
                times[name].append(paced.durable_ms())
                if name == "ours":
                    times["append"].append(paced.append_us())
        rows += _latency_rows(f"{pace_hz:,} events/s", times, reach=reach)
    return rows


def _latency_rows(
    pace: str, times: dict[str, list[tuple[float, float]]], *, reach: bool
) -> list[Row]:
    least = {
        name: [min(each) for each in zip(*found, strict=True)] for name, found in times.items()
    }
    durable = f"append to durable, 5 ms linger, {pace}"
    bounds = {"append": (1.5, 10.0), "ours": (7.0, 12.0), "peer": (None, None)}
    rows = []
    for name, what, unit in (
        ("append", f"hot-path append, {pace}", "µs"),
        ("ours", durable, "ms"),
        ("peer", f"{durable}, SQLite peer", "ms"),
    ):
        for quantile, value, bound in zip(("p50", "p99"), least[name], bounds[name], strict=True):
            rows.append(Row(f"{what}, {quantile}", value, unit, bound))
    ratio = least["peer"][1] / least["ours"][1]
    to_reach = 1.5 if reach else None
    what = f"{durable}, p99 of the SQLite peer to ours"
    return [*rows, Row(what, ratio, "times", to_reach, at_least=True)]


def flat_out(buffer: Buffer, pool: list[bytes], count: int) -> float:
    """Durable appends a second, when nothing else is done."""
    started_s, size = time.perf_counter(), len(pool)
    for at in range(0, count, 256):
        for one in range(at, min(at + 256, count)):
            buffer.add(pool[one % size])
        while buffer.waiting_bytes() > PENDING_BYTES:
            time.sleep(0.001)
    while buffer.done() < count:
        time.sleep(0.001)
    return count / (time.perf_counter() - started_s)


def throughput(home: Path, gigabytes: float) -> list[Row]:
    """How many appends a second become durable; then reopening what they left, and flash bytes."""
    pool = encoded(POOL, 1)
    count = int(gigabytes * (1 << 30)) // 204
    ours = OurLog(home / "flat-out")
    rate = flat_out(ours, pool, count)
    numbers = ours.log.statistics()
    ours.close()
    payload = sum(map(len, pool)) * count // POOL
    rows = [Row("durable append, 200 B events", rate, "events/s", 120_000, at_least=True)]
    written = numbers["written_bytes"]
    peer = SqliteBuffer(home / "flat-out-peer")
    peer_rate = flat_out(peer, pool, min(count, 500_000))
    peer.close()
    rows.append(Row("durable append, SQLite peer", peer_rate, "events/s"))
    rows.append(Row("durable append, ours to the SQLite peer", rate / peer_rate, "times"))
    what, took_s = f"reopening a 1 GB log ({gigabytes:g} GB), after a crash", reopened(ours.folder)
    rows.append(Row(what, max(took_s), "s", 1.0))
    rows.append(Row("write amplification on the device", written / payload, "times", 1.1))
    shutil.rmtree(home / "flat-out")
    return rows


def reopened(folder: Path) -> list[float]:
    """Seconds that it takes to open the log in `folder`, each time after a process died with it."""
    found = []
    for _ in range(3):
        subprocess.run([sys.executable, "-c", DYING, str(folder)], check=True)
        started_s = time.perf_counter()
        log = EventLog(folder, device="bench", bytes_max=4 << 30)
        found.append(time.perf_counter() - started_s)
        log.close()
    return found
