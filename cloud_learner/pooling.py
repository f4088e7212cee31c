"""From what devices tell of their sessions to where the next candidate's prior begins.

Why: reports come by wall time, on the loop; a candidate is made on the trainer's thread, with an
embedding of its own. Between the two each device has one word that waits, and a look, twice a
minute, takes them all.

Invariants: hearing costs the loop nothing, however much is told: a device that says more than one
word between two looks has replaced its own. Words of a release that serves no longer, and what is
no moments, are left out and counted, of each device the last reason. What was told of a release
ends with it, or with the process: a release's package says for how many told sessions its prior
stands, so that what came of them goes on.

Knows nothing about candidates. `hear` belongs to the loop, all else to the trainer's thread.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from cloud_learner.train.dataset import Matrix
from cloud_learner.train.policy import REFERENCE_ROWS
from cloud_learner.train.pooled import Anchor, Pooled, told_of
from edge_runtime.errors import PackageError, RequestError
from edge_runtime.inference.package import read_package
from edge_runtime.inference.runner import Runner
from edge_runtime.wire.messages import SessionMoments

log = logging.getLogger("cloud_learner")

LOOK_EVERY_S = 30.0
WAITING_BYTES_MAX = 32 << 20
REASONS_MAX = 100


@dataclass(frozen=True)
class Served:
    """The release that serves, and its package; both empty where none does."""

    release: str = ""
    package: Path | None = None


NOTHING = Served()
NOBODY = {"moments_devices": 0, "moments_sessions": 0}


class Pooling:
    """The moments of one family; `reference` are its rows, (rows, columns).

    `refused` holds the last reason by device, of those that were refused last; any thread may look.
    """

    def __init__(self, family: str, reference: Matrix) -> None:
        self._family, self._reference = family, reference[:REFERENCE_ROWS]
        self._lock = Lock()
        self._waiting: dict[str, SessionMoments] = {}
        self._bytes = 0
        self._served, self._looked_s = NOTHING, -math.inf
        self._pooled: Pooled | None = None
        self._anchor: Anchor | None = None
        self.refused: dict[str, str] = {}
        self._replaced = 0  # counted on the loop, all else on the trainer's thread
        self._counts = {"moments_heard": 0, "moments_refused": 0, "moments_left_out": 0}
        self._pool_counts = NOBODY

    def hear(self, device: str, told: Sequence[SessionMoments]) -> None:
        """Take what a device says; what it said before, and nobody has looked at, is replaced."""
        with self._lock:
            for each in told:
                if each.family == self._family:
                    self._drop(device)
                    self._waiting[device] = each
                    self._bytes += len(each.moments)
            while self._bytes > WAITING_BYTES_MAX:
                self._drop(next(iter(self._waiting)))

    def anchor(self, served: Served, now_s: float, left_out: Collection[str] = ()) -> Anchor | None:
        """Where the next prior begins while `served` serves; None where that has no policy.

        `now_s` is monotonic. What devices of `left_out` tell does not count.
        """
        if served != self._served:
            self._begin(served)
        if self._pooled is not None and now_s >= self._looked_s + LOOK_EVERY_S:
            self._looked_s = now_s
            self._look(served.release, self._pooled, left_out)
        return self._anchor

    def statistics(self) -> dict[str, int]:
        """Words that were heard, refused, left out, and wait; devices and sessions that count.

        Any thread may ask.
        """
        left_out = self._counts["moments_left_out"] + self._replaced
        waiting = {"moments_left_out": left_out, "moments_waiting": len(self._waiting)}
        return self._counts | waiting | self._pool_counts

    def _drop(self, device: str) -> None:
        dropped = self._waiting.pop(device, None)
        if dropped is not None:
            self._bytes -= len(dropped.moments)
            self._replaced += 1

    def _begin(self, served: Served) -> None:
        """With another release: its prior, of which nobody has told yet."""
        self._served, self._looked_s = served, -math.inf
        self._pooled = self._anchor = None
        self._pool_counts = NOBODY
        if served.package is None:
            return
        try:
            runner = Runner(served.package)
            info = read_package(runner.metadata)
            if info.policy is None:
                return
            embeddings, _ = runner.embed(self._reference)
            if np.isfinite(embeddings).all():
                self._pooled = Pooled(info.policy.prior, told_of(info.provenance))
                self._anchor = Anchor(*self._pooled.next(), embeddings)
        except PackageError as error:  # the next prior is learned from nothing
            log.warning("%s: sessions of %s: %s", self._family, served.release, error)

    def _look(self, release: str, pooled: Pooled, left_out: Collection[str]) -> None:
        with self._lock:
            waiting, self._waiting, self._bytes = self._waiting, {}, 0
        for device, told in waiting.items():
            if told.release == release:
                self._take(device, told.moments, pooled)
            else:
                self._counts["moments_left_out"] += 1
        if self._anchor is not None:
            prior, sessions = pooled.next(left_out)
            self._anchor = Anchor(prior, sessions, self._anchor.embeddings)
            self._pool_counts = pooled.statistics()

    def _take(self, device: str, data: bytes, pooled: Pooled) -> None:
        try:
            pooled.take(device, data)
        except RequestError as error:
            self._counts["moments_refused"] += 1
            self._refuse(device, error.message)
        else:
            self._counts["moments_heard"] += 1

    def _refuse(self, device: str, why: str) -> None:
        if self.refused.get(device) != why:
            log.warning("%s: %s: %s", self._family, device, why)
        others = {name: said for name, said in self.refused.items() if name != device}
        self.refused = dict([*others.items(), (device, why)][-REASONS_MAX:])
