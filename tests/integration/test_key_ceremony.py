"""Keys are replaced under a fleet that nobody visits: devices follow, thieves are shut out."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, Root, Targets

from cloud_learner.publisher import Publisher
from cloud_learner.release import ceremony, keys
from cloud_learner.release.custody import ALL_KEYS, Custody, Trust
from cloud_learner.release.keyfiles import KeySigner
from cloud_learner.release.metadata import (
    ReleaseFile,
    expiry,
    forge_plan,
    forge_release,
    look,
    metadata_message,
    opened,
    publish_below,
    push,
    sealed,
    snapshot_of,
    timestamp_of,
)
from edge_runtime.bus.base import Bus
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import ManualClock
from edge_runtime.errors import ConfigError, TrustError
from edge_runtime.files import OsFiles
from edge_runtime.rollout.plan import NUMBER_MAX, Plan, PlanArm
from edge_runtime.update.client import UpdateClient
from edge_runtime.update.fetcher import BusFetcher
from edge_runtime.update.shelf import Shelf
from edge_runtime.update.trust import RELEASE_FLOOR_FIELD

NOW_S = 1_800_000_000.0
FAMILY = "flight_delay"
FAR = 2**31


class Killed(BaseException):
    """The process is gone: nothing after it runs."""


class DyingFiles(OsFiles):
    """A disk whose process is killed before its operation number `last`."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.left = last

    def _one(self) -> None:
        if not self.left:
            raise Killed
        self.left -= 1

    def create(self, path: Path, mode: int = 0o600) -> int:
        self._one()
        return super().create(path, mode)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        self._one()
        super().write(fd, data, offset)

    def replace(self, source: Path, target: Path) -> None:
        self._one()
        super().replace(source, target)

    def unlink(self, path: Path) -> None:
        self._one()
        super().unlink(path)


@dataclass
class Site:
    """A home with root and targets in three folders apart from it, and what devices see of it."""

    place: Path
    bus: Bus
    clock: ManualClock
    seq: int = 0

    @property
    def home(self) -> Path:
        return self.place / "home"

    @property
    def custody(self) -> Custody:
        return Custody(self.home, [self.place / name for name in "abc"])

    @property
    def trust(self) -> Trust:
        return self.custody.trust()

    def create(self) -> None:
        keys.create(self.home, [FAMILY], self.clock, self.custody)
        self.embedded = (self.home / "trust" / "root.json").read_bytes()

    def key(self, name: str) -> KeySigner:
        return self.custody.signer(name, self.trust.ids()[name])

    def rotate(self, *names: str) -> None:
        ceremony.rotate(self.custody, names, str, self.clock)

    def revoke(self, *names: str) -> None:
        ceremony.revoke(self.custody, names, str, self.clock)

    async def publish(self, data: bytes) -> Publisher:
        """What the next `serve` does: sign what must be signed, and one more release."""
        publisher = Publisher(self.home, self.bus, keys.load(self.home), self.clock)
        await publisher.publish()
        self.seq += 1
        one = release(f"r{self.seq}", data, self.seq)
        await publisher.publish(one, plan(self.seq, one))
        return publisher

    def device(self, name: str = "EWR") -> Device:
        fetcher = BusFetcher(self.bus, asyncio.get_running_loop())
        client = UpdateClient(self.place / name, self.embedded, fetcher, self.clock)
        return Device(client, Shelf(self.place / name / "shelf"))

    async def below(
        self, *forged: tuple[str, bytes], snapshot: KeySigner, timestamp: KeySigner
    ) -> None:
        await publish_below(
            self.bus,
            self.trust.root,
            dict(forged),
            snapshot_signer=snapshot,
            timestamp_signer=timestamp,
            now_s=self.clock.now_s(),
        )


@dataclass
class Device:
    client: UpdateClient
    shelf: Shelf

    async def update(self) -> bytes:
        return await asyncio.to_thread(self._update)

    def _update(self) -> bytes:
        self.client.refresh()
        found = self.client.plan(FAMILY)
        [one] = found.arms
        path = self.client.fetch(one, one.packages[0], self.shelf)
        self.client.confirm(found)
        return path.read_bytes()

    async def refused(self) -> str:
        with pytest.raises(TrustError) as caught:
            await self.update()
        return caught.value.code


