"""What learning costs: a whole cycle step by step, and learning on against learning anew.

Why: to learn in minutes is worth something only if it is cheap; what it must be compared with is
what everybody does: training from scratch, every day, on the last month.

Invariants: every pass of every network is counted, on both sides; times are of the real steps, a
gate over real rows and a publisher that signs to disk included.
"""

from __future__ import annotations

import asyncio
import resource
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from bench_learner_streams import Setup, asked_of, first, over_seeds, setup_of, tell
from bench_rows import Row

from cloud_learner.config import Home
from cloud_learner.cycle import Candidate, Cycle
from cloud_learner.evaluate.offline import EvaluationSet, is_held_out
from cloud_learner.evaluate.slices import Keys
from cloud_learner.experiment.arms import Policy
from cloud_learner.experiment.freshness import setting_of
from cloud_learner.experiment.prequential import course
from cloud_learner.experiment.report import Options
from cloud_learner.experiment.trajectory import Job, play
from cloud_learner.experiment.worlds import REFERENCE_ROWS
from cloud_learner.gate import Gate
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.release.metadata import ReleaseFile
from cloud_learner.releasing import release_signers
from cloud_learner.rules import gate_limits, recent_hold_out
from cloud_learner.store.lineage import Lineage
from cloud_learner.train.family import Family
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import SystemClock
from edge_runtime.inference.pipeline import score_batch
from edge_runtime.inference.runner import Runner

T = TypeVar("T")

ONE_REPLICA = """
[learning.fast]
passes = 3
learning_rate = 1e-3
window_rows = 0
keep = 0.0
"""
ONE_REPLICA_ROW = "flights, incremental daily against scratch daily on a 30-day window"
STATIC_ROWS = 3400
STEPS = ("watch", "trust", "weigh", "fast", "stable", "distil", "quantize", "gate", "sign")


def incremental(data: Path, seeds: int, rows: int | None) -> list[Row]:
    """One replica, daily: learning on, against learning the last 30 days anew."""
    asked = first(asked_of("flight_weather", data), rows)
    setup = setup_of("flight_weather", asked)
    found = over_seeds(setup, seeds, _both)
    lost = found["scratch quality"] - found["fast quality"]
    return [
        Row(
            f"{ONE_REPLICA_ROW}, one replica: AUC lower by",
            lost,
            "",
            0.003,
        ),
        Row(
            f"{ONE_REPLICA_ROW}: fewer sample passes",
            found["scratch passes"] / found["fast passes"],
            "x",
            25.0,
            True,
        ),
        Row("flights, incremental daily: AUC", found["fast quality"], ""),
        Row("flights, scratch daily on 30 days: AUC", found["scratch quality"], ""),
        Row(
            "flights, incremental daily: CPU against scratch",
            found["scratch cpu"] / found["fast cpu"],
            "x",
        ),
    ]


