"""Health: whether a device leaves a release by itself, from what it sees of it alone.

Why: a bad release must stop within a few requests, also where no network is; and a good one must
not be left for one slow run, one odd row, or a row that no release can answer.

A release on trial, which the stable one stands beside, is judged at every request (`Trial`): by its
failures in a row, by the time that it takes, by the memory that loading it took, by a run that does
not end. The stable release has only what ran before it to go to, so it is left with hesitation: it
is looked at once a second, and only after BAD_LOOKS looks in a row that found bad answers alone
(`Looks`).

Invariants: pure: no clock, no network, no locks. Once a gate was failed, that verdict stays. A row
that the stable release cannot answer either says nothing about a trial. `saw` costs a fraction of a
microsecond, for it is called for each request.

Knows nothing about models and slots, nor how a release is left.
"""

from __future__ import annotations

from typing import Literal

from edge_runtime.rollout.plan import LocalGates

SLOW_RUNS = 32
"""Of so many runs in a row more than half must be too slow: their median is."""

HANG_S = 1.0
"""So long a run may last on any machine, however fast the stable release is."""

HANG_TIMES = 1000.0
"""As many times the stable one's, on a machine where that is longer, and no gate says how many."""

BAD_LOOKS = 5


class Trial:
    """What is seen of a release on trial; `gate` names the gate that it failed: `failures`,
    `slowdown`, `memory` or `hung`, empty while it failed none.

    `added_mb` is what loading it added to the process.
    """

    __slots__ = ("_failures", "_runs", "_slow", "_waiting", "gate", "gates")

    def __init__(self, gates: LocalGates, added_mb: float) -> None:
        self.gates = gates
        self._failures = self._runs = self._slow = self._waiting = 0
        self.gate = "memory" if gates.memory_mb and added_mb > gates.memory_mb else ""

    def saw(self, took_ns: int, stable_ns: int, *, usable: bool) -> str:
        """Take in a request that the stable release could answer; returns `gate`."""
        gates = self.gates
        if not usable:
            self._failures += 1
            if gates.failures and self._failures >= gates.failures:
                self.gate = self.gate or "failures"
            return self.gate
        self._failures = 0
        self._runs += 1
        self._slow += took_ns > gates.slowdown * stable_ns
        if self._runs == SLOW_RUNS:
            if gates.slowdown and self._slow > SLOW_RUNS // 2:
                self.gate = self.gate or "slowdown"
            self._runs = self._slow = 0
        return self.gate

    def waits(self, run: int, since_s: float, stable_s: float) -> str:
        """Take in a look that found `run`, a number of its own, going on for `since_s`, where the
        stable release usually takes `stable_s`; returns `gate`.

        It takes two looks: one that finds a long run may only come after the process stood still.
        """
        limit_s = max(HANG_S, (self.gates.slowdown or HANG_TIMES) * stable_s)
        if since_s > limit_s and run == self._waiting:
            self.gate = self.gate or "hung"
        self._waiting = run
        return self.gate


class Looks:
    """What is seen of the stable release, look by look."""

    __slots__ = ("_answered", "_bad", "_failed")

    def __init__(self) -> None:
        self._answered = self._failed = self._bad = 0

    def look(self, answered: int, failed: int) -> Literal["", "bad", "leave"]:
        """Take in how many requests it had so far, and to how many of them no usable answer.

        Says whether this look found bad answers alone, and whether to leave it now.
        """
        fresh, bad = answered - self._answered, failed - self._failed
        self._answered, self._failed = answered, failed
        if fresh > bad:
            self._bad = 0
        if not fresh or fresh > bad:
            return ""
        self._bad = (self._bad + 1) % BAD_LOOKS
        return "bad" if self._bad else "leave"


def is_stuck(looks: int, useless_looks: float) -> bool:
    """Whether a run of the stable release on the worker hangs, which so many looks in a row found,
    of which all after `useless_looks` came when its answer was of no use any more.
    """
    return looks >= max(BAD_LOOKS, useless_looks)
