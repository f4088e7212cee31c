"""The floor on disk: two sealed copies, and what becomes of damaged ones.

Why: the floor is all that stands between a device whose cache was lost and old metadata, so one
bad sector must not take it, and a damaged one must never read as none.

Invariants: the copies are written one after the other, each in one commit point, so one of them is
whole at any time. The higher of the two holds in every part. A copy that is damaged, missing or
behind is mended when the other is read; where both are damaged, nothing is believed.

Knows nothing about metadata and plans.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from edge_runtime.errors import TrustError
from edge_runtime.files import Files, OsFiles, write_atomic
from edge_runtime.update import trust

_NAMES = ("floor.a", "floor.b")


class FloorFile:
    """The floor that is kept in `directory`; one process at a time.

    Raises: TrustError (floor_unreadable), OSError.
    """

    def __init__(self, directory: Path, files: Files | None = None) -> None:
        self._files = files or OsFiles()
        self._paths = [directory / name for name in _NAMES]
        self._floor = self._load()

    @property
    def floor(self) -> trust.Floor:
        """What this device has confirmed so far."""
        return self._floor

    def raise_to(self, floor: trust.Floor) -> None:
        """Store `floor`, which is nowhere below the one before.

        Raises: OSError; what is stored is then the one or the other.
        """
        if floor == self._floor:
            return
        for path in self._paths:
            write_atomic(path, trust.encode_floor(floor), files=self._files)
        self._floor = floor

    def _load(self) -> trust.Floor:
        copies = [copy for path in self._paths if (copy := _read(path)) is not None]
        if not copies:
            return trust.Floor()
        floor = self._highest(copies)
        whole = trust.encode_floor(floor)
        if copies != [whole, whole]:
            with contextlib.suppress(OSError):  # the other copy holds, and it is tried again
                for path in self._paths:
                    write_atomic(path, whole, files=self._files)
        return floor

    def _highest(self, copies: list[bytes]) -> trust.Floor:
        floor, failure = None, None
        for copy in copies:
            try:
                one = trust.decode_floor(copy)
                floor = one if floor is None else trust.merge_floors(floor, one)
            except TrustError as error:
                failure = error
        if floor is None:
            assert failure is not None
            raise TrustError(
                failure.code,
                f"both copies of what was confirmed last are damaged ({failure.message}); nothing "
                "is installed, what runs goes on",
                f"rm {self._paths[0]} {self._paths[1]}, and restart: the device then believes "
                "the newest metadata that it is shown, as a new one does",
            ) from failure
        return floor


def _read(path: Path) -> bytes | None:
    """A copy, None where there is none; one that the disk cannot read is as good as damaged."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError:
        return b""
