"""How a package reaches the shelf: as a patch to one that lies there, or whole.

Why: which way it takes is a matter of bytes, not of trust: the shelf takes nothing whose hash is
not the signed one, whoever made it.

Invariants: a patch that cannot be had or does not lead to the package costs its bytes and nothing
else: the whole file is fetched instead, and the failure is counted.

Knows nothing about plans and counters: the caller has proven the entry that it hands in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from tuf.api.exceptions import DownloadError
from tuf.api.metadata import TargetFile  # type: ignore[attr-defined] # tuf has no __all__

from edge_runtime.errors import PackageError, TrustError
from edge_runtime.update import patch
from edge_runtime.update.fetcher import BusFetcher
from edge_runtime.update.shelf import Shelf

log = logging.getLogger("edge_runtime.update")


class Delivery:
    """Brings packages to a shelf, over `fetcher`, one at a time."""

    def __init__(self, fetcher: BusFetcher) -> None:
        self._fetcher = fetcher
        self._counts = {"whole": 0, "patched": 0, "patch_failed": 0, "bytes_saved": 0}

    def bring(self, target: TargetFile, shelf: Shelf) -> Path:
        """The package of a signed entry on the shelf.

        Raises: DownloadError and its kinds, TrustError (hash_mismatch, wrong_length),
        CapacityError (shelf_unwritable).
        """
        sha256 = target.hashes["sha256"]
        stored = shelf.path_of(sha256)
        if stored is not None:
            return stored
        for entry in patch.entries(target.custom):
            base = shelf.path_of(entry.base)
            if base is None or entry.length >= target.length:
                continue
            try:
                return self._patched(target, entry, base, shelf)
            except (DownloadError, PackageError, TrustError, OSError) as error:
                self._counts["patch_failed"] += 1
                log.info("%s is fetched whole: its patch failed: %s", target.path, error)
        path = shelf.put(
            sha256,
            target.length,
            lambda first: self._fetcher.chunks(sha256, target.length, first),
        )
        self._counts["whole"] += 1
        return path

    def statistics(self) -> dict[str, int]:
        """Packages that came whole or as a patch, patches that failed, bytes that they saved."""
        return dict(self._counts)

    def _patched(
        self, target: TargetFile, entry: patch.PatchEntry, base: Path, shelf: Shelf
    ) -> Path:
        data = b"".join(self._fetcher.chunks(entry.sha256, entry.length))

        def chunks(first: int) -> Iterator[bytes]:
            with base.open("rb") as file:
                for index, chunk in enumerate(patch.applied(file, data, target.length)):
                    if index >= first:
                        yield chunk

        path = shelf.put(target.hashes["sha256"], target.length, chunks)
        self._counts["patched"] += 1
        self._counts["bytes_saved"] += target.length - entry.length
        return path
