"""Who may do what at a real broker that admits devices by their keys: nobody speaks for another."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Self

import msgspec
import pytest
from click.testing import CliRunner

from cloud_learner.admission import Admissions
from cloud_learner.broker import Broker
from cloud_learner.cli import main
from cloud_learner.config import Home
from cloud_learner.floors import Floors
from cloud_learner.reports import Reports
from edge_runtime.bus import nkey
from edge_runtime.bus.access import Access
from edge_runtime.bus.base import Bus, Message
from edge_runtime.bus.nats import NatsBus, connect
from edge_runtime.errors import ConfigError, HeadwaterError, TransportError
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import WIRE_VERSION, Report

WAIT_S = 10.0
MB = 1 << 20
DEVICES = ("kiosk-1", "kiosk-2")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    found = Home(tmp_path / "cloud")
    found.root.mkdir()
    return found


@pytest.fixture
def admissions(home: Home, tmp_path: Path) -> Admissions:
    return admitted(home, tmp_path)


def admitted(home: Home, folder: Path) -> Admissions:
    """Admissions of DEVICES, whose seeds lie in `folder`."""
    found = Admissions(home)
    for device in DEVICES:
        found.admit(device, nkey.create(folder / f"{device}.nk").public)
    return found


class World:
    """A broker with the learner's streams, and the ways to come in."""

    def __init__(self, broker: Broker, admissions: Admissions, folder: Path) -> None:
        self.broker, self.admissions, self.folder = broker, admissions, folder
        self._stack = contextlib.AsyncExitStack()

    async def learner(self) -> Bus:
        bus = await self.bus("learner", self.admissions.access())
        await bus.ensure_stream(
            subjects.EVENTS_STREAM, [subjects.EVENTS_ALL], max_bytes=MB, discard_new=True
        )
        for stream, held in (
            (subjects.STATE_STREAM, subjects.STATE_ALL),
            (subjects.TRUST_STREAM, subjects.TRUST_ALL),
        ):
            await bus.ensure_stream(stream, held, max_bytes=MB, per_subject=1, discard_new=False)
        return bus

    async def device(self, name: str) -> NatsBus:
        """The named device, by the key of that name and with its inbox."""
        key = self.folder / f"{name}.nk"
        bus = await self.bus(name, Access(key=key, inbox=subjects.inbox(name)))
        assert isinstance(bus, NatsBus)
        return bus

    async def bus(self, name: str, access: Access | None = None, **options) -> Bus:
        bus = await connect(self.broker.url, name=name, access=access, **options)
        self._stack.push_async_callback(bus.close)
        return bus

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._stack.aclose()


Scenario = Callable[[World], Awaitable[None]]


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Scenario], None]]:
    """Runs a scenario against one broker that all of them share."""
    folder = tmp_path_factory.mktemp("shared")
    home = Home(folder / "cloud")
    home.root.mkdir()
    admissions = admitted(home, folder)

    async def played(broker: Broker, scenario: Scenario) -> None:
        async with asyncio.timeout(30), World(broker, admissions, folder) as world:
            await scenario(world)

    with Broker.start(home.broker, admissions.rules()) as broker:
        yield lambda scenario: asyncio.run(played(broker, scenario))


async def refusal(attempt: Awaitable[object]) -> str:
    """The code with which an attempt is refused, at once and not by a deadline."""
    started_s = asyncio.get_running_loop().time()
    with pytest.raises(HeadwaterError) as caught:
        await attempt
    assert asyncio.get_running_loop().time() - started_s < 2.0
    return caught.value.code


async def refused_with(device: Bus) -> str:
    """What a device is told once it has noticed that it is expelled."""
    said = ""
    while "does not admit" not in said:
        try:
            await device.publish(subjects.report("kiosk-1"), b"x", timeout_s=1)
        except TransportError as error:
            said = str(error)
        await asyncio.sleep(0)
    return said


@contextlib.asynccontextmanager
async def hearing(bus: Bus, subject: str) -> AsyncIterator[asyncio.Queue[Message]]:
    queue: asyncio.Queue[Message] = asyncio.Queue()
    subscription = await bus.subscribe(subject, queue.put)
    try:
        yield queue
    finally:
        await subscription.close()


async def heard(queue: asyncio.Queue[Message]) -> Message:
    return await asyncio.wait_for(queue.get(), WAIT_S)


async def heard_until(queue: asyncio.Queue[Message], body: bytes) -> list[Message]:
    """All up to the message with this body."""
    came = [await heard(queue)]
    while came[-1].data != body:
        came.append(await heard(queue))
    return came


