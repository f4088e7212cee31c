"""A campaign on disk: its state, and the journals of its trials beside it.

Why: the state is replaced as a whole with every change, what a trial was told only grows.

Invariants: the commit point of a change is the rename of the state file; a journal is synced before
it, and what a crash left in it beyond the state is cut off. The newest journals are kept, a bounded
number of bounded size. A state of the version before is read: its trial goes on in the first stage,
with evidence gathered anew and without a journal.

Knows nothing about what any of it means. Not thread-safe: one thread at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from cloud_learner.rollout.state import Counts, Decision, Offer, Rules, State, Step, Trial
from edge_runtime.errors import CapacityError, ConfigError
from edge_runtime.files import fsync_directory, write_atomic

STATE_VERSION = 2
JOURNALS_MAX = 20


class Freshness(msgspec.Struct, frozen=True):
    """From the last mature label that a release learned until it served on its first canary."""

    release: str
    device: str
    freshness_s: float


class Saved(msgspec.Struct):
    """The state file."""

    family: str
    version: int = STATE_VERSION
    state: State = msgspec.field(default_factory=State)
    freshness: list[Freshness] = []


class _Before(msgspec.Struct):
    """What version 1 says of a campaign that knew a canary and then all."""

    seq: int = 0
    stable: Offer | None = None
    canary: Offer | None = None
    pending: Offer | None = None
    quarantined: list[str] = []
    decisions: list[Decision] = []
    counts: Counts = msgspec.field(default_factory=Counts)
    outbox: list[Step] = []


class _SavedBefore(msgspec.Struct):
    state: _Before = msgspec.field(default_factory=_Before)
    freshness: list[Freshness] = []


class _Head(msgspec.Struct):
    family: str
    version: int = 1


class Kept:
    """Where the campaign of a family lies: `path`, and the folder `trials` beside it."""

    def __init__(self, path: Path) -> None:
        self._path, self._folder = path, path.parent / "trials"
        self._lengths: dict[str, int] = {}

    def load(self, rules: Rules, now_s: float) -> Saved:
        """The campaign, or an empty one. Raises: ConfigError `bad_controller_state`."""
        try:
            data = self._path.read_bytes()
            head = msgspec.json.decode(data, type=_Head)
            if head.family != rules.family or head.version not in (1, STATE_VERSION):
                found = f"version {head.version} of {head.family!r}"
                raise self._unreadable(f"it is {found}, not {STATE_VERSION} of {rules.family!r}")
            saved = _upgraded(data, rules, now_s) if head.version == 1 else _decoded(data)
        except FileNotFoundError:
            saved = Saved(family=rules.family)
        except (OSError, msgspec.DecodeError) as error:
            raise self._unreadable(str(error)) from error
        if (live := saved.state.live) is not None:
            self._lengths[live.journal] = live.journal_bytes
        return saved

    def save(self, data: bytes, lines: Iterable[tuple[str, bytes]]) -> None:
        """Add to journals, then put the encoded state in the place of the one before.

        Raises: CapacityError `disk_failed`; then the same is tried again as a whole.
        """
        try:
            lengths = self._append(lines)
            write_atomic(self._path, data)
            self._lengths |= lengths
        except OSError as error:
            raise CapacityError(
                "disk_failed",
                f"campaign state {self._path} was not written, and no plan is published: {error}",
            ) from error

    def keep_signed(self, journal: str, line: bytes) -> None:
        """Put a plan and the signed document that lists it beside the journal of its trial.

        Raises: CapacityError `disk_failed`.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / journal).with_suffix(".plans").open("ab") as file:
                file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._prune()
        except OSError as error:
            raise CapacityError("disk_failed", f"{self._folder}: {error}") from error

    def _append(self, lines: Iterable[tuple[str, bytes]]) -> dict[str, int]:
        """Write lines behind what is committed; returns how long the journals are now."""
        lengths = {}
        by_name: dict[str, list[bytes]] = {}
        for name, line in lines:
            by_name.setdefault(name, []).append(line + b"\n")
        for name, added in by_name.items():
            self._folder.mkdir(parents=True, exist_ok=True)
            path, data = self._folder / name, b"".join(added)
            is_new = not path.exists()
            with path.open("wb" if is_new else "r+b") as file:
                file.truncate(self._lengths.get(name, 0))
                file.seek(0, os.SEEK_END)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                fsync_directory(self._folder)
            lengths[name] = self._lengths.get(name, 0) + len(data)
        return lengths

    def _prune(self) -> None:
        names = sorted(path.stem for path in self._folder.glob("*.jsonl"))
        for name in names[:-JOURNALS_MAX]:
            for suffix in (".jsonl", ".plans"):
                (self._folder / f"{name}{suffix}").unlink(missing_ok=True)

    def _unreadable(self, why: str) -> ConfigError:
        return ConfigError(
            "bad_controller_state",
            f"campaign state {self._path} cannot be read, and nothing was changed: {why}",
            "restore the file from a backup; without it the next plan would be older than the "
            "fleet's",
        )


def _decoded(data: bytes) -> Saved:
    return msgspec.json.decode(data, type=Saved)


def _upgraded(data: bytes, rules: Rules, now_s: float) -> Saved:
    found = msgspec.json.decode(data, type=_SavedBefore)
    old = found.state
    trial = None
    if old.canary is not None and old.stable is not None:
        trial = Trial.start(rules, old.canary, old.stable.release)
        trial.at, trial.began_s = 0, now_s
    state = State(
        seq=old.seq,
        stable=old.stable,
        trial=trial,
        pending=old.pending,
        quarantined=old.quarantined,
        decisions=old.decisions,
        counts=old.counts,
        outbox=old.outbox,
    )
    return Saved(family=rules.family, state=state, freshness=found.freshness)
