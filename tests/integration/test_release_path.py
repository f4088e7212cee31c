"""Publisher to shelf: the genuine arrives; the forged, old or damaged is refused by name."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root, Targets

from cloud_learner.package.delta import patch_between
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.release.metadata import (
    ReleaseFile,
    expiry,
    forge_plan,
    forge_release,
    look,
    publish_below,
    sealed,
)
from edge_runtime.bus.base import Bus, Message
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import ManualClock
from edge_runtime.errors import ConfigError, HeadwaterError, TransportError, TrustError
from edge_runtime.rollout.plan import Plan, PlanArm, Variant
from edge_runtime.update.client import UpdateClient
from edge_runtime.update.fetcher import BusFetcher
from edge_runtime.update.shelf import Shelf
from edge_runtime.wire import subjects

NOW_S = 1_800_000_000.0
DAY_S = 86_400.0
FAMILY = "flight_delay"
VERDICT = {"outcome": "pass", "rules": ["static"], "sha256": "0" * 64}


@dataclass
class Device:
    client: UpdateClient
    fetcher: BusFetcher
    shelf: Shelf

    async def update(self, family: str = FAMILY) -> list[bytes]:
        """One whole turn of a device: refresh, plan, fetch every arm, confirm."""
        return await asyncio.to_thread(self._update, family)

    def _update(self, family: str) -> list[bytes]:
        self.client.refresh()
        plan = self.client.plan(family)
        paths = [
            self.client.fetch(arm, package, self.shelf)
            for arm in plan.arms
            for package in arm.packages
        ]
        self.client.confirm(plan)
        return [path.read_bytes() for path in paths]


@dataclass
class Site:
    home: Path
    bus: Bus
    clock: ManualClock
    passed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        keys.create(self.home, [FAMILY, "other"], self.clock)
        self.publisher = self.new_publisher()
        root = Metadata[Root].from_bytes(self.root_bytes).signed
        self.root = root

    @property
    def root_bytes(self) -> bytes:
        return (self.home / "trust" / "root.json").read_bytes()

    def key(self, name: str) -> CryptoSigner:
        return keys.load_signer(self.home, name)

    def new_publisher(self) -> Publisher:
        signers = keys.Signers(
            learner=self.key("learner"),
            gate=keys.GateSigner(self.key("gate"), lambda _path, sha256: sha256 in self.passed),
            rollout=self.key("rollout"),
            snapshot=self.key("snapshot"),
            timestamp=self.key("timestamp"),
        )
        return Publisher(self.home, self.bus, signers, self.clock)

    def device(self, name: str = "EWR", bus: Bus | None = None) -> Device:
        directory = self.home.parent / name
        fetcher = BusFetcher(bus or self.bus, asyncio.get_running_loop())
        client = UpdateClient(directory, self.root_bytes, fetcher, self.clock)
        return Device(client, fetcher, Shelf(directory / "shelf"))

    def release(
        self, name: str, data: bytes, counter: int = 1, family: str = FAMILY
    ) -> ReleaseFile:
        return self.pass_(ReleaseFile(family, name, counter, data, VERDICT))

    def pass_(self, release: ReleaseFile) -> ReleaseFile:
        """Let the gate have passed every package of a release."""
        self.passed |= {hashlib.sha256(data).hexdigest() for data in release.packages().values()}
        return release

    async def publish(self, name: str, seq: int, data: bytes, counter: int = 1) -> ReleaseFile:
        release = self.release(name, data, counter)
        await self.publisher.publish(release, plan(seq, release))
        return release

    async def below(self, *forged: tuple[str, bytes]) -> None:
        """Publish forged roles with the real snapshot and timestamp keys."""
        await publish_below(
            self.bus,
            self.root,
            dict(forged),
            snapshot_signer=self.key("snapshot"),
            timestamp_signer=self.key("timestamp"),
            now_s=self.clock.now_s(),
        )

    async def messages(self) -> dict[str, bytes]:
        """Every metadata message that the broker holds now."""
        view = await look(self.bus, self.root)
        names = ["timestamp.json"]
        names += [f"{n}.{role}.json" for role, n in view.versions.items() if role != "timestamp"]
        found = await self.bus.last_many(
            subjects.TRUST_STREAM, [subjects.metadata(name) for name in names]
        )
        return {message.subject: message.data for message in found if message is not None}


def arm(release: ReleaseFile, weight: float = 1.0) -> PlanArm:
    names = ["int8", *release.variants]
    variants = tuple(
        Variant(name, path, hashlib.sha256(data).hexdigest())
        for name, (path, data) in zip(names, release.packages().items(), strict=True)
    )
    facts = (release.release, release.path, release.sha256, release.counter, weight)
    return PlanArm(*facts, variants if release.variants else ())


def plan(seq: int, stable: ReleaseFile, canary: ReleaseFile | None = None) -> Plan:
    return Plan(
        family=stable.family,
        seq=seq,
        stable=arm(stable),
        canary=None if canary is None else arm(canary),
        salt="s",
    )


def in_memory(tmp_path: Path, scene: Callable[[Site], Awaitable[None]]) -> None:
    """Play a scene at a site with a broker in memory."""

    async def play() -> None:
        bus = await MemoryBroker().connect()
        await scene(Site(tmp_path / "home", bus, ManualClock(NOW_S)))

    asyncio.run(play())


async def refused(family: type[HeadwaterError], turn: Awaitable[object]) -> str:
    """The code with which a turn is refused."""
    with pytest.raises(family) as caught:
        await turn
    return caught.value.code


@pytest.mark.parametrize("kind", ["memory", "nats"])
def test_a_release_and_its_plan_reach_the_shelf(
    tmp_path: Path, bus_of: Callable[[str], AbstractAsyncContextManager[Bus]], kind: str
) -> None:
    package = bytes(range(256)) * 1700  # 435,200 bytes: four chunks

    async def play() -> None:
        async with bus_of(kind) as bus:
            site = Site(tmp_path / "home", bus, ManualClock(NOW_S))
            nudges: list[bytes] = []

            async def nudged(message: object) -> None:
                nudges.append(b"")

            await bus.subscribe(subjects.REFRESH, nudged)
            first = await site.publish("r1", 1, package)
            device = site.device()
            assert await device.update() == [package]
            second = site.release("r2", b"second", 2)
            await site.publisher.publish(second, plan(2, first, second))
            assert await device.update() == [package, b"second"]
            assert len(nudges) == 2

    asyncio.run(play())


def test_a_new_plan_costs_four_round_trips_and_no_news_one(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        release = await site.publish("r1", 1, b"package")
        device = site.device()
        await device.update()
        before = device.fetcher.statistics()["round_trips"]
        await site.publisher.publish(plan=plan(2, release))
        await device.update()
        # root and timestamp together, snapshot, plans, the plan itself
        assert device.fetcher.statistics()["round_trips"] - before == 4
        await device.update()
        assert device.fetcher.statistics()["round_trips"] - before == 5

    in_memory(tmp_path, scene)


@pytest.mark.parametrize(
    "verdict",
    [
        {},
        {"outcome": "fail", "rules": [], "sha256": ""},
        {"outcome": "pass"},
        VERDICT | {"rules": 1},
    ],
)
def test_a_release_without_its_gate_s_verdict_is_refused(
    tmp_path: Path, verdict: dict[str, object]
) -> None:
    async def scene(site: Site) -> None:
        await site.publish("r1", 1, b"genuine")
        device = site.device()
        await device.update()
        unjudged = site.pass_(ReleaseFile(FAMILY, "r2", 2, b"unjudged", verdict))
        await site.publisher.publish(unjudged, plan(2, unjudged))
        assert await refused(TrustError, device.update()) == "no_verdict"
        assert device.client.verdicts()[FAMILY] == {"r1": VERDICT}

    in_memory(tmp_path, scene)


def test_before_anything_is_published_a_device_waits(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        assert await refused(TransportError, site.device("LGA").update()) == "unreachable"
        await site.publisher.publish()
        assert await refused(TransportError, site.device().update()) == "no_plan"

    in_memory(tmp_path, scene)


def test_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    home = tmp_path / "home"
    keys.create(home, [FAMILY], ManualClock(NOW_S))
    modes = {path.stat().st_mode & 0o777 for path in (home / "keys").iterdir()}
    assert modes == {0o600}
    before = (home / "keys" / "gate.pem").read_bytes()
    with pytest.raises(ConfigError, match="keys_exist"):
        keys.create(home, [FAMILY], ManualClock(NOW_S))
    assert (home / "keys" / "gate.pem").read_bytes() == before


@pytest.mark.parametrize("names", [["learner"], ["gate"], ["rollout"], ["timestamp", "snapshot"]])
def test_too_few_keys_ship_nothing_and_the_next_genuine_publish_mends_it(
    tmp_path: Path, names: list[str]
) -> None:
    async def scene(site: Site) -> None:
        await site.publish("r1", 1, b"genuine")
        device, fresh = site.device(), site.device("JFK")
        await device.update()
        evil = ReleaseFile(FAMILY, "evil", 99, b"evil")
        now_s = site.clock.now_s()
        signers = [site.key(name) for name in names]
        await site.below(
            await forge_release(site.bus, site.root, evil, signers, now_s),
            await forge_plan(site.bus, site.root, plan(9, evil), [site.key("rollout")], now_s),
        )
        assert await refused(TrustError, device.update()) == "below_threshold"
        assert await refused(TrustError, fresh.update()) == "below_threshold"
        assert device.shelf.path_of(evil.sha256) is None

        await site.publish("r2", 2, b"mended")
        assert site.publisher.statistics()["repairs"] == 1
        assert await device.update() == [b"mended"]
        assert await fresh.update() == [b"mended"]

    in_memory(tmp_path, scene)


def test_keys_of_another_home_are_refused(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish("r1", 1, b"genuine")
        device = site.device()
        await device.update()
        stranger = Site(tmp_path / "stranger" / "home", site.bus, site.clock)
        await stranger.publish("r1", 1, b"strange")
        # The stranger's timestamp is the newest message now.
        assert await refused(TrustError, device.update()) == "below_threshold"
        await site.publisher.publish()
        assert await device.update() == [b"genuine"]

    in_memory(tmp_path, scene)


def test_a_forged_plan_below_real_online_keys_is_refused(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        first = await site.publish("r1", 1, b"genuine")
        device = site.device()
        await device.update()
        role = await forge_plan(site.bus, site.root, plan(2, first), [site.key("learner")], NOW_S)
        await site.below(role)
        assert await refused(TrustError, device.update()) == "below_threshold"

    in_memory(tmp_path, scene)


def test_the_rollout_key_alone_can_name_only_what_is_released(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish("r1", 1, b"genuine")
        device = site.device()
        await device.update()
        evil = ReleaseFile(FAMILY, "evil", 99, b"evil")
        rollout = [site.key("rollout")]
        await site.below(await forge_plan(site.bus, site.root, plan(2, evil), rollout, NOW_S))
        assert await refused(TrustError, device.update()) == "not_released"
        swapped = ReleaseFile(FAMILY, "r1", 1, b"swapped")
        await site.below(await forge_plan(site.bus, site.root, plan(2, swapped), rollout, NOW_S))
        assert await refused(TrustError, device.update()) == "plan_mismatch"

    in_memory(tmp_path, scene)


def test_a_plan_that_names_another_familys_release_is_refused(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish("r1", 1, b"genuine")
        device = site.device()
        await device.update()
        other = site.release("r1", b"of the other family", family="other")
        await site.publisher.publish(other)
        crossed = Plan(family=FAMILY, seq=2, stable=arm(other))
        rollout = [site.key("rollout")]
        await site.below(await forge_plan(site.bus, site.root, crossed, rollout, NOW_S))
        assert await refused(TrustError, device.update()) == "plan_of_other_family"

    in_memory(tmp_path, scene)


def test_a_family_cannot_sign_a_path_of_another(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish("r1", 1, b"genuine")
        evil = ReleaseFile("other", "r1", 1, b"evil")
        both = [site.key("learner"), site.key("gate")]
        document = Targets(version=9, expires=expiry(NOW_S, 7), targets=evil.targets())
        crossed = Plan(family="other", seq=1, stable=arm(evil))
        rollout = [site.key("rollout")]
        await site.below(
            (f"m-{FAMILY}", sealed(document, both)),
            await forge_plan(site.bus, site.root, crossed, rollout, NOW_S),
        )
        assert await refused(TrustError, site.device().update("other")) == "not_released"

    in_memory(tmp_path, scene)


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_older_metadata_is_refused_after_the_cache_was_lost(tmp_path: Path, damage: str) -> None:
    async def scene(site: Site) -> None:
        await site.publish("r1", 1, b"old")
        old = await site.messages()
        await site.publish("r2", 2, b"new")
        device = site.device()
        await device.update()
        await asyncio.gather(*(site.bus.publish(name, data) for name, data in old.items()))
        assert await refused(TrustError, device.update()) == "rolled_back"

        cache = tmp_path / "EWR" / "tuf"
        if damage == "delete":
            shutil.rmtree(cache)
            cache.mkdir()
        else:
            for path in cache.glob("*.json"):
                path.write_bytes(b"")
        device.client.close()
        reborn = site.device()
        assert await refused(TrustError, reborn.update()) == "metadata_rolled_back"
        assert await site.device("new").update() == [b"old"]  # who never saw the new one

    in_memory(tmp_path, scene)


def test_a_plan_below_the_confirmed_one_is_refused_though_its_metadata_is_new(
    tmp_path: Path,
) -> None:
    async def scene(site: Site) -> None:
        release = await site.publish("r1", 5, b"package")
        device = site.device()
        await device.update()
        with pytest.raises(TrustError, match="plan_rolled_back"):
            await site.publisher.publish(plan=plan(4, release))
        rollout = [site.key("rollout")]
        await site.below(await forge_plan(site.bus, site.root, plan(4, release), rollout, NOW_S))
        assert await refused(TrustError, device.update()) == "plan_rolled_back"

    in_memory(tmp_path, scene)


def test_a_fleet_goes_back_to_an_older_release_until_the_floor_forbids_it(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        first = await site.publish("r1", 1, b"one", counter=1)
        device = site.device()
        await device.update()
        second = site.release("r2", b"two", counter=2)
        await site.publisher.publish(second, plan(2, second))
        assert await device.update() == [b"two"]
        await site.publisher.publish(plan=plan(3, first))
        assert await device.update() == [b"one"]
        await site.publisher.raise_floor(FAMILY, 2)
        assert await refused(TrustError, device.update()) == "release_below_floor"
        await site.publisher.publish(plan=plan(4, second))
        assert await device.update() == [b"two"]
        assert device.client.floor.release_counter == {FAMILY: 2}

    in_memory(tmp_path, scene)


@pytest.mark.parametrize(
    ("damage", "family", "code"),
    [
        (lambda data: bytes([data[0] ^ 1]) + data[1:], TrustError, "hash_mismatch"),
        (lambda data: data[:-1], TrustError, "wrong_length"),
        (lambda data: data + b"more", TrustError, "wrong_length"),
    ],
)
def test_a_damaged_package_is_refused_and_the_next_try_heals(
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    family: type[HeadwaterError],
    code: str,
) -> None:
    package = b"x" * 200_000

    async def scene(site: Site) -> None:
        release = await site.publish("r1", 1, package)
        subject = subjects.chunk(release.sha256, 1)
        message = await site.bus.last(subjects.TRUST_STREAM, subject)
        assert message is not None
        await site.bus.publish(subject, damage(message.data))
        device = site.device()
        assert await refused(family, device.update()) == code
        assert list((tmp_path / "EWR" / "shelf" / "packages").glob("*.onnx")) == []
        await site.bus.publish(subject, message.data)
        assert await device.update() == [package]

    in_memory(tmp_path, scene)


def test_an_absent_chunk_is_worth_a_retry(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publisher.publish()
        evil = site.release("r1", b"x")
        both = [site.key("learner"), site.key("gate")]
        document = Targets(version=9, expires=expiry(NOW_S, 7), targets=evil.targets())
        rollout = [site.key("rollout")]
        await site.below(
            (f"m-{FAMILY}", sealed(document, both)),
            await forge_plan(site.bus, site.root, plan(1, evil), rollout, NOW_S),
        )
        assert await refused(TransportError, site.device().update()) == "absent"

    in_memory(tmp_path, scene)


def test_garbage_metadata_is_refused(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish("r1", 1, b"package")
        device = site.device()
        await device.update()
        await site.bus.publish(subjects.metadata("timestamp.json"), b"\x00garbage")
        assert await refused(TrustError, device.update()) == "bad_metadata"
        await site.publisher.publish()
        assert await device.update() == [b"package"]

    in_memory(tmp_path, scene)


def test_endless_metadata_is_cut_off(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish("r1", 1, b"package")
        await site.bus.publish(subjects.metadata("timestamp.json"), b" " * 500_000)
        assert await refused(TrustError, site.device().update()) == "wrong_length"

    in_memory(tmp_path, scene)


def test_expired_metadata_blocks_installs_until_it_is_signed_afresh(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish("r1", 1, b"package")
        device = site.device()
        await device.update()
        assert not await site.publisher.maintain()
        site.clock.advance(1.1 * DAY_S)
        assert await refused(TrustError, device.update()) == "expired"
        assert await site.publisher.maintain()
        assert await device.update() == [b"package"]
        site.clock.advance(20 * DAY_S)  # all but root and targets has expired, on both sides
        assert await site.publisher.maintain()
        assert await device.update() == [b"package"]
        assert await site.device("JFK").update() == [b"package"]

    in_memory(tmp_path, scene)


def test_a_clock_that_was_set_back_revives_nothing(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish("r1", 1, b"old")
        device = site.device()
        old = await site.messages()
        site.clock.advance(3 * DAY_S)
        await site.publish("r2", 2, b"new")
        await device.update()
        device.client.close()
        site.clock = ManualClock(0.0)
        (tmp_path / "EWR" / "tuf" / "timestamp.json").unlink()
        await asyncio.gather(*(site.bus.publish(name, data) for name, data in old.items()))
        assert await refused(TrustError, site.device().update()) == "expired"

    in_memory(tmp_path, scene)


def test_the_gate_signs_only_what_it_passed(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish("r1", 1, b"package")
        before = await site.messages()
        failed = ReleaseFile(FAMILY, "r2", 2, b"failed the gate")
        with pytest.raises(TrustError, match="not_passed"):
            await site.publisher.publish(failed, plan(2, failed))
        assert await site.messages() == before
        assert await site.device().update() == [b"package"]
        assert site.publisher.plan(FAMILY).seq == 1  # type: ignore[union-attr]

    in_memory(tmp_path, scene)


def test_plan_changes_need_no_signature_of_learner_or_gate(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        first = await site.publish("r1", 1, b"one")
        second = site.release("r2", b"two", 2)
        await site.publisher.publish(second)
        site.passed.clear()
        await site.publisher.publish(plan=plan(2, first, second))
        assert await site.device().update() == [b"one", b"two"]

    in_memory(tmp_path, scene)


def test_a_plan_may_not_name_what_is_not_released(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish("r1", 1, b"one")
        with pytest.raises(TrustError, match="plan_names_unreleased"):
            await site.publisher.publish(plan=plan(2, site.release("r2", b"two")))
        with pytest.raises(TrustError, match="release_exists"):
            await site.publisher.publish(site.release("r1", b"other content"))
        with pytest.raises(ConfigError, match="unknown_family"):
            await site.publisher.publish(site.release("r1", b"one", family="nobody"))

    in_memory(tmp_path, scene)


def test_metadata_and_disk_hold_live_releases_only(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        for number in range(1, 9):
            await site.publish(f"r{number}", number, b"package %d" % number)
        assert len(list((site.home / "tuf" / "blobs").iterdir())) == 2
        view = await look(site.bus, site.root)
        name = subjects.metadata(f"{view.versions[f'm-{FAMILY}']}.m-{FAMILY}.json")
        message = await site.bus.last(subjects.TRUST_STREAM, name)
        assert message is not None
        assert sorted(Metadata.from_bytes(message.data).signed.targets) == [
            f"m/{FAMILY}/r7.onnx",
            f"m/{FAMILY}/r8.onnx",
        ]

    in_memory(tmp_path, scene)


def test_a_publisher_goes_on_after_a_restart_and_after_the_broker_lost_its_store(
    tmp_path: Path,
) -> None:
    async def scene(site: Site) -> None:
        first = await site.publish("r1", 1, b"one")
        device = site.device()
        await device.update()
        site.publisher = site.new_publisher()
        await site.publish("r2", 2, b"two", counter=2)
        assert await device.update() == [b"two"]

        site.bus = await MemoryBroker().connect()
        site.publisher = site.new_publisher()
        await site.publisher.publish(site.release("r1", b"one"), plan(3, first))
        device.client.close()
        assert await site.device().update() == [b"one"]

    in_memory(tmp_path, scene)


def test_the_same_publisher_fills_a_broker_that_lost_its_store(tmp_path: Path) -> None:
    async def play() -> None:
        broker = MemoryBroker()
        bus = await broker.connect()
        site = Site(tmp_path / "home", bus, ManualClock(NOW_S))
        await site.publish("r1", 1, b"one")
        broker.streams.clear()
        assert await refused(TransportError, site.publisher.publish()) == "no_stream"
        await site.publisher.publish()
        assert await site.device().update() == [b"one"]

    asyncio.run(play())


def test_a_publish_that_met_an_outage_is_repeated(tmp_path: Path) -> None:
    async def play() -> None:
        broker = MemoryBroker()
        bus = await broker.connect()
        site = Site(tmp_path / "home", bus, ManualClock(NOW_S))
        await site.publish("r1", 1, b"one")
        device = site.device()
        await device.update()
        second = site.release("r2", b"two", 2)
        broker.down()
        assert await refused(TransportError, device.update()) == "unreachable"
        turn = site.publisher.publish(second, plan(2, second))
        assert await refused(TransportError, turn) == "unreachable"
        broker.up()
        await site.publisher.publish(second, plan(2, second))
        assert await device.update() == [b"two"]

    asyncio.run(play())


def test_a_second_client_on_one_directory_is_refused(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        device = site.device()
        with pytest.raises(ConfigError, match="already_owned"):
            site.device()
        device.client.close()
        site.device().client.close()

    in_memory(tmp_path, scene)


def test_a_quarantined_package_is_not_fetched_again(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        release = await site.publish("r1", 1, b"package")
        device = site.device()
        device.shelf.quarantine(release.sha256, "golden_mismatch")
        assert await refused(TrustError, device.update()) == "release_quarantined"

    in_memory(tmp_path, scene)


def two_variants(name: str = "r1", counter: int = 1, data: bytes = b"int8") -> ReleaseFile:
    return ReleaseFile(FAMILY, name, counter, data, VERDICT, variants={"float32": b"float " + data})


def test_every_variant_of_a_release_is_signed_and_reaches_the_shelf(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        first = site.pass_(two_variants())
        await site.publisher.publish(first, plan(1, first))
        assert await site.device().update() == [b"int8", b"float int8"]

        second = site.pass_(two_variants("r2", 2, b"next"))
        await site.publisher.publish(second, plan(2, first, second))
        assert len(await site.device("JFK").update()) == 4

    in_memory(tmp_path, scene)


def test_a_release_is_not_published_with_a_variant_that_the_gate_did_not_pass(
    tmp_path: Path,
) -> None:
    async def scene(site: Site) -> None:
        release = two_variants()
        site.passed.add(release.sha256)
        assert await refused(TrustError, site.publisher.publish(release)) == "not_passed"

    in_memory(tmp_path, scene)


def test_a_plan_cannot_mix_the_variants_of_two_releases(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        first, second = site.pass_(two_variants()), site.pass_(two_variants("r2", 2, b"next"))
        await site.publisher.publish(first, plan(1, first))
        await site.publisher.publish(second)
        device = site.device()
        await device.update()
        ours, theirs = arm(second), arm(first)
        stolen = Variant("float32", ours.variants[1].path, theirs.variants[1].sha256)
        mixed = Plan(
            family=FAMILY,
            seq=2,
            stable=msgspec.structs.replace(ours, variants=(ours.variants[0], stolen)),
        )
        publishing = site.publisher.publish(plan=mixed)
        assert await refused(TrustError, publishing) == "plan_names_unreleased"
        rollout = [site.key("rollout")]
        await site.below(await forge_plan(site.bus, site.root, mixed, rollout, NOW_S))
        assert await refused(TrustError, device.update()) == "plan_mismatch"

    in_memory(tmp_path, scene)


def test_variants_that_no_plan_names_leave_the_signed_releases(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        for counter in (1, 2, 3):
            release = site.pass_(two_variants(f"r{counter}", counter, b"%d" % counter))
            await site.publisher.publish(release, plan(counter, release))
        stored = (site.home / "tuf" / "blobs").iterdir()
        assert len(list(stored)) == 4  # of the current release and the one before it

    in_memory(tmp_path, scene)


FIRST = hashlib.shake_128(b"first").digest(300_000)
SECOND = FIRST[:100] + b"other weights" + FIRST[113:] + b"grown"


class Forgetful:
    """A bus to a broker that lost some messages."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.forgotten: set[str] = set()

    async def last_many(self, stream: str, names: list[str]) -> list[Message | None]:
        found = await self._bus.last_many(stream, names)
        return [
            None if name in self.forgotten else message
            for name, message in zip(names, found, strict=True)
        ]