def test_a_device_says_and_hears_all_that_it_needs(play):
    async def scenario(world: World) -> None:
        learner, device = await world.learner(), await world.device("kiosk-1")
        for event_class in ("event", "label"):
            subject = subjects.events("kiosk-1", event_class)
            first = await device.publish(subject, b"x", message_id=event_class)
            assert await device.publish(subject, b"x", message_id=event_class) == first
        await device.publish(subjects.report("kiosk-1"), b"report")
        assert await device.last(subjects.STATE_STREAM, subjects.watermark("kiosk-1")) is None
        async with (
            hearing(device, subjects.watermark("kiosk-1")) as marks,
            hearing(device, subjects.REFRESH) as nudges,
            hearing(device, subjects.LEARNER_STATUS) as words,
        ):
            await learner.publish(subjects.watermark("kiosk-1"), b"mark")
            await learner.send(subjects.REFRESH, b"")
            await learner.send(subjects.LEARNER_STATUS, b"well")
            assert (await heard(marks)).data == b"mark"
            assert (await heard(nudges)).data == b""
            assert (await heard(words)).data == b"well"
        found = await device.last(subjects.STATE_STREAM, subjects.watermark("kiosk-1"))
        assert found is not None
        assert found.data == b"mark"
        names = [subjects.chunk("ab" * 32, index) for index in range(3)]
        await learner.publish(names[1], b"chunk", headers={"a": "1"})
        found_many = await device.last_many(subjects.TRUST_STREAM, names)
        assert [each and (each.data, each.headers) for each in found_many] == [
            None,
            (b"chunk", {"a": "1"}),
            None,
        ]
        assert device.statistics()["not_allowed"] == 0

    play(scenario)


@pytest.mark.parametrize(
    "subject",
    [
        *("hw.ev.kiosk-2.event", "hw.ev.kiosk-2.label", "hw.report.kiosk-2"),
        *("hw.wm.kiosk-1", "hw.wm.kiosk-2", "hw.meta.timestamp", "hw.blob.x.0", "hw.cmd.refresh"),
        *("hw.status.learner", "_INBOX_kiosk-2.x", "_INBOX.x", "anything"),
    ],
)
def test_a_device_cannot_publish_what_is_not_its_own(play, subject):
    async def scenario(world: World) -> None:
        learner, device = await world.learner(), await world.device("kiosk-1")
        async with hearing(learner, ">") as everything:
            assert await refusal(device.publish(subject, b"x")) == "not_allowed"
            await device.send(subject, b"x")
            await device.publish(subjects.report("kiosk-1"), b"the end")
            came = await heard_until(everything, b"the end")
            assert not [each for each in came if each.data == b"x"]
        assert device.statistics()["not_allowed"] == 2
        assert device.connected

    play(scenario)


@pytest.mark.parametrize(
    "call",
    [
        *("STREAM.CREATE.MINE", "STREAM.UPDATE.HW_EVENTS", "STREAM.DELETE.HW_EVENTS"),
        *("STREAM.PURGE.HW_EVENTS", "STREAM.INFO.HW_EVENTS", "STREAM.NAMES"),
        *("STREAM.MSG.GET.HW_EVENTS", "STREAM.MSG.DELETE.HW_EVENTS"),
        *("CONSUMER.CREATE.HW_EVENTS.x", "CONSUMER.DELETE.HW_EVENTS.learner"),
        "CONSUMER.MSG.NEXT.HW_EVENTS.learner",
    ],
)
def test_a_device_cannot_touch_streams(play, call):
    async def scenario(world: World) -> None:
        learner, device = await world.learner(), await world.device("kiosk-1")
        assert await refusal(device._live().api(call, {})) == "not_allowed"
        assert await refusal(device.purge(subjects.EVENTS_STREAM)) == "not_allowed"
        await learner.purge(subjects.EVENTS_STREAM)

    play(scenario)


def test_a_device_cannot_read_what_the_broker_holds_for_others(play):
    async def scenario(world: World) -> None:
        learner, device = await world.learner(), await world.device("kiosk-1")
        await learner.publish(subjects.watermark("kiosk-2"), b"secret")
        for stream, subject in (
            (subjects.STATE_STREAM, subjects.watermark("kiosk-2")),
            (subjects.STATE_STREAM, subjects.report("kiosk-2")),
            (subjects.EVENTS_STREAM, subjects.events("kiosk-2", "event")),
        ):
            assert await refusal(device.last(stream, subject)) == "not_allowed"

    play(scenario)


