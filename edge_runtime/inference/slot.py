"""The slot: where the arms of a family run, and how new ones take their place.

Why: a model is replaced many times a day; no request may fail or wait because of it.

`load_arm` does all that can fail, in the caller's loader thread: hash, load, warm, golden samples.
`swap` then only exchanges one reference. The arms before are drained: each request leases the arms
that it runs on, and when the last lease of a generation ends, a thread frees it and gives its
memory back to the system.

Invariants: a lease sees one generation, whole, to its end; a swap that is refused changes nothing.

Knows nothing about features, plans or how packages got here.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime import memory
from edge_runtime.errors import PackageError
from edge_runtime.inference import agreement
from edge_runtime.inference.onnxfile import check_whole, is_package, metadata_in
from edge_runtime.inference.package import PackageInfo, read_package
from edge_runtime.inference.runner import Runner

MB = 1 << 20


@dataclass(frozen=True)
class Arm:
    """A release in memory: `name` is "stable", or that of a trial, `weight` its share of answers.

    `info` is None for a file that carries no metadata of ours: it takes tensors, no events.
    `variant` is the form of the release that was loaded, `sha256` the content of its file,
    `added_mb` what loading it added to the process. A `shadow` answers nobody.
    """

    name: str
    release: str
    runner: Runner
    info: PackageInfo | None
    weight: float
    variant: str = ""
    sha256: str = ""
    added_mb: float = 0.0
    shadow: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        """What its file says that it came from, and what a row took in each bucket, in µs."""
        times = {str(size): took or 0.0 for size, took in self.runner.bucket_us.items()}
        return {"provenance": self.info.provenance if self.info else {}, "bucket_us": times}


class Lease:
    """One generation of arms, held by those requests that have entered it and not yet left.

    `arms` answer; `resident` are all that are in memory, shadows at the end.
    """

    __slots__ = ("_drained", "_lock", "arms", "leases", "resident", "retired")

    def __init__(
        self, arms: tuple[Arm, ...], lock: threading.Lock, drained: Callable[[Lease], None]
    ) -> None:
        self.arms = tuple(arm for arm in arms if not arm.shadow)
        self.resident = (*self.arms, *(arm for arm in arms if arm.shadow))
        self.leases = 0
        self.retired = False
        self._lock = lock
        self._drained = drained

    def __enter__(self) -> tuple[Arm, ...]:
        return self.arms

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self.leases -= 1
            last = self.retired and not self.leases and bool(self.arms)
        if last:
            self._drained(self)


class Slot:
    """The arms of one family; empty at first. Any thread may lease and swap.

    `generation` counts the swaps.
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self._lock = threading.Lock()
        self._current = Lease((), self._lock, self._dispose)
        self._disposals: list[threading.Thread] = []
        self.generation = 0
        self._swap_failures = 0
        self._draining = 0

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that serve now; to run one, take a lease."""
        return self._current.arms

    @property
    def resident(self) -> tuple[Arm, ...]:
        """The arms that serve now, and after them the shadows."""
        return self._current.resident

    def lease(self) -> Lease:
        """`with slot.lease() as arms:` holds these arms for the block; always use it so."""
        with self._lock:
            lease = self._current
            lease.leases += 1
        return lease

    def swap(self, new_arms: Iterable[Arm]) -> None:
        """Serve `new_arms` from the next lease on; an empty tuple withdraws the family.

        Raises: PackageError (wrong_family, bad_arms), with what serves unchanged.
        """
        fresh = Lease(tuple(new_arms), self._lock, self._dispose)
        try:
            self._check(fresh.resident)
        except PackageError:
            self._swap_failures += 1
            raise
        with self._lock:
            old, self._current = self._current, fresh
            old.retired = True
            drained = bool(old.arms) and not old.leases
            self.generation += 1
            self._draining += bool(old.arms)
        if drained:
            self._dispose(old)

    def close(self) -> None:
        """Withdraw all arms, and wait as `settle` does."""
        self.swap(())
        self.settle()

    def settle(self) -> None:
        """Wait until the arms that were replaced and are held by no lease are freed."""
        for thread in self._disposals:
            thread.join()

    def statistics(self) -> dict[str, int]:
        """Swaps done and refused, leases held now, generations that still wait to be freed."""
        return {
            "swaps": self.generation,
            "swap_failures": self._swap_failures,
            "leases": self._current.leases,
            "draining": self._draining,
        }

    def _check(self, arms: tuple[Arm, ...]) -> None:
        interfaces = [None if arm.info is None else arm.info.interface for arm in arms]
        for arm, interface in zip(arms, interfaces, strict=True):
            if interface is not None and interface.family != self.family:
                raise PackageError(
                    "wrong_family",
                    f"release {arm.release} is of family {interface.family!r}, not {self.family!r}",
                )
            if (interface, arm.runner.scores) != (interfaces[0], arms[0].runner.scores):
                raise PackageError(
                    "bad_arms",
                    f"releases {arms[0].release} and {arm.release} differ in their interface",
                    "a new interface is released to the stable arm alone",
                )
        if len({arm.name for arm in arms}) != len(arms):
            raise PackageError("bad_arms", f"two arms of {self.family} have the same name")

    def _dispose(self, lease: Lease) -> None:
        """Free off the caller's thread: unloading a model takes milliseconds."""
        thread = threading.Thread(target=self._free, args=(lease,), name="slot-free")
        thread.start()
        with self._lock:
            alive = [each for each in self._disposals if each.is_alive()]
            self._disposals = [*alive, thread]

    def _free(self, lease: Lease) -> None:
        lease.arms = lease.resident = ()
        memory.trim()
        with self._lock:
            self._draining -= 1


