"""The worker: one thread that runs the models that are too heavy for the caller's own.

Why: a model that takes milliseconds must not stall the event loop, and a thread pool would let such
models fight for the same few CPUs.

Work that shares a `group` may be done together, up to `rows_max` rows; the first of it then waits
at most `delay_us` for company. With `rows_max` 1, each is done alone and at once.

Invariants: at most `queue_max` pieces of work wait, and the next is refused by name; what was given
up, because its time was over or its caller went away, is never begun. Work that fails together
is done again one by one, so nobody gets another's error. A run that does not end can be left to
itself: its thread is lost, and what waits goes on on another one.

Knows nothing about models. `submit` is for event loops, any number of them, on any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from edge_runtime.errors import CapacityError

QUEUE_MAX = 256
CLOSE_S = 2.0
WORKER_THREAD = "inference"

_COUNTS = ("jobs", "runs", "overloaded", "deadline_exceeded", "threads_lost")

P = TypeVar("P")
R = TypeVar("R")
Work = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Run:
    """A run that goes on: for whom, and after how long it is of no use to anybody."""

    owner: object
    useless_s: float


@dataclass(slots=True)
class _Job:
    work: Work
    payload: Any
    group: Hashable | None
    rows: int
    owner: object
    timeout_s: float | None
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


class Worker:
    """A thread that starts with the first piece of work; `on_start` is called on it before that.

    `deadline_s` is how long a run of one piece of work is given at least before it counts as of no
    use, however little time who asked had.
    """

    def __init__(
        self,
        *,
        queue_max: int = QUEUE_MAX,
        rows_max: int = 1,
        delay_us: float = 0.0,
        deadline_s: float = 0.0,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._queue: queue.Queue[_Job | None] = queue.Queue(queue_max)
        self._rows_max, self._delay_s = rows_max, delay_us / 1e6
        self._on_start, self._deadline_s = on_start, deadline_s
        self._thread: threading.Thread | None = None
        self._starting, self._closed = threading.Lock(), False
        self._held: _Job | None = None
        self._run_now: Run | None = None
        self._counts = dict.fromkeys(_COUNTS, 0)

    async def submit(
        self,
        work: Callable[[Sequence[P]], Sequence[R]],
        payload: P,
        *,
        group: Hashable | None = None,
        rows: int = 1,
        owner: object = None,
        timeout_s: float | None = None,
    ) -> R:
        """The result of `work([payload])`, or of `work` on several payloads of the same group.

        `owner` is told of a run that goes on.
        Raises: CapacityError (overloaded, deadline_exceeded, closed), and what `work` raises.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        self._put(_Job(work, payload, group, rows, owner, timeout_s, loop, future))
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            self._counts["deadline_exceeded"] += 1
            raise CapacityError(
                "deadline_exceeded",
                f"the model did not answer within {timeout_s:g} s; nothing was logged",
                "allow more time, or ask less often",
            ) from error

    @property
    def running(self) -> Run | None:
        """The run that the thread is at."""
        return self._run_now

    def leave(self, run: Run) -> None:
        """Go on without `run`, if it still goes on: its thread is left behind."""
        with self._starting:
            if self._run_now is run and not self._closed:
                self._run_now = None
                self._counts["threads_lost"] += 1
                self._start()

    def close(self) -> None:
        """End the thread after the run that it is at; what waits fails with `closed`. A run that
        takes longer than CLOSE_S is left behind: it ends with the process.
        """
        with self._starting:
            self._closed = True
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
            self._thread.join(CLOSE_S)
            self._drain()  # what a thread that hangs will not

    def statistics(self) -> dict[str, int]:
        """Counts since the start, and `waiting`, the pieces of work that wait now."""
        return self._counts | {"waiting": self._queue.qsize()}

    def _put(self, job: _Job) -> None:
        with self._starting:
            if self._closed:
                raise _closed()
            try:
                self._queue.put_nowait(job)
            except queue.Full:
                self._counts["overloaded"] += 1
                raise CapacityError(
                    "overloaded",
                    f"{self._queue.maxsize} requests wait for the model; this one was not taken",
                    "ask again later, or raise inference.queue_max",
                ) from None
            if self._thread is None:
                self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=WORKER_THREAD, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._on_start()
        while not self._closed and self._take_turn():
            if threading.current_thread() is not self._thread:
                return  # it was left behind, and another one goes on
        self._drain()

    def _take_turn(self) -> bool:
        """Do what waits first, and what goes with it; False at the end. What was done is not held
        while the thread waits for more: it may be the last hold on a model.
        """
        first, self._held = self._held or self._queue.get(), None
        if first is None:
            return False
        jobs = [job for job in self._gathered(first) if not job.future.done()]
        if jobs:
            self._counts["runs"] += 1
            self._counts["jobs"] += len(jobs)
            self._run_now = run = self._run_of(jobs)
            results = _done(jobs)
            if self._run_now is run:
                self._run_now = None
            _deliver(jobs, results)
        return True

    def _run_of(self, jobs: list[_Job]) -> Run:
        """Of no use once it has taken so long for each of its answers, and as long again."""
        allowed_s = [math.inf if each.timeout_s is None else each.timeout_s for each in jobs]
        return Run(jobs[0].owner, max(self._deadline_s, *allowed_s) * (1 + len(jobs)))

    def _gathered(self, first: _Job) -> list[_Job]:
        """`first` and what may be done with it; work of another group is held for the next turn."""
        jobs, rows, until_s = [first], first.rows, time.monotonic() + self._delay_s
        while first.group is not None and rows < self._rows_max:
            try:
                wait_s = until_s - time.monotonic()
                job = self._queue.get(wait_s > 0, max(wait_s, 0.0))
            except queue.Empty:
                break
            if job is None or job.group != first.group or rows + job.rows > self._rows_max:
                self._held = job
                break
            jobs.append(job)
            rows += job.rows
        return jobs

    def _drain(self) -> None:
        left = [self._held] if self._held is not None else []
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._queue.get_nowait()
                left += [job] if job is not None else []
        _deliver(left, [_closed() for _ in left])


def _done(jobs: list[_Job]) -> Sequence[Any]:
    try:
        return jobs[0].work([job.payload for job in jobs])
    except Exception as error:  # whose it is: the thread has to live on for the others
        return [error] if len(jobs) == 1 else [result for job in jobs for result in _done([job])]


def _deliver(jobs: list[_Job], results: Sequence[Any]) -> None:
    for job, result in zip(jobs, results, strict=True):
        with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits any more
            job.loop.call_soon_threadsafe(_settle, job.future, result)


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def _closed() -> CapacityError:
    return CapacityError("closed", "the runtime is closed; the request was not answered")
