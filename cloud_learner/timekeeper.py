"""Says what time it is, signed: for devices whose own clock cannot be right.

Why: a device that sees only expired metadata cannot tell a clock that is ahead from somebody who
holds metadata back. The key `time` signs nothing else, so a thief of it makes no release genuine.

Invariants: each answer bears the nonce of its question, so it fits no other. A home without the key
answers nothing; what is no question is dropped and counted.

Knows nothing about devices and releases. Implements proto/asyncapi.yaml (channel hw.time).
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from cloud_learner.release import keys
from cloud_learner.release.metadata import Signs
from edge_runtime.bus.base import Bus, Message, Subscription
from edge_runtime.clock import Clock
from edge_runtime.errors import ConfigError, HeadwaterError, RequestError
from edge_runtime.update.trust import NONCE_BYTES, TIME_ROLE, time_payload
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import WIRE_VERSION, TimeAnswer

log = logging.getLogger("cloud_learner")


class Timekeeper:
    """Answers with the time of `clock`, once started, under the key in the home at `root`."""

    def __init__(self, root: Path, bus: Bus, clock: Clock) -> None:
        self._signer = _signer(root)
        self._bus, self._clock = bus, clock
        self._counts = {"times_told": 0, "bad_time_questions": 0}

    async def start(self) -> Subscription:
        """Answer until the subscription is closed."""
        return await self._bus.subscribe(subjects.TIME, self._on_question)

    def statistics(self) -> dict[str, int]:
        """Times told, and questions that were none."""
        return dict(self._counts)

    async def _on_question(self, message: Message) -> None:
        try:
            nonce = codec.decode_time_question(message.data).nonce
        except RequestError:
            nonce = b""
        if self._signer is None or len(nonce) != NONCE_BYTES:
            self._counts["bad_time_questions"] += len(nonce) != NONCE_BYTES
            return
        now_s = self._clock.now_s()
        signed = self._signer.sign(time_payload(nonce, now_s))
        answer = TimeAnswer(
            WIRE_VERSION, nonce, now_s, bytes.fromhex(signed.signature), signed.keyid
        )
        with contextlib.suppress(HeadwaterError):  # it asks again
            await message.answer(codec.encode(answer))
            self._counts["times_told"] += 1


def _signer(root: Path) -> Signs | None:
    try:
        return keys.load_signer(root, TIME_ROLE)
    except ConfigError as error:
        log.warning("devices with a wrong clock are not told the time: %s", error)
        return None
