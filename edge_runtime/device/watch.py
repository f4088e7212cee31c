"""Looks at what a release answers live, and leaves one that answers nothing good any more.

Why: a package is proven on samples; on what really comes it may fail each time, or say NaN. Then
the release before it is better than waiting for somebody to look, and it needs no network.

Invariants: a good newest answer acquits; only BAD_LOOKS in a row that found bad ones condemn. What
is left is in quarantine, so no update brings it back; a family's last release is never left. A
model that ends the process, or hangs in it, is the business of `starts`.

Knows nothing about models; looking costs the hot path an assignment.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping

from edge_runtime.device.family import Family
from edge_runtime.errors import HeadwaterError

LOOK_S = 1.0
BAD_LOOKS = 5

log = logging.getLogger("edge_runtime")


class Watch:
    """Watches `members` once it runs; `leave`, of a family and for a reason, goes back."""

    def __init__(
        self, members: Mapping[str, Family], leave: Callable[[str, str], Awaitable[str]]
    ) -> None:
        self._members, self._go_back = members, leave
        self._before: dict[str, tuple[int, int]] = {}
        self._bad = dict.fromkeys(members, 0)
        self._counts = {"bad_looks": 0, "releases_left": 0}

    async def run(self) -> None:
        """Look once a second until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Judge what was answered since the last look."""
        for family, member in self._members.items():
            answers, failures, newest = member.live()
            before = self._before.get(family, (0, 0))
            self._before[family] = answers, failures
            answered, failed = answers > before[0], failures > before[1]
            if answered and newest is not None and all(map(math.isfinite, newest.outputs)):
                self._bad[family] = 0
            elif answered or failed:
                self._bad[family] += 1
                self._counts["bad_looks"] += 1
            if self._bad[family] >= BAD_LOOKS:
                self._bad[family] = 0
                await self._leave(family)

    def statistics(self) -> dict[str, int]:
        """Looks that found only bad answers, and releases that were left for them."""
        return dict(self._counts)

    async def _leave(self, family: str) -> None:
        try:
            release = await self._go_back(family, "only bad answers")
        except HeadwaterError as error:
            log.error("%s gives only bad answers, and stays: %s", family, error)  # noqa: TRY400
            return
        self._counts["releases_left"] += 1
        log.error("%s gave only bad answers; it goes on with %s", family, release)
