"""The snapshot: the state of an engine's tables as bytes with a checksum.

Why: windows outlive the process, and the release that reads them may be newer than the one that
wrote them.

Invariants: what was written reads back to the same bits. Version 1, which knew kept entries alone
and was named by the hash of the whole spec, is still read: a table's `how` is appended to its name.

Knows nothing about disks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import msgspec

from edge_runtime.errors import RequestError
from edge_runtime.features.plan import AnyTable, TableId

SNAPSHOT_VERSION = 2
_VERSIONS = (1, SNAPSHOT_VERSION)
_MAGIC = b"HWFE"

States = list[list[Any]]
"""For each key of a table, the least recently observed first: the key, and its state's `dump`."""


class _Snapshot(msgspec.Struct, array_like=True):
    version: int
    spec: str
    tables: list[tuple[TableId, States]]


_decoder = msgspec.msgpack.Decoder(_Snapshot)


def write(spec: str, tables: Mapping[TableId, AnyTable]) -> bytes:
    """A snapshot of `tables`, the windows of a spec with the hash `spec`."""
    states = [(name, dump(table)) for name, table in tables.items()]
    body = msgspec.msgpack.encode(_Snapshot(SNAPSHOT_VERSION, spec, states))
    return _MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def read(data: bytes) -> tuple[str, dict[TableId, States]]:
    """The hash of the spec and the states of its tables. Raises: RequestError `bad_snapshot`."""
    body = data[8:]
    if data[:4] != _MAGIC or int.from_bytes(data[4:8], "little") != zlib.crc32(body):
        raise bad_snapshot("its checksum does not match")
    try:
        snapshot = _decoder.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise bad_snapshot(str(error)) from error
    if snapshot.version not in _VERSIONS:
        raise bad_snapshot(f"version {snapshot.version}; this reads {SNAPSHOT_VERSION}")
    return snapshot.spec, dict(snapshot.tables)


def dump(table: AnyTable) -> States:
    """The states of a table, which `load` takes back."""
    return [[key, *state.dump()] for key, state in table.items()]


def load(table: AnyTable, states: States) -> dict[Any, Any]:
    """New states for `table` that hold what `states` say. Raises: RequestError `bad_snapshot`."""
    loaded = {}
    for key, *dumped in states:
        state = loaded[key] = table.new()
        try:
            state.load(*dumped)
        except (TypeError, ValueError) as error:
            raise bad_snapshot(f"the state of {key!r}: {error}") from error
    return loaded


def bad_snapshot(why: str) -> RequestError:
    """The error that a snapshot cannot be read."""
    return RequestError("bad_snapshot", f"the window snapshot cannot be read: {why}")
