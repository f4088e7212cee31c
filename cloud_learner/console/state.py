"""What the live view shows of a run, as plain data, and how it writes times.

Why: who gathers the numbers and who draws them share this and nothing else.

Invariants: values only; a state is replaced, never changed.

Knows nothing about terminals.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

DeviceState = Literal["up", "killed", "recovered"]


class DeviceRow(msgspec.Struct, frozen=True, kw_only=True):
    """A device: which release each arm runs, latency of predict, log records not yet uploaded."""

    name: str
    state: DeviceState = "up"
    arms: dict[str, str] = {}
    p50_us: float = 0.0
    p99_us: float = 0.0
    log_pending: int = 0


class LearnerRow(msgspec.Struct, frozen=True, kw_only=True):
    """The learner: `weights` of its replicas; freshness None until the first canary serves."""

    events_per_s: float = 0.0
    archived: int = 0
    cycle: int = 0
    weights: dict[str, float] = {}
    freshness_p50_s: float | None = None
    freshness_p99_s: float | None = None


class FaultRow(msgspec.Struct, frozen=True):
    """A fault that the run injects: what became of it so far; `ok` is None while it is open."""

    name: str
    state: str
    ok: bool | None = None


class ViewState(msgspec.Struct, frozen=True, kw_only=True):
    """All that the view shows. `rollout` is what `Controller.status` says, empty before it does."""

    version: str
    broker_url: str
    elapsed_s: float = 0.0
    event_time_s: float | None = None
    devices: Sequence[DeviceRow] = ()
    learner: LearnerRow = LearnerRow()
    rollout: dict[str, Any] = {}
    faults: Sequence[FaultRow] = ()


def duration(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def moment(time_s: float | None) -> str:
    """An event time, to the minute."""
    return "-" if time_s is None else f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M} UTC"
