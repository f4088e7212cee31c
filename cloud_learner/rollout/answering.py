"""How often each release answered, by what devices report, since somebody asked last.

Why: labels come hours after the answers; who draws shares must know how many are under way.

Invariants: what a device counts only adds up within a process of its, and the first report that is
heard of one says where it begins; so a restart here loses a few answers, and counts none twice.

Knows nothing about labels. Lives in memory alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from edge_runtime.wire.messages import Report


class Answering:
    """Counts of one family."""

    def __init__(self, family: str) -> None:
        self._family = family
        self._told: dict[str, tuple[int, dict[str, int]]] = {}
        self._since: Counter[str] = Counter()

    def hear(self, report: Report) -> None:
        """Take what a device has counted in its present process."""
        now = {arm.release: arm.answered for arm in report.arms if arm.family == self._family}
        epoch, before = self._told.get(report.device, (0, {}))
        if report.epoch == epoch:
            for release, answered in now.items():
                self._since[release] += max(answered - before.get(release, 0), 0)
        self._told[report.device] = report.epoch, now

    def since(self, releases: Iterable[str]) -> list[int]:
        """The answers of each release since the last call."""
        found = [self._since[release] for release in releases]
        self._since.clear()
        return found
