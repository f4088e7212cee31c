"""A file on its way to the shelf: space first, then chunk by chunk, proven as a whole at the end.

Why: a package of many megabytes over a poor line must not start again with each interruption, and a
disk that is too small must say so before anything is spent on it.

The file has its whole length from the start, in zeros that occupy their space. So its last byte
that is not zero says how far an earlier attempt came, and no second file has to agree with it: at
worst, a chunk that ends in zeros is fetched again.

Invariants: what `receive` leaves under the name of the part, when it returns, is durable and has
the hash that was asked for, of all its bytes as they are read back from the disk. When it raises,
the part is gone, with its space, unless an interruption left whole chunks in it to go on from. What
an earlier attempt left is never trusted: if it does not lead to the hash, all is fetched anew.

Knows nothing about where chunks come from. The part is no commit point: that is the shelf's rename.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from edge_runtime.errors import TrustError
from edge_runtime.files import Files
from edge_runtime.update.trust import CHUNK_BYTES

Chunks = Callable[[int], Iterable[bytes]]
"""The chunks of a file from a given one on."""

_READ_BYTES = 1 << 20


def receive(files: Files, part: Path, sha256: str, length: int, chunks: Chunks) -> None:
    """Bring the `length` bytes with this hash into `part`; an earlier attempt is gone on with.

    Raises: TrustError (hash_mismatch, wrong_length), OSError, and what `chunks` raises.
    """
    first = whole_chunks(files, part, length)
    try:
        fd = files.open(part) if first else _reserved(files, part, length)
        try:
            _write(files, fd, first, length, chunks)
            files.sync(fd)
        finally:
            files.close(fd)
        found = hash_of(files, part)
    except OSError:
        _drop(files, part)
        raise
    except BaseException:  # the interruption may be of any kind
        if not whole_chunks(files, part, length):
            _drop(files, part)
        raise
    if found == sha256:
        return
    _drop(files, part)
    if not first:
        raise TrustError(
            "hash_mismatch", f"package {sha256[:12]} arrived with other content; dropped"
        )
    receive(files, part, sha256, length, chunks)


def whole_chunks(files: Files, part: Path, length: int) -> int:
    """How many chunks an earlier attempt left; 0 where there is none, or of another length.

    Raises: OSError.
    """
    try:
        if files.size(part) != length:
            return 0
        with files.reader(part) as file:
            end = length
            while end:
                start = max(0, end - _READ_BYTES)
                file.seek(start)
                if block := file.read(end - start).rstrip(b"\0"):
                    return (start + len(block)) // CHUNK_BYTES
                end = start
    except FileNotFoundError:
        return 0
    return 0


def hash_of(files: Files, path: Path) -> str:
    """The SHA-256 of a file in hex. Raises: OSError."""
    digest = hashlib.sha256()
    with files.reader(path) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _reserved(files: Files, part: Path, length: int) -> int:
    files.unlink(part)
    fd = files.create(part, 0o644)
    try:
        if length:
            files.allocate(fd, length)
    except BaseException:
        files.close(fd)
        raise
    return fd


def _write(files: Files, fd: int, first: int, length: int, chunks: Chunks) -> None:
    at = first * CHUNK_BYTES
    for chunk in chunks(first):
        if at + len(chunk) > length:
            raise TrustError("wrong_length", f"more than the {length} signed bytes arrived")
        files.write(fd, chunk, at)
        at += len(chunk)


def _drop(files: Files, part: Path) -> None:
    with contextlib.suppress(OSError):
        files.unlink(part)
