"""What all connections of the Unix socket may hold together: their number, their bytes, their time.

Why: one careless client, or a thousand, must not take the memory of a small device.

A started frame must be whole `half_frame_s` after the client was last read without one. Above
HELD_BYTES_MAX bytes that arrived and wait, the connection that holds the most is ended: small ones
go on.

Invariants: at most one timer runs, and none while no frame is half there.

Knows nothing about frames' content. Implements the section Bounds of proto/socket.md.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from edge_runtime.errors import CapacityError

HELD_BYTES_MAX = 64 << 20


class Member(Protocol):
    """A connection: `held` counts the bytes that arrived and wait; `lost` is done at its end."""

    held: int
    lost: asyncio.Future[None]

    def close(self) -> None:
        """Begin nothing more, and close once what has begun was answered."""

    def abort(self) -> None:
        """Close now."""

    def end(self, error: CapacityError) -> None:
        """Say why, and close."""


class Bounds:
    """The connections of one server, counted; on the running loop."""

    def __init__(self, connections_max: int, half_frame_s: float) -> None:
        self.members: set[Member] = set()
        self.counts = dict.fromkeys(
            ("connections", "frames", "bad_frames", "half_frames", "refused", "ended"), 0
        )
        self._connections_max, self._half_frame_s = connections_max, half_frame_s
        self._held = 0
        self._half: dict[Member, float] = {}  # since when; the longest first
        self._timer: asyncio.TimerHandle | None = None

    def admit(self, member: Member) -> CapacityError | None:
        """Take a connection in, or say why not."""
        if len(self.members) >= self._connections_max:
            self.counts["refused"] += 1
            return CapacityError(
                "too_many_connections",
                f"{len(self.members)} connections are open, which is all that may be",
                "close those that are not used; one connection carries many requests",
            )
        self.members.add(member)
        self.counts["connections"] += 1
        return None

    def part(self, member: Member) -> None:
        """Forget a connection that is over."""
        self.counts["half_frames"] += member in self._half
        self.hold(member, 0)
        self.members.discard(member)

    def hold(self, member: Member, held: int, *, half: bool = False, fresh: bool = False) -> None:
        """Know that `held` bytes wait at `member`; `half`: for the rest of a frame, which is
        another one than the last time when `fresh`.
        """
        self._held += held - member.held
        member.held = held
        if not half:
            self._half.pop(member, None)
        elif fresh or member not in self._half:
            self._half.pop(member, None)
            loop = asyncio.get_running_loop()
            self._half[member] = loop.time()
            if self._timer is None:
                self._timer = loop.call_later(self._half_frame_s, self._end_overdue)
        while self._held > HELD_BYTES_MAX:
            self._end(max(self.members, key=_held), "overloaded", "too many bytes wait here")

    def close(self) -> None:
        """Let no timer run on."""
        if self._timer is not None:
            self._timer.cancel()

    def statistics(self) -> dict[str, int]:
        """Counts since the start; `open` connections and `held_bytes` now."""
        return self.counts | {"open": len(self.members), "held_bytes": self._held}

    def _end_overdue(self) -> None:
        loop, self._timer = asyncio.get_running_loop(), None
        while self._half:
            member, since = next(iter(self._half.items()))
            due_s = since + self._half_frame_s
            if due_s > loop.time():
                self._timer = loop.call_at(due_s, self._end_overdue)
                return
            self._end(
                member, "half_frame", f"half a frame, and no more in {self._half_frame_s:g} s"
            )

    def _end(self, member: Member, code: str, why: str) -> None:
        self.counts["ended"] += 1
        member.end(CapacityError(code, f"{why}; the connection is closed"))
        self.counts["half_frames"] += member in self._half
        self.hold(member, 0)


def _held(member: Member) -> int:
    return member.held