def release(name: str, data: bytes, counter: int) -> ReleaseFile:
    one = ReleaseFile(FAMILY, name, counter, data)
    verdict = {"outcome": "pass", "rules": [], "sha256": one.sha256}
    return ReleaseFile(FAMILY, name, counter, data, verdict)


def plan(seq: int, one: ReleaseFile) -> Plan:
    arm = PlanArm(one.release, one.path, one.sha256, one.counter, 1.0)
    return Plan(family=FAMILY, seq=seq, stable=arm, canary=None, salt="s")


def at_site(tmp_path: Path, scene: Callable[[Site], Awaitable[None]]) -> None:
    async def play() -> None:
        site = Site(tmp_path, await MemoryBroker().connect(), ManualClock(NOW_S))
        site.create()
        await scene(site)

    asyncio.run(play())


@pytest.mark.parametrize("missed", [1, 2, 50])
def test_a_device_that_missed_root_rotations_follows(tmp_path: Path, missed: int) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"before")
        device = site.device()
        assert await device.update() == b"before"
        kinds = cycle([["root"], ["timestamp"], ["targets"], ["root-2", "learner"]])
        for names, _ in zip(kinds, range(missed), strict=False):
            site.rotate(*names)
        assert site.trust.root.version == missed + 1
        await site.publish(b"after")
        assert await device.update() == b"after"
        assert device.client.floor.versions["root"] == missed + 1
        assert await site.device("new").update() == b"after"  # was given the first root

    at_site(tmp_path, scene)


@pytest.mark.parametrize("name", ["learner", "gate", "rollout", "time"])
def test_what_the_targets_document_names_is_replaced_without_a_new_root(
    tmp_path: Path, name: str
) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"before")
        device = site.device()
        await device.update()
        before = site.trust.ids()
        site.rotate(name)
        after = site.trust.ids()
        assert [each for each in ALL_KEYS if before[each] != after[each]] == [name]
        assert (site.trust.root.version, site.trust.targets.version) == (1, 2)
        await site.publish(b"after")
        assert await device.update() == b"after"

    at_site(tmp_path, scene)


def test_serve_signs_anew_what_a_replaced_key_had_signed(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        publisher = await site.publish(b"package")
        device = site.device()
        await device.update()
        assert not await publisher.maintain()
        site.rotate("learner", "rollout", "timestamp")
        reborn = Publisher(site.home, site.bus, keys.load(site.home), site.clock)
        assert await reborn.maintain()
        assert await device.update() == b"package"
        assert not await reborn.maintain()

    at_site(tmp_path, scene)


@pytest.mark.parametrize("stolen", ["learner", "gate", "rollout"])
def test_a_revoked_key_signs_nothing_that_a_device_takes(tmp_path: Path, stolen: str) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"before")
        device = site.device()
        await device.update()
        thief = {name: site.key(name) for name in ("learner", "gate", "rollout")}
        site.revoke(stolen)
        await site.publish(b"after")
        assert await device.update() == b"after"

        signers = {name: site.key(name) for name in thief} | {stolen: thief[stolen]}
        assert signers[stolen].public_key != site.key(stolen).public_key
        evil, root = release("evil", b"evil", 99), site.trust.root
        both = [signers["learner"], signers["gate"]]
        await site.below(
            await forge_release(site.bus, root, evil, both, NOW_S),
            await forge_plan(site.bus, root, plan(9, evil), [signers["rollout"]], NOW_S),
            snapshot=site.key("snapshot"),
            timestamp=site.key("timestamp"),
        )
        assert await device.refused() == "below_threshold"
        assert await site.device("new").refused() == "below_threshold"

    at_site(tmp_path, scene)


@pytest.mark.parametrize("stolen", ["snapshot", "timestamp"])
def test_a_revoked_online_key_is_refused(tmp_path: Path, stolen: str) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"before")
        device = site.device()
        await device.update()
        thief = {name: site.key(name) for name in ("snapshot", "timestamp")}
        site.revoke(stolen)
        await site.publish(b"after")
        assert await device.update() == b"after"
        await site.below(**{name: site.key(name) for name in thief} | {stolen: thief[stolen]})
        assert await device.refused() == "below_threshold"

    at_site(tmp_path, scene)


