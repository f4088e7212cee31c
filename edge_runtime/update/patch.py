"""Patches: a package as what differs between it and one that the device has.

Why: two students of one architecture differ in small steps of their int8 weights, so most bytes of
the newer file are those of the older one, or one more, or one less. Said that way, a release is a
twentieth of itself, and a metered line carries it.

Invariants: what comes out has exactly the signed length, and is made block by block, so a patch
that inflates is cut and costs no memory. Nothing here is trusted: whether the bytes are the package
is for their hash to say. A patch of another make or kind is no patch, never an error of a release.

Knows nothing about ONNX and signatures. Implements proto/package.md, section Patches.
"""

from __future__ import annotations

import contextlib
import lzma
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.errors import PackageError
from edge_runtime.update.trust import chunk_sizes

KIND = "residual"
FIELD = "patches"
"""The custom field of a package's signed entry that lists its patches."""

FILTERS = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20, "lc": 0, "lp": 0, "pb": 0}]
"""The coder of a patch, whose memory is its dictionary."""

STEPS = np.array([0, 1, 255, 0], np.uint8)
"""What each code of two bits adds to a byte; the last stands for any other byte, given apart."""

ESCAPE = 3
SHIFTS = np.array([0, 2, 4, 6], np.uint8)

Bytes = npt.NDArray[np.uint8]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class PatchEntry(msgspec.Struct, frozen=True):
    """A patch as the signed metadata lists it: from which package, and its own hash and length."""

    base: Sha256 = msgspec.field(name="from")
    sha256: Sha256
    length: Annotated[int, msgspec.Meta(ge=0)]
    kind: str = KIND


def entries(custom: Mapping[str, Any] | None) -> list[PatchEntry]:
    """The patches in the custom fields of a package that can be applied here."""
    listed = (custom or {}).get(FIELD)
    found = []
    for plain in listed if isinstance(listed, list) else ():
        with contextlib.suppress(msgspec.ValidationError):
            found.append(msgspec.convert(plain, PatchEntry))
    return [each for each in found if each.kind == KIND]


def applied(base: BinaryIO, patch: bytes, length: int) -> Iterator[bytes]:
    """The `length` bytes that `patch` makes of the file `base`, in chunks.

    Raises: PackageError `bad_patch`, at the chunk that it does not give; OSError of `base`.
    """
    take = _reader(patch)
    for size in chunk_sizes(length):
        old = np.zeros(size, np.uint8)
        known = base.read(size)
        old[: len(known)] = np.frombuffer(known, np.uint8)
        codes = unpacked(take(packed_size(size)))[:size]
        steps, others = STEPS[codes], codes == ESCAPE
        steps[others] = take(int(others.sum()))
        yield (old + steps).tobytes()


def packed_size(size: int) -> int:
    """How many bytes the codes of `size` bytes take."""
    return -(-size // 4)


def unpacked(packed: Bytes) -> Bytes:
    """Four codes for each byte, the lowest bits first."""
    codes: Bytes = packed[:, None] >> SHIFTS & np.uint8(3)
    return codes.ravel()


def _reader(patch: bytes) -> Callable[[int], Bytes]:
    """Gives so many of the bytes that `patch` inflates to, and inflates no more than these."""
    inflating = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS)
    rest = patch

    def take(size: int) -> Bytes:
        nonlocal rest
        taken = bytearray()
        while len(taken) < size:
            try:
                more = inflating.decompress(rest, max_length=size - len(taken))
            except (lzma.LZMAError, EOFError) as error:
                raise PackageError("bad_patch", f"the patch is damaged: {error}") from error
            if not (more or rest):
                raise PackageError("bad_patch", "the patch ends too early")
            rest, taken = b"", taken + more
        return np.frombuffer(taken, np.uint8)

    return take
