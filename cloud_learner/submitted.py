"""What an operator handed in last for a family, and what the learner's candidates do after it.

Why: until it is decided no candidate of the learner may take its place, also after a restart.

Invariants: what is noted is on disk. Commit point: the rename of the file.

Knows nothing about releases and campaigns.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_runtime.files import write_atomic


class Submitted(msgspec.Struct, frozen=True):
    """The release that came of it; with `hold`, no candidate follows until another is handed in."""

    release: str = ""
    then: str = "follow"

    @classmethod
    def load(cls, path: Path) -> Submitted:
        """What was noted at `path`, or nothing."""
        return msgspec.json.decode(path.read_bytes(), type=cls) if path.exists() else cls()

    def note(self, path: Path) -> Submitted:
        """Put it at `path`."""
        write_atomic(path, msgspec.json.encode(self))
        return self
