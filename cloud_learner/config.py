"""The learner's home: one folder with all that the cloud side of some families keeps.

Why: bootstrap, serve and status must agree on where things lie.

Invariants: what families share lies at the top, what is a family's own below `families/<name>/`;
its `origin.json` is written last by its bootstrap, and a folder without one is no family's. A home
without a family is no home. One process at a time owns a home: it serves it, or adds a family.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from edge_runtime.errors import ConfigError
from edge_runtime.files import write_atomic


class Origin(msgspec.Struct, frozen=True):
    """What the bootstrap settled: the family's folder, and the event time it learned through."""

    family: str
    folder: str
    learned_through_s: float
    release: str
    sha256: str


class FamilyHome:
    """Paths of what is one family's own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.campaign = root / "campaign.json"
        self.checkpoint = root / "checkpoint.pt"
        self.graph = root / "graph.onnx"
        self.reference = root / "reference.set"
        self.static = root / "static.set"
        self.known = root / "known.keys"
        self.hold_out = root / "recent.hold-out"
        self.marker = root / "origin.json"
        self.submitted = root / "submitted.json"
        self.trials = root / "trials"

    def write_origin(self, origin: Origin) -> None:
        """The last act of a bootstrap."""
        write_atomic(self.marker, msgspec.json.encode(origin))

    def origin(self) -> Origin:
        """What the bootstrap settled. Raises: ConfigError `bad_origin`."""
        try:
            return msgspec.json.decode(self.marker.read_bytes(), type=Origin)
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(
                "bad_origin",
                f"{self.marker} cannot be read: {error}; nothing was changed",
                "restore the family's folder from a copy",
            ) from error


class Home:
    """Paths under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.archive = root / "examples"  # `archive` held records, up to release 0.1
        self.raw = root / "raw"
        self.registry = root / "registry"
        self.lineage = root / "lineage"
        self.ingest_db = root / "ingest"
        self.trusted_root = root / "trust" / "root.json"
        self.broker = root / "broker"
        self.learner_key = root / "learner.nk"
        self.operators = root / "keys" / "operators"

    def key(self, name: str) -> Path:
        """Where the private key of a trust domain lies, whether or not it is there."""
        return self.root / "keys" / f"{name}.pem"

    def check_gate_is_here(self) -> None:
        """Raises: ConfigError `gate_apart` where the gate's key has left a home that has others."""
        if self.key("learner").exists() and not self.key("gate").exists():
            raise ConfigError(
                "gate_apart",
                f"the gate of {self.root} has a home of its own, and this needs its key here; "
                "nothing was changed",
                "move gate.pem back into keys/, do it, and cloud-learner gate init into a new home",
            )

    def of(self, family: str) -> FamilyHome:
        """Where a family's own things lie, whether or not it is there."""
        return FamilyHome(self.root / "families" / family)

    def families(self) -> list[str]:
        """The names of the families that were bootstrapped into this home, in order.

        Raises: ConfigError `bad_version`.
        """
        if (self.root / "bootstrap.json").exists():
            raise ConfigError(
                "bad_version",
                f"{self.root} is a home of a release that knew one family; nothing was changed",
                "bootstrap a new home: the devices send again what they still hold",
            )
        return sorted(path.parent.name for path in self.root.glob("families/*/origin.json"))

    def origins(self) -> dict[str, Origin]:
        """What the bootstrap of each family settled. Raises: ConfigError `no_home`, `bad_origin`,
        `bad_version`.
        """
        names = self.families()
        if not names:
            raise ConfigError(
                "no_home",
                f"{self.root} is not a learner's home: it holds no family",
                f"cloud-learner bootstrap FAMILY DATA --home {self.root}",
            )
        return {name: self.of(name).origin() for name in names}

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Own the folder, made when absent. Raises: ConfigError `already_owned`."""
        self.root.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._lock(fd)
            yield
        finally:
            os.close(fd)

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                "already_owned",
                f"another process uses {self.root}; nothing was changed",
                "stop `cloud-learner serve` on it first; a new family is served from its next "
                "start on",
            ) from error
