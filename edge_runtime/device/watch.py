"""Watches what serves, and leaves what `rollout.health` says is to be left.

Why: a package is proven on samples; on what really comes it may fail each time, say NaN, take long
or never end. Then the release beside it, or the one before it, is better than waiting for somebody
to look, and it needs no network.

How: a thread, for the event loop itself may hang in a model. It looks once a second, and at once
when a family wakes it, which has given up the trial by then: that one answers nothing any more.

Invariants: what is left is in quarantine, so no update brings it back; a family's last release is
never left. What cannot be left, since the disk takes nothing, is tried again at the next look. A
stable release that ends the process, or hangs in the event loop, is the business of `starts`; one
that hangs on the worker is left, and the worker's thread with it.

Knows nothing about models, nor when one is to be left; looking costs the hot path nothing.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from time import monotonic, perf_counter_ns

from edge_runtime.device.family import Family
from edge_runtime.device.releases import Releases
from edge_runtime.errors import HeadwaterError
from edge_runtime.inference.slot import Arm
from edge_runtime.inference.worker import Run, Worker
from edge_runtime.rollout.health import Trial, is_stuck

LOOK_S = 1.0
CLOSE_S = 5.0

log = logging.getLogger("edge_runtime")


class Watch:
    """Watches `members`, and `worker`, where heavy models run, once one of them wakes it;
    `releases` changes what they serve.
    """

    def __init__(self, members: Mapping[str, Family], releases: Releases, worker: Worker) -> None:
        self._members, self._releases, self._worker = members, releases, worker
        self._seen: tuple[Run | None, int] = None, 0
        self._looking, self._woken = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._counts = Counter(bad_looks=0, releases_left=0, trials_left=0)
        for member in members.values():
            member.wake = self.wake

    def wake(self) -> None:
        """Look soon, and from now on once a second."""
        self._woken.set()
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    def look(self) -> None:
        """Leave each trial that failed a gate, or that hangs."""
        with self._looking:
            for member in self._members.values():
                for arm, trial in member.trials():
                    self._look_at(member, arm, trial)

    def look_at_stable(self) -> None:
        """Judge what the stable releases answered since the last time; once a second is meant."""
        for name, member in self._members.items():
            found = member.look()
            self._counts["bad_looks"] += bool(found)
            if found == "leave":
                self._leave(name, "only bad answers")
        self._look_at_worker()

    def close(self) -> None:
        """Look no more; returns when the last look is over."""
        self._closed = True
        self._woken.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def statistics(self) -> dict[str, int]:
        """Looks that found only bad answers; stable releases, and trials, that were left."""
        return dict(self._counts)

    def _run(self) -> None:
        due_s = monotonic() + LOOK_S
        while not self._closed:
            self._woken.wait(max(0.0, due_s - monotonic()))
            self._woken.clear()
            self.look()
            if monotonic() >= due_s:
                due_s = monotonic() + LOOK_S
                self.look_at_stable()

    def _look_at(self, member: Family, arm: Arm, trial: Trial) -> None:
        arms = member.pipeline.slot.arms[:1] or (arm,)
        stable_s = max((each.runner.run_us or 0.0) for each in arms) / 1e6
        for started_ns, rows in list(arm.runner.running.values()):
            trial.waits(started_ns, (perf_counter_ns() - started_ns) / 1e9, rows * stable_s)
        member.heed(arm, trial)
        if not trial.gate:
            return
        try:
            left = self._releases.leave_trial(member, arm, trial.gate)
        except HeadwaterError as error:
            log.error("%s answers no more, but is not left: %s", arm.release, error)  # noqa: TRY400
        else:
            self._counts["trials_left"] += left

    def _look_at_worker(self) -> None:
        """Looks are counted, not time: a machine that was suspended is no model that hangs."""
        run, before = self._worker.running, self._seen
        if run is None or run.owner is None:
            self._seen = None, 0
            return
        looks = before[1] + 1 if run is before[0] else 1
        self._seen = run, looks
        if not is_stuck(looks, run.useless_s / LOOK_S):
            return
        self._seen = run, 0
        self._counts["bad_looks"] += looks
        serving = {id(each.pipeline.slot.arms): name for name, each in self._members.items()}
        family = serving.get(id(run.owner))  # none: what hangs was replaced meanwhile
        if family is None or self._leave(family, "no answer for long"):
            self._worker.leave(run)

    def _leave(self, family: str, why: str) -> bool:
        try:
            release = self._releases.leave_stable(self._members[family], why)
        except HeadwaterError as error:
            log.error("%s gives %s, and stays: %s", family, why, error)  # noqa: TRY400
            return False
        self._counts["releases_left"] += 1
        log.error("%s gave %s; it goes on with %s", family, why, release)
        return True
