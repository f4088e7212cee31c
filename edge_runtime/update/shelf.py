"""Where packages lie on a device: files named by their content, and which of them run now.

Why: a restart without a network serves at once from what was verified before, and a release that
disappoints can be left at once for the one before it.

Invariants: a package appears under its name whole or not at all: the rename in `put` is the commit
point. What arrives takes its space first, and no package gives way to it. A file whose bytes do not
match its name is never handed out. A family's current plan and the good one before it are one file,
replaced in one commit point; so are the list of quarantined packages and the choices of variants,
whose loss costs new choices. Any thread may call, one at a time to `put`.

Knows nothing about signatures: the caller has verified the hash that it asks for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from edge_runtime.errors import CapacityError, TrustError
from edge_runtime.files import Files, OsFiles, make_directory, remove_strays, write_atomic
from edge_runtime.rollout.plan import Plan, decode_plan, encode_plan
from edge_runtime.update.arrival import Chunks, hash_of, receive
from edge_runtime.update.trust import CHUNK_BYTES

PLANS_VERSION = 2


class _Version(msgspec.Struct):
    version: int


class _Plans(msgspec.Struct):
    """A family's file: the current plan and, if any, the previous one; version 1 was one plan."""

    version: int
    plans: list[msgspec.Raw]


class Shelf:
    """The packages, current plans and quarantine under one directory; one process at a time."""

    def __init__(self, directory: Path, files: Files | None = None) -> None:
        self._directory = directory
        self._files = files or OsFiles()
        self._packages = directory / "packages"
        make_directory(self._packages, self._files)
        make_directory(directory / "current", self._files)
        remove_strays(directory)
        self._lock = threading.Lock()
        self._proven: set[str] = set()
        self._quarantined = self._load_quarantine()
        self._chosen = self._load_choices()
        self._counts = {"put": 0, "corrupt": 0, "pruned": 0}

    def path_of(self, sha256: str, *, anew: bool = False) -> Path | None:
        """The package with this content, hashed at its first use and `anew` when that is asked;
        None when absent or unreadable, or damaged and now gone.
        """
        path = self._path(sha256)
        if anew:
            self._proven.discard(sha256)
        if not path.exists():
            return None
        if sha256 in self._proven:
            return path
        try:
            proven = hash_of(self._files, path) == sha256
            if not proven:
                self._files.unlink(path)
        except OSError:  # the disk may read it another time
            proven = False
        if not proven:
            self._counts["corrupt"] += 1
            return None
        self._proven.add(sha256)
        return path

    def put(self, sha256: str, length: int, chunks: Chunks) -> Path:
        """Store a package; a stored one is kept and `chunks` is not asked.

        What an interruption leaves of it is gone on with at the next call, also after a restart.

        Raises: TrustError (hash_mismatch, wrong_length), CapacityError (shelf_unwritable), and what
        `chunks` raises; the packages on the shelf are then unchanged.
        """
        stored = self.path_of(sha256)
        if stored is not None:
            return stored
        part = self._packages / f".{sha256}.part"
        with _ours(f"package {sha256[:12]}"):
            try:
                receive(self._files, part, sha256, length, chunks)
                self._files.replace(part, self._path(sha256))
                self._files.sync_directory(self._packages)
            except OSError:
                self._drop_parts()
                raise
        self._proven.add(sha256)
        self._counts["put"] += 1
        return self._path(sha256)

    def put_whole(self, sha256: str, data: bytes) -> Path:
        """Store a package that is at hand. Raises: as `put`."""
        return self.put(sha256, len(data), lambda first: [data[first * CHUNK_BYTES :]])

    def prune(self, keep: set[str]) -> int:
        """Remove all packages but those in `keep`, and say how many went.

        What is on its way goes as well: whoever still wants it has to start again.

        Raises: CapacityError (shelf_unwritable).
        """
        with self._lock, _ours("the shelf"):
            return self._prune(keep)

    def save_current(self, plan: Plan, lowest_counter: int = 0) -> None:
        """Remember durably that the arms of `plan` run now, in place of its family's last one.

        A release below `lowest_counter` is nothing to go back to any more.

        Raises: CapacityError (shelf_unwritable), with the last one kept.
        """
        with self._lock, _ours(f"the current plan of {plan.family}"):
            self._replace(self._current(plan.family), self._encoded(plan, lowest_counter))

    def load_current(self, family: str) -> Plan | None:
        """The plan that ran last; None before the first. Raises: TrustError (bad_plan)."""
        return self._plans(family)[0]

    def load_previous(self, family: str) -> Plan | None:
        """The newest plan before the current one with another stable release that is still good.

        Raises: TrustError (bad_plan).
        """
        return self._plans(family)[1]

    def quarantine(self, sha256: str, reason: str) -> None:
        """Never use this package again on this device, for `reason` (an error code).

        Raises: CapacityError (shelf_unwritable); it then holds until the next restart.
        """
        with self._lock, _ours("the quarantine"):
            self._quarantined = self._quarantined | {sha256: reason}
            self._replace(self._quarantine_path, msgspec.json.encode(self._quarantined))

    def choose(self, default: str, chosen: str) -> None:
        """Remember which of a release's packages, known by its default one, this device runs.

        Raises: CapacityError (shelf_unwritable); it then holds until the next restart.
        """
        with self._lock, _ours("the choice of variants"):
            self._chosen = self._chosen | {default: chosen}
            self._replace(self._choices_path, msgspec.json.encode(self._chosen))

    def chosen(self, default: str) -> str | None:
        """What `choose` was told about the release with this default package."""
        return self._chosen.get(default)

    def quarantined(self) -> dict[str, str]:
        """The packages that are not used again, with the reason."""
        return dict(self._quarantined)

    def statistics(self) -> dict[str, int]:
        """Counts since the shelf was opened."""
        return self._counts | {"quarantined": len(self._quarantined)}

    def _prune(self, keep: set[str]) -> int:
        gone = [path for path in self._packages.glob("*.onnx") if path.stem not in keep]
        self._drop_parts()
        for path in gone:
            self._files.unlink(path)
            self._proven.discard(path.stem)
        self._chosen = {each: sha for each, sha in self._chosen.items() if sha in keep}
        self._counts["pruned"] += len(gone)
        return len(gone)

    def _encoded(self, plan: Plan, lowest_counter: int) -> bytes:
        """The family's file with `plan` as the current one; one that cannot be read is given up."""
        try:
            known = self._plans(plan.family)
        except TrustError:
            known = None, None
        good = [each for each in known if each and self._is_good_before(each, plan)]
        before = [each for each in good if each.stable.counter >= lowest_counter]
        plans = [msgspec.Raw(encode_plan(each)) for each in (plan, *before[:1])]
        return msgspec.json.encode(_Plans(PLANS_VERSION, plans))

    def _is_good_before(self, old: Plan, new: Plan) -> bool:
        left = all(each.sha256 in self._quarantined for each in old.stable.packages)
        return old.stable.sha256 != new.stable.sha256 and not left

    def _plans(self, family: str) -> tuple[Plan | None, Plan | None]:
        path = self._current(family)
        try:
            data = path.read_bytes()
            version = msgspec.json.decode(data, type=_Version).version
            if version == 1:
                return decode_plan(data), None
            current, *before = msgspec.json.decode(data, type=_Plans).plans
        except FileNotFoundError:
            return None, None
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise TrustError("bad_plan", f"{path} cannot be read: {error}") from error
        if version != PLANS_VERSION:
            raise TrustError("bad_plan", f"{path} has version {version}; this reads 1 and 2")
        return decode_plan(bytes(current)), decode_plan(bytes(before[0])) if before else None

    def _path(self, sha256: str) -> Path:
        return self._packages / f"{sha256}.onnx"

    def _current(self, family: str) -> Path:
        return self._directory / "current" / f"{family}.json"

    def _replace(self, path: Path, data: bytes) -> None:
        if not path.parent.exists():
            make_directory(path.parent, self._files)
        write_atomic(path, data, files=self._files)

    def _drop_parts(self) -> None:
        for part in self._packages.glob(".*.part"):
            with contextlib.suppress(OSError):
                self._files.unlink(part)

    @property
    def _quarantine_path(self) -> Path:
        return self._directory / "quarantine.json"

    @property
    def _choices_path(self) -> Path:
        return self._directory / "choices.json"

    def _load_choices(self) -> dict[str, str]:
        try:
            return msgspec.json.decode(self._choices_path.read_bytes(), type=dict[str, str])
        except (OSError, msgspec.DecodeError, ValueError, RecursionError):
            return {}

    def _load_quarantine(self) -> dict[str, str]:
        path = self._quarantine_path
        if not path.exists():
            return {}
        try:
            return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise TrustError(
                "quarantine_unreadable",
                f"{path} cannot be read: {error}",
                f"rm {path} (releases that failed here may be tried again)",
            ) from error


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
