"""Signatures from trust domains that are asked, and what the gate reads before it gives one.

Why: the gate's key lies with a process of its own; the publisher collects what it signs as it
collects the signatures of keys that lie here.

Knows nothing about how another process is asked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from inspect import isawaitable
from typing import Any, Protocol

from securesystemslib.signer import Signature  # type: ignore[attr-defined] # no __all__
from tuf.api.metadata import Metadata, Targets  # type: ignore[attr-defined] # no __all__

from cloud_learner.release.metadata import Signs


class Asks(Protocol):
    """What has another process sign for its trust domain."""

    async def sign(self, payload: bytes) -> Signature:
        """A signature over `payload`. Raises: TransportError when there is none now."""


async def collected(document: Targets, signers: Sequence[Signs | Asks]) -> bytes:
    """The file of a document, signed by exactly these. Raises: what a signer raises."""
    metadata = Metadata(document)
    payload = metadata.signed_bytes
    for signer in signers:
        found = signer.sign(payload)
        signature = await found if isawaitable(found) else found
        metadata.signatures[signature.keyid] = signature
    return metadata.to_bytes()


def verdicts_in(payload: bytes) -> list[tuple[str, str, Any]]:
    """Path, hash and verdict (None: none) of each release in a payload that `releases_in` read."""
    targets = json.loads(payload)["targets"]
    return [
        (path, entry["hashes"]["sha256"], entry.get("custom", {}).get("verdict"))
        for path, entry in targets.items()
    ]