@pytest.mark.parametrize(
    "reply",
    [
        *("hw.ev.kiosk-2.event", "hw.wm.kiosk-2", "hw.report.kiosk-2", "hw.meta.timestamp"),
        *("hw.cmd.refresh", "hw.status.learner"),
        *("$JS.API.STREAM.DELETE.HW_EVENTS", "$JS.API.STREAM.PURGE.HW_EVENTS"),
    ],
)
def test_a_device_cannot_let_the_broker_answer_onto_anothers_subject(play, reply):
    """The broker checks what is published on, not where its answer goes; the account keeps it in.

    An answer that is empty is what would delete a stream; the direct get of nothing gives one.
    """

    async def scenario(world: World) -> None:
        learner, device = await world.learner(), await world.device("kiosk-1")
        other = await world.device("kiosk-2")
        async with hearing(learner, ">") as here, hearing(other, "hw.cmd.>") as there:
            link = device._live()
            for subject in (
                subjects.events("kiosk-1", "event"),
                f"$JS.API.DIRECT.GET.{subjects.TRUST_STREAM}.hw.meta.none",
            ):
                await link.send(subject, b"", reply=reply)
            await device.publish(subjects.report("kiosk-1"), b"the end")
            came = {each.subject for each in await heard_until(here, b"the end")}
            assert subjects.events("kiosk-1", "event") in came
            assert reply not in came
            assert there.empty()
        assert await learner.last(subjects.TRUST_STREAM, "hw.meta.timestamp") is None
        found = await learner.last(subjects.EVENTS_STREAM, subjects.events("kiosk-1", "event"))
        assert found is not None

    play(scenario)


@pytest.mark.parametrize("subject", [">", "_INBOX_kiosk-2.>", "hw.ev.>", "hw.wm.kiosk-2", "hw.>"])
def test_a_device_cannot_listen_to_another(play, subject):
    async def scenario(world: World) -> None:
        learner, spy = await world.learner(), await world.device("kiosk-1")
        victim = await world.device("kiosk-2")
        async with hearing(spy, subject) as stolen, hearing(spy, subjects.REFRESH) as nudges:
            await victim.publish(subjects.events("kiosk-2", "event"), b"secret")
            await learner.publish(subjects.watermark("kiosk-2"), b"secret")
            await learner.send(subjects.REFRESH, b"")
            await heard(nudges)
            assert stolen.empty()
        assert spy.statistics()["not_allowed"] >= 1

    play(scenario)


def report(device: str, number: int, time_s: float, epoch: int = 1, **values: object) -> bytes:
    bare = Report(WIRE_VERSION, device, epoch, time_s, {}, [], 0, {}, {}, [], 0, 0, number=number)
    return codec.encode(msgspec.structs.replace(bare, **values))


def signed(world: World, by: str, subject: str, data: bytes) -> dict[str, str]:
    key = nkey.load(world.folder / f"{by}.nk")
    return codec.signature_headers(key.sign(codec.signed_report(subject, data)))