async def patch_listed(site: Site, release: ReleaseFile) -> dict[str, str]:
    """The one patch that the signed metadata lists for a release."""
    view = await look(site.bus, site.root)
    name = subjects.metadata(f"{view.versions[f'm-{FAMILY}']}.m-{FAMILY}.json")
    message = await site.bus.last(subjects.TRUST_STREAM, name)
    assert message is not None
    [patch] = Metadata.from_bytes(message.data).signed.targets[release.path].custom["patches"]
    return dict(patch)


def test_a_device_that_has_what_ran_before_fetches_a_patch(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish("r1", 1, FIRST)
        device = site.device()
        await device.update()
        await site.publish("r2", 2, SECOND, counter=2)
        before = device.client.statistics()
        assert await device.update() == [SECOND]
        after = device.client.statistics()
        assert (after["patched"], after["patch_failed"], after["whole"]) == (1, 0, 1)
        assert after["bytes"] - before["bytes"] < 10_000
        assert after["bytes_saved"] > 290_000
        newcomer = site.device("JFK")
        assert await newcomer.update() == [SECOND]
        assert newcomer.client.statistics()["whole"] == 1

    in_memory(tmp_path, scene)


@pytest.mark.parametrize("damaged", [None, b"", b"no patch", b"\0" * 400])
def test_a_patch_that_is_absent_or_forged_costs_the_whole_file_and_is_counted(
    tmp_path: Path, damaged: bytes | None
) -> None:
    async def scene(site: Site) -> None:
        await site.publish("r1", 1, FIRST)
        bus = Forgetful(site.bus)
        device = site.device(bus=bus)  # type: ignore[arg-type]
        await device.update()
        release = await site.publish("r2", 2, SECOND, counter=2)
        chunk = subjects.chunk((await patch_listed(site, release))["sha256"], 0)
        if damaged is None:
            bus.forgotten.add(chunk)
        else:
            await site.bus.publish(chunk, damaged)
        assert await device.update() == [SECOND]
        counts = device.client.statistics()
        assert (counts["patched"], counts["patch_failed"], counts["whole"]) == (0, 1, 2)

    in_memory(tmp_path, scene)


def test_a_genuine_patch_to_another_package_is_caught_by_the_hash(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish("r1", 1, FIRST)
        device = site.device()
        await device.update()
        wrong = patch_between(FIRST, SECOND[:-1] + b"?")
        right = patch_between(FIRST, SECOND)
        assert wrong is not None
        assert right is not None
        release = await site.publish("r2", 2, SECOND, counter=2)
        patch = await patch_listed(site, release)
        assert patch["sha256"] == hashlib.sha256(right).hexdigest()
        await site.bus.publish(subjects.chunk(patch["sha256"], 0), wrong.ljust(len(right), b"\0"))
        assert await device.update() == [SECOND]
        assert device.client.statistics()["patch_failed"] == 1

    in_memory(tmp_path, scene)


def test_patches_go_with_the_release_that_they_lead_to(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        data = FIRST
        for number in range(1, 6):
            data = data[:-10] + b"%010d" % number**9
            await site.publish(f"r{number}", number, data, counter=number)
        blobs = [path.stat().st_size for path in (site.home / "tuf" / "blobs").iterdir()]
        assert sorted(size > 290_000 for size in blobs) == [False, False, True, True]

    in_memory(tmp_path, scene)


def test_each_variant_is_patched_from_its_own_kind(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        other = hashlib.shake_128(b"float").digest(200_000)
        first = ReleaseFile(FAMILY, "r1", 1, FIRST, VERDICT, variants={"float32": other})
        mended = {"float32": other[:-1] + b"!"}
        second = ReleaseFile(FAMILY, "r2", 2, SECOND, VERDICT, variants=mended)
        await site.publisher.publish(site.pass_(first), plan(1, first))
        device = site.device()
        await device.update()
        await site.publisher.publish(site.pass_(second), plan(2, second))
        assert await device.update() == [SECOND, other[:-1] + b"!"]
        assert device.client.statistics()["patched"] == 2

    in_memory(tmp_path, scene)
