"""The keeper: one thread that looks after sessions while there are any.

Why: what is personal has an end also where nobody asks and nothing is reported; and a new release
should find sessions moved before their people come back, at nobody's cost.

Invariants: the thread lives from the first answer within a session until nothing is open and
nothing waits for a label. It takes turns as who asks does, and runs no model in one.

Knows nothing about labels, disks or how a session learns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from threading import Event, Lock, Thread

from edge_runtime.clock import Clock
from edge_runtime.personal.ground import Ground, Key
from edge_runtime.personal.pending import Pending
from edge_runtime.personal.prior import Prior
from edge_runtime.personal.sessions import Sessions

_EVERY_S_MAX = 60.0
_PAUSE_S = 0.0002  # between two sessions that are moved: whoever waits for the turn gets it


class Keeper:
    """Ends what is older than `ttl_s`, and moves sessions to the `grounds` of their families."""

    def __init__(
        self,
        turn: Lock,
        sessions: Sessions,
        pending: Pending,
        grounds: Mapping[str, Ground],
        *,
        clock: Clock,
        ttl_s: float,
    ) -> None:
        self._turn, self._sessions, self._pending = turn, sessions, pending
        self._grounds, self._clock, self._ttl_s = grounds, clock, ttl_s
        self._due, self._stop = Event(), Event()
        self._thread, self._lives = Thread(), False

    def begin(self) -> None:
        """In a turn: there is something to look after from now on."""
        if not self._lives and not self._stop.is_set():
            self._lives = True
            self._thread = Thread(target=self._keep, name="sessions", daemon=True)
            self._thread.start()

    def hasten(self) -> None:
        """In a turn: sessions stand on something else from now on."""
        self._due.set()

    def close(self) -> None:
        """End, whatever is open; out of turn."""
        with self._turn:
            self._stop.set()
            thread = self._thread
        self._due.set()
        if thread.is_alive():
            thread.join()

    def expire(self) -> None:
        """End what nobody has used for too long; out of turn."""
        with self._turn:
            self._expire()

    def _expire(self) -> None:
        self._sessions.expire()
        self._pending.expire(self._clock.monotonic_s(), self._ttl_s)

    def _keep(self) -> None:
        every_s = min(self._ttl_s / 4, _EVERY_S_MAX)
        while not self._is_over():
            if self._due.wait(every_s):
                self._due.clear()
                self._move()

    def _is_over(self) -> bool:
        with self._turn:
            self._expire()
            self._lives = bool(self._sessions or self._pending) and not self._stop.is_set()
            return not self._lives

    def _move(self) -> None:
        """Move all sessions that are late, those first that were used last."""
        priors: dict[Ground, Prior] = {}  # what is computed out of turn has its own scratch
        while late := self._late():
            for name, ground in late:
                if self._stop.wait(_PAUSE_S):
                    return
                if ground not in priors:
                    priors[ground] = replace(ground.prior)
                self._move_one(name, ground, priors[ground])

    def _late(self) -> list[tuple[Key, Ground]]:
        with self._turn:
            return [
                (name, ground)
                for family, ground in self._grounds.items()
                for name in self._sessions.late(family, ground)
            ]

    def _move_one(self, name: Key, ground: Ground, prior: Prior) -> None:
        with self._turn:
            stands = self._grounds.get(name[0]) is ground
            move = self._sessions.begin(name, ground, prior) if stands else None
        if move is None:
            return
        move.learn(ground.embed)
        with self._turn:
            if self._grounds.get(name[0]) is ground:
                self._sessions.arrive(name, ground, move)
