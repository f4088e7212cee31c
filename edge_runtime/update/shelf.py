"""Where packages lie on a device: files named by their content, and which of them run now.

Why: a restart without a network serves at once from what was verified before.

Invariants: a package appears under its name whole or not at all: the rename in `put` is the commit
point. A file whose bytes do not match its name is never handed out. The current plan of a family is
one file, replaced in one commit point; so is the list of quarantined packages.

Knows nothing about signatures: the caller has verified the hash that it asks for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from edge_runtime.errors import CapacityError, TrustError
from edge_runtime.files import fsync_directory, write_atomic
from edge_runtime.rollout.plan import Plan, decode_plan, encode_plan

_READ_BYTES = 1 << 20


class Shelf:
    """The packages, current plans and quarantine under one directory; one user at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._packages = directory / "packages"
        self._packages.mkdir(parents=True, exist_ok=True)
        for leftover in self._packages.glob(".*.part"):
            leftover.unlink()
        self._proven: set[str] = set()
        self._quarantined = self._load_quarantine()
        self._counts = {"put": 0, "corrupt": 0, "pruned": 0}

    def path_of(self, sha256: str) -> Path | None:
        """The package with this content, hashed at its first use; None when absent or damaged."""
        path = self._path(sha256)
        if not path.exists():
            return None
        if sha256 in self._proven:
            return path
        if _hash_of(path) != sha256:
            path.unlink()
            self._counts["corrupt"] += 1
            return None
        self._proven.add(sha256)
        return path

    def put(self, sha256: str, chunks: Iterable[bytes]) -> Path:
        """Store a package; a stored one is kept and `chunks` is not read.

        Raises: TrustError (hash_mismatch), CapacityError (shelf_unwritable), and what `chunks`
        raises; the shelf is then unchanged.
        """
        stored = self.path_of(sha256)
        if stored is not None:
            return stored
        with _ours(f"package {sha256[:12]}"):
            self._write(self._packages / f".{sha256}.part", sha256, chunks)
        self._proven.add(sha256)
        self._counts["put"] += 1
        return self._path(sha256)

    def prune(self, keep: set[str]) -> int:
        """Remove all packages but those in `keep`, and say how many went.

        Raises: CapacityError (shelf_unwritable).
        """
        with _ours("the shelf"):
            return self._prune(keep)

    def save_current(self, plan: Plan) -> None:
        """Remember durably that the arms of `plan` run now, in place of its family's last one.

        Raises: CapacityError (shelf_unwritable), with the last one kept.
        """
        with _ours(f"the current plan of {plan.family}"):
            write_atomic(self._current(plan.family), encode_plan(plan))

    def load_current(self, family: str) -> Plan | None:
        """The plan that ran last; None before the first. Raises: TrustError (bad_plan)."""
        try:
            data = self._current(family).read_bytes()
        except FileNotFoundError:
            return None
        return decode_plan(data)

    def quarantine(self, sha256: str, reason: str) -> None:
        """Never use this package again on this device, for `reason` (an error code).

        Raises: CapacityError (shelf_unwritable); it then holds until the next restart.
        """
        self._quarantined[sha256] = reason
        with _ours("the quarantine"):
            write_atomic(
                self._directory / "quarantine.json", msgspec.json.encode(self._quarantined)
            )

    def quarantined(self) -> dict[str, str]:
        """The packages that are not used again, with the reason."""
        return dict(self._quarantined)

    def statistics(self) -> dict[str, int]:
        """Counts since the shelf was opened."""
        return self._counts | {"quarantined": len(self._quarantined)}

    def _prune(self, keep: set[str]) -> int:
        gone = [path for path in self._packages.glob("*.onnx") if path.stem not in keep]
        for path in gone:
            path.unlink()
            self._proven.discard(path.stem)
        self._counts["pruned"] += len(gone)
        return len(gone)

    def _path(self, sha256: str) -> Path:
        return self._packages / f"{sha256}.onnx"

    def _current(self, family: str) -> Path:
        return self._directory / "current" / f"{family}.json"

    def _write(self, staged: Path, sha256: str, chunks: Iterable[bytes]) -> None:
        try:
            _stage(staged, sha256, chunks)
            os.replace(staged, self._path(sha256))
            fsync_directory(self._packages)
        finally:
            staged.unlink(missing_ok=True)

    def _load_quarantine(self) -> dict[str, str]:
        path = self._directory / "quarantine.json"
        if not path.exists():
            return {}
        try:
            return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
        except (msgspec.DecodeError, ValueError) as error:
            raise TrustError(
                "quarantine_unreadable",
                f"{path} cannot be read: {error}",
                f"rm {path} (releases that failed here may be tried again)",
            ) from error


def _stage(staged: Path, sha256: str, chunks: Iterable[bytes]) -> None:
    digest = hashlib.sha256()
    with staged.open("wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
        if digest.hexdigest() != sha256:
            raise TrustError(
                "hash_mismatch", f"package {sha256[:12]} arrived with other content; dropped"
            )
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _ours(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CapacityError(
            "shelf_unwritable",
            f"{what} cannot be stored: {error}; what runs is unchanged",
            "free disk space under the state directory",
        ) from error


def _hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