def test_a_revoked_targets_key_delegates_to_nobody(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"before")
        device = site.device()
        await device.update()
        stolen, own = site.key("targets"), CryptoSigner.generate_ed25519()
        site.revoke("targets")
        await site.publish(b"after")
        assert await device.update() == b"after"
        all_to_me = DelegatedRole("plans", [own.public_key.keyid], 1, True, ["p/*"])
        document = Targets(version=9, expires=expiry(NOW_S, 7))
        document.delegations = Delegations(
            {own.public_key.keyid: own.public_key}, {"plans": all_to_me}
        )
        online = {name: site.key(name) for name in ("snapshot", "timestamp")}
        await site.below(("targets", sealed(document, [stolen])), **online)
        assert await device.refused() == "below_threshold"

    at_site(tmp_path, scene)


async def forge_root(site: Site, signers: Sequence[KeySigner]) -> None:
    """Push a root above the newest that gives everything to a key of the thief's."""
    own = CryptoSigner.generate_ed25519()
    newest = site.trust.root.version
    document = opened(Root, site.trust.roots[newest], None, "root")
    document.version = newest + 1
    for role in document.roles.values():
        role.keyids, role.threshold = [own.public_key.keyid], 1
    document.keys = {own.public_key.keyid: own.public_key}
    data = sealed(document, [*signers, own])
    await push(site.bus, [metadata_message("root", newest + 1, data)])


@pytest.mark.parametrize("revoked", [True, False])
def test_one_of_two_root_keys_is_refused_and_a_revoked_one_counts_no_more(
    tmp_path: Path, *, revoked: bool
) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"before")
        device = site.device()
        await device.update()
        thief = [site.key("root-1")]
        if revoked:
            site.revoke("root-1")
            thief.append(site.key("root-2"))
            await site.publish(b"after")
            assert await device.update() == b"after"
        await forge_root(site, thief)
        assert await device.refused() == "below_threshold"

    at_site(tmp_path, scene)


@pytest.mark.parametrize("repaired", [True, False])
def test_versions_that_a_thief_raised_out_of_reach_recover_without_a_visit(
    tmp_path: Path, *, repaired: bool
) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"before")
        device = site.device()
        await device.update()
        root, view = site.trust.root, await look(site.bus, site.trust.root)
        listed = {k: n for k, n in view.versions.items() if k not in {"timestamp", "snapshot"}}
        snapshot = sealed(snapshot_of(listed, FAR, NOW_S), [site.key("snapshot")])
        timestamp = sealed(timestamp_of(FAR, FAR, NOW_S), [site.key("timestamp")])
        await push(site.bus, [metadata_message("snapshot", FAR, snapshot)])
        await push(site.bus, [metadata_message("timestamp", FAR, timestamp)])
        await device.update()
        assert device.client.floor.versions["timestamp"] == FAR
        if repaired:
            await site.publish(b"above the thief's")
            await device.update()
            assert device.client.floor.versions["timestamp"] > FAR

        site.revoke("timestamp")
        assert site.trust.root.version == root.version + 1
        await site.publish(b"after")
        assert await device.update() == b"after"
        assert await site.device("new").update() == b"after"
        view = await look(site.bus, site.trust.root)
        assert view.versions["timestamp"] == view.versions["snapshot"] == 2
        assert device.client.floor.versions["timestamp"] == 2
        await push(site.bus, [metadata_message("timestamp", FAR, timestamp)])
        assert await device.refused() == "below_threshold"

    at_site(tmp_path, scene)


async def number_out_of_reach(site: Site, *stolen: str) -> bytes:
    """Thieves of these keys, and of the online pair, number as high as it goes; what they ship."""
    keys_of = {name: site.key(name) for name in (*stolen, "snapshot", "timestamp")}
    last, forged = release("r1", b"before", 1), []
    if "gate" in stolen:
        last, both = release("evil", b"evil", NUMBER_MAX), [keys_of["learner"], keys_of["gate"]]
        role, data = await forge_release(site.bus, site.trust.root, last, both, NOW_S)
        document = opened(Targets, data, None, role)
        document.unrecognized_fields[RELEASE_FLOOR_FIELD] = NUMBER_MAX
        forged.append((role, sealed(document, both)))
    root, numbered = site.trust.root, plan(NUMBER_MAX, last)
    forged.append(await forge_plan(site.bus, root, numbered, [keys_of["rollout"]], NOW_S))
    await site.below(*forged, snapshot=keys_of["snapshot"], timestamp=keys_of["timestamp"])
    return last.data


