"""Shadows: releases that answer nobody, compared with the stable one on what really comes.

Why: a release can be watched on live events before anybody depends on it, on one condition: that
nobody notices.

How: each event that the stable arm answered is offered, which appends references to a queue. A
thread of low priority takes from it in idle time, runs both releases on their own features of the
same event, one after the other and alike, and adds up how the shadow's answer differs from the one
that was given.

Invariants: no answer waits for a shadow or depends on one. At most QUEUE_ROWS rows wait, and the
newest is dropped where there is no room. While an answer is being made, or work waits for the
worker, nothing is compared; where answers took more than LOAD_MAX of the time since the last turn,
all that waits is dropped. The thread rests four times as long as it works. What a shadow does wrong
is judged as of any trial; one that hangs is ended by whoever watches the trials.

Knows nothing about plans and reports' ways.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from math import isfinite
from time import perf_counter
from typing import Protocol

import numpy as np

from edge_runtime.clock import Clock
from edge_runtime.cpus import flush_denormals
from edge_runtime.inference.package import Matrix
from edge_runtime.inference.scoring import GIVEN_UP, Answer, Rows, score_many
from edge_runtime.inference.slot import Arm, Slot
from edge_runtime.wire.messages import ShadowReport

QUEUE_ROWS = 64
TICK_S = 0.05
WORK_S = 0.01
REST = 4.0
LOAD_MAX = 0.5
CLOSE_S = 2.0
_NICENESS = 10
_SPREAD = 0.1
"""Numbers agree that differ by at most so many standard deviations of the golden answers."""

Judge = Callable[[Sequence[Arm], Sequence[bool], Sequence[int]], None]
"""Is told of a run: the stable arm and the shadow, which answer can be used, what each took."""

Agree = Callable[[Sequence[float], Sequence[float]], bool]


class Comparison:
    """A shadow of `slot` beside the stable release `against`, and what comparing them gave."""

    def __init__(self, slot: Slot, shadow: Arm, judge: Judge) -> None:
        assert shadow.info is not None
        self.release, self.against = shadow.release, slot.arms[0].release
        self.slot, self.judge = slot, judge
        self.agree = agreement(shadow.info.golden_outputs)
        self.offered_in_vain = self.given_up_on = 0
        self._sums = (0, 0, 0, 0.0, 0.0, 0.0)

    def add(self, given: Sequence[float], answer: Answer | None, took_ns: int) -> None:
        """Count a row: the answer that was `given`, and the shadow's; None where none is usable."""
        rows, agreed, bad, distances, squares, run_us = self._sums
        good, distance = isinstance(answer, list), 1.0
        if isinstance(answer, list):
            pairs = zip(given, answer, strict=True)
            distance = min(1.0, max(abs(one - other) for one, other in pairs))
            agreed += self.agree(given, answer)
        self._sums = (
            rows + 1,
            agreed,
            bad + (not good),
            distances + distance,
            squares + distance * distance,
            run_us + took_ns / 1000,
        )

    def report(self, family: str) -> ShadowReport:
        """The sums so far."""
        rows, agreed, bad, distances, squares, run_us = self._sums
        dropped = self.offered_in_vain + self.given_up_on
        names = family, self.release, self.against
        return ShadowReport(*names, rows, dropped, agreed, bad, distances, squares, run_us)


class Load(Protocol):
    """What is asked of those who answer."""

    def is_busy(self) -> bool:
        """Whether somebody waits for an answer now."""

    def spent_us(self) -> float:
        """What all answers took so far."""


