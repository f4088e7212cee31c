"""What sessions take, and what hostile ones can do: bytes, and the trust region.

How: heads of an embedding of 64 numbers and feature rows of 16, with a full prior, through the
store that holds them. Memory is what Python and numpy have allocated, not what the store believes.
"""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from bench_rows import Row

from edge_runtime.clock import ManualClock
from edge_runtime.personal.ground import Ground
from edge_runtime.personal.prior import Prior
from edge_runtime.personal.sessions import Sessions

WIDTH, COLUMNS = 64, 16
REGION = 2.0
OPENED = 10_000
BYTES_MAX = 32 << 20
FAMILY = "bench"


def prior_of(task: str) -> Prior:
    chance = np.random.default_rng(1)
    root = chance.normal(0, 0.05, (WIDTH + 1, WIDTH + 1))
    covariance = (root @ root.T + 0.01 * np.eye(WIDTH + 1)).astype(np.float32)
    covariance = (covariance + covariance.T) / 2
    return Prior(task, np.zeros(WIDTH + 1, np.float32), covariance, REGION, norm_max=100.0)


def embeddings(count: int, seed: int) -> Any:
    return np.random.default_rng(seed).normal(0, 0.5, (count, WIDTH)).astype(np.float32)


def memory(opened: int) -> list[Row]:
    """Many sessions, each with a full history; then more of them than the bytes allow."""
    prior, rows = prior_of("binary"), embeddings(64, 4)
    ground = Ground(prior, columns=COLUMNS)
    values = np.zeros(COLUMNS, np.float32)
    few = 500
    sessions = Sessions(ManualClock(), ttl_s=3600, bytes_max=1 << 30, count_max=opened)
    prior.scratch.square.fill(0)  # all heads have it together

    def fill(into: Sessions, key: str) -> None:
        head = into.open((FAMILY, key), ground)
        for n, row in enumerate(rows):
            head.adapt(row, 0.5, float(n % 2), values)

    each = allocated(lambda: [fill(sessions, f"user-{n}") for n in range(few)]) / few
    bounded = Sessions(ManualClock(), ttl_s=3600, bytes_max=BYTES_MAX, count_max=opened)
    held = allocated(lambda: [bounded.open((FAMILY, f"user-{n}"), ground) for n in range(opened)])
    said = bounded.statistics()
    newest = all(
        (bounded.find((FAMILY, f"user-{n}"), ground) is not None) == (n >= opened - said["open"])
        for n in range(opened)
    )
    what = f"memory per session, 64-dim: the byte bound of 32 MiB holds under {opened:,} opened"
    return [
        Row("memory per session, 64-dim", each / 1024, "KB", 24),
        Row(f"{what}, share used", held / BYTES_MAX, "", 1),
        Row(f"{what}, oldest out", float(newest), "", 1, at_least=True),
        Row(f"{what}, evicted", said["evicted"], ""),
    ]


def allocated(call: Callable[[], Any]) -> int:
    """Bytes that are held after the call and were not before."""
    gc.collect()
    tracemalloc.start()
    kept = call()
    del kept
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return held


HOSTILE = (math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0, 1.0, 5.0, -5.0, 1e-30)


def hostile(count: int) -> list[Row]:
    """One session is told nonsense and contradictions; ten others are looked at meanwhile."""
    worst, equal, learned = 0.0, True, 0
    for task in ("binary", "regression", "ranking"):
        ground, rows, seen = Ground(prior_of(task)), embeddings(256, 5), embeddings(32, 6)
        sessions = Sessions(ManualClock(), ttl_s=3600, bytes_max=BYTES_MAX, count_max=100)
        others = [sessions.open((FAMILY, f"other-{n}"), ground) for n in range(10)]
        for n, head in enumerate(others):
            head.adapt(rows[n], 0.5, float(n % 2))
        before = [head.answer(row, 0.25) for head in others for row in seen]
        enemy = sessions.open((FAMILY, "enemy"), ground)
        for n in range(count):
            row = rows[n % 256] * (1.0, 1e3, math.nan, -1.0)[(n // 7) % 4]
            learned += enemy.adapt(row, 0.5, HOSTILE[n % len(HOSTILE)])
            contrary = float(enemy.shift(rows[n % 256]) < 0)
            learned += enemy.adapt(rows[n % 256], 0.5, contrary)
            worst = max(worst, *(abs(enemy.shift(each)) for each in (row, seen[n % 32])))
        equal &= before == [head.answer(row, 0.25) for head in others for row in seen]
    what = f"hostile session, {count:,} contradictory labels"
    return [
        Row(f"{what}: largest shift, as a share of the trust region", worst / REGION, "", 1),
        Row(f"{what}: other sessions' outputs bit-equal", float(equal), "", 1, at_least=True),
        Row(f"{what}: of them learned before it fell back for good", learned, ""),
    ]