@pytest.mark.parametrize("stolen", [["rollout"], ["rollout", "learner", "gate"]])
def test_plans_and_releases_that_a_thief_numbered_out_of_reach_recover_without_a_visit(
    tmp_path: Path, stolen: list[str]
) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"before")
        device = site.device()
        await device.update()
        shipped = await number_out_of_reach(site, *stolen)
        assert await device.update() == shipped
        assert device.client.floor.plan_seq == {FAMILY: NUMBER_MAX}
        await site.publish(b"refused")
        assert await device.refused() == "plan_rolled_back"

        site.revoke(*stolen)
        await site.publish(b"after")
        assert await device.update() == b"after"
        assert device.client.floor.plan_seq == {FAMILY: site.seq}
        assert device.client.floor.release_counter == {FAMILY: 0}
        assert await site.device("new").update() == b"after"

    at_site(tmp_path, scene)


def test_targets_that_a_thief_listed_out_of_reach_recover(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        publisher = await site.publish(b"before")
        device = site.device()
        await device.update()
        online = {name: site.key(name) for name in ("snapshot", "timestamp")}
        document = Targets(version=FAR, expires=expiry(NOW_S, 7))
        await site.below(("targets", sealed(document, [])), **online)
        assert await device.refused() == "below_threshold"
        with pytest.raises(TrustError, match="targets_fast_forwarded"):
            await publisher.publish()
        site.revoke("snapshot", "timestamp")
        await site.publish(b"after")
        assert await device.update() == b"after"

    at_site(tmp_path, scene)


CEREMONIES = {
    "everything is rotated": lambda site, custody: ceremony.rotate(
        custody, ALL_KEYS, str, site.clock
    ),
    "a root key is revoked": lambda site, custody: ceremony.revoke(
        custody, ["root-1"], str, site.clock
    ),
    "the learner's key is revoked": lambda site, custody: ceremony.revoke(
        custody, ["learner"], str, site.clock
    ),
}


@pytest.mark.parametrize("held", CEREMONIES)
@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_ceremony_cut_off_anywhere_leaves_the_old_trust_or_the_new(
    tmp_path: Path, held: str, stride: int
) -> None:
    async def scene(site: Site) -> None:
        await site.publish(b"before")
        old = site.trust.ids()
        seen = set()
        for last in count(stride - 1, stride):
            site.place, files = tmp_path / f"{last}", DyingFiles(last)
            for name in ("home", "a", "b", "c"):
                shutil.copytree(tmp_path / name, site.place / name)
            custody = Custody(site.home, site.custody.offline, files=files)
            try:
                CEREMONIES[held](site, custody)
            except Killed:
                pass
            else:
                break
            now = site.trust.ids()
            for name in ALL_KEYS:
                site.key(name)
            seen.add(now == old)
            assert now == old or all(
                now[name] != old[name] for name in ALL_KEYS if name in changed(held)
            )
            site.bus, site.seq = await MemoryBroker().connect(), 1
            await site.publish(b"meanwhile")
            device = site.device()
            assert await device.update() == b"meanwhile"
            CEREMONIES[held](site, site.custody)
            assert not list(site.place.glob("**/*.next.*"))
            await site.publish(b"after")
            assert await device.update() == b"after"
        assert seen == {True, False}

    at_site(tmp_path, scene)


def changed(held: str) -> Sequence[str]:
    return {
        "everything is rotated": ALL_KEYS,
        "a root key is revoked": ("root-1", "snapshot", "timestamp"),
    }.get(held, ("learner",))


def test_a_home_that_was_cut_off_while_it_was_made_is_finished(tmp_path: Path) -> None:
    for last in count():
        home = tmp_path / f"{last}"
        try:
            keys.create(home, [FAMILY], ManualClock(NOW_S), Custody(home, files=DyingFiles(last)))
        except Killed:
            with pytest.raises(ConfigError, match="no_trust"):
                Custody(home).trust()
        else:
            break
        made = {path.name: path.read_bytes() for path in (home / "keys").glob("[!.]*")}
        keys.admit(home, FAMILY, ManualClock(NOW_S))
        assert made.items() <= {p.name: p.read_bytes() for p in (home / "keys").iterdir()}.items()
        keys.load(home)
    assert last > len(ALL_KEYS)
