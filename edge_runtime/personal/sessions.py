"""The sessions that a device has open: few, small, and gone when nobody comes back.

Why: every visitor may open one, so neither their number nor their bytes may be the visitors' to
decide; what a session knows is personal, so it has an end.

A session begins with its first label: who only asks is answered by the model, and needs none. It
stands on a release, its `Ground`; on a new one it is late until its own history is replayed: when
it is next used, by a quick model, else when somebody has moved it. A release with other features
means other rows, so there the session begins anew.

Invariants: what is open takes at most `bytes_max`, and is at most `count_max`, the bytes first: one
that does not fit ends others, the longest unused first, which is counted. Unused for `ttl_s`, a
session is over. One session never touches another. The store and all its heads are used by one
thread at a time; who has several, has a lock, such as the runtime's turn. No call blocks.

Knows nothing about events, files or models.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from edge_runtime.clock import Clock
from edge_runtime.errors import CapacityError, HeadwaterError
from edge_runtime.personal import snapshot
from edge_runtime.personal.ground import Ground, Key, Move, checked_key
from edge_runtime.personal.head import Head
from edge_runtime.personal.prior import Prior
from edge_runtime.personal.snapshot import Entry

OVERHEAD_BYTES = 1536
"""What a session takes beside its arrays: Python's objects, measured and rounded up."""

_COUNTED = ("opened", "closed", "expired", "evicted", "wiped", "rebased", "outgrown", "unreadable")


@dataclass(slots=True)
class _Open:
    spec: str
    release: str
    head: Head
    bytes: int
    used_s: float


