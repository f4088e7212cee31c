"""SIGKILL at seeded random points: a reopened device knows what its durable log says, bit for bit.

The child asks, observes and labels as fast as it can, labels for predictions of earlier lives among
them, and says after each commit what is durable; the parent kills it once a random number of events
is. The windows of the device that is opened next must be those of a pipeline that reads the
whole log, of which nothing was trimmed, from its first record on.
"""

from __future__ import annotations

import random
import subprocess
import sys

import msgspec
import pytest

from edge_runtime import factory
from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig, LogConfig
from edge_runtime.events.journal import SNAPSHOT_EVERY
from edge_runtime.features.spec import Spec
from edge_runtime.inference.pipeline import Pipeline
from edge_runtime.runtime import Runtime
from edge_runtime.wire import codec
from edge_runtime.wire.messages import PredictionRecord

NOW_S = 1_360_000_000.0
FEATURES = """
version = 1
[[features]]
name = "count"
window = { over = "scheduled", key = "carrier", statistic = "count", span_s = 600.0 }
[[features]]
name = "high"
window = { over = "departed", key = "carrier", value = "delay", statistic = "max", span_s = 300.0 }
[[features]]
name = "kinds"
window = { over = "departed", value = "delay", statistic = "distinct", span_s = 300.0 }
[[features]]
name = "fading"
[features.window]
over = "departed"
value = "delay"
statistic = "decayed_mean"
half_life_s = 60.0
[[features]]
name = "latest"
window = { over = "departed", value = "delay", statistic = "std", span_events = 100 }
[[features]]
name = "rate"
window = { over = "label", key = "carrier", statistic = "mean", span_s = 600.0 }
"""

_CHILD = """
import random, sys
from pathlib import Path
import msgspec
from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig
from edge_runtime.runtime import Event, Runtime

seed, now_s = int(sys.argv[2]), float(sys.argv[3])
config = msgspec.json.decode(sys.argv[1], type=EdgeConfig, dec_hook=lambda kind, text: Path(text))
runtime = Runtime.open(config, clock=ManualClock(now_s))
chance = random.Random(seed)
ids = [
    f"{config.device}.{epoch}.{chance.randint(1, last)}"
    for epoch, kind, last in runtime.survived() if kind == "event" and last
    for _ in range(20)
]
def say():
    print(runtime.epoch, runtime.log.durable("event")[1], flush=True)
def asked(time_s):
    return Event("scheduled", time_s, {"carrier": chance.choice("ABC"), "distance": 1.0})
say()
runtime.journal.on_commit = say
while True:
    now_s += chance.random()
    time_s = now_s - chance.choice([0, 0, 0, 50, 8000])
    choice = chance.randrange(8)
    if choice < 3:
        fields = {"carrier": chance.choice("ABC"), "delay": float(chance.randrange(50))}
        runtime.observe("toy", Event("departed", time_s, fields))
    elif choice < 5 or not ids:
        ids.append(runtime.predict("toy", asked(time_s)).id)
    elif choice < 6:
        many = runtime.predict_many("toy", [asked(time_s) for _ in range(4)])
        ids += [each.id for each in many]
    else:
        at = chance.randrange(len(ids))
        runtime.label(ids[at], float(chance.randrange(2)), time_s=time_s, final=choice < 7)
"""


@pytest.fixture
def config(tmp_path, write_package):
    config = EdgeConfig(
        device="EWR",
        families=["toy"],
        state_dir=tmp_path / "state",
        socket=tmp_path / "edge.sock",
        log=LogConfig(linger_ms=2, linger_max_ms=0),
    )
    path, _ = write_package(spec=Spec.from_toml(FEATURES))
    factory.install(config, path, factory.inspect(path))
    return config


def run_and_kill(config: EdgeConfig, seed: int, now_s: float, until: int) -> tuple[int, int]:
    """Let a device live until so many of its events are durable, and kill it; its last whole word:
    epoch, durable events.
    """
    plain = msgspec.json.encode(config, enc_hook=str).decode()
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, plain, str(seed), str(now_s)], stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        lines = [child.stdout.readline()]
        while lines[-1] and int(lines[-1].split()[1]) < until:
            lines.append(child.stdout.readline())
        child.kill()
        lines += child.stdout.readlines()
    whole = [line for line in lines if line.endswith(b"\n")]
    assert whole, "the child never opened its runtime"
    epoch, events = map(int, whole[-1].split())
    assert events >= until, "the child ended by itself"
    return epoch, events


def by_the_log_alone(runtime: Runtime) -> tuple[bytes, int]:
    """What a pipeline knows that reads the whole log of `runtime`, and how many records that is."""
    serving = runtime._members["toy"].pipeline
    pipeline, records = Pipeline("toy", ManualClock(NOW_S)), 0
    pipeline.swap(serving.slot.arms)
    for epoch, seq, data in runtime.log.tail("event", 0, 0):
        record = codec.decode_record(data)
        pipeline.replay(record.kind, record.time_s, record.fields)
        if isinstance(record, PredictionRecord):
            pipeline.answered.remember((epoch, seq), record.fields)
        records += 1
    return pipeline.snapshot(), records


def lives(config: EdgeConfig, seed: int, count: int) -> None:
    chance, now_s, durable = random.Random(seed), NOW_S, 0
    snapshots = replays = 0
    for life in range(count):
        context = f"seed {seed}, life {life}"
        until = chance.randrange(2 * SNAPSHOT_EVERY)
        epoch, events = run_and_kill(config, seed * 100 + life, now_s, until)
        durable += events
        with Runtime.open(config, clock=ManualClock(NOW_S)) as runtime:
            assert runtime.epoch > epoch, context
            known, records = by_the_log_alone(runtime)
            assert records >= durable, context
            assert runtime._members["toy"].pipeline.snapshot() == known, context
            replayed = runtime.statistics()["snapshots"]["replayed"]
            snapshots += runtime.journal.trim_floor()[1] >= SNAPSHOT_EVERY
            replays += 0 < replayed < records
            now_s = runtime._members["toy"].pipeline.newest_s
            durable = records
    assert snapshots, f"seed {seed}: no life was long enough for a snapshot"
    assert replays, f"seed {seed}: no life ended after a snapshot"


def test_windows_after_kills_are_those_of_the_durable_log(config: EdgeConfig) -> None:
    lives(config, seed=1, count=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 10))
def test_the_same_over_many_kills(config: EdgeConfig, seed: int) -> None:
    lives(config, seed, count=8)
