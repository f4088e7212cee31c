"""The sessions that a device has open: few, small, and gone when nobody comes back.

Why: every visitor may open one, so neither their number nor their bytes may be the visitors' to
decide; what a session knows is personal, so it has an end.

A session begins with its first label: who only asks is answered by the model, and needs none.

Invariants: what is open takes at most `bytes_max`, and is at most `count_max`, the bytes first: one
that does not fit ends others, the longest unused first, which is counted. Unused for `ttl_s`, a
session is over. One session never touches another. The store and all its heads are used by one
thread at a time; who has several, has a lock, such as the runtime's turn. No call blocks.

Knows nothing about events, files or models. Formats: `SESSIONS_VERSION`.
"""

from __future__ import annotations

import sys
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from edge_runtime.clock import Clock
from edge_runtime.errors import CapacityError, RequestError
from edge_runtime.personal.head import Embed, Head
from edge_runtime.personal.prior import Prior

SESSIONS_VERSION: Final = 1
KEY_LENGTH_MAX = 256

OVERHEAD_BYTES = 1536
"""What a session takes beside its arrays: Python's objects, measured and rounded up."""

_MAGIC = b"HWSE"

Key = tuple[str, str]
"""Family, and whom the session is of."""


class _Entry(msgspec.Struct, array_like=True, frozen=True):
    family: str
    key: str
    unused_s: float
    state: bytes


class _Snapshot(msgspec.Struct, array_like=True, frozen=True):
    version: Literal[1]
    saved_s: float
    entries: list[_Entry]


_decoder = msgspec.msgpack.Decoder(_Snapshot)


@dataclass(slots=True)
class _Open:
    head: Head
    bytes: int
    used_s: float


class Sessions:
    """Open sessions by family and key, the longest unused first."""

    def __init__(self, clock: Clock, *, ttl_s: float, bytes_max: int, count_max: int) -> None:
        assert ttl_s > 0
        assert count_max > 0
        self._clock, self._ttl_s = clock, ttl_s
        self._bytes_max, self._count_max = bytes_max, count_max
        self._open: dict[Key, _Open] = {}
        self._bytes = 0
        self._counts = Counter(opened=0, expired=0, evicted=0, wiped=0, rebased=0, unreadable=0)

    def find(self, family: str, key: str) -> Head | None:
        """The session's head, which is in use from now on; None where none is open."""
        found = self._open.pop((family, key), None)
        if found is None:
            return None
        now_s = self._clock.monotonic_s()
        if now_s - found.used_s >= self._ttl_s:
            self._bytes -= found.bytes
            self._counts["expired"] += 1
            return None
        found.used_s = now_s
        self._open[family, key] = found
        return found.head

    def open(self, family: str, key: str, prior: Prior, columns: int = 0) -> Head:
        """The session's head, a new one of `prior` where none is open.

        Raises: RequestError `bad_session_key`, CapacityError `session_too_large`.
        """
        head = self.find(family, key)
        if head is None:
            if not 0 < len(key) <= KEY_LENGTH_MAX:
                raise RequestError(
                    "bad_session_key",
                    f"a session's key has {len(key)} characters; no session was opened",
                    f"use 1 to {KEY_LENGTH_MAX}, such as a hash of what you have",
                )
            head = Head(prior, columns)
            self._put((family, key), head, self._clock.monotonic_s())
            self._counts["opened"] += 1
        return head

    def _put(self, name: Key, head: Head, used_s: float) -> None:
        needs = head.nbytes + OVERHEAD_BYTES + sum(map(sys.getsizeof, name))
        if needs > self._bytes_max:
            raise CapacityError(
                "session_too_large",
                f"a session of {name[0]!r} takes {needs} bytes, all together may take "
                f"{self._bytes_max}; no session was opened",
                "allow sessions more bytes",
            )
        self.expire()
        while self._bytes + needs > self._bytes_max or len(self._open) >= self._count_max:
            self._end(next(iter(self._open)), "evicted")
        self._open[name] = _Open(head, needs, used_s)
        self._bytes += needs

    def _end(self, name: Key, why: str) -> None:
        self._bytes -= self._open.pop(name).bytes
        self._counts[why] += 1

    def expire(self) -> None:
        """End what has been unused for too long."""
        over_s = self._clock.monotonic_s() - self._ttl_s
        while self._open and next(iter(self._open.values())).used_s <= over_s:
            self._end(next(iter(self._open)), "expired")

    def wipe(self, family: str, key: str) -> bool:
        """Forget a session at once; False when there was none."""
        if (family, key) not in self._open:
            return False
        self._end((family, key), "wiped")
        return True

    def wipe_all(self) -> None:
        """Forget all sessions at once."""
        for name in list(self._open):
            self._end(name, "wiped")

    def rebase(self, family: str, prior: Prior, embed: Embed, at_most: int) -> int:
        """Move up to `at_most` sessions of a family to `prior`, the last used first.

        Call it until it returns 0: between two calls others have their turn.
        """
        late = [
            name
            for name, found in reversed(self._open.items())
            if name[0] == family and found.head.prior is not prior
        ]
        for name in late[:at_most]:
            self._open[name].head = self._open[name].head.rebased(prior, embed)
        self._counts["rebased"] += len(late[:at_most])
        return len(late[:at_most])

    def snapshot(self) -> bytes:
        """All open sessions as bytes, which hold what is known of people: keep them as such."""
        self.expire()
        now_s = self._clock.monotonic_s()
        entries = [
            _Entry(*name, now_s - found.used_s, found.head.encode())
            for name, found in self._open.items()
        ]
        body = msgspec.msgpack.encode(_Snapshot(SESSIONS_VERSION, self._clock.now_s(), entries))
        return _MAGIC + zlib.crc32(body).to_bytes(4, "little") + body

    def restore(self, data: bytes, models: Mapping[str, tuple[Prior, Embed]]) -> None:
        """Open what `snapshot` has kept, as old as it is by now, on what each family serves.

        Before any other is opened.

        Sessions that no family here can take are counted as `unreadable` and stay out.
        Raises: RequestError `bad_sessions`, and nothing has changed.
        """
        assert not self._open
        snapshot = _opened(data)
        now_s = self._clock.monotonic_s()
        away_s = max(self._clock.now_s() - snapshot.saved_s, 0.0)
        for entry in snapshot.entries:
            unused_s = max(entry.unused_s, 0.0) + away_s
            if unused_s >= self._ttl_s:
                self._counts["expired"] += 1
                continue
            try:
                prior, embed = models[entry.family]
                head = Head.decode(entry.state, prior, embed)
                self._put((entry.family, entry.key), head, now_s - unused_s)
            except (KeyError, RequestError, CapacityError):
                self._counts["unreadable"] += 1

    def statistics(self) -> dict[str, int]:
        """What is open, its bytes, and what became of the others."""
        return {"open": len(self._open), "bytes": self._bytes, **self._counts}


def _opened(data: bytes) -> _Snapshot:
    body = data[8:]
    whole = data[:8] == _MAGIC + zlib.crc32(body).to_bytes(4, "little")
    try:
        return _decoder.decode(body if whole else b"")
    except msgspec.MsgspecError as error:
        why = error if whole else "their checksum is wrong"
        raise RequestError(
            "bad_sessions",
            f"the kept sessions cannot be read: {why}; what is open stays open",
            "remove what was kept; sessions begin anew",
        ) from None
