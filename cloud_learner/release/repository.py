"""The signed repository as it stands: on the publisher's disk, and on the broker.

Why: what is signed must outlive both the publisher's process and the broker's store, which drops
its oldest messages when it is full.

Invariants: `online.json` is replaced in one commit point, after the packages that it names are on
disk. What is live is sent again when it was never sent, or so much followed that it could fade.

Knows nothing about signing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from cloud_learner.release.metadata import ReleaseFile, blob_messages, metadata_message
from edge_runtime.errors import CapacityError, ConfigError
from edge_runtime.files import write_atomic
from edge_runtime.wire import subjects

STREAM_BYTES = 256 * 1024 * 1024
STATE_VERSION = 1

Messages = list[tuple[str, bytes]]


class SignedFile(msgspec.Struct, frozen=True):
    """A signed metadata file of ours, with the version and expiry that stand in it."""

    version: int
    expires_s: float
    text: str


class State(msgspec.Struct, frozen=True, kw_only=True):
    """All that changes from one transaction to the next: signed files by role, plans by family."""

    version: int = STATE_VERSION
    roles: dict[str, SignedFile] = {}
    plans: dict[str, str] = {}

    def message(self, role: str) -> tuple[str, bytes]:
        """Subject and bytes of a role's file."""
        file = self.roles[role]
        return metadata_message(role, file.version, file.text.encode())


class Repository:
    """The files under `directory`, and what of them the broker lacks.

    Raises on construction: ConfigError (no_trust, bad_state).
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.roots = _versioned(directory, "root")
        targets = _versioned(directory, "targets")
        if not self.roots or not targets:
            raise ConfigError(
                "no_trust",
                f"{directory} holds no root of trust",
                "create the keys of this home first",
            )
        newest = max(targets)
        self.targets = targets[newest]
        self._static = [
            metadata_message("root", number, data) for number, data in self.roots.items()
        ]
        self._static.append(metadata_message("targets", newest, self.targets))
        self.state = _load_state(directory / "online.json")
        self._sent: dict[str, int] = {}
        self._sent_bytes = 0

    @property
    def anything_sent(self) -> bool:
        """Whether the broker is known to hold anything of ours."""
        return bool(self._sent)

    def commit(self, state: State, release: ReleaseFile | None, live: set[str]) -> Messages:
        """Make `state` durable; give what the broker lacks of it, the timestamp excepted.

        `live` holds the hashes of the packages and patches that stay.
        Raises: CapacityError (state_unwritable), with the state as it was or as it shall be.
        """
        try:
            return self._commit(self._directory / "blobs", state, release, live)
        except OSError as error:
            raise CapacityError(
                "state_unwritable", f"{self._directory} fails: {error}; nothing is published"
            ) from error

    def package(self, sha256: str) -> bytes | None:
        """A package that is live; None for any other."""
        try:
            return (self._directory / "blobs" / sha256).read_bytes()
        except OSError:
            return None

    def mark_sent(self, messages: Iterable[tuple[str, bytes]]) -> None:
        """Remember that the broker stored these."""
        for subject, data in messages:
            self._sent[subject] = self._sent_bytes
            self._sent_bytes += len(data)

    def forget_sent(self) -> None:
        """Assume nothing of what the broker holds."""
        self._sent.clear()

    def _commit(
        self, blobs: Path, state: State, release: ReleaseFile | None, live: set[str]
    ) -> Messages:
        for data in _files_of(release) if release is not None else ():
            path = blobs / hashlib.sha256(data).hexdigest()
            if not path.exists():
                write_atomic(path, data)
        write_atomic(self._directory / "online.json", msgspec.json.encode(state))
        self.state = state
        for path in blobs.glob("[0-9a-f]*"):
            if path.name not in live:
                path.unlink()
        return self._lacking(blobs, live)

    def _lacking(self, blobs: Path, live: set[str]) -> Messages:
        files = list(self._static)
        for text in self.state.plans.values():
            files += blob_messages(text.encode())
        files += [self.state.message(role) for role in self.state.roles if role != "timestamp"]
        packages = {subjects.chunk(sha256, 0): sha256 for sha256 in live}
        still = {subject for subject, _ in files} | packages.keys()
        self._sent = {subject: at for subject, at in self._sent.items() if subject in still}
        lacking = [message for message in files if not self._fresh(message[0])]
        for subject, sha256 in packages.items():
            if not self._fresh(subject):
                lacking += blob_messages((blobs / sha256).read_bytes())
        return lacking

    def _fresh(self, subject: str) -> bool:
        at = self._sent.get(subject)
        return at is not None and self._sent_bytes - at < STREAM_BYTES // 2


def _files_of(release: ReleaseFile) -> list[bytes]:
    patches = [patch.data for each in release.patches.values() for patch in each]
    return [*release.packages().values(), *patches]


def _versioned(directory: Path, role: str) -> dict[int, bytes]:
    paths = directory.glob(f"[0-9]*.{role}.json")
    return {int(path.name.split(".")[0]): path.read_bytes() for path in paths}


def _load_state(path: Path) -> State:
    if not path.exists():
        return State()
    try:
        state = msgspec.json.decode(path.read_bytes(), type=State)
    except (msgspec.DecodeError, ValueError) as error:
        raise _bad_state(path, str(error)) from error
    if state.version != STATE_VERSION:
        raise _bad_state(path, f"version {state.version}; this reads {STATE_VERSION}")
    return state


def _bad_state(path: Path, what: str) -> ConfigError:
    return ConfigError(
        "bad_state",
        f"{path} cannot be read: {what}; nothing is published",
        "restore it, or remove it and publish release and plan again",
    )
