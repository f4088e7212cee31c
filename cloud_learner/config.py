"""The learner's home: one folder with all that a family's cloud side keeps.

Why: bootstrap, serve and status must agree on where things lie.

Invariants: `bootstrap.json` is written last by the bootstrap; a home without it is no home.
"""

from __future__ import annotations

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


class Home:
    """Paths under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.archive = root / "examples"  # `archive` held records, up to release 0.1
        self.raw = root / "raw"
        self.registry = root / "registry"
        self.lineage = root / "lineage"
        self.ingest_db = root / "ingest"
        self.campaign = root / "campaign.json"
        self.checkpoint = root / "checkpoint.pt"
        self.graph = root / "graph.onnx"
        self.reference = root / "reference.set"
        self.static = root / "static.set"
        self.known = root / "known.keys"
        self.hold_out = root / "recent.hold-out"
        self.trusted_root = root / "trust" / "root.json"
        self.broker = root / "broker"
        self.learner_key = root / "learner.nk"

    def write_origin(self, origin: Origin) -> None:
        """The last act of a bootstrap."""
        write_atomic(self.root / "bootstrap.json", msgspec.json.encode(origin))

    def origin(self) -> Origin:
        """What the bootstrap settled. Raises: ConfigError `no_home`."""
        path = self.root / "bootstrap.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=Origin)
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(
                "no_home",
                f"{self.root} is not a learner's home: {error}",
                f"cloud-learner bootstrap FAMILY DATA --home {self.root}",
            ) from error