class Shadowing:
    """The thread that compares shadows beside `load`; it starts with the first of them."""

    def __init__(self, clock: Clock, load: Load) -> None:
        self._clock, self._load = clock, load
        self._queue: deque[tuple[Comparison, Rows, tuple[float, ...]]] = deque()
        self._looked = clock.monotonic_s(), 0.0
        self._thread: threading.Thread | None = None
        self._turn, self._closed = threading.Lock(), threading.Event()

    def of(self, slot: Slot, before: Sequence[Comparison], judge: Judge) -> tuple[Comparison, ...]:
        """For each shadow in `slot` that of `before` which compares the same releases, or anew."""
        shadows = [arm for arm in slot.resident if arm.shadow]
        known = {(each.release, each.against): each for each in before}
        if shadows and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
            self._thread.start()
        return tuple(
            known.get((arm.release, slot.arms[0].release)) or Comparison(slot, arm, judge)
            for arm in shadows
        )

    def offer(self, comparison: Comparison, rows: Rows, given: Answer) -> None:
        """Have the shadow's answer compared with the one that was `given`, if there is time; `rows`
        are the features for the stable release and for the shadow. On the thread that answers.
        """
        if len(self._queue) >= QUEUE_ROWS:
            comparison.offered_in_vain += 1
            return
        assert isinstance(given, list)
        self._queue.append((comparison, rows, tuple(given)))  # the list is the caller's by now

    def turn(self) -> None:
        """Compare what waits, for as long as nobody wants an answer, and a short time at most."""
        with self._turn:
            if self._queue and self._is_loaded():
                while self._queue:
                    self._queue.popleft()[0].given_up_on += 1
            until_s = perf_counter() + WORK_S
            while self._queue and perf_counter() < until_s and not self._load.is_busy():
                _compare(*self._queue.popleft())

    def close(self) -> None:
        """End the thread after the run that it is at; one that hangs ends with the process."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def statistics(self) -> dict[str, int]:
        """How many rows wait now."""
        return {"waiting": len(self._queue)}

    def _is_loaded(self) -> bool:
        """Whether answers took most of the time since this was asked last."""
        now_s, spent_us = self._clock.monotonic_s(), self._load.spent_us()
        before_s, before_us = self._looked
        self._looked = now_s, spent_us
        return spent_us - before_us > LOAD_MAX * 1e6 * (now_s - before_s) > 0

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        flush_denormals()
        pause_s = TICK_S
        while not self._closed.wait(pause_s):
            idle, started_s = not self._queue, perf_counter()
            self.turn()
            worked_s = perf_counter() - started_s
            pause_s = min(1.0, 2 * pause_s) if idle else max(TICK_S, REST * worked_s)


def agreement(golden: Matrix) -> Agree:
    """When two answers of a model with these golden answers, (rows, outputs), decide alike.

    What is a share, one number between 0 and 1, decides by the side of 0.5 on which it lies; shares
    that sum to 1 by the largest of them; other numbers agree within a tenth of the standard
    deviation that they have among the golden answers.
    """
    is_share = bool((golden >= 0).all() and (golden <= 1).all())
    if is_share and golden.shape[1] == 1:
        return lambda one, other: (one[0] >= 0.5) == (other[0] >= 0.5)
    if is_share and np.allclose(golden.sum(1), 1, atol=1e-3):
        return lambda one, other: _largest(one) == _largest(other)
    within = (_SPREAD * golden.std(0)).tolist()
    return lambda one, other: all(
        abs(a - b) <= bound for a, b, bound in zip(one, other, within, strict=True)
    )


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _compare(comparison: Comparison, rows: Rows, given: tuple[float, ...]) -> None:
    lease = comparison.slot.lease()
    with lease:
        shadows = [arm for arm in lease.resident if arm.release == comparison.release]
        if not shadows or not shadows[0].shadow:
            return
        pair = lease.arms[0], shadows[0]
        [([own, answer], took_ns, _)] = score_many(pair, [rows])
        if answer is GIVEN_UP:
            return
        usable = [isinstance(each, list) and isfinite(sum(each)) for each in (own, answer)]
        comparison.add(given, answer if usable[1] else None, took_ns[1])
        comparison.judge(pair, usable, took_ns)
