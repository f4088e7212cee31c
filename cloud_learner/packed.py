"""What travels between processes of the cloud: structs as MessagePack, packages in chunks.

Why: a package is larger than a message may be, and what comes off a bus is anybody's bytes.

Invariants: a package that was fetched has the hash and no more than the length that was asked for.

Knows nothing about who speaks. Implements proto/asyncapi.yaml (candidate).
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import msgspec

from edge_runtime.bus.base import Bus
from edge_runtime.errors import RequestError
from edge_runtime.update.trust import CHUNK_BYTES, chunk_sizes
from edge_runtime.wire import subjects

PACKAGE_BYTES_MAX = 64 << 20

T = TypeVar("T")


class Parcel(msgspec.Struct, array_like=True, frozen=True):
    """A package that lies in the stream of candidates."""

    sha256: str
    length: int

    @classmethod
    def of(cls, data: bytes) -> Parcel:
        """What names this package."""
        return cls(hashlib.sha256(data).hexdigest(), len(data))


def encoded(struct: object) -> bytes:
    """A struct as MessagePack."""
    return msgspec.msgpack.encode(struct)


def decoded(data: bytes, kind: type[T]) -> T:
    """The struct in `data`. Raises: RequestError `bad_question`."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise RequestError("bad_question", f"{len(data)} bytes are no {kind.__name__}") from error


async def send_package(bus: Bus, data: bytes) -> Parcel:
    """Put a package into the stream of candidates. Raises: as Bus.publish."""
    parcel = Parcel.of(data)
    for index in range(len(chunk_sizes(len(data)))):
        part = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        await bus.publish(subjects.candidate_chunk(parcel.sha256, index), part)
    return parcel


async def fetch_package(bus: Bus, parcel: Parcel) -> bytes:
    """The package. Raises: RequestError (too_large, no_package); TransportError."""
    if not 0 <= parcel.length <= PACKAGE_BYTES_MAX:
        raise RequestError("too_large", f"a package of {parcel.length} bytes is not judged")
    indices = range(len(chunk_sizes(parcel.length)))
    names = [subjects.candidate_chunk(parcel.sha256, index) for index in indices]
    parts = await bus.last_many(subjects.CANDIDATES_STREAM, names)
    data = b"".join([part.data for part in parts if part is not None])
    if Parcel.of(data) != parcel:
        raise RequestError(
            "no_package",
            f"the stream of candidates does not hold {parcel.sha256[:12]} as a whole",
            "send it again",
        )
    return data
