"""A hundred swaps under load: nothing fails, nothing is mixed, memory stays, windows survive.

The load runs in a process of its own, so that its memory is that of a runtime and of nothing else.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from edge_runtime import factory
from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig, LogConfig
from edge_runtime.features.spec import Spec
from edge_runtime.inference.slot import Arm, load_arm
from edge_runtime.rollout.plan import Plan, PlanArm, model_path
from edge_runtime.runtime import Event, Runtime
from edge_runtime.wire import codec
from edge_runtime.wire.messages import PredictionRecord

NOW_S = 1_360_000_000.0
MIB = 1 << 20
SWAPS, WARM_UP = 100, 20
BIASES = {"a-stable": 0.0, "a-canary": 0.1, "b-stable": 2.0, "b-canary": 2.1}
ANSWERS = {release: 1 / (1 + math.exp(-bias - 0.999)) for release, bias in BIASES.items()}
WritePackage = Callable[..., tuple[Path, str]]
Package = tuple[str, str]


def configured(folder: Path, linger_ms: int = 5) -> EdgeConfig:
    return EdgeConfig(
        device="EWR",
        families=["toy"],
        state_dir=folder / "state",
        socket=folder / "edge.sock",
        log=LogConfig(linger_ms=linger_ms),
    )


def scheduled(time_s: float = NOW_S) -> Event:
    return Event("scheduled", time_s, {"carrier": "UA", "distance": 998.0})


def arms_of(packages: dict[str, Package], seq: int = 1) -> tuple[list[Arm], Plan]:
    """`packages`, release -> (path, hash), the stable one first, loaded and planned as equals."""
    arms, planned, weight = [], [], 1 / len(packages)
    for name, (release, (path, sha256)) in zip(
        ("stable", "canary"), packages.items(), strict=False
    ):
        arms.append(load_arm(path, sha256, name, release, weight))
        planned.append(PlanArm(release, model_path("toy", release), sha256, seq, weight))
    stable, canary = [*planned, None][:2]
    return arms, Plan(family="toy", seq=seq, stable=stable, canary=canary)


class Load:
    """Threads that ask a runtime as fast as they can, and what they were told."""

    def __init__(self, runtime: Runtime, threads: int = 3) -> None:
        self._runtime, self._over = runtime, threading.Event()
        self.failed: list[str] = []
        self.told: list[Counter[tuple[str, float]]] = [Counter() for _ in range(threads + 1)]
        works = [self._predict] * threads + [self._infer]
        self._threads = [
            threading.Thread(target=self._ask, args=(work, told))
            for work, told in zip(works, self.told, strict=True)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, work: Callable[[], tuple[str, float]], told: Counter[tuple[str, float]]) -> None:
        while not self._over.is_set():
            try:
                told[work()] += 1
            except Exception as error:
                self.failed.append(repr(error))

    def _predict(self) -> tuple[str, float]:
        answer = self._runtime.predict("toy", scheduled())
        return answer.release, round(answer.outputs[0], 4)

    def _infer(self) -> tuple[str, float]:
        row = np.array([[0.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
        return "stable", round(
            float(self._runtime.infer("toy", {"features": row})["probability"][0, 0]), 4
        )


def main(folder: Path, generations: list[dict[str, Package]]) -> None:
    """Swap between `generations` under load and say what came of it, as one line of JSON."""
    with Runtime.open(configured(folder), clock=ManualClock(NOW_S)) as runtime:
        seq = 0

        def play(swaps: int) -> Load:
            nonlocal seq
            with Load(runtime) as load:
                for _ in range(swaps):
                    seq += 1
                    runtime.swap("toy", *arms_of(generations[seq % 2], seq))
            runtime._members["toy"].pipeline.slot.settle()
            return load

        runtime.swap("toy", *arms_of(generations[0]))
        failed = play(WARM_UP).failed
        before = resident_bytes()
        load = play(SWAPS)
        grown = resident_bytes() - before
        report = {
            "failed": failed + load.failed,
            "told": [[[*key, count] for key, count in told.items()] for told in load.told],
            "grown": grown,
            "slot": runtime._members["toy"].pipeline.slot.statistics(),
            "counters": runtime.counters(),
        }
    print(json.dumps(report))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


@pytest.fixture
def generations(write_package: WritePackage) -> list[dict[str, Package]]:
    """Two plans of two arms; no two of their answers are alike."""
    return [
        {
            release: (str(path), sha256)
            for release, (path, sha256) in (
                (release, write_package(bias=bias, ballast=256))
                for release, bias in BIASES.items()
                if release[0] == plan
            )
        }
        for plan in "ab"
    ]


def test_a_hundred_swaps_under_load_fail_nothing_mix_nothing_and_leave_no_memory(
    tmp_path: Path, generations: list[dict[str, Package]], capsys: pytest.CaptureFixture[str]
) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), json.dumps(generations)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        timeout=120,
        check=True,
    )
    report: dict[str, Any] = json.loads(done.stdout)
    told = [{(release, value): n for release, value, n in each} for each in report["told"]]

    assert report["failed"] == []
    predicted: Counter[tuple[str, float]] = sum(map(Counter, told[:-1]), Counter())
    assert dict(predicted.keys()) == pytest.approx(ANSWERS, abs=1e-4)
    assert len(predicted) == len(ANSWERS), "an answer was not that of its release"
    assert set(told[-1]) == {("stable", 0.5), ("stable", 0.8808)}
    assert report["slot"] == {
        "swaps": 1 + WARM_UP + SWAPS,
        "swap_failures": 0,
        "leases": 0,
        "draining": 0,
    }
    assert report["counters"]["requests_dropped"] == report["counters"]["request_errors"] == 0
    assert report["grown"] <= 3 * MIB
    assert scored_by_one_plan(tmp_path) == report["counters"]["predictions"]
    with capsys.disabled():
        asked = sum(predicted.values()) + sum(told[-1].values())
        print(f"\n  {SWAPS} swaps, {asked} answers, {report['grown'] / MIB:+.1f} MiB", end=" ")


def scored_by_one_plan(folder: Path) -> int:
    """How many predictions are in the log; each was scored by both arms of one plan."""
    count = 0
    with Runtime.open(configured(folder), clock=ManualClock(NOW_S)) as runtime:
        for _, _, data in runtime.log.tail("event", 0, 0):
            record = codec.decode_record(data)
            assert isinstance(record, PredictionRecord)
            scored = {each.release: each.outputs[0] for each in record.scored}
            assert len({release[0] for release in scored}) == 1, scored
            assert {release[2:] for release in scored} == {"stable", "canary"}
            assert all(abs(ANSWERS[release] - value) < 1e-4 for release, value in scored.items())
            count += 1
    return count


def departed(index: int) -> Event:
    fields = {"carrier": ("UA", "AA")[index % 2], "delay": index / 7}
    return Event("departed", NOW_S + 20 * index, fields)


def features(runtime: Runtime, time_s: float) -> bytes:
    """The feature values behind an answer, from the log."""
    runtime.predict("toy", scheduled(time_s))
    last = runtime.log.handed_out("event")
    asyncio.run(runtime.log.wait_durable("event", last))
    [data] = [data for _, seq, data in runtime.log.tail("event", runtime.epoch, last - 1)]
    record = codec.decode_record(data)
    assert isinstance(record, PredictionRecord)
    return record.features


def watched(folder: Path, package: Package, events: int) -> Runtime:
    """A runtime that serves `package` and has seen so many departures, and answered at each fifth;
    hardly any of it is durable yet.
    """
    folder.mkdir()
    runtime = Runtime.open(configured(folder, linger_ms=200), clock=ManualClock(NOW_S))
    runtime.swap("toy", *arms_of({"r1": package}))
    for index in range(events):
        runtime.observe("toy", departed(index))
        if not index % 5:
            runtime.predict("toy", scheduled(NOW_S + 20 * index))
    return runtime


@pytest.fixture
def wider(toy_spec: Spec) -> Spec:
    """The toy's features and one more, over a window that the toy does not keep."""
    spec = json.loads(toy_spec.to_json())
    window = {"over": "scheduled", "key": "carrier", "statistic": "count", "span_s": 490.0}
    spec["features"].append({"name": "asked", "window": window})
    return Spec.from_json(json.dumps(spec))


