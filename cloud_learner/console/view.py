"""The live view of a run: a picture that moves on a terminal, plain lines anywhere else.

Why: a loop that nobody can watch is not believed, and a log must stay readable.

Invariants: `update` draws in the caller's thread, at most twice a second, and starts no
thread; no escape sequence leaves a plain view.

Knows nothing about where its numbers come from; what it shows is handed over whole.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live

from cloud_learner.console.panel import render
from cloud_learner.console.state import ViewState, duration, moment
from edge_runtime.clock import Clock, SystemClock

REDRAW_S = 0.5
PLAIN_EVERY_S = 5.0


def is_plain(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether to print lines: no terminal, a dumb one, or NO_COLOR set to anything."""
    dumb = environment.get("TERM") == "dumb"
    return not stream.isatty() or dumb or bool(environment.get("NO_COLOR"))


class LiveView:
    """Shows states while it is entered; the last one stays on the screen. Writes to stderr.

    With `plain`, and where `is_plain` says so, it prints lines: each change at once, a summary at
    most every PLAIN_EVERY_S.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        plain: bool = False,
        clock: Clock | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock or SystemClock()
        self._plain = plain or is_plain(self._stream, environment)
        self._console = Console(file=self._stream, _environ=environment)
        self._live: Live | None = None
        self._shown: ViewState | None = None
        self._last: ViewState | None = None
        self._next_s = 0.0

    def __enter__(self) -> Self:
        if not self._plain:
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._last is not None and self._last is not self._shown:
            self._show(self._last)
        if self._live is not None:
            self._live.stop()

    def update(self, state: ViewState) -> None:
        """Show `state`, or keep it for the end when something was shown a moment ago."""
        if self._plain:
            self._print(changes(self._last, state))
        self._last = state
        if self._clock.monotonic_s() >= self._next_s or self._shown is None:
            self._show(state)

    def _show(self, state: ViewState) -> None:
        self._shown = state
        every_s = PLAIN_EVERY_S if self._plain else REDRAW_S
        self._next_s = self._clock.monotonic_s() + every_s
        if self._live is None:
            self._print([summary(state)])
        else:
            self._live.update(render(state, self._console.height), refresh=True)

    def _print(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._stream.write(f"{line}\n")
        self._stream.flush()


def changes(before: ViewState | None, after: ViewState) -> Iterator[str]:
    """One plain line for each device, trial, decision and fault that is new or has changed."""
    time = duration(after.elapsed_s)
    old_devices = {row.name: row.state for row in before.devices} if before else {}
    for row in after.devices:
        if old_devices.get(row.name, "up") != row.state:
            yield f"{time}  device {row.name} {row.state}"
    old = before.rollout if before else {}
    if (trial := _release(after.rollout, "canary")) and trial != _release(old, "canary"):
        yield f"{time}  canary {trial} against {_release(after.rollout, 'stable')}"
    seen = max((decision["plan_seq"] for decision in old.get("decisions", ())), default=0)
    for decision in after.rollout.get("decisions", ()):
        if decision["plan_seq"] > seen:
            yield f"{time}  {decision['reason']}: {decision['note']}"
    old_faults = set(before.faults) if before else set()
    for fault in after.faults:
        if fault not in old_faults:
            yield f"{time}  fault {fault.name}: {fault.state}{_said(fault.ok)}"


def summary(state: ViewState) -> str:
    """The whole state in one plain line."""
    learner, counts = state.learner, state.rollout.get("counts", {})
    devices = " ".join(
        f"{row.name}={'/'.join(row.arms.values()) or '-'},{row.p99_us:.0f}us"
        for row in state.devices
    )
    facts = [
        duration(state.elapsed_s),
        f"event time {moment(state.event_time_s)}",
        devices or "no devices",
        f"archived {learner.archived:,} ({learner.events_per_s:,.0f}/s)",
        f"cycle {learner.cycle}",
        f"promoted {counts.get('promoted', 0)}, rolled back {counts.get('rolled_back', 0)}",
    ]
    return "  ".join(facts)


def _release(status: Mapping[str, Any], arm: str) -> str | None:
    return status[arm]["release"] if status.get(arm) else None


def _said(ok: bool | None) -> str:
    return "" if ok is None else " (ok)" if ok else " (BAD)"
