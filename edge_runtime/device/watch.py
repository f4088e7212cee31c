"""Looks at what a release answers live, and leaves one that answers nothing good any more.

Why: a package is proven on samples; on what really comes it may fail each time, or say NaN. Then
the release before it is better than waiting for somebody to look, and it needs no network.

Invariants: a good newest answer acquits; only BAD_LOOKS in a row that found bad ones condemn, or
that found the same run on the worker, long after its answers were of use. What is left is in
quarantine, so no update brings it back; a family's last release is never left. A model that ends
the process, or hangs in the event loop, is the business of `starts`.

Knows nothing about models; looking costs the hot path an assignment.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping

from edge_runtime.device.family import Family
from edge_runtime.errors import HeadwaterError
from edge_runtime.inference.slot import Arm
from edge_runtime.inference.worker import Run, Worker

LOOK_S = 1.0
BAD_LOOKS = 5

log = logging.getLogger("edge_runtime")


class Watch:
    """Watches `members`, and `worker`, where heavy models run, once it runs; `leave`, of a family
    and for a reason, goes back.
    """

    def __init__(
        self,
        members: Mapping[str, Family],
        leave: Callable[[str, str], Awaitable[str]],
        worker: Worker,
    ) -> None:
        self._members, self._go_back, self._worker = members, leave, worker
        self._run: tuple[Run | None, int] = None, 0
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
                await self._leave(family, "only bad answers")
        await self._look_at_worker()

    def statistics(self) -> dict[str, int]:
        """Looks that found only bad answers, and releases that were left for them."""
        return dict(self._counts)

    async def _look_at_worker(self) -> None:
        """Looks are counted, not time: a machine that was suspended is no model that hangs."""
        run, before = self._worker.running, self._run
        if run is None or run.owner is None:
            self._run = None, 0
            return
        seen = before[1] + 1 if run is before[0] else 1
        self._run = run, seen
        if seen < max(BAD_LOOKS, run.useless_s / LOOK_S):
            return
        self._run = run, 0
        self._counts["bad_looks"] += seen
        serves = (each for each in self._members if self._serving(each) is run.owner)
        family = next(serves, None)  # none: what hangs was replaced meanwhile
        if family is None or await self._leave(family, "no answer for long"):
            self._worker.leave(run)

    def _serving(self, family: str) -> tuple[Arm, ...]:
        return self._members[family].pipeline.slot.arms

    async def _leave(self, family: str, why: str) -> bool:
        try:
            release = await self._go_back(family, why)
        except HeadwaterError as error:
            log.error("%s gives %s, and stays: %s", family, why, error)  # noqa: TRY400
            return False
        self._counts["releases_left"] += 1
        log.error("%s gave %s; it goes on with %s", family, why, release)
        return True
