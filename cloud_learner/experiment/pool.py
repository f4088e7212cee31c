"""Jobs on all processors: trajectories side by side, with one bar that says how long it will take.

Why: seeds and policies know nothing of each other, and an afternoon is shorter than a day.

Invariants: results come in the order of the jobs, whichever ended first, and are what one process
alone would have found. An interrupt ends all processes; nothing of theirs stays.

Knows nothing about what a job is, but for its steps.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from edge_runtime.errors import CapacityError

J = TypeVar("J")
R = TypeVar("R")
Run = Callable[[Any, J, Callable[[], None]], R]

LOOK_S = 0.2
_worker: dict[str, Any] = {}


class _StoppedError(Exception):
    """The parent was interrupted."""


def run_all(run: Run[J, R], shared: Any, jobs: Sequence[J], steps: int, workers: int) -> list[R]:
    """`run(shared, job, tick)` for each job; `steps` are the ticks of all of them together.

    With one worker everything runs in this process. Raises: CapacityError `worker_died`.
    """
    with _bar(steps) as advance:
        if workers == 1:
            return [run(shared, job, lambda: advance(1)) for job in jobs]
        return _spread(run, shared, jobs, workers, advance)


def workers_for(jobs: int) -> int:
    """As many as there are processors, and no more than there are jobs."""
    return max(min(os.cpu_count() or 1, jobs), 1)


def _spread(
    run: Run[J, R], shared: Any, jobs: Sequence[J], workers: int, advance: Callable[[int], None]
) -> list[R]:
    context = multiprocessing.get_context("spawn")  # torch and forks do not go together
    done, stopped = context.Value("L", 0), context.Event()
    given = (run, shared, done, stopped)
    with ProcessPoolExecutor(workers, context, _begin, given) as pool:
        try:
            futures = _submitted(pool, jobs)
            _watch(futures, done, advance)
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise CapacityError(
                "worker_died",
                "a process of the experiment was ended from outside; nothing was written",
                "was there too little memory? fewer --seeds or a shorter file need less",
            ) from error
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, jobs: Sequence[Any]) -> list[Future[Any]]:
    """The jobs, begun."""
    with _undisturbed():
        return [pool.submit(_work, job) for job in jobs]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """An interrupt waits for the end. Processes that begin in here inherit that it is blocked, so
    it meets none of their imports, and the pool forgets none that has begun.
    """
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    open_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, open_before)
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt


def _watch(futures: Sequence[Future[Any]], done: Any, advance: Callable[[int], None]) -> None:
    """Move the bar until all have ended, or one has failed."""
    waiting, told = set(futures), 0
    while waiting:
        ended, waiting = wait(waiting, LOOK_S)
        now = done.value
        advance(now - told)
        told = now
        for future in ended:
            future.result()


def _begin(run: Run[Any, Any], shared: Any, done: Any, stopped: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to hear
    _worker.update(run=run, shared=shared, done=done, stopped=stopped)


def _work(job: Any) -> Any:
    _look()
    return _worker["run"](_worker["shared"], job, _tick)


def _tick() -> None:
    _look()
    with _worker["done"].get_lock():
        _worker["done"].value += 1


def _look() -> None:
    if _worker["stopped"].is_set():
        raise _StoppedError


@contextmanager
def _bar(steps: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where that is a terminal, else a line now and then."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(steps)
        return
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=steps)
        yield lambda count: progress.advance(task, count)


class _Lines:
    """Progress as lines, one for each tenth."""

    def __init__(self, steps: int) -> None:
        self._steps, self._done, self._tenth = steps, 0, 0
        self._started_s = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        tenth = 10 * self._done // self._steps
        if tenth > self._tenth:
            self._tenth = tenth
            took_s = time.monotonic() - self._started_s
            left_s = took_s * (self._steps - self._done) / self._done
            print(f"{10 * tenth} % done, about {left_s:.0f} s left", file=sys.stderr)  # noqa: T201
