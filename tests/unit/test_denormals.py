"""Numbers below 1.2e-38 are taken for zero on the threads that run models, and only there.

The flag belongs to a thread, so each test runs models on threads of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from onnx import parser

from edge_runtime.cpus import flush_denormals
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.worker import Worker

TINY = 1e-39
T = TypeVar("T")

# What comes in is tiny already, or becomes so on the way.
KEEPS = "{ y = Identity (x) }"
HALVES = "<float[1] half = {0.5}> { y = Mul (x, half) }"
SHRINKS = "<float[1] little = {1e-30}> { y = Mul (x, little) }"
ROUNDS = 20


@pytest.fixture
def runner(tmp_path: Path) -> Callable[[str], Runner]:
    def load(body: str) -> Runner:
        text = f'<ir_version: 8, opset_import: ["": 17]> g (float[n,4] x) => (float[n,4] y) {body}'
        path = tmp_path / "model.onnx"
        path.write_bytes(parser.parse_model(text).SerializeToString())
        return Runner(path)

    return load


def on_new_thread(call: Callable[[], T], *, flushed: bool) -> T:
    with ThreadPoolExecutor(1, initializer=flush_denormals if flushed else lambda: None) as pool:
        return pool.submit(call).result()


def answer(runner: Runner, value: float) -> bytes:
    """The answer's bytes: to compare tiny numbers, a thread that flushes them is no judge."""
    return runner.infer({"x": np.full((1, 4), value, np.float32)})["y"].tobytes()


@pytest.mark.parametrize(
    ("body", "value", "exact"), [(HALVES, 2 * TINY, TINY), (SHRINKS, 1e-9, TINY)]
)
def test_a_thread_that_flushes_answers_zero_and_any_other_the_tiny_number(
    runner: Callable[[str], Runner], body: str, value: float, exact: float
) -> None:
    model = runner(body)
    assert on_new_thread(lambda: answer(model, value), flushed=True) == bytes(16)
    kept = np.frombuffer(on_new_thread(lambda: answer(model, value), flushed=False), "<f4")
    assert kept == pytest.approx([exact] * 4, rel=1e-5, abs=0)


def test_numbers_that_are_merely_small_stay_what_they_are(
    runner: Callable[[str], Runner],
) -> None:
    small = np.full(4, 1.2e-38, "<f4").tobytes()
    assert on_new_thread(lambda: answer(runner(KEEPS), 1.2e-38), flushed=True) == small
    halved = np.full(4, 1.2e-38, "<f4").tobytes()
    assert on_new_thread(lambda: answer(runner(HALVES), 2.4e-38), flushed=True) == halved


def test_flushing_is_a_matter_of_the_thread_that_asked_for_it(
    runner: Callable[[str], Runner],
) -> None:
    model = runner(SHRINKS)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        before = one.submit(answer, model, 1e-9).result()
        one.submit(flush_denormals).result()
        assert other.submit(answer, model, 1e-9).result() == before != bytes(16)
        assert one.submit(answer, model, 1e-9).result() == bytes(16)


def test_the_thread_of_heavy_models_flushes(runner: Callable[[str], Runner]) -> None:
    model = runner(SHRINKS)

    def work(values: Sequence[float]) -> list[bytes]:
        return [answer(model, value) for value in values]

    worker = Worker(on_start=flush_denormals)
    try:
        assert asyncio.run(worker.submit(work, 1e-9)) == bytes(16)
    finally:
        worker.close()
