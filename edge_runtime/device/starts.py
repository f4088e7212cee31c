"""Starts that did not end well: a device that dies again and again leaves its newest release.

Why: a model that passed every check may still end the process on some request, and a supervisor
would start it on the same release for ever.

Invariants: a start counts before anything is loaded, durably. It ends well after WELL_S of serving,
or in order; then the count begins anew. Only who holds the lock of the count may change it, so a
second process on a state directory counts for nothing. What is left is in quarantine, so no update
brings it back; a family's last release is never left.

Durable state: `starts.json`, one rename. Knows nothing about why a process died.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os

import msgspec

from edge_runtime.config import EdgeConfig
from edge_runtime.errors import HeadwaterError
from edge_runtime.files import write_atomic
from edge_runtime.rollout.plan import PlanArm, arms_for
from edge_runtime.update.shelf import Shelf

STARTS_MAX = 5
WELL_S = 60.0

log = logging.getLogger("edge_runtime")


class _File(msgspec.Struct):
    version: int
    starts: int


class Starts:
    """The starts in a row of the device of `config` that did not end well, this one included."""

    def __init__(self, config: EdgeConfig) -> None:
        self._config = config
        self._path = config.state_dir / "starts.json"
        self._lock = -1
        self._counts = {"starts": 0, "releases_left": 0}

    def begin(self) -> None:
        """Count this start; after too many, leave each family's newest release for the one before.

        A disk that takes nothing counts nothing.
        """
        with contextlib.suppress(OSError):
            self._config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                return
            self._lock = lock
            starts = self._load()
            if starts >= STARTS_MAX:
                self._leave_newest(starts)
                starts = 0
            self._save(starts + 1)

    async def settle(self) -> None:
        """Serving for so long is a start that went well."""
        await asyncio.sleep(WELL_S)
        await asyncio.to_thread(self.well)

    def well(self) -> None:
        """Count anew: all goes well now."""
        if self._lock >= 0:
            with contextlib.suppress(OSError):
                self._save(0)

    def close(self) -> None:
        """Give the lock back; the end of the process does it as well."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def statistics(self) -> dict[str, int]:
        """Starts in a row that did not end well, and releases that were left for that."""
        return dict(self._counts)

    def _leave_newest(self, starts: int) -> None:
        shelf = Shelf(self._config.state_dir / "shelf")
        for family in self._config.families:
            try:
                arm = _newest(shelf, family, self._config)
                for package in () if arm is None else arm.packages:
                    shelf.quarantine(package.sha256, "crash_loop")
            except HeadwaterError as error:
                log.warning("%s stays as it is: %s", family, error)
                continue
            if arm is not None:
                self._counts["releases_left"] += 1
                log.error("%s is left after %d starts that went wrong", arm.release, starts)

    def _load(self) -> int:
        try:
            return max(0, msgspec.json.decode(self._path.read_bytes(), type=_File).starts)
        except (OSError, msgspec.DecodeError):
            return 0

    def _save(self, starts: int) -> None:
        write_atomic(self._path, msgspec.json.encode(_File(1, starts)), 0o600)
        self._counts["starts"] = starts


def _newest(shelf: Shelf, family: str, config: EdgeConfig) -> PlanArm | None:
    """The arm to leave: the canary, or a stable one that has something before it."""
    plan, previous = shelf.load_current(family), shelf.load_previous(family)
    if plan is None:
        return None
    left = shelf.quarantined()
    for name, arm in reversed(arms_for(plan, config.device, config.attributes)):
        if name == "stable" and previous is None:
            return None
        if not all(each.sha256 in left for each in arm.packages):
            return arm
    return None
