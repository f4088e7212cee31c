"""The registry: every package the learner built or was given, named by the hash of its bytes.

Why: a release, a verdict and a plan all name a package by its hash; here the bytes are found.

Invariants: what lies under a hash has that hash, checked whenever it is read. Commit point of
`put`: one rename; putting the same bytes again changes nothing.

Knows nothing about ONNX, releases or who may use a package.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from edge_runtime.errors import CapacityError, PackageError, RequestError
from edge_runtime.files import write_atomic

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Registry:
    """Content-addressed package files in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> str:
        """Keep `data` and return its SHA-256 in hex. Raises: CapacityError `disk_full`."""
        sha256 = hashlib.sha256(data).hexdigest()
        path = self._directory / f"{sha256}.onnx"
        if not (path.exists() and _hash_of(path) == sha256):
            try:
                write_atomic(path, data)
            except OSError as error:
                message = f"{path}: {len(data)} bytes were not written: {error}"
                raise CapacityError("disk_full", message) from error
        return sha256

    def path(self, sha256: str) -> Path:
        """Where the package lies, its bytes just verified.

        Raises: RequestError `unknown_package`; PackageError `hash_mismatch`.
        """
        path = self._directory / f"{sha256}.onnx"
        if not _SHA256.fullmatch(sha256) or not path.exists():
            raise RequestError("unknown_package", f"no package {sha256!r} in {self._directory}")
        if _hash_of(path) != sha256:
            raise PackageError(
                "hash_mismatch",
                f"{path} does not hold what its name says; it is not used",
                "remove the file and build or submit the package again",
            )
        return path


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
