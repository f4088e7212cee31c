"""The snapshot: open sessions as bytes, for as long as a process is away.

Why: what is kept of people is to be whole or not at all, and read with care: who can write the file
is not always who wrote it.

Invariants: bytes that are no snapshot are refused with `bad_sessions`. The numbers in one are
whatever was written, NaN included.

Knows nothing about clocks, and not what is in the `state` of a session. Formats:
`SNAPSHOT_VERSION`.
"""

from __future__ import annotations

import zlib
from typing import Final, Literal

import msgspec

from edge_runtime.errors import RequestError

SNAPSHOT_VERSION: Final = 1

_MAGIC = b"HWSE"


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """A session that was unused for `unused_s`, with its `state` on `release`, which had the
    features `spec`.
    """

    family: str
    key: str
    spec: str
    unused_s: float
    state: bytes
    release: str


class Snapshot(msgspec.Struct, array_like=True, frozen=True):
    """The sessions that were open at `saved_s`, the longest unused first."""

    version: Literal[1]
    saved_s: float
    entries: list[Entry]


_decoder = msgspec.msgpack.Decoder(Snapshot)


def encode(saved_s: float, entries: list[Entry]) -> bytes:
    """Sessions as bytes, behind their checksum."""
    body = msgspec.msgpack.encode(Snapshot(SNAPSHOT_VERSION, saved_s, entries))
    return _MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def decode(data: bytes) -> Snapshot:
    """What was encoded. Raises: RequestError `bad_sessions`."""
    body = data[8:]
    whole = data[:8] == _MAGIC + zlib.crc32(body).to_bytes(4, "little")
    try:
        return _decoder.decode(body if whole else b"")
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        why = error if whole else "their checksum is wrong"
        raise RequestError(
            "bad_sessions",
            f"the kept sessions cannot be read: {why}; what is open stays open",
            "remove what was kept; sessions begin anew",
        ) from None
