"""The helm: answers who asks about campaigns, and brings what people say to them.

Why: the campaigns live in the host; commands reach it over the bus.

Invariants: a word without who and why is refused, as is one to a family that is not here.

Knows nothing about how words are carried out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from cloud_learner.packed import decoded
from cloud_learner.releasing import Releasing
from cloud_learner.rollout.control import Control
from cloud_learner.steering import REASON_CHARS_MAX, Word
from edge_runtime.bus.base import Message
from edge_runtime.errors import ConfigError, RequestError
from edge_runtime.update.approval import Approval
from edge_runtime.wire.subjects import checked_name


class Helm:
    """Answers for the families of a host."""

    def __init__(self, releasing: Mapping[str, Releasing]) -> None:
        self._releasing = releasing

    async def work(self, _message: Message, body: bytes) -> bytes:
        """What an Answerer does. Raises: RequestError."""
        word = decoded(body, Word)
        told = word.control
        spoken_to = self._families(word)
        if told is not None:
            _check(word)
            await self._tell(spoken_to[word.family], word, told)
        found = {name: each.controller.status() for name, each in spoken_to.items()}
        return json.dumps(found).encode()

    async def _tell(self, releasing: Releasing, word: Word, told: Control) -> None:
        approve = None
        if (order := word.order) is not None:

            async def approve(plan: bytes) -> Approval:
                return await releasing.door.approve(plan, order)

        await releasing.controller.control(told, approve)

    def _families(self, word: Word) -> Mapping[str, Releasing]:
        if not word.family and word.verb == "status":
            return self._releasing
        if word.family not in self._releasing:
            raise RequestError(
                "unknown_family",
                f"there is no family {word.family!r:.70} here; nothing was changed",
                f"known: {', '.join(sorted(self._releasing))}",
            )
        return {word.family: self._releasing[word.family]}


def _check(word: Word) -> None:
    if not word.by or not word.reason:
        raise RequestError("no_reason", "who says it, and why? nothing was changed", "--reason")
    if len(word.by) + len(word.reason) > REASON_CHARS_MAX:
        text = f"a reason has at most {REASON_CHARS_MAX} characters; nothing was changed"
        raise RequestError("no_reason", text)
    if word.order is not None and word.order.operator != word.by:
        raise RequestError("bad_order", "the order is another operator's; nothing was changed")
    if word.verb in ("hold", "pin", "free"):
        try:
            checked_name(word.device, "device")
        except ConfigError as error:
            raise RequestError(error.code, error.message) from error