def _both(setup: Setup, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / setup.folder.name
        shutil.copytree(setup.folder, folder)
        with (folder / "family.toml").open("a") as file:
            file.write(ONE_REPLICA)
        setting = setting_of(
            Family.load(folder),
            setup.stream.asked,
            Options.of("never,1d", "fast,scratch:30d", 1, 1),
        )
        found: dict[str, float] = {}
        for name, policy in (
            ("fast", Policy("fast", "fast")),
            ("scratch", Policy("scratch:30d", "scratch", 30 * 86_400.0)),
        ):
            played = play(setting, Job(policy, seed), lambda: None)
            _, at = next(iter(played.models.values()))  # the slowest cadence comes first
            found[f"{name} quality"] = at.measures[0].quality
            found[f"{name} passes"], found[f"{name} cpu"] = at.sample_passes, at.cpu_s
    return found


def cycle(data: Path, batches: int) -> list[Row]:
    """Micro-batches of 500 of the flights, each learned, gated and signed."""
    tell("cycle: the stream")
    setup = setup_of("flight_delay", first(asked_of("flight_delay", data), 40_000 + 500 * batches))
    with tempfile.TemporaryDirectory() as home:
        seconds, examples = _cycles(setup, Path(home), batches)
    whole = np.sum([seconds[step] for step in STEPS], axis=0)
    p50_s = float(np.median(whole))
    return [
        Row(
            "one cycle, micro-batch of 500, flights family, candidate gated and signed: p50",
            p50_s,
            "s",
            0.4,
        ),
        *(Row(f"one cycle, {step}: p50", float(np.median(seconds[step])), "s") for step in STEPS),
        Row("examples through the whole cycle", examples / float(np.sum(whole)), "1/s"),
        Row("memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "MB"),
    ]


def _cycles(setup: Setup, home: Path, batches: int) -> tuple[dict[str, list[float]], int]:
    family, stream = setup.family(0), setup.stream
    cuts = stream.cuts(family.config, -np.inf)
    known = np.concatenate([cut.positions for cut in cuts[:-batches]])
    rows = stream.rows_at(known)
    learner = Cycle(family, rows.features[:REFERENCE_ROWS])
    learner.pretrain(rows)
    lineage, hold_out = Lineage(home / "lineage"), recent_hold_out(family)
    hold_out.add([stream.example(position) for position in known.tolist()])
    static = EvaluationSet(rows.features[:STATIC_ROWS], rows.labels[:STATIC_ROWS])
    gate = Gate(gate_limits(family), static, hold_out, lineage, Keys({}))
    keys.create(home, [family.name])
    signing = _Signing(home, family, gate)
    seconds: dict[str, list[float]] = defaultdict(list)
    serving: Path | None = None
    for number, cut in enumerate(cuts[-batches:], start=1):
        batch = stream.batch(number, cut)
        before = dict(learner.teaching.seconds)
        started_s = time.perf_counter()
        learner.learn(batch)
        spent = {
            step: value - before.get(step, 0.0) for step, value in learner.teaching.seconds.items()
        }
        spent["watch"] = time.perf_counter() - started_s - sum(spent.values())  # and the rest
        spent["quantize"], candidate = _timed(learner.candidate)
        hold_out.add(batch.examples)
        spent["gate"], judgement = _timed(
            lambda candidate=candidate, serving=serving: gate.judge(
                candidate.package, candidate.float_package, serving
            )
        )
        spent["sign"], _ = _timed(
            lambda candidate=candidate, number=number: signing.sign(candidate, number)
        )
        for step in STEPS:
            seconds[step].append(spent.get(step, 0.0))
        if judgement.outcome == "pass":
            serving = home / "serving.onnx"
            serving.write_bytes(candidate.package)
    signing.close()
    return seconds, 500 * batches


class _Signing:
    """A publisher that signs each candidate as a release, to disk."""

    def __init__(self, home: Path, family: Family, gate: Gate) -> None:
        self._family, self._gate = family, gate
        self._loop = asyncio.new_event_loop()
        bus = self._loop.run_until_complete(MemoryBroker().connect(name="bench"))
        signers = release_signers(Home(home), lambda _family, _sha256: True)
        self._publisher = Publisher(home, bus, signers, SystemClock())

    def sign(self, candidate: Candidate, number: int) -> None:
        release = ReleaseFile(
            self._family.name, f"r{number:05d}", number, candidate.package, variants={}
        )
        self._loop.run_until_complete(self._publisher.publish(release))

    def close(self) -> None:
        self._loop.close()


def int8(data: Path, seeds: int, rows: int | None) -> list[Row]:
    """What int8 and what distilling cost, on rows that nobody trained on."""
    found = over_seeds(
        setup_of("flight_delay", first(asked_of("flight_delay", data), rows)), seeds, _forms
    )
    return [
        Row(
            "int8 student against its float form: AUC lower by",
            found["float"] - found["int8"],
            "",
            0.001,
        ),
        Row(
            "int8 student against its teacher: AUC lower by",
            found["teacher"] - found["int8"],
            "",
            0.003,
        ),
        Row("int8 student: AUC on held-out rows", found["int8"], ""),
        Row("int8 student: bytes", found["bytes"], "B"),
    ]


def _forms(setup: Setup, seed: int) -> dict[str, float]:
    family, stream = setup.family(seed), setup.stream
    learned = course(family, stream).cycle
    positions = [at for at in range(len(stream.released.rows)) if is_held_out(stream.example(at))]
    held = stream.rows_at(np.array(positions))
    task, candidate = family.config.task, learned.candidate()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.onnx"
        path.write_bytes(candidate.package)
        answers = score_batch(Runner(path), held.features)
    return {
        "int8": task.quality(held.labels, answers),
        "float": task.quality(held.labels, learned.answers(held.features)),
        "teacher": task.quality(held.labels, learned.replicas.answers(held.features)),
        "bytes": float(len(candidate.package)),
    }


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    started_s = time.perf_counter()
    found = call()
    return time.perf_counter() - started_s, found
