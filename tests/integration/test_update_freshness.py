"""Freshness and order, with the real client: clocks that lie, replays, lost state, long absences.

Each test is a promise of docs/promises.md; what runs is never touched by a refusal.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tuf.api.metadata import Root, Targets, Timestamp

from cloud_learner.broker import Broker
from cloud_learner.floors import Floors
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.release.metadata import ReleaseFile, expiry, look, opened, sealed
from cloud_learner.timekeeper import Timekeeper
from edge_runtime.bus import nats
from edge_runtime.bus.base import Bus, Message
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import ManualClock
from edge_runtime.errors import HeadwaterError, TrustError
from edge_runtime.rollout.plan import Plan, PlanArm
from edge_runtime.update.client import UpdateClient
from edge_runtime.update.fetcher import BusFetcher
from edge_runtime.update.shelf import Shelf
from edge_runtime.update.trust import ISSUED_FIELD, STALE_S, time_payload
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import WIRE_VERSION, Report, TimeAnswer

NOW_S = 1_800_000_000.0
HOUR_S, DAY_S, YEAR_S = 3600.0, 86_400.0, 365 * 86_400.0
FAMILY = "flight_delay"
VERDICT = {"outcome": "pass", "rules": ["static"], "sha256": "0" * 64}
ROLES = ("timestamp", "snapshot", "targets", "plans", f"m-{FAMILY}")


@dataclass
class Device:
    """One life of a device; `clock` is what it takes for the time."""

    client: UpdateClient
    shelf: Shelf
    clock: ManualClock

    async def update(self) -> bytes:
        """A whole turn: refresh, plan, fetch, confirm, remember; gives the package."""
        return await asyncio.to_thread(self._update)

    def _update(self) -> bytes:
        self.client.refresh()
        plan = self.client.plan(FAMILY)
        path = self.client.fetch(plan.stable, plan.stable.packages[0], self.shelf)
        self.client.confirm(plan)
        self.shelf.save_current(plan)
        return path.read_bytes()


@dataclass
class Site:
    """A cloud with the right time, and devices that may have another."""

    folder: Path
    bus: Bus
    clock: ManualClock = field(default_factory=lambda: ManualClock(NOW_S))

    def __post_init__(self) -> None:
        keys.create(self.home, [FAMILY], self.clock)
        self.seq = 0
        self.restart()

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def restart(self) -> None:
        self.publisher = Publisher(self.home, self.bus, keys.load(self.home), self.clock)

    async def tell_the_time(self) -> Timekeeper:
        timekeeper = Timekeeper(self.home, self.bus, self.clock)
        await timekeeper.start()
        return timekeeper

    async def publish(self, data: bytes) -> Plan:
        self.seq += 1
        release = ReleaseFile(FAMILY, f"r{self.seq}", self.seq, data, VERDICT)
        arm = PlanArm(release.release, release.path, release.sha256, self.seq, 1.0)
        plan = Plan(family=FAMILY, seq=self.seq, stable=arm)
        await self.publisher.publish(release, plan)
        return plan

    def device(self, now_s: float | None = None, name: str = "EWR") -> Device:
        clock = ManualClock(self.clock.now_s() if now_s is None else now_s)
        fetcher = BusFetcher(self.bus, asyncio.get_running_loop())
        directory, root = self.folder / name, (self.home / "trust" / "root.json").read_bytes()
        client = UpdateClient(directory, root, fetcher, clock, ask_time=fetcher.ask_time)
        return Device(client, Shelf(directory / "shelf"), clock)

    async def messages(self) -> dict[str, bytes]:
        """All signed metadata that the broker holds now."""
        root = opened(Root, (self.home / "trust" / "root.json").read_bytes(), None, "root")
        view = await look(self.bus, root)
        names = [f"{n}.{role}.json" for role, n in view.versions.items() if role != "timestamp"]
        wanted = [subjects.metadata(name) for name in ("timestamp.json", *names)]
        found = await self.bus.last_many(subjects.TRUST_STREAM, wanted)
        return {each.subject: each.data for each in found if each is not None}

    async def serve(self, messages: dict[str, bytes]) -> None:
        for subject, data in messages.items():
            await self.bus.publish(subject, data)

    def renew(self, days: int) -> None:
        """The yearly ceremony: root and targets signed anew, valid for so many days from now."""
        root = opened(Root, self.newest("root"), None, "root")
        targets = opened(Targets, self.newest("targets"), None, "targets")
        for name, document, by in (
            ("root", root, ["root-1", "root-2"]),
            ("targets", targets, ["targets"]),
        ):
            document.version += 1
            document.expires = expiry(self.clock.now_s(), days)
            document.unrecognized_fields[ISSUED_FIELD] = int(self.clock.now_s())
            data = sealed(document, [keys.load_signer(self.home, each) for each in by])
            (self.home / "tuf" / f"{document.version}.{name}.json").write_bytes(data)
        self.restart()

    def newest(self, role: str) -> bytes:
        found = (self.home / "tuf").glob(f"[0-9]*.{role}.json")
        return max(found, key=lambda path: int(path.name.split(".")[0])).read_bytes()


def play(tmp_path: Path, scene: Callable[[Site], Awaitable[None]]) -> None:
    async def played() -> None:
        await scene(Site(tmp_path, await MemoryBroker().connect()))

    asyncio.run(played())


async def refused(turn: Awaitable[object]) -> HeadwaterError:
    with pytest.raises(TrustError) as caught:
        await turn
    return caught.value


# F1, F2: replays, with any part of the cache gone


@pytest.mark.parametrize(
    "damage",
    [
        "empty",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("gone", "garbage", "half")),
    ],
)
def test_f2_with_any_part_of_the_cache_lost_a_replay_is_refused_and_the_genuine_taken(
    tmp_path: Path, damage: str
) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"old")
        old = await site.messages()
        await site.publish(b"new")
        new = await site.messages()
        device = site.device()
        assert await device.update() == b"new"
        device.client.close()
        tried = 0
        for size in range(len(ROLES) + 2):
            for lost in itertools.combinations([*ROLES, "root"], size):
                shutil.copytree(tmp_path / "EWR", tmp_path / "life", symlinks=True)
                for role in lost:
                    spoil(tmp_path / "life" / "tuf", role, damage)
                await site.serve(old)
                life = site.device(name="life")
                error = await refused(life.update())
                assert error.code in {"rolled_back", "metadata_rolled_back"}, lost
                await site.serve(new)
                assert await life.update() == b"new", lost
                life.client.close()
                shutil.rmtree(tmp_path / "life")
                tried += 1
        assert tried == 2**6

    play(tmp_path, scene)


def spoil(cache: Path, role: str, damage: str) -> None:
    found = cache.glob("root_history/*") if role == "root" else [cache / f"{role}.json"]
    for path in list(found):
        whole = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(
                {"empty": b"", "garbage": b"\x00\xff" * 99}.get(damage, whole[: len(whole) // 2])
            )


UNREADABLE = Path("/proc/self/mem")
"""What stands here answers with EIO, as a bad sector does."""


@pytest.mark.parametrize("lost", ["floor.a", "floor.b"])
@pytest.mark.parametrize("damage", [b"", b"\x00" * 300, b"{}", None, UNREADABLE])
def test_f2_one_copy_of_the_floor_is_enough_and_mends_the_other(
    tmp_path: Path, lost: str, damage: bytes | Path | None
) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"old")
        old = await site.messages()
        await site.publish(b"new")
        device = site.device()
        await device.update()
        floor = device.client.floor
        device.client.close()
        path = tmp_path / "EWR" / lost
        whole = path.read_bytes()
        path.unlink()
        if isinstance(damage, Path):
            path.symlink_to(damage)
        elif damage is not None:
            path.write_bytes(damage)
        shutil.rmtree(tmp_path / "EWR" / "tuf")
        await site.serve(old)
        device = site.device()
        assert device.client.floor == floor
        assert path.read_bytes() == whole
        assert (await refused(device.update())).code == "metadata_rolled_back"

    play(tmp_path, scene)


def test_f2_without_a_floor_that_can_be_read_nothing_is_believed_and_the_way_back_is_told(
    tmp_path: Path,
) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"package")
        device = site.device()
        await device.update()
        device.client.close()
        paths = [tmp_path / "EWR" / name for name in ("floor.a", "floor.b")]
        for path in paths:
            path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(TrustError) as caught:
            site.device()
        assert caught.value.code == "floor_unreadable"
        assert caught.value.hint.startswith(f"rm {paths[0]} {paths[1]}")
        assert device.shelf.load_current(FAMILY) is not None
        for path in paths:
            path.unlink()
        assert await site.device().update() == b"package"

    play(tmp_path, scene)


# F3: an older copy of the disk


def test_f3_a_disk_that_was_put_back_is_told_by_the_cloud(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        floors = Floors(tmp_path / "floors.json")

        def report(device: Device) -> None:
            floor = list(device.client.freshness.floor)
            told = Report(WIRE_VERSION, "EWR", 1, 0.0, {}, [], 1, {}, {}, [], 0, 0, floor=floor)
            floors.hear(told, site.clock.now_s())

        await site.publish(b"last month")
        device = site.device()
        await device.update()
        report(device)
        device.client.close()
        shutil.copytree(tmp_path / "EWR", tmp_path / "image", symlinks=True)
        await site.publish(b"this month")
        device = site.device()
        await device.update()
        report(device)
        assert floors.restored() == {}
        device.client.close()
        floors.save()
        floors = Floors(tmp_path / "floors.json")
        device = site.device(name="image")
        report(device)
        assert floors.restored() == {"EWR": {"times": 1, "last_s": NOW_S, "below": 1}}
        await device.update()
        report(device)
        assert floors.restored() == {"EWR": {"times": 1, "last_s": NOW_S, "below": 0}}

    play(tmp_path, scene)


# F4: parts of two states


@pytest.mark.parametrize("role", ["snapshot", "targets", "plans", f"m-{FAMILY}"])
def test_f4_a_part_of_an_older_state_below_a_newer_one_is_refused(
    tmp_path: Path, role: str
) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"old")
        old = await site.messages()
        site.renew(days=300)
        await site.publish(b"new")
        new = await site.messages()
        subject = next(each for each in new if each.endswith(f".{role}"))
        before = next(each for each in old if each.endswith(f".{role}"))
        await site.serve({subject: old[before]})
        assert (await refused(site.device().update())).code in {"rolled_back", "bad_metadata"}
        await site.serve(new)
        assert await site.device(name="JFK").update() == b"new"

    play(tmp_path, scene)


# F5: a broker that stands still


def test_f5_metadata_that_is_held_back_raises_an_alarm_before_it_expires(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"package")
        device = site.device()
        device.clock.advance(STALE_S - 60)
        await device.update()
        assert not device.client.freshness.stale
        device.clock.advance(120)
        await device.update()
        assert device.client.freshness.stale
        assert device.client.freshness.issued_s == NOW_S
        site.clock.advance(STALE_S + 60)
        await site.publisher.maintain()
        await device.update()
        assert not device.client.freshness.stale

    play(tmp_path, scene)


# F6: clocks


@pytest.mark.parametrize("kind", ["memory", "nats"])
def test_f6_a_clock_that_is_ten_years_ahead_is_settled_by_a_signed_answer(
    tmp_path: Path, kind: str
) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"package")
        device = site.device(NOW_S + 10 * YEAR_S)
        error = await refused(device.update())
        assert error.code == "expired"
        assert "nobody says what time it is" in error.message
        assert "set the device's clock" in error.hint
        timekeeper = await site.tell_the_time()
        assert await device.update() == b"package"
        assert timekeeper.statistics() == {"times_told": 1, "bad_time_questions": 0}
        assert device.client.floor.time_s == NOW_S  # a clock that is ahead locks nobody out
        device.client.close()
        assert await site.device().update() == b"package"
        assert timekeeper.statistics()["times_told"] == 1

    if kind == "memory":
        play(tmp_path, scene)
        return

    async def played(url: str) -> None:
        bus = await nats.connect(url, name="test")
        try:
            await scene(Site(tmp_path, bus))
        finally:
            await bus.close()

    with Broker.start(tmp_path / "broker") as broker:
        asyncio.run(played(broker.url))


@pytest.mark.parametrize("now_s", [0.0, NOW_S, NOW_S + 1.5 * DAY_S, NOW_S + 10 * YEAR_S])
def test_f6_what_has_expired_is_refused_by_any_clock(tmp_path: Path, now_s: float) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"package")
        site.clock.advance(2 * DAY_S)
        timekeeper = await site.tell_the_time()
        device = site.device(now_s)
        if now_s == NOW_S:  # nothing tells this clock from a right one
            await device.update()
            return
        assert (await refused(device.update())).code == "expired"
        assert timekeeper.statistics()["times_told"] == 1
        await site.publisher.maintain()
        assert await device.update() == b"package"

    play(tmp_path, scene)


def test_f6_a_clock_at_1970_installs_nothing_until_somebody_says_the_time(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"package")
        device = site.device(0.0)
        error = await refused(device.update())
        assert error.code == "clock_behind"
        assert "set the device's clock" in error.hint
        await site.tell_the_time()
        assert await device.update() == b"package"

    play(tmp_path, scene)


def test_f6_a_clock_that_jumps_back_an_hour_at_each_start_revives_nothing(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"old")
        old = await site.messages()
        await site.tell_the_time()
        for start in range(30):
            site.clock.advance(DAY_S)
            await site.publish(b"%d" % start)
            new = await site.messages()
            device = site.device(NOW_S - start * HOUR_S)
            assert await device.update() == b"%d" % start
            device.client.close()
            shutil.rmtree(tmp_path / "EWR" / "tuf")
            await site.serve(old)
            device = site.device(NOW_S - start * HOUR_S)
            assert (await refused(device.update())).code in {"expired", "metadata_rolled_back"}
            device.client.close()
            await site.serve(new)

    play(tmp_path, scene)


def test_f6_the_issue_of_the_root_is_the_first_time_that_a_device_knows(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"old")
        old = await site.messages()
        site.clock.advance(3 * DAY_S)
        site.renew(days=300)
        await site.publish(b"new")
        new = await site.messages()
        (site.home / "trust" / "root.json").write_bytes(site.newest("root"))
        await site.serve(old)
        device = site.device(0.0)
        assert (await refused(device.update())).code == "expired"
        await site.serve(new)
        await site.tell_the_time()
        assert await device.update() == b"new"

    play(tmp_path, scene)


Answer = Callable[[Site, Message], bytes]


def of_other_key(site: Site, message: Message) -> bytes:
    nonce = codec.decode_time_question(message.data).nonce
    key = keys.load_signer(site.home, "timestamp")
    signed = key.sign(time_payload(nonce, NOW_S))
    mark = bytes.fromhex(signed.signature)
    return codec.encode(TimeAnswer(WIRE_VERSION, nonce, NOW_S, mark, signed.keyid))


def of_other_time(site: Site, message: Message) -> bytes:
    nonce = codec.decode_time_question(message.data).nonce
    signed = keys.load_signer(site.home, "time").sign(time_payload(nonce, NOW_S + 9 * YEAR_S))
    mark = bytes.fromhex(signed.signature)
    return codec.encode(TimeAnswer(WIRE_VERSION, nonce, NOW_S, mark, signed.keyid))


def of_other_question(site: Site, _message: Message) -> bytes:
    nonce = bytes(16)
    signed = keys.load_signer(site.home, "time").sign(time_payload(nonce, NOW_S))
    mark = bytes.fromhex(signed.signature)
    return codec.encode(TimeAnswer(WIRE_VERSION, nonce, NOW_S, mark, signed.keyid))


@pytest.mark.parametrize(
    "forge",
    [
        *(of_other_key, of_other_time, of_other_question),
        lambda _site, _message: b"",
        lambda _site, message: message.data,
        lambda _site, _message: codec.encode(TimeAnswer(1, bytes(16), float("nan"), b"", "x")),
    ],
)
def test_f6_a_forged_or_replayed_time_is_no_time(tmp_path: Path, forge: Answer) -> None:
    async def scene(site: Site) -> None:
        async def answer(message: Message) -> None:
            await message.answer(forge(site, message))

        await site.publish(b"package")
        await site.bus.subscribe(subjects.TIME, answer)
        for now_s, code in ((0.0, "clock_behind"), (NOW_S + 10 * YEAR_S, "expired")):
            device = site.device(now_s)
            assert (await refused(device.update())).code == code
            device.client.close()

    play(tmp_path, scene)


def test_f6_metadata_from_the_future_is_refused_by_a_signed_time(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.tell_the_time()
        site.publisher = Publisher(
            site.home, site.bus, keys.load(site.home), ManualClock(NOW_S + YEAR_S / 2)
        )
        await site.publish(b"package")
        device = site.device()
        assert (await refused(device.update())).code == "issued_ahead"
        assert device.client.floor.time_s == 0.0

    play(tmp_path, scene)


@pytest.mark.parametrize("issued", [-1, 10**12, 10**400, True, "soon", None, [1]])
def test_f6_a_time_of_issue_that_is_none_ends_nothing(tmp_path: Path, issued: object) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"package")
        await site.tell_the_time()
        device = site.device()
        await device.update()
        told = (await site.messages())[subjects.metadata("timestamp.json")]
        stamp = opened(Timestamp, told, None, "timestamp")
        stamp.version += 1
        stamp.unrecognized_fields[ISSUED_FIELD] = issued
        data = sealed(stamp, [keys.load_signer(site.home, "timestamp")])
        await site.serve({subjects.metadata("timestamp.json"): data})
        with contextlib.suppress(TrustError):
            await device.update()
        assert device.client.floor.time_s == NOW_S
        assert device.shelf.load_current(FAMILY) is not None

    play(tmp_path, scene)


# F7: away for two years


def test_f7_after_two_years_away_a_device_updates_without_a_visit(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"two years ago")
        device = site.device()
        await device.update()
        device.client.close()
        for _ in range(4):
            site.clock.advance(YEAR_S / 2)
            site.renew(days=300)
        await site.tell_the_time()
        await site.publish(b"today")
        for name, now_s in (("EWR", None), ("EWR", 0.0), ("JFK", None), ("LGA", NOW_S)):
            device = site.device(now_s, name)
            assert await device.update() == b"today"
            assert device.client.floor.versions["root"] == 5
            device.client.close()

    play(tmp_path, scene)


def test_f7_where_nobody_renewed_the_root_the_reason_is_exact(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"two years ago")
        device = site.device()
        await device.update()
        device.clock.advance(2 * YEAR_S)
        site.clock.advance(2 * YEAR_S)
        await site.tell_the_time()
        await site.publisher.maintain()
        error = await refused(device.update())
        assert error.code == "expired"
        assert "root" in error.message
        assert device.shelf.load_current(FAMILY) is not None

    play(tmp_path, scene)


# F8: expiry in the middle of an install


@pytest.mark.parametrize("until", ["plan", "fetch", "confirm"])
def test_f8_metadata_that_expires_while_an_install_is_pending_leaves_old_or_new(
    tmp_path: Path, until: str
) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"old")
        device = site.device()
        await device.update()
        new = await site.publish(b"new")

        def install() -> None:
            device.client.refresh()
            expire_at("plan")
            plan = device.client.plan(FAMILY)
            expire_at("fetch")
            device.client.fetch(plan.stable, plan.stable.packages[0], device.shelf)
            expire_at("confirm")
            device.client.confirm(plan)
            device.shelf.save_current(plan)

        def expire_at(step: str) -> None:
            if step == until:
                device.clock.advance(400 * DAY_S)

        await asyncio.to_thread(install)
        assert (await refused(device.update())).code == "expired"
        assert device.shelf.load_current(FAMILY) == new
        assert device.client.floor.plan_seq == {FAMILY: 2}
        device.client.close()
        again = site.device(NOW_S + 400 * DAY_S)
        assert (await refused(again.update())).code == "expired"
        path = again.shelf.path_of(new.stable.sha256)
        assert path is not None
        assert hashlib.sha256(path.read_bytes()).hexdigest() == new.stable.sha256

    play(tmp_path, scene)