def test_c11_forged_and_replayed_reports_do_not_count(play, tmp_path):
    """Whoever holds the broker may publish anything in a device's name, and say again what it said.

    The learner's own connection stands for it here.
    """
    floors = Floors(tmp_path / "floors.json")

    async def scenario(world: World) -> None:
        hostile, device = await world.learner(), await world.device("kiosk-1")
        reports = Reports(world.admissions.known, floors.is_news)
        subject, other = subjects.report("kiosk-1"), subjects.report("kiosk-2")

        async def said(bus: Bus, data: bytes, headers: dict[str, str], on: str = subject) -> bool:
            await bus.publish(on, data, headers=headers)
            return reports.believed(await heard(queue)) is not None

        async with hearing(hostile, "hw.report.*") as queue:
            first, second = report("kiosk-1", 1, 10.0), report("kiosk-1", 2, 11.0)
            by_itself = [signed(world, "kiosk-1", subject, data) for data in (first, second)]
            assert await said(device, first, by_itself[0])
            assert await said(device, second, by_itself[1])
            # Said again, as it was and as a newer one.
            assert not await said(hostile, first, by_itself[0])
            assert not await said(hostile, second, by_itself[1])
            assert reports.statistics()["replayed_reports"] == 2
            # Forged: not signed, by another key, of other content, for another subject.
            better = report("kiosk-1", 3, 12.0, plan_seq=9)
            assert not await said(hostile, better, {})
            assert reports.statistics()["unsigned_reports"] == 1
            for headers in (
                signed(world, "kiosk-2", subject, better),
                by_itself[1],
                signed(world, "kiosk-1", other, better),
                {codec.SIGNATURE_HEADER: "no base64"},
                {codec.SIGNATURE_HEADER: ""},
            ):
                assert not await said(hostile, better, headers)
            assert reports.statistics()["forged_reports"] == 5
            # A device that speaks of another one, with its own key on its own subject.
            wrong = report("kiosk-2", 3, 12.0)
            assert not await said(device, wrong, signed(world, "kiosk-1", subject, wrong))
            assert reports.statistics()["bad_reports"] == 1
            # The device goes on; on an older copy of its disk the numbers begin anew, not the time.
            for number, time_s, epoch in ((3, 12.0, 1), (1, 13.0, 1), (1, 5.0, 2), (2, 4.0, 2)):
                data = report("kiosk-1", number, time_s, epoch)
                assert await said(device, data, signed(world, "kiosk-1", subject, data))
            assert not await said(hostile, first, by_itself[0])
            # Of a device whose key is not known, what is not signed counts, and counts once.
            strange = report("ghost", 1, 1.0)
            assert await said(hostile, strange, {}, subjects.report("ghost"))
            assert not await said(hostile, strange, {}, subjects.report("ghost"))
        floors.save()
        again = Reports(world.admissions.known, Floors(tmp_path / "floors.json").is_news)
        assert again.believed(Message(subject, first, by_itself[0])) is None

    play(scenario)


def test_c11_a_key_that_was_replaced_signs_no_more(home, admissions, tmp_path):
    subject, data = subjects.report("kiosk-1"), report("kiosk-1", 1, 1.0)
    reports = Reports(admissions.known, lambda _: True)

    def believed(name: str) -> bool:
        signature = nkey.load(tmp_path / f"{name}.nk").sign(codec.signed_report(subject, data))
        message = Message(subject, data, codec.signature_headers(signature))
        return reports.believed(message) is not None

    assert believed("kiosk-1")
    new = nkey.create(tmp_path / "new.nk").public
    Admissions(home).admit("kiosk-1", new, replace=True)
    assert not believed("kiosk-1")
    assert believed("new")


def test_strangers_get_nowhere(play, tmp_path, caplog):
    async def scenario(world: World) -> None:
        await world.learner()
        unknown = nkey.create(tmp_path / "unknown.nk").public
        for access, hint in (
            (None, "edge-runtime init"),
            (Access(key=tmp_path / "unknown.nk"), f"cloud-learner admit DEVICE {unknown}"),
        ):
            bus = await world.bus("stranger", access)
            assert not bus.connected
            with pytest.raises(TransportError) as caught:
                await bus.publish(subjects.events("kiosk-1", "event"), b"x")
            assert caught.value.code == "unreachable"
            assert "does not admit" in caught.value.message
            assert hint in caught.value.hint

    play(scenario)
    refused = [record for record in caplog.records if "does not admit" in record.message]
    assert len(refused) == 2
    assert not any(record.exc_info for record in caplog.records)


def test_a_broker_that_runs_takes_a_new_device_and_the_others_stay(play):
    async def scenario(world: World) -> None:
        learner, device = await world.learner(), await world.device("kiosk-1")
        key = nkey.create(world.folder / "new.nk").public
        assert await asyncio.to_thread(world.admissions.admit, "new", key)
        new = await world.device("new")
        await new.publish(subjects.events("new", "event"), b"hello")
        await device.publish(subjects.report("kiosk-1"), b"still here")
        for bus in (learner, device, new):
            assert bus.statistics()["reconnects"] == 0

    play(scenario)


def test_an_expelled_device_is_cut_and_told_why_and_comes_back_when_it_is_admitted(play):
    async def scenario(world: World) -> None:
        learner, device = await world.learner(), await world.device("kiosk-1")
        other = await world.device("kiosk-2")
        key = world.admissions.devices["kiosk-1"]
        assert await asyncio.to_thread(world.admissions.expel, "kiosk-1")
        assert key in await refused_with(device)
        await other.publish(subjects.report("kiosk-2"), b"still here")
        assert learner.statistics()["reconnects"] == other.statistics()["reconnects"] == 0
        assert await asyncio.to_thread(world.admissions.admit, "kiosk-1", key)
        back = asyncio.Event()
        again = await world.bus(
            "again",
            Access(key=world.folder / "kiosk-1.nk", inbox=subjects.inbox("kiosk-1")),
            on_reconnect=back.set,
        )
        assert again.connected

    play(scenario)


