"""Past sessions: what the newest of them were told, of which the prior is learned.

Why: a prior belongs to one embedding, and every student has another; what people did stays, so it
is kept as rows and looked at anew by whoever needs it.

A session is what one device says under one value of the family's `[personal] group`. Without a
group a device has one session after the other, with silences of `pause_s` between them.

Invariants: at most `memory` sessions, of each the newest `ROWS_MAX` rows, in the order of event
time. When there are too many, one of the device that has the most goes, the longest untold first:
who floods pushes out its own. Same rows in the same order, same sessions.

Knows nothing about priors and networks, nor who may be heard.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from cloud_learner.train.dataset import Matrix, Rows
from cloud_learner.train.declaration import Personal

ROWS_MAX = 48  # as many as a session keeps of itself on a device

Key = tuple[str, str]
"""The device, and what the session is called there."""


class _Session:
    """Rows as three lists that are of one length."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.features: list[Matrix] = []
        self.labels: list[float] = []

    def add(self, time_s: float, features: Matrix, label: float) -> None:
        at = bisect_right(self.times_s, time_s)
        self.times_s.insert(at, time_s)
        self.features.insert(at, features)
        self.labels.insert(at, label)
        for values in (self.times_s, self.features, self.labels):
            del values[:-ROWS_MAX]

    def is_near(self, time_s: float, pause_s: float) -> bool:
        return self.times_s[0] - pause_s <= time_s <= self.times_s[-1] + pause_s


class PastSessions:
    """The newest sessions of a family that declares `personal`, the longest untold first."""

    def __init__(self, personal: Personal) -> None:
        self._pause_s, self._bound = personal.pause_s, personal.memory
        self._is_named = bool(personal.group)
        self._sessions: dict[Key, _Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def add(
        self, rows: Rows, devices: Sequence[str], names: Sequence[str], times_s: Sequence[float]
    ) -> None:
        """Take in rows, each with its device, its value of the group, and its event time.

        Of a family without a group `names` are not looked at.
        """
        for at in np.argsort(times_s, kind="stable").tolist():
            device, time_s = devices[at], times_s[at]
            key = (device, names[at] if self._is_named else self._named(device, time_s))
            session = self._sessions.pop(key, None) or _Session()
            session.add(time_s, rows.features[at].copy(), float(rows.labels[at]))
            self._sessions[key] = session
            if len(self._sessions) > self._bound:
                self._make_room()

    def newest(self, rows_max: int) -> list[Rows]:
        """The rows of each session, the one that was told last first, `rows_max` at most in all."""
        found, left = [], rows_max
        for session in reversed(self._sessions.values()):
            left -= len(session.labels)
            if left < 0:
                break
            labels = np.array(session.labels, np.float32)
            found.append(Rows(np.stack(session.features), labels))
        return found

    def state(self) -> list[tuple[Any, ...]]:
        """All that is needed to go on from here."""
        return [
            (key, list(each.times_s), np.stack(each.features), list(each.labels))
            for key, each in self._sessions.items()
        ]

    def restore(self, state: list[tuple[Any, ...]]) -> None:
        """Go on from `state`."""
        self._sessions = {}
        for key, times_s, features, labels in state:
            session = self._sessions[tuple(key)] = _Session()
            session.times_s, session.labels = list(times_s), list(labels)
            session.features = list(features)
        while len(self._sessions) > self._bound:
            self._make_room()

    def _named(self, device: str, time_s: float) -> str:
        """The session of the device that this moment belongs to, or a new one's name."""
        for (other, name), session in reversed(self._sessions.items()):
            if other == device and session.is_near(time_s, self._pause_s):
                return name
        return repr(time_s)

    def _make_room(self) -> None:
        counts = Counter(device for device, _ in self._sessions)
        most = max(counts.values())
        del self._sessions[next(key for key in self._sessions if counts[key[0]] == most)]
