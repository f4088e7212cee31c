"""How a device stands: its report to the cloud, and the status that it tells those beside it.

Why: both are made of the same numbers, and neither must cost what serves anything.

Knows nothing about how the numbers come to be.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from edge_runtime.clock import Clock
from edge_runtime.config import EdgeConfig
from edge_runtime.device.adapting import Adapting
from edge_runtime.device.family import Family
from edge_runtime.events.log import CLASSES, EventLog
from edge_runtime.metrics import Histogram
from edge_runtime.wire.messages import WIRE_VERSION, Mark, Report

_PIPELINE_COUNTS = ("swaps", "swap_failures", "late_events", "late_labels")


class Device(Protocol):
    """What is asked of a runtime here."""

    config: EdgeConfig
    device: str
    epoch: int
    log: EventLog
    adapting: Adapting

    def counters(self) -> dict[str, int]: ...

    def latencies(self) -> dict[str, Histogram]: ...


def report(
    device: Device,
    families: Collection[Family],
    clock: Clock,
    refused: dict[str, int],
    number: int,
) -> Report:
    """What `device` says about itself to the cloud, for the `number`th time in this life."""
    numbers = device.log.statistics()
    return Report(
        WIRE_VERSION,
        device.device,
        device.epoch,
        clock.now_s(),
        device.config.attributes,
        [arm for family in families for arm in family.reports()],
        max(family.plan_seq for family in families),
        device.counters(),
        refused,
        device.latencies()["predict"].counts(),
        numbers["bytes"],
        numbers["pending"],
        [Mark(epoch, name, last) for name in CLASSES for epoch, last in device.log.owed(name)],
        number=number,
        shadows=[shadow for family in families for shadow in family.shadow_reports()],
        moments=device.adapting.exporting.told(),
    )


def health(config: EdgeConfig, status: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the device works worse than it should, and by what; `status` is all that it counts.

    It answers all the same: what stops answers is told by `ready`.
    """
    uplink = status.get("uplink", {})
    nearly = 0.9 * (config.log.bytes_max_mb << 20)
    signs = {
        "log_failing": status["log"]["failing"],
        "log_full": bool(config.nats) and status["log"]["bytes"] > nearly,
        "stream_full": uplink.get("held", 0),
        "duplicate_identity": uplink.get("duplicate_identity", 0),
        "bad_answers": status.get("watch", {}).get("releases_left", 0),
        "crash_loop": status.get("starts", {}).get("releases_left", 0),
        "metadata_stale": status.get("agent", {}).get("metadata_stale", 0),
    }
    reasons = [name for name, sign in signs.items() if sign]
    return {"degraded": int(bool(reasons)), "reasons": reasons}


def states(families: Mapping[str, Family]) -> dict[str, bytes]:
    """The windows of each family, as a snapshot keeps them."""
    return {name: family.pipeline.snapshot() for name, family in families.items()}


def counters(asked: Mapping[str, int], families: Collection[Family]) -> dict[str, int]:
    """`asked`, and what the pipelines of `families` count, summed."""
    numbers = [family.pipeline.statistics() for family in families]
    return dict(asked) | {name: sum(each[name] for each in numbers) for name in _PIPELINE_COUNTS}


def told(device: Device, families: Mapping[str, Family]) -> dict[str, Any]:
    """The part of a status that speaks of what is served and how fast."""
    return {
        "device": device.device,
        "epoch": device.epoch,
        "families": {name: family.statistics() for name, family in families.items()},
        "counters": device.counters(),
        **{f"{name}_us": each.summary() for name, each in device.latencies().items()},
    }
