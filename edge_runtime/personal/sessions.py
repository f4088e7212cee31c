"""The sessions that a device has open: few, small, and gone when nobody comes back.

Why: every visitor may open one, so neither their number nor their bytes may be the visitors' to
decide; what a session knows is personal, so it has an end.

A session begins with its first label: who only asks is answered by the model, and needs none. It
stands on a release, its `Ground`; on a new one its own history is replayed, at the latest when it
is next used. A release with other features means other rows, so there the session begins anew.

Invariants: what is open takes at most `bytes_max`, and is at most `count_max`, the bytes first: one
that does not fit ends others, the longest unused first, which is counted. Unused for `ttl_s`, a
session is over. One session never touches another. The store and all its heads are used by one
thread at a time; who has several, has a lock, such as the runtime's turn. No call blocks.

Knows nothing about events, files or models. Formats: `SESSIONS_VERSION`.
"""

from __future__ import annotations

import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from edge_runtime.clock import Clock
from edge_runtime.errors import CapacityError, HeadwaterError, PackageError, RequestError
from edge_runtime.personal.head import Embed, Head
from edge_runtime.personal.prior import Matrix, Prior, Vector

SESSIONS_VERSION: Final = 1
KEY_LENGTH_MAX = 256

OVERHEAD_BYTES = 1536
"""What a session takes beside its arrays: Python's objects, measured and rounded up."""

_MAGIC = b"HWSE"

_COUNTED = ("opened", "closed", "expired", "evicted", "wiped", "rebased", "outgrown", "unreadable")

Key = tuple[str, str]
"""Family, and whom the session is of."""


def _no_rows(rows: Matrix) -> tuple[Matrix, Vector]:
    raise AssertionError(f"{len(rows)} rows were kept where none can be embedded")


@dataclass(frozen=True, eq=False)
class Ground:
    """What the sessions of a family stand on: a `release`, its prior, and its features.

    `spec` names the features, `columns` is how many there are (0: no history is kept), and `embed`
    is the release's model.
    """

    prior: Prior
    spec: str = ""
    columns: int = 0
    embed: Embed = _no_rows
    release: str = ""


class _Entry(msgspec.Struct, array_like=True, frozen=True):
    family: str
    key: str
    spec: str
    unused_s: float
    state: bytes
    release: str


class _Snapshot(msgspec.Struct, array_like=True, frozen=True):
    version: Literal[1]
    saved_s: float
    entries: list[_Entry]


_decoder = msgspec.msgpack.Decoder(_Snapshot)


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
        """The session's head, which is in use from now on; None where none is open."""
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

    def open(self, name: Key, ground: Ground) -> Head:
        """The session's head, a new one where none is open.

        Raises: RequestError `bad_session_key`, CapacityError `session_too_large`.
        """
        head = self.find(name, ground)
        if head is None:
            checked_key(name[1])
            head = Head(ground.prior, ground.columns)
            self._put(name, ground, head, self._clock.monotonic_s())
            self._counts["opened"] += 1
        return head

    def _move(self, name: Key, found: _Open, ground: Ground) -> bool:
        """Let a session stand on another release; False where it cannot, and has ended."""
        if found.spec != ground.spec:
            self._end(name, "outgrown")
            return False
        if (found.release, found.head.prior.digest) == (ground.release, ground.prior.digest):
            found.head.prior = ground.prior
        else:
            try:
                found.head = found.head.rebased(ground.prior, ground.embed)
            except PackageError:  # a model that cannot be run on what was answered before
                self._end(name, "unreadable")
                return False
            self._counts["rebased"] += 1
            found.release, needs = ground.release, _needs(name, found.head)
            self._bytes += needs - found.bytes
            found.bytes = needs
            self._make_room(0, 0)
        return name in self._open

    def _make_room(self, needs: int, count: int) -> None:
        while self._bytes + needs > self._bytes_max or len(self._open) + count > self._count_max:
            self._end(next(iter(self._open)), "evicted")

    def _put(self, name: Key, ground: Ground, head: Head, used_s: float) -> None:
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
        self._newest = _Open(ground.spec, ground.release, head, needs, used_s)
        self._open[name] = self._newest
        self._bytes += needs

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

    def rebase(self, name: Key, ground: Ground) -> None:
        """Let a session stand on `ground`, if it is open and does not yet."""
        found = self._open.get(name)
        if found is not None and found.head.prior is not ground.prior:
            self._move(name, found, ground)

    def snapshot(self) -> bytes:
        """All open sessions as bytes, which hold what is known of people: keep them as such."""
        self.expire()
        now_s = self._clock.monotonic_s()
        entries = [
            _Entry(*name, found.spec, now_s - found.used_s, found.head.encode(), found.release)
            for name, found in self._open.items()
        ]
        body = msgspec.msgpack.encode(_Snapshot(SESSIONS_VERSION, self._clock.now_s(), entries))
        return _MAGIC + zlib.crc32(body).to_bytes(4, "little") + body

    def restore(self, data: bytes, grounds: Mapping[str, Ground]) -> None:
        """Open what `snapshot` has kept, as old as it is by now, before any other is opened.

        Those that no family here can take are counted, as `outgrown` or `unreadable`, and stay out.
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
            ground = grounds.get(entry.family)
            if ground is None or ground.spec != entry.spec:
                self._counts["outgrown"] += 1
                continue
            try:
                head = Head.decode(entry.state, ground.prior, ground.embed)
                if entry.release != ground.release:
                    head = head.rebased(ground.prior, ground.embed)
                self._put((entry.family, entry.key), ground, head, now_s - unused_s)
            except HeadwaterError:
                self._counts["unreadable"] += 1

    def statistics(self) -> dict[str, int]:
        """What is open, its bytes, and what became of the others."""
        return {"open": len(self._open), "bytes": self._bytes, **self._counts}


def checked_key(key: str) -> str:
    """`key`, if it can be one of a session. Raises: RequestError `bad_session_key`."""
    fits = isinstance(key, str) and 0 < len(key) <= KEY_LENGTH_MAX
    if not fits or key.encode(errors="replace").decode() != key:  # half a surrogate pair
        raise RequestError(
            "bad_session_key",
            f"a session's key is no text of 1 to {KEY_LENGTH_MAX} characters; none was opened",
            "use such as a hash of what you have, in hexadecimal digits",
        )
    return key


def _needs(name: Key, head: Head) -> int:
    return head.nbytes + OVERHEAD_BYTES + sum(map(sys.getsizeof, name))


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
