"""The page at /metrics: everything that is counted on this device, for Prometheus.

Why: each room counts what it does in its `statistics()`; this page shows all of it, so no table of
metrics has to be kept in step with the rooms.

Invariants: every number in the status is on the page, under the name that its path gives it, with
the family as a label where there is one. There are as many names as the code has, whatever the
traffic.

Knows nothing about what the numbers mean, but for which of them only rise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from edge_runtime.memory import resident_bytes
from edge_runtime.metrics import Histogram, Page, metric_name

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_NOW = frozenset(
    (
        *(
            "bytes",
            "bytes_today",
            "children",
            "connected",
            "degraded",
            "draining",
            "entries",
            "entries_evicted",
        ),
        *("epoch", "event_segments", "failing", "flash_bytes_today", "flash_bytes_yesterday"),
        *("held", "held_bytes", "keys", "keys_evicted", "label_segments", "leases", "linger_ms"),
        *("open", "p50", "p99", "p999", "pending", "pending_bytes", "plan_seq", "run_us", "seq"),
        *("since_s", "tables", "under_way", "unlearned", "waiting"),
        *("waiting_hold", "waiting_jitter", "waiting_quarantine", "waiting_window"),
    )
)
"""Numbers of now, which may fall; every other one only rises while the process lives."""

Labels = dict[str, str]


def exposition(status: Mapping[str, Any], latencies: Mapping[str, Histogram]) -> str:
    """The page about a device's status and how long its answers took, by what was asked."""
    page = Page()
    for asked, values in latencies.items():
        page.histogram(metric_name("edge", asked, "seconds"), values)
    for name, value in status.items():
        if name == "families":
            for family, numbers in value.items():
                _family(page, family, numbers)
        elif name == "withheld":
            for family, numbers in value.items():
                _numbers(page, ("edge", name), numbers, {"family": family})
        elif name == "counters":
            _numbers(page, ("edge",), value, {})
        else:
            _number(page, ("edge", name), value, {})
    _process(page)
    return page.text()


def _family(page: Page, family: str, numbers: Mapping[str, Any]) -> None:
    labels = {"family": family}
    for arm in numbers.get("arms", ()):
        texts = {key: text for key, text in arm.items() if isinstance(text, str)}
        page.gauge("edge_release_info", 1, labels | texts)
    _numbers(page, ("edge", "family"), numbers, labels)


def _numbers(page: Page, path: tuple[str, ...], numbers: Mapping[str, Any], labels: Labels) -> None:
    for name, value in numbers.items():
        _number(page, (*path, name), value, labels)


def _number(page: Page, path: tuple[str, ...], value: Any, labels: Labels) -> None:
    if isinstance(value, Mapping):
        _numbers(page, path, value, labels)
    elif isinstance(value, int | float):
        name = metric_name(*path)
        (page.gauge if path[-1] in _NOW else page.counter)(name, value, labels)


def _process(page: Page) -> None:
    """What Prometheus's own clients tell of a process, under their names."""
    times = os.times()
    page.gauge("process_resident_memory_bytes", resident_bytes())
    page.counter("process_cpu_seconds", times.user + times.system)
    page.gauge("process_open_fds", len(os.listdir("/proc/self/fd")))