def test_a_restart_knows_who_was_admitted_meanwhile(home, admissions, tmp_path):
    with Broker.start(home.broker, admissions.rules()):
        pass
    assert not admissions.admit("late", nkey.create(tmp_path / "late.nk").public)  # nothing runs

    async def scenario() -> None:
        with Broker.start(home.broker, admissions.rules()) as broker:
            async with World(broker, admissions, tmp_path) as world:
                await world.learner()
                late = await world.device("late")
                await late.publish(subjects.events("late", "event"), b"x")

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_what_a_broker_for_everybody_held_is_still_there_with_accounts(home, admissions, tmp_path):
    async def scenario() -> None:
        with Broker.start(home.broker) as broker:
            bus = await connect(broker.url, name="test")
            await bus.ensure_stream("HW_EVENTS", ["hw.ev.*.*"], max_bytes=MB, discard_new=True)
            await bus.publish("hw.ev.kiosk-1.event", b"kept")
            await bus.close()
        with Broker.start(home.broker, admissions.rules()) as broker:
            async with World(broker, admissions, tmp_path) as world:
                found = await (await world.learner()).last("HW_EVENTS", "hw.ev.kiosk-1.event")
        assert found is not None
        assert found.data == b"kept"

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_one_key_is_one_device_and_one_device_one_key(admissions, tmp_path):
    key = admissions.devices["kiosk-1"]
    other = nkey.create(tmp_path / "other.nk").public
    for device, public, code in (
        ("kiosk-3", key, "key_taken"),
        ("kiosk-1", other, "device_known"),
        ("kiosk 3", other, "bad_name"),
        ("a.b", other, "bad_name"),
        ("kiosk-3", other[:-1], "bad_public_key"),
        ("kiosk-3", "S" + other[1:], "bad_public_key"),
    ):
        before = admissions.devices
        with pytest.raises(ConfigError) as caught:
            admissions.admit(device, public)
        assert caught.value.code == code
        assert admissions.devices == before
    admissions.admit("kiosk-1", other, replace=True)
    admissions.admit("kiosk-1", other)
    assert admissions.devices["kiosk-1"] == other
    with pytest.raises(ConfigError) as caught:
        admissions.expel("nobody")
    assert caught.value.code == "unknown_device"


def test_the_learners_key_is_made_once_and_is_its_own(home, admissions):
    key = admissions.access().key
    assert key is not None
    before = key.read_bytes()
    assert stat.S_IMODE(os.stat(key).st_mode) == 0o600
    assert Admissions(home).access().key == key
    assert key.read_bytes() == before


def test_the_commands_admit_list_and_expel(home, tmp_path):
    def learner(*args: object) -> tuple[int, str, str]:
        done = CliRunner().invoke(main, [*map(str, args), "--home", str(home.root)])
        return done.exit_code, done.stdout, done.stderr

    key = nkey.create(tmp_path / "new.nk").public
    home.root.rmdir()
    code, _, told = learner("admit", "new", key)
    assert (code, "no_home" in told, home.root.exists()) == (2, True, False)
    home.root.mkdir()
    assert learner("devices") == (0, "", "")
    code, said, told = learner("admit", "new", key)
    assert (code, said) == (0, "")
    assert "from serve's next start on" in told
    assert learner("devices")[1] == f"new  {key}\n"
    assert json.loads(learner("devices", "--json")[1]) == {"new": key}
    assert key in learner("broker-config")[1]
    assert learner("expel", "new")[0] == 0
    assert learner("expel", "new")[0] == 2
    assert learner("admit", "new", "U123")[0] == 2


def test_a_device_asks_the_time_and_nobody_but_the_learner_hears_or_answers_it(play) -> None:
    async def scenario(world: World) -> None:
        learner, device = await world.learner(), await world.device("kiosk-1")
        other = await world.device("kiosk-2")

        async def answer(message: Message) -> None:
            await message.answer(b"said to " + message.data)

        async with hearing(other, subjects.TIME) as heard:
            assert await refusal(device.ask(subjects.TIME, b"")) in {"nobody", "timeout"}
            subscription = await learner.subscribe(subjects.TIME, answer)
            assert await device.ask(subjects.TIME, b"kiosk-1") == b"said to kiosk-1"
            assert await other.ask(subjects.TIME, b"kiosk-2") == b"said to kiosk-2"
            assert heard.empty()
            await subscription.close()

    play(scenario)
