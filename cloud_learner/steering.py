"""Steering a campaign from outside of its process: what is asked, and the asking.

Why: whoever operates a fleet must be able to see where a release stands, hold it back and end it,
while the learner runs.

Invariants: every word carries who says it and why.

Knows nothing about campaigns. Implements proto/asyncapi.yaml (rollout).
"""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec

from cloud_learner.asking import Asker
from cloud_learner.orders import Order
from cloud_learner.packed import encoded
from cloud_learner.rollout.contest import Terms
from cloud_learner.rollout.control import Control
from edge_runtime.bus.access import Access
from edge_runtime.bus.nats import connect
from edge_runtime.wire import subjects

ANSWER_S = 10.0
REASON_CHARS_MAX = 300


class Word(msgspec.Struct, array_like=True, frozen=True):
    """A question about `family` (all where it is empty), or a word to its campaign.

    `order` is an operator's consent to the step that an approval leads to, `terms` are those of a
    contest.
    """

    verb: Literal["status", "pause", "resume", "abort", "approve", "hold", "pin", "free", "contest"]
    family: str = ""
    by: str = ""
    reason: str = ""
    device: str = ""
    release: str = ""
    order: Order | None = None
    terms: Terms | None = None

    @property
    def control(self) -> Control | None:
        """What the campaign is told; None where it is only asked."""
        if self.verb == "status":
            return None
        return Control(
            verb=self.verb,
            by=self.by,
            reason=self.reason,
            device=self.device,
            release=self.release,
            terms=self.terms,
        )


async def say(url: str, access: Access, word: Word) -> dict[str, Any]:
    """The status of each family that was spoken to, after it was told.

    Raises: RequestError (what was refused), TransportError (unreachable, no_answer).
    """
    bus = await connect(url, name="rollout", access=access)
    asker = Asker(bus)
    try:
        answer = await asker.ask(subjects.ROLLOUT, encoded(word), wait_s=ANSWER_S)
    finally:
        await asker.close()
        await bus.close()
    found: dict[str, Any] = json.loads(answer)
    return found