def load_arm(
    path: Path | str,
    sha256: str | None,
    name: str,
    release: str,
    weight: float,
    *,
    variant: str = "",
) -> Arm:
    """Load the package at `path` and prove that it answers here as it did where it was made.

    `sha256` is the hash that the file must have before it is read and after; None for a file that
    nobody signed.
    Raises: PackageError (hash_mismatch, golden_mismatch, unreadable_package, external_data,
    wrong_signature, wrong_vocabulary, padding_counts, missing_metadata, missing_extra,
    other_tokens, bad_metadata, spec_mismatch).
    """
    memory.trim()  # what was freed and is still held would hide what loading adds
    before = memory.resident_bytes()
    with nullcontext() if sha256 is None else unchanged(Path(path), sha256):
        check_whole(Path(path))
        runner = Runner(path)
    info = read_package(runner.metadata)
    agreement.check(runner, info, str(path))
    added = max(0, memory.resident_bytes() - before) / MB if before else 0.0
    return Arm(name, release, runner, info, weight, variant, sha256 or "", added)


def load_bare_arm(path: Path | str, release: str) -> Arm:
    """Load any ONNX file, with metadata of ours or without, as the one arm of a device by itself.

    Raises: PackageError, as `load_arm`; a file without metadata proves itself by running only.
    """
    if is_package(metadata_in(Path(path))):
        return load_arm(path, None, "stable", release, 1.0)
    return Arm("stable", release, Runner(path), None, 1.0)


@contextmanager
def unchanged(path: Path, sha256: str) -> Iterator[None]:
    """What reads the file at `path` within reads the bytes with this hash, or the end says no.

    The same file, with the same hash and untouched since, stands under the name before and after:
    so no second copy has to be held in memory to be sure of what was read from the first.
    Raises: PackageError (hash_mismatch, unreadable_package).
    """
    before = _stamp(path, sha256)
    try:
        yield
    finally:  # what fails because the file was changed says nothing about the package
        if _stamp(path, sha256) != before:
            raise PackageError(
                "hash_mismatch", f"{path} was changed while it was read; it was not loaded"
            )


def _stamp(path: Path, sha256: str) -> tuple[int, ...]:
    """Which file it is, and when it was last touched; its hash is checked."""
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PackageError("unreadable_package", f"{path} cannot be read: {error}") from error
    if found != sha256:
        raise PackageError(
            "hash_mismatch", f"{path} has sha256 {found}, not {sha256}; it was not loaded"
        )
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
