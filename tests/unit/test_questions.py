"""Questions in the cloud are answered once, packages arrive whole, orders are signed."""

from __future__ import annotations

import asyncio

import pytest

from cloud_learner import orders
from cloud_learner.asking import Answerer, Asker
from cloud_learner.packed import Parcel, fetch_package, send_package
from cloud_learner.streams import make_streams
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.errors import ConfigError, HeadwaterError, RequestError, TransportError
from edge_runtime.update.trust import CHUNK_BYTES
from edge_runtime.wire import subjects

WISH = orders.Wish(family="coin", packages=["a" * 64, "b" * 64])


def asked(work, *, before=None, wait_s=30.0):
    """What comes of a question to who answers with `work`."""

    async def scenario():
        broker = MemoryBroker()
        bus, other = await broker.connect(name="asker"), await broker.connect(name="gate")
        asker = Asker(bus)
        if work is not None:
            answerer = Answerer(other, work)
            await other.subscribe(subjects.GATE_SIGN, answerer.hear)
        if before is not None:
            await before(broker, other)
        try:
            return await asker.ask(subjects.GATE_SIGN, b"question", wait_s=wait_s)
        finally:
            await asker.close()

    return asyncio.run(scenario())


async def echo(message, body):
    return message.subject.encode() + body


def test_a_question_gets_its_answer():
    assert asked(echo) == b"hw.gate.signquestion"


def test_a_refusal_comes_back_as_the_error_it_was():
    async def refuse(_message, _body):
        raise RequestError("unknown_family", "no", "yes")

    with pytest.raises(RequestError) as caught:
        asked(refuse)
    assert (caught.value.code, caught.value.message, caught.value.hint) == (
        "unknown_family",
        "no",
        "yes",
    )


def test_somebody_further_on_who_is_away_is_away():
    async def away(_message, _body):
        raise TransportError("no_answer", "the gate is away")

    with pytest.raises(TransportError) as caught:
        asked(away)
    assert caught.value.code == "no_answer"


def test_nobody_there_is_no_answer():
    with pytest.raises(TransportError) as caught:
        asked(None, wait_s=0.01)
    assert caught.value.code == "no_answer"


def test_garbage_on_the_subject_stops_nobody():
    async def garble(broker, bus):
        for data in (b"", b"garbage", b"\x94\x01\xa1a\xa3../\xc4\x00"):
            await bus.send(subjects.GATE_SIGN, data)

    assert asked(echo, before=garble) == b"hw.gate.signquestion"


def test_the_work_of_a_question_that_comes_again_is_done_once():
    done, heard = [], []

    async def work(_message, body):
        done.append(body)
        return b""

    async def scenario():
        broker = MemoryBroker()
        bus, other = await broker.connect(name="asker"), await broker.connect(name="gate")
        answerer = Answerer(other, work)

        async def twice(message):
            heard.append(message)
            await answerer.hear(message)
            await answerer.hear(message)

        await other.subscribe(subjects.GATE_SIGN, twice)
        asker = Asker(bus)
        await asker.ask(subjects.GATE_SIGN, b"question", wait_s=30.0)
        await asker.close()

    asyncio.run(scenario())
    assert done == [b"question"]


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_a_package_arrives_whole(size):
    async def scenario():
        bus = await MemoryBroker().connect(name="x")
        await make_streams(bus)
        data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        assert await fetch_package(bus, await send_package(bus, data)) == data

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"sha256": "0" * 64}, "no_package"),
        ({"length": 2}, "no_package"),
        ({"length": 1 << 40}, "too_large"),
        ({"length": -1}, "too_large"),
    ],
)
def test_a_package_that_is_not_there_as_it_was_named_is_refused(change, code):
    async def scenario():
        bus = await MemoryBroker().connect(name="x")
        await make_streams(bus)
        sent = await send_package(bus, b"package")
        named = Parcel(change.get("sha256", sent.sha256), change.get("length", sent.length))
        with pytest.raises(RequestError) as caught:
            await fetch_package(bus, named)
        assert caught.value.code == code

    asyncio.run(scenario())


@pytest.fixture
def keys(tmp_path):
    orders.create(tmp_path / "anna.pem", tmp_path / "operators" / "anna.pub")
    orders.create(tmp_path / "eve.pem", tmp_path / "eve.pub")
    return tmp_path


def test_an_order_is_what_its_operator_signed(keys):
    order = orders.signed(WISH, "anna", keys / "anna.pem")

    assert orders.checked(order, keys / "operators", orders.Wish) == WISH


@pytest.mark.parametrize(
    ("operator", "key", "change", "code"),
    [
        ("anna", "eve.pem", b"", "bad_order_signature"),
        ("anna", "anna.pem", b" ", "bad_order_signature"),
        ("eve", "eve.pem", b"", "unknown_operator"),
        ("../anna", "anna.pem", b"", "unknown_operator"),
    ],
)
def test_another_s_order_is_refused(keys, operator, key, change, code):
    order = orders.signed(WISH, operator, keys / key)
    order = orders.Order(order.operator, order.text + change, order.signature)

    with pytest.raises(HeadwaterError) as caught:
        orders.checked(order, keys / "operators", orders.Wish)
    assert caught.value.code == code


def test_keys_that_cannot_be_used_are_refused(keys):
    (keys / "open.pem").write_bytes((keys / "anna.pem").read_bytes())
    (keys / "open.pem").chmod(0o644)
    (keys / "bad.pem").write_text("no key")
    (keys / "bad.pem").chmod(0o600)
    found = {}
    for name in ("open", "bad", "absent"):
        with pytest.raises(ConfigError) as caught:
            orders.signed(WISH, "anna", keys / f"{name}.pem")
        found[name] = caught.value.code
    with pytest.raises(ConfigError) as caught:
        orders.create(keys / "anna.pem", keys / "anna.pub")

    assert found == {"open": "open_key", "bad": "bad_key", "absent": "no_key"}
    assert caught.value.code == "keys_exist"