def packaged(write_package: WritePackage, **options: Any) -> Package:
    path, sha256 = write_package(**options)
    return str(path), sha256


def test_windows_of_an_unchanged_definition_are_carried_over_a_swap(
    tmp_path: Path, write_package: WritePackage
) -> None:
    with watched(tmp_path / "a", packaged(write_package), 60) as runtime:
        before = features(runtime, NOW_S + 1200)
        runtime.swap("toy", *arms_of({"r2": packaged(write_package, bias=1.0)}, 2))
        assert features(runtime, NOW_S + 1200) == before
        assert np.frombuffer(before, "<f4")[2:] == pytest.approx(
            [60, sum(range(60)) / 60 / 7, sum(range(0, 60, 2)) / 7]
        )


@pytest.mark.parametrize(
    "take",
    [Runtime.swap, lambda runtime, *release: asyncio.run(runtime.adopt(*release))],
    ids=["swap", "adopt"],
)
def test_windows_that_a_release_brings_know_what_came_before_it(
    tmp_path: Path, write_package: WritePackage, wider: Spec, take: Callable[..., None]
) -> None:
    """As if it had served all along, though nothing had time to become durable."""
    new = packaged(write_package, spec=wider)
    release = arms_of({"r2": new}, 2)
    with watched(tmp_path / "old", packaged(write_package), 60) as runtime:
        take(runtime, "toy", *release)
        swapped = features(runtime, NOW_S + 1200)
    with watched(tmp_path / "new", new, 60) as runtime:
        assert swapped == features(runtime, NOW_S + 1200)
    assert np.frombuffer(swapped, "<f4")[5] == 4  # at 800, 900, 1000 and 1100 s, before 1200 s


def test_a_restart_after_the_swap_knows_the_same(
    tmp_path: Path, write_package: WritePackage, wider: Spec
) -> None:
    path, sha256 = write_package(spec=wider)
    release = arms_of({"r2": (str(path), sha256)}, 2)
    with watched(tmp_path / "a", packaged(write_package), 60) as runtime:
        runtime.swap("toy", *release)
        before = np.frombuffer(features(runtime, NOW_S + 1200), "<f4")
        config = runtime.config
    factory.install(config, path, factory.inspect(path))
    with Runtime.open(config, clock=ManualClock(NOW_S)) as runtime:
        after = np.frombuffer(features(runtime, NOW_S + 1200), "<f4")
    assert after[:5].tobytes() == before[:5].tobytes()
    assert (before[5], after[5]) == (4, 5)  # what was asked before the restart counts after it


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