class Sessions:
    """Open sessions by family and key, the longest unused first.

    `on_end` is told of each that is over, with its family and head; not of what is wiped.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        ttl_s: float,
        bytes_max: int,
        count_max: int,
        on_end: Callable[[str, Head], None] | None = None,
    ) -> None:
        assert ttl_s > 0
        assert count_max > 0
        self._clock, self._ttl_s = clock, ttl_s
        self._bytes_max, self._count_max, self._on_end = bytes_max, count_max, on_end
        self._open: OrderedDict[Key, _Open] = OrderedDict()
        self._newest: _Open | None = None
        self._bytes = 0
        self._counts = dict.fromkeys(_COUNTED, 0)

    def find(self, name: Key, ground: Ground) -> Head | None:
        """The session's head, which is in use from now on; None where none is open, or where it is
        late and the model is not quick: then `begin` moves it.
        """
        found = self._open.get(name)
        if found is None:
            return None
        now_s = self._clock.monotonic_s()
        if now_s - found.used_s >= self._ttl_s:
            self._end(name, "expired")
            return None
        found.used_s = now_s
        if found is not self._newest:
            self._open.move_to_end(name)
            self._newest = found
        if found.head.prior is not ground.prior and not self._move(name, found, ground):
            return None
        return found.head

    def open(self, name: Key, ground: Ground) -> Head | None:
        """The session's head, a new one where none is open; None where it is late.

        Raises: RequestError `bad_session_key`, CapacityError `session_too_large`.
        """
        head = self.find(name, ground)
        if head is None and name not in self._open:
            checked_key(name[1])
            head = Head(ground.prior, ground.columns)
            self._put(name, ground.spec, ground.release, head, self._clock.monotonic_s())
            self._counts["opened"] += 1
        return head

    def _move(self, name: Key, found: _Open, ground: Ground) -> bool:
        """Let a session stand on another ground; False where it cannot, or not yet."""
        if not self._is_settled(name, found, ground):
            if not ground.quick:
                return False
            move = Move(found.head, ground.prior)
            move.learn(ground.embed)
            self._arrive(name, found, move, ground)
        return name in self._open

    def _is_settled(self, name: Key, found: _Open, ground: Ground) -> bool:
        """Whether a session has nothing to learn there: it stands there now, or has ended."""
        stands = found.release, found.head.prior.digest
        if found.spec != ground.spec:
            self._end(name, "outgrown")
        elif found.head.is_behind or stands != (ground.release, ground.prior.digest):
            return False
        else:
            found.head.prior = ground.prior
        return True

    def _arrive(self, name: Key, found: _Open, move: Move, ground: Ground) -> None:
        if move.head is None:  # a model that cannot be run on what was answered before
            self._end(name, "unreadable")
            return
        found.head, found.release, found.head.prior = move.head, ground.release, ground.prior
        needs = _needs(name, found.head)
        self._bytes += needs - found.bytes
        found.bytes = needs
        self._counts["rebased"] += 1
        self._make_room(0, 0)

    def _make_room(self, needs: int, count: int) -> None:
        while self._bytes + needs > self._bytes_max or len(self._open) + count > self._count_max:
            self._end(next(iter(self._open)), "evicted")

    def _put(self, name: Key, spec: str, release: str, head: Head, used_s: float) -> _Open:
        needs = _needs(name, head)
        if needs > self._bytes_max:
            raise CapacityError(
                "session_too_large",
                f"a session of {name[0]!r} takes {needs} bytes, all may take "
                f"{self._bytes_max}; none was opened",
                "allow sessions more bytes",
            )
        self.expire()
        self._make_room(needs, 1)
        self._newest = self._open[name] = found = _Open(spec, release, head, needs, used_s)
        self._bytes += needs
        return found

    def _end(self, name: Key, why: str) -> None:
        over = self._open.pop(name)
        self._bytes -= over.bytes
        self._counts[why] += 1
        if self._on_end is not None and why in ("closed", "expired", "evicted"):
            self._on_end(name[0], over.head)

    def expire(self) -> None:
        """End what has been unused for too long."""
        over_s = self._clock.monotonic_s() - self._ttl_s
        while self._open and next(iter(self._open.values())).used_s <= over_s:
            self._end(next(iter(self._open)), "expired")

    def close(self, name: Key) -> bool:
        """A session is over; False when there was none."""
        if name not in self._open:
            return False
        self._end(name, "closed")
        return True

    def reset(self, name: Key) -> None:
        """Let a session begin anew, on whatever it stands."""
        if name in self._open:
            self._open[name].head.reset()

    def wipe(self, family: str | None = None) -> int:
        """Forget the sessions of a family, or of all, at once; how many there were."""
        names = [name for name in self._open if family is None or name[0] == family]
        for name in names:
            self._end(name, "wiped")
        return len(names)

    def late(self, family: str, ground: Ground) -> list[Key]:
        """The sessions of a family that do not stand on `ground` yet, the last used first."""
        return [
            name
            for name, found in reversed(self._open.items())
            if name[0] == family and found.head.prior is not ground.prior
        ]

    def begin(self, name: Key, ground: Ground, prior: Prior) -> Move | None:
        """A session's move to `ground`, by a clone of its prior that is the caller's; None where
        there is none, or nothing to learn. `arrive` ends it, with the same ground.
        """
        found = self._open.get(name)
        if found is None or found.head.prior is ground.prior:
            return None
        return None if self._is_settled(name, found, ground) else Move(found.head, prior)

    def arrive(self, name: Key, ground: Ground, move: Move) -> None:
        """End a move; a session that was told something meanwhile is late as before."""
        found = self._open.get(name)
        if found is not None and move.holds(found.head):
            self._arrive(name, found, move, ground)

    def snapshot(self) -> bytes:
        """All open sessions as bytes, which hold what is known of people: keep them as such."""
        self.expire()
        now_s = self._clock.monotonic_s()
        entries = [
            Entry(*name, found.spec, now_s - found.used_s, found.head.encode(), found.release)
            for name, found in self._open.items()
        ]
        return snapshot.encode(self._clock.now_s(), entries)

    def restore(self, data: bytes, grounds: Mapping[str, Ground]) -> None:
        """Open what `snapshot` has kept, as old as it is by now, before any other is opened.

        No model is run: who stood on another release is late. Those that no family here can take
        are counted, as `outgrown` or `unreadable`, and stay out.
        Raises: RequestError `bad_sessions`, and nothing has changed.
        """
        assert not self._open
        kept = snapshot.decode(data)
        away_s = max(self._clock.now_s() - kept.saved_s, 0.0)
        priors = {name: replace(ground.prior) for name, ground in grounds.items()}
        for entry in kept.entries:
            name, unused_s = (entry.family, entry.key), entry.unused_s + away_s
            ground = grounds.get(entry.family)
            if not 0 <= unused_s < self._ttl_s:  # so is what is no number
                self._counts["expired"] += 1
            elif ground is None or ground.spec != entry.spec:
                self._counts["outgrown"] += 1
            else:
                try:
                    self._restore(name, entry, unused_s, ground, priors[entry.family])
                except HeadwaterError:
                    self._counts["unreadable"] += 1

    def _restore(
        self, name: Key, entry: Entry, unused_s: float, ground: Ground, prior: Prior
    ) -> None:
        head = Head.decode(entry.state, prior)
        if head.columns != ground.columns:
            self._counts["unreadable"] += 1
            return
        self.close(name)  # a key that comes twice
        used_s = self._clock.monotonic_s() - unused_s
        found = self._put(name, entry.spec, entry.release, head, used_s)
        self._is_settled(name, found, ground)

    def __len__(self) -> int:
        return len(self._open)

    def statistics(self) -> dict[str, int]:
        """What is open, its bytes, and what became of the others."""
        return {"open": len(self._open), "bytes": self._bytes, **self._counts}


def _needs(name: Key, head: Head) -> int:
    return head.nbytes + OVERHEAD_BYTES + sum(map(sys.getsizeof, name))
