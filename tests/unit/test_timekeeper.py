"""Who says the time: what is no question is dropped, and a home without the key says nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cloud_learner.release import keys
from cloud_learner.timekeeper import Timekeeper
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import ManualClock
from edge_runtime.errors import TransportError
from edge_runtime.update.trust import time_payload
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import WIRE_VERSION, TimeQuestion

NOW_S = 1_800_000_000.25
NONCE = bytes(range(16))


def test_an_answer_is_signed_over_its_question_and_the_time(tmp_path: Path) -> None:
    keys.create(tmp_path, ["toy"])

    async def scene() -> None:
        bus = await MemoryBroker().connect()
        timekeeper = Timekeeper(tmp_path, bus, ManualClock(NOW_S))
        await timekeeper.start()
        data = await bus.ask(subjects.TIME, codec.encode(TimeQuestion(WIRE_VERSION, NONCE)))
        answer = codec.decode_time_answer(data)
        assert (answer.nonce, answer.time_s) == (NONCE, NOW_S)
        signed = keys.load_signer(tmp_path, "time").sign(
            b"headwater-time-1|" + NONCE + b"|1800000000250"
        )
        assert time_payload(NONCE, NOW_S).endswith(b"|1800000000250")
        assert (answer.signature.hex(), answer.keyid) == (signed.signature, signed.keyid)
        assert timekeeper.statistics() == {"times_told": 1, "bad_time_questions": 0}

    asyncio.run(scene())


def test_what_is_no_question_gets_no_answer(tmp_path: Path) -> None:
    keys.create(tmp_path, ["toy"])
    bad = [b"", b"\xff" * 9, codec.encode(TimeQuestion(9, NONCE))]
    bad += [codec.encode(TimeQuestion(WIRE_VERSION, each)) for each in (b"", NONCE[:15], NONCE * 2)]

    async def scene() -> None:
        bus = await MemoryBroker().connect()
        timekeeper = Timekeeper(tmp_path, bus, ManualClock(NOW_S))
        await timekeeper.start()
        for question in bad:
            with pytest.raises(TransportError, match="timeout"):
                await bus.ask(subjects.TIME, question, timeout_s=0.01)
        assert timekeeper.statistics() == {"times_told": 0, "bad_time_questions": len(bad)}

    asyncio.run(scene())


def test_a_home_without_the_key_says_nothing(tmp_path: Path) -> None:
    keys.create(tmp_path, ["toy"])
    (tmp_path / "keys" / "time.pem").unlink()

    async def scene() -> None:
        bus = await MemoryBroker().connect()
        await Timekeeper(tmp_path, bus, ManualClock(NOW_S)).start()
        question = codec.encode(TimeQuestion(WIRE_VERSION, NONCE))
        with pytest.raises(TransportError, match="timeout"):
            await bus.ask(subjects.TIME, question, timeout_s=0.01)

    asyncio.run(scene())
