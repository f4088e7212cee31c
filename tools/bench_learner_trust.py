"""What hostile devices can do: two of fifty flip every label and send all they say ten times.

They begin with the stream: what a learner is bootstrapped from is its operator's own file.

Why: a cap for each device bounds their share of every micro-batch; what that is worth shows beside
the same stream without it, and beside the same stream without enemies.

Invariants: the same rows of honest devices are scored in all worlds; the certificate is computed
from what was really in each micro-batch.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from bench_learner_streams import Setup, asked_of, first, learned, over_seeds, setup_of
from bench_rows import Row

from cloud_learner.experiment.asked import Asked
from cloud_learner.experiment.prequential import stream_start_s
from cloud_learner.stats.scores import auc

DEVICES, FLOOD = 50, 10
HOSTILE = ("meter-00", "meter-01")  # 4 % of them
CAP = 4  # of 100 rows, twice what an honest device brings
COPY_S = 60.0  # between what is sent again and again
SEED = 19960507


def poison(data: Path, seeds: int, count: int | None) -> list[Row]:
    """elec2, its half-hours spread over fifty devices."""
    clean = _spread(first(asked_of("electricity", data), count))
    worlds = {
        "clean": _measured(clean, seeds, CAP),
        "clean, no cap, nobody judged": _measured(clean, seeds, 100, learning__contributors=0),
        "poisoned": _measured(_poisoned(clean), seeds, CAP),
        "poisoned, cap alone": _measured(_poisoned(clean), seeds, CAP, learning__contributors=0),
        "poisoned, no cap": _measured(_poisoned(clean), seeds, 100, learning__contributors=0),
    }
    lost = worlds["clean"]["auc"] - worlds["poisoned"]["auc"]
    price = worlds["clean, no cap, nobody judged"]["auc"] - worlds["clean"]["auc"]
    return [
        Row(
            "poison, on elec2: 4 % of 50 devices flip labels and flood tenfold: AUC lost",
            lost,
            "",
            0.015,
        ),
        Row("poison: AUC lost when clean", price, "", 0.002),
        *(Row(f"poison, {name}: AUC", found["auc"], "") for name, found in worlds.items()),
        Row("poison: certificate, k * cap / batch", len(HOSTILE) * CAP / 100, ""),
        Row("poison: largest share of a micro-batch", worlds["poisoned"]["share"], ""),
        Row("poison: certificate violated", worlds["poisoned"]["violations"], "batches", 0),
        Row("poison, no cap: largest share", worlds["poisoned, no cap"]["share"], ""),
        Row("poison: quarantines when clean", worlds["clean"]["quarantines"], ""),
        Row("poison: quarantines when poisoned", worlds["poisoned"]["quarantines"], ""),
    ]


def _measured(asked: Asked, seeds: int, cap: int, **changes: float) -> dict[str, float]:
    setup = setup_of("electricity", asked, learning__device_cap=cap, **changes)
    return over_seeds(setup, seeds, _honest)


def _honest(setup: Setup, seed: int) -> dict[str, float]:
    course = learned(setup, seed)
    devices = np.array(setup.stream.asked.devices)
    honest = ~np.isin(devices[course.truth.rows], HOSTILE)
    learning = setup.family(seed).config.learning
    cuts = setup.stream.cuts(setup.family(seed).config, -np.inf)
    shares = [
        np.isin(devices[setup.stream.released.rows[cut.positions]], HOSTILE).mean() for cut in cuts
    ]
    bounds = [len(HOSTILE) * learning.device_cap / len(cut.positions) for cut in cuts]
    answers = course.answers["student"][honest, 0]
    return {
        "auc": auc(course.truth.labels[honest], answers),
        "share": max(shares),
        "violations": sum(share > bound for share, bound in zip(shares, bounds, strict=True)),
        "quarantines": course.cycle.teaching.trust.counters["quarantines"],
    }


def _spread(asked: Asked) -> Asked:
    """Each row given to one of the devices by chance."""
    drawn = np.random.default_rng(SEED).integers(0, DEVICES, len(asked))
    return msgspec.structs.replace(asked, devices=[f"meter-{at:02d}" for at in drawn.tolist()])


def _poisoned(asked: Asked) -> Asked:
    """What the hostile say, flipped, and sent `FLOOD` times."""
    streams = asked.times_s >= stream_start_s(asked)
    hostile = np.isin(asked.devices, HOSTILE) & streams
    labels = np.where(hostile, 1 - asked.labels, asked.labels).astype(np.float32)
    rows = np.repeat(np.arange(len(asked)), np.where(hostile, FLOOD, 1))
    first = np.r_[True, rows[1:] != rows[:-1]]
    copies = np.arange(len(rows)) - np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))
    return msgspec.structs.replace(
        asked,
        devices=[asked.devices[row] for row in rows.tolist()],
        times_s=asked.times_s[rows] + copies * COPY_S,
        known_s=asked.known_s[rows] + copies * COPY_S,
        features=asked.features[rows],
        labels=labels[rows],
    )
