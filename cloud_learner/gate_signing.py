"""The gate's signature: given here, after a look at what is signed, or by a process that is asked.

Why: learner and gate must both sign a release; the publisher collects, wherever the gate's key is.

Invariants: the gate's key signs only packages that this gate passed, each with the verdict that it
gave. One that is away, slow or refuses has not signed yet: TransportError, try again.

Knows nothing about judging.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from securesystemslib.signer import Signature  # type: ignore[attr-defined] # no __all__

from cloud_learner.asking import Asker
from cloud_learner.packed import decoded
from cloud_learner.release.collecting import verdicts_in
from cloud_learner.release.keys import GateSigner
from cloud_learner.release.metadata import Signs
from edge_runtime.errors import RequestError, TransportError, TrustError
from edge_runtime.wire import subjects

SIGN_S = 2.0
REST_S = 10.0
"""How long a gate that gave no signature is not asked again: publishing holds up ingest."""

VerdictOf = Callable[[str, str], Mapping[str, Any] | None]


class JudgedSigner:
    """The gate's signer: only packages that passed, each with the verdict that was given.

    `verdict_of(family, sha256)` is that verdict, or None.
    """

    def __init__(self, signer: Signs, verdict_of: VerdictOf) -> None:
        self._verdict_of = verdict_of
        self._signer = GateSigner(signer, lambda *named: self._found(*named) is not None)

    def sign(self, payload: bytes) -> Signature:
        """Raises: TrustError (not_passed, not_releases, other_verdict)."""
        signature = self._signer.sign(payload)
        for path, sha256, verdict in verdicts_in(payload):
            if verdict is not None and verdict != self._found(path, sha256):
                raise TrustError(
                    "other_verdict", f"{path} names a verdict that is not the gate's; not signed"
                )
        return signature

    def _found(self, path: str, sha256: str) -> Mapping[str, Any] | None:
        return self._verdict_of(path.split("/")[1], sha256)


class ApartSigner:
    """The signature of a gate in another process."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self._not_before_s = float("-inf")
        self._why = ""

    async def sign(self, payload: bytes) -> Signature:
        """Raises: TransportError `no_gate_signature`: away, or it refuses; try again later."""
        if time.monotonic() < self._not_before_s:
            raise TransportError("no_gate_signature", self._why)
        try:
            data = await self._asker.ask(subjects.GATE_SIGN, payload, wait_s=SIGN_S)
        except (TransportError, RequestError) as error:
            self._why = f"the gate has not signed, and nothing is published: {error}"
            self._not_before_s = time.monotonic() + REST_S
            raise TransportError("no_gate_signature", self._why) from error
        keyid, signature = decoded(data, tuple[str, str])
        return Signature(keyid, signature)
