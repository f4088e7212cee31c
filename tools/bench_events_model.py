"""What tools/bench-events sends: seeded predictions of 200 bytes each, and their labels.

Invariants: the same seed gives the same bytes; a prediction takes 200 bytes on average as it stands
in the log, with sixteen features, three fields and one answer; no two of a pool are alike, and a
pool is larger than what a compressor of an envelope can look back on.

Knows nothing about logs, buses or databases.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from edge_runtime.wire import codec
from edge_runtime.wire.messages import LabelRecord, PredictionRecord, Scored

FAMILY = "bench"
KIND = "asked"
SPEC = "5d41402abc4b2a76b9719d911017c592"
FEATURES = 16
START_S = 1_360_000_000.0
POOL = 1 << 15


def predictions(count: int, seed: int) -> list[PredictionRecord]:
    """So many predictions, a fraction of a second apart."""
    chance, numbers = random.Random(seed), np.random.default_rng(seed)  # noqa: S311 - data
    features = numbers.normal(0.0, 10.0, (count, FEATURES)).astype("<f4")
    features[:, :8] = np.round(features[:, :8])  # counts and sums of whole numbers, as windows have
    gaps = numbers.exponential(0.2, count)
    found, time_s = [], START_S
    for at in range(count):
        time_s += float(gaps[at])
        fields = {
            "carrier": chance.choice(("AA", "B6", "DL", "EV", "UA", "WN")),
            "dest": chance.choice(("ATL", "BOS", "LAX", "MIA", "ORD", "SFO")),
            "distance": float(chance.randrange(90, 5000)),
        }
        scored = [Scored("r00017-1a", "stable", [chance.random()])]
        row = features[at].tobytes()
        found.append(PredictionRecord(FAMILY, KIND, time_s, fields, SPEC, row, 1.0, scored))
    return found


def encoded(count: int, seed: int) -> list[bytes]:
    """So many predictions as they stand in the log."""
    return [codec.encode(record) for record in predictions(count, seed)]


def label(epoch: int, seq: int, time_s: float) -> LabelRecord:
    """What turned out to be true of a prediction."""
    return LabelRecord(FAMILY, epoch, seq, float(seq % 2), time_s)


def quantiles(values: Any) -> tuple[float, float]:
    """p50 and p99."""
    p50, p99 = np.quantile(values, [0.5, 0.99])
    return float(p50), float(p99)
