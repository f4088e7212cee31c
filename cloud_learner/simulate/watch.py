"""The watch: what the learner and the devices said last, for whoever plays and shows a run.

Why: a run is judged from outside, by what its parts say of themselves over the broker.

Invariants: it only listens. A device's report is kept for each of its lives, so that what a killed
process had counted still counts.

Knows nothing about what is played, injected or shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

from edge_runtime.bus.base import Bus, Message
from edge_runtime.errors import TransportError
from edge_runtime.metrics import Histogram
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import LearnerStatus, Report


class Watch:
    """What the learner and the devices said last, and the latencies of all their lives."""

    def __init__(self) -> None:
        self.status: LearnerStatus | None = None
        self.detail: dict[str, Any] = {}
        self.reports: dict[str, Report] = {}
        self.lives: dict[tuple[str, int], Report] = {}
        self.moved = asyncio.Event()
        self.on_status: list[Any] = []
        self.check_alive: Callable[[], None] = lambda: None

    async def follow(self, bus: Bus) -> None:
        """Listen to the learner's status and to every report."""
        await bus.subscribe(subjects.LEARNER_STATUS, self._take_status)
        await bus.subscribe(subjects.report("*"), self._take_report)

    async def wait(self, what: str, ready: Any, bound_s: float) -> None:
        """Wait until `ready()`. Raises: TransportError naming what did not come."""
        until_s = time.monotonic() + bound_s
        while not ready():
            self.check_alive()
            if time.monotonic() > until_s:
                raise TransportError("demo_stuck", f"{what} did not come within {bound_s:.0f} s")
            self.moved.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.moved.wait(), 0.5)

    def family(self, name: str) -> dict[str, Any]:
        """What the learner said last of one family; nothing before it spoke."""
        found: dict[str, Any] = self.detail.get("families", {}).get(name, {})
        return found

    def rollout(self, family: str) -> dict[str, Any]:
        """Its rollout, as `Controller.status` says it."""
        found: dict[str, Any] = self.family(family).get("rollout", {})
        return found

    def decisions(self, family: str) -> list[dict[str, Any]]:
        """The newest decisions about its releases."""
        found: list[dict[str, Any]] = self.rollout(family).get("decisions", [])
        return found

    def latency(self) -> Histogram:
        """Of every predict of every life of every device."""
        whole = Histogram()
        for report in self.lives.values():
            whole.merge(Histogram(list(report.predict_us)))
        return whole

    def counter(self, name: str) -> int:
        """A counter summed over all lives of all devices."""
        return sum(report.counters.get(name, 0) for report in self.lives.values())

    def refusals(self) -> int:
        """Updates that devices have refused so far, over all lives."""
        return sum(sum(report.refused.values()) for report in self.lives.values())

    async def _take_status(self, message: Message) -> None:
        self.status = codec.decode_status(message.data)
        self.detail = json.loads(self.status.detail or "{}")
        self.moved.set()
        for call in self.on_status:
            call()

    async def _take_report(self, message: Message) -> None:
        report = codec.decode_report(message.data)
        self.reports[report.device] = report
        self.lives[report.device, report.epoch] = report
        self.moved.set()


def quantiles(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Median and 99th percentile (nearest rank); None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None, None
    last = len(ordered) - 1
    return ordered[round(0.5 * last)], ordered[min(last, round(0.99 * last))]
