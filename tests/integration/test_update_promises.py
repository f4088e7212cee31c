"""The promises about keys, thieves and brokers (A1 to A8, A11, P13), each a test of its number.

After each attack the device holds what it held, says by a code what it refused, and takes the next
genuine update.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Root, TargetFile, Targets

from cloud_learner.broker import Broker
from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.release.metadata import (
    ReleaseFile,
    blob_messages,
    expiry,
    forge_plan,
    forge_release,
    look,
    opened,
    publish_below,
    sealed,
    snapshot_of,
    timestamp_of,
)
from edge_runtime.bus import nats
from edge_runtime.bus.base import Bus
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import ManualClock
from edge_runtime.errors import HeadwaterError, RequestError
from edge_runtime.rollout.plan import Plan, PlanArm, encode_plan, plan_path
from edge_runtime.update.client import UpdateClient
from edge_runtime.update.fetcher import BusFetcher
from edge_runtime.update.shelf import Shelf
from edge_runtime.update.trust import CHUNK_BYTES, PLANS_ROLE, models_role
from edge_runtime.wire import subjects

NOW_S, DAY_S = 1_800_000_000.0, 86_400.0
FAMILY, OTHER = "toy", "other"
FAR = 1 << 31
BATCH_BYTES_MAX = 4 << 20
BusOf = Callable[[str], AbstractAsyncContextManager[Bus]]
ROLES = ["timestamp", "snapshot", "targets", PLANS_ROLE, models_role(FAMILY)]


def release(name: str, data: bytes, counter: int = 1, family: str = FAMILY) -> ReleaseFile:
    verdict = {"outcome": "pass", "rules": ["r"], "sha256": hashlib.sha256(data).hexdigest()}
    return ReleaseFile(family, name, counter, data, verdict)


def plan(seq: int, of: ReleaseFile, family: str = FAMILY) -> Plan:
    return Plan(
        family=family, seq=seq, stable=PlanArm(of.release, of.path, of.sha256, of.counter, 1.0)
    )


class Scene:
    """A home that publishes on `bus`, a thief with any of its keys, and a device."""

    def __init__(self, folder: Path, bus: Bus) -> None:
        self.home, self.bus, self.clock = folder / "home", bus, ManualClock(NOW_S)
        keys.create(self.home, [FAMILY, OTHER], self.clock)
        self._given = (self.home / "trust" / "root.json").read_bytes()
        self._device = folder / "device"
        self.good = release("r1", b"good" * 100_000)
        self.seq = 0

    @property
    def root(self) -> Root:
        newest = max(
            (self.home / "tuf").glob("*.root.json"), key=lambda path: path.stat().st_mtime_ns
        )
        return opened(Root, newest.read_bytes(), None, "root")

    def key(self, name: str) -> CryptoSigner:
        return keys.load_signer(self.home, name)

    async def publish(self, new: ReleaseFile | None = None) -> bytes:
        """A genuine publication; what devices shall serve then."""
        self.seq += 1
        self.good = new or self.good
        publisher = Publisher(self.home, self.bus, keys.load(self.home), self.clock)
        await publisher.publish(
            new or (self.good if self.seq == 1 else None), plan(self.seq, self.good)
        )
        return self.good.data

    async def steal(self, *forged: tuple[str, bytes]) -> None:
        """Publish forged roles below the real snapshot and timestamp keys."""
        await publish_below(
            self.bus,
            self.root,
            dict(forged),
            snapshot_signer=self.key("snapshot"),
            timestamp_signer=self.key("timestamp"),
            now_s=self.clock.now_s(),
        )

    async def forged_plan(self, seq: int, of: ReleaseFile, *by: str) -> tuple[str, bytes]:
        signers = [self.key(name) for name in by]
        return await forge_plan(self.bus, self.root, plan(seq, of), signers, self.clock.now_s())

    async def forged_release(self, of: ReleaseFile, *by: str) -> tuple[str, bytes]:
        signers = [self.key(name) for name in by]
        return await forge_release(self.bus, self.root, of, signers, self.clock.now_s())

    async def said(self, name: str) -> bytes | None:
        found = await self.bus.last(subjects.TRUST_STREAM, subjects.metadata(name))
        return None if found is None else found.data

    async def turn(self, family: str = FAMILY, fetcher: BusFetcher | None = None) -> bytes | str:
        """What a device serves after an update, or the code of what it refused."""
        fetcher = fetcher or BusFetcher(self.bus, asyncio.get_running_loop())
        said = await asyncio.to_thread(self._turn, fetcher, family)
        assert self.serving() == self.served
        return said

    def _turn(self, fetcher: BusFetcher, family: str) -> bytes | str:
        shelf = Shelf(self._device / "shelf")
        with closing(UpdateClient(self._device, self._given, fetcher, self.clock)) as client:
            try:
                client.refresh()
                wanted = client.plan(family)
                path = client.fetch(wanted.stable, wanted.stable.packages[0], shelf)
            except HeadwaterError as error:
                return error.code
            client.confirm(wanted)
            shelf.save_current(wanted)
            self.served = path.read_bytes()
            return self.served

    served: bytes | None = None

    @property
    def packages(self) -> Path:
        return self._device / "shelf" / "packages"

    def serving(self, family: str = FAMILY) -> bytes | None:
        """What the device would serve after a restart."""
        shelf = Shelf(self._device / "shelf")
        current = shelf.load_current(family)
        path = current and shelf.path_of(current.stable.sha256)
        return path.read_bytes() if path else None

    async def rotate(self, *names: str) -> None:
        """A newer root, signed by two root keys, that names new keys in place of these."""
        root = self.root
        for name in names:
            root.revoke_key(self.key(name).public_key.keyid, name)
            signer = CryptoSigner.generate_ed25519()
            (self.home / "keys" / f"{name}.pem").write_bytes(signer.private_bytes)
            root.add_key(signer.public_key, name)
        root.version += 1
        data = sealed(root, [self.key("root-1"), self.key("root-3")])
        (self.home / "tuf" / f"{root.version}.root.json").write_bytes(data)


def play(
    folder: Path,
    scene: Callable[[Scene], Awaitable[None]],
    over: AbstractAsyncContextManager[Bus] | None = None,
) -> None:
    """Play a scene over a bus, by default one of a broker in memory."""

    async def whole() -> None:
        async with AsyncExitStack() as stack:
            bus = await (stack.enter_async_context(over) if over else MemoryBroker().connect())
            await scene(Scene(folder, bus))

    asyncio.run(whole())


def bad_signatures(document: dict[str, Any], how: str) -> None:
    first = document["signatures"][0]
    if how == "none":
        document["signatures"] = []
    elif how == "wrong":
        first["sig"] = "ab" * 64
    elif how == "doubled":
        document["signatures"] = [first] * 2
    else:
        stranger = CryptoSigner.generate_ed25519().sign(b"anything")
        document["signatures"] = [{"keyid": stranger.keyid, "sig": stranger.signature}]


@pytest.mark.parametrize("how", ["none", "wrong", "doubled", "of a stranger"])
@pytest.mark.parametrize("role", ROLES)
def test_a1_a_role_without_its_signatures_is_refused(tmp_path: Path, role: str, how: str) -> None:
    """The same for every case of the public suite, through `tests/contract/tuf-client`."""

    async def scene(at: Scene) -> None:
        await at.publish(at.good)
        assert await at.turn() == at.good.data
        if role != "targets":
            await at.publish(release("r2", b"second", 2))
        else:
            keys.admit(at.home, "third", at.clock)
            await at.publish()
        version = json.loads(await at.said("timestamp.json") or b"")["signed"]["version"]
        snapshot = json.loads(await at.said(f"{version}.snapshot.json") or b"")["signed"]["meta"]
        number = version if role == "snapshot" else snapshot.get(f"{role}.json", {}).get("version")
        name = "timestamp.json" if role == "timestamp" else f"{number}.{role}.json"
        document = json.loads(await at.said(name) or b"")
        bad_signatures(document, how)
        await at.bus.publish(subjects.metadata(name), json.dumps(document).encode())
        assert await at.turn() in {"below_threshold", "bad_metadata"}
        third = await at.publish(release("r3", b"third", 3))
        assert await at.turn() == third

    play(tmp_path, scene)


def test_a2_the_learners_key_alone_installs_nothing(tmp_path: Path) -> None:
    async def scene(at: Scene) -> None:
        await at.publish(at.good)
        assert await at.turn() == at.good.data
        evil = release("evil", b"evil", 9)
        for thieves in (["learner"], ["learner", "learner"], ["learner", "rollout"]):
            forged = await at.forged_release(evil, *thieves)
            await at.steal(forged, await at.forged_plan(9, evil, "rollout"))
            assert await at.turn() == "below_threshold"
        await at.publish()
        assert await at.turn() == at.good.data

    play(tmp_path, scene)


def test_a3_the_rollout_key_chooses_among_genuine_releases_of_the_family(tmp_path: Path) -> None:
    async def scene(at: Scene) -> None:
        old = at.good
        await at.publish(old)
        await at.publish(release("r2", b"second", 2))
        assert await at.turn() == b"second"
        other = release("r2", b"of another family", 2, OTHER)
        publisher = Publisher(at.home, at.bus, keys.load(at.home), at.clock)
        await publisher.publish(other)
        wanted = {
            "not_released": release("evil", b"evil", 9),
            "plan_mismatch": release("r2", b"other bytes", 2),
            "plan_of_other_family": other,
        }
        for code, named in wanted.items():
            await at.steal(await at.forged_plan(9, named, "rollout"))
            assert await at.turn() == code
        await at.steal(await at.forged_plan(9, old, "rollout"))
        assert await at.turn() == old.data  # genuine, and not below the floor
        at.seq = 9
        await publisher.raise_floor(FAMILY, 2)
        await at.steal(await at.forged_plan(10, old, "rollout"))
        assert await at.turn() == "release_below_floor"

    play(tmp_path, scene)


ENTRIES = {
    "of no sha256": {"hashes": {"sha512": "ab" * 64}},
    "of a name that is no hash": {"hashes": {"sha256": "../x y.*"}},
    "without end": {"length": 1 << 62},
}


@pytest.mark.parametrize("how", [*ENTRIES, "numbered out of range"])
def test_a3_a_plan_that_no_publisher_makes_is_refused_by_name(tmp_path: Path, how: str) -> None:
    """The rollout key alone must not end a device, which would leave its release for that."""

    async def scene(at: Scene) -> None:
        await at.publish(at.good)
        assert await at.turn() == at.good.data
        root = at.root
        number = (await look(at.bus, root)).next(PLANS_ROLE)
        data = encode_plan(plan(2, at.good))
        if how not in ENTRIES:
            data = data.replace(b'"seq":2', b'"seq":%d' % 2**70)
        entry = {"length": len(data), "hashes": {"sha256": hashlib.sha256(data).hexdigest()}}
        target = TargetFile(**entry | ENTRIES.get(how, {}), path=plan_path(FAMILY))
        document = Targets(
            version=number, expires=expiry(at.clock.now_s(), 7), targets={target.path: target}
        )
        for subject, chunk in blob_messages(data):
            await at.bus.publish(subject, chunk)
        await at.steal((PLANS_ROLE, sealed(document, [at.key("rollout")])))
        assert await at.turn() == "bad_plan"
        second = await at.publish(release("r2", b"second", 2))
        assert await at.turn() == second

    play(tmp_path, scene)


def test_a7_a_version_that_no_report_can_carry_is_refused_and_undone_by_new_keys(
    tmp_path: Path,
) -> None:
    async def scene(at: Scene) -> None:
        await at.publish(at.good)
        assert await at.turn() == at.good.data
        stamp = timestamp_of(1, 1 << 64, at.clock.now_s())
        data = sealed(stamp, [at.key("timestamp")])
        await at.bus.publish(subjects.metadata("timestamp.json"), data)
        assert await at.turn() == "bad_metadata"
        await at.rotate("snapshot", "timestamp")
        second = await at.publish(release("r2", b"second", 2))
        assert await at.turn() == second

    play(tmp_path, scene)


def test_a4_the_online_keys_bring_nothing_new_and_freeze_no_longer_than_the_roles_live(
    tmp_path: Path,
) -> None:
    async def scene(at: Scene) -> None:
        await at.publish(at.good)
        assert await at.turn() == at.good.data
        evil = release("evil", b"evil", 9)
        await at.steal(
            await at.forged_release(evil, "snapshot", "timestamp"),
            await at.forged_plan(9, evil, "snapshot"),
        )
        assert await at.turn() == "below_threshold"
        await at.publish()
        frozen = []
        for _day in range(8):
            at.clock.advance(DAY_S)
            await at.steal()  # the thief signs the same roles afresh, day by day
            frozen.append(await at.turn())
        assert frozen == [at.good.data] * 6 + ["expired"] * 2
        assert at.serving() == at.good.data
        await at.publish(release("r2", b"second", 2))
        assert await at.turn() == b"second"

    play(tmp_path, scene)


DELAYS = {
    *("below_threshold", "bad_metadata", "rolled_back", "hash_mismatch", "wrong_length", "absent"),
    "bad_plan",
}


def test_a5_a_hostile_broker_delays_and_no_more(tmp_path: Path) -> None:
    async def scene(at: Scene) -> None:
        heard: dict[str, bytes] = {}
        publish = at.bus.publish

        class Listening:
            """The bus of the publisher; the broker sees all that is said."""

            def __getattr__(self, name: str) -> Any:
                return getattr(at.bus, name)

            async def publish(self, subject: str, data: bytes, **more: Any) -> int:
                heard[subject] = data
                return await publish(subject, data, **more)

        async def said(new: ReleaseFile) -> dict[str, bytes]:
            heard.clear()
            at.seq += 1
            publisher = Publisher(at.home, Listening(), keys.load(at.home), at.clock)  # type: ignore[arg-type]
            await publisher.publish(new, plan(at.seq, new))
            return dict(heard)

        old = await said(at.good)
        assert await at.turn() == at.good.data
        new = await said(release("r2", b"second" * 50_000, 2))
        chance = random.Random(5)
        asked = ["timestamp", "2.snapshot", "2.plans", "2.m-toy"]
        subjects_asked = [subjects.metadata(f"{name}.json") for name in asked]
        for subject in [*subjects_asked, *sorted(new.keys() - old.keys() - {*subjects_asked})]:
            truth = new[subject]
            lies = [b"", chance.randbytes(100), *old.values(), *new.values()]
            for lie in chance.sample([lie for lie in lies if lie != truth], 4):
                await publish(subject, lie)
                assert await at.turn() in {at.good.data, *DELAYS}, subject
                assert at.serving() == at.good.data
            await publish(subject, truth)
        assert await at.turn() == b"second" * 50_000
        for subject, data in old.items():
            await publish(subject, data)
        assert await at.turn() == "rolled_back"
        assert at.serving() == b"second" * 50_000

    play(tmp_path, scene)


def test_a6_missed_roots_are_followed_and_revoked_keys_refused(tmp_path: Path) -> None:
    async def scene(at: Scene) -> None:
        await at.publish(at.good)
        assert await at.turn() == at.good.data
        stolen = at.key("timestamp")
        for _ in range(50):
            await at.rotate("timestamp")
        await at.publish(release("r2", b"second", 2))
        assert await at.turn() == b"second"
        version = json.loads(await at.said("timestamp.json") or b"")["signed"]["version"]
        forged = timestamp_of(version, version + 1, at.clock.now_s())
        await at.bus.publish(subjects.metadata("timestamp.json"), sealed(forged, [stolen]))
        assert await at.turn() == "below_threshold"
        await at.publish()
        assert await at.turn() == b"second"

    play(tmp_path, scene)


def test_a7_versions_run_up_by_a_thief_are_undone_by_new_keys(tmp_path: Path) -> None:
    async def scene(at: Scene) -> None:
        await at.publish(at.good)
        assert await at.turn() == at.good.data
        snapshot = json.loads(await at.said("1.snapshot.json") or b"")["signed"]["meta"]
        roles = {name.removesuffix(".json"): entry["version"] for name, entry in snapshot.items()}
        roles[models_role(OTHER)] = FAR  # which nobody of this family ever looks at
        forged = snapshot_of(roles, FAR, at.clock.now_s())
        name = subjects.metadata(f"{FAR}.snapshot.json")
        await at.bus.publish(name, sealed(forged, [at.key("snapshot")]))
        stamp = timestamp_of(FAR, FAR, at.clock.now_s())
        await at.bus.publish(
            subjects.metadata("timestamp.json"), sealed(stamp, [at.key("timestamp")])
        )
        assert await at.turn() == at.good.data  # and so the device has confirmed it
        await at.rotate("timestamp", "snapshot")
        await at.publish(release("r2", b"second", 2))
        assert await at.turn() == b"second"
        assert await at.turn() == b"second"
        versions = json.loads(await at.said("timestamp.json") or b"")["signed"]["version"]
        assert versions < FAR

    play(tmp_path, scene)


def test_a8_a_path_of_another_family_is_ignored(tmp_path: Path) -> None:
    async def scene(at: Scene) -> None:
        await at.publish(at.good)
        evil = release("evil", b"evil", 9, OTHER)
        both = [at.key("learner"), at.key("gate")]
        document = Targets(version=9, expires=expiry(NOW_S, 7), targets=evil.targets())
        crossed = await forge_plan(
            at.bus, at.root, plan(1, evil, OTHER), [at.key("rollout")], NOW_S
        )
        await at.steal((models_role(FAMILY), sealed(document, both)), crossed)
        assert await at.turn(OTHER) == "not_released"

    play(tmp_path, scene)


def around(folder: Path) -> list[str]:
    """The files in a folder and those below the device's that are not in its cache."""
    return sorted(
        str(path)
        for path in folder.rglob("*")
        if "tuf" not in path.parts and "broker" not in str(path)
    )


@pytest.mark.parametrize("kind", ["memory", "nats"])
@pytest.mark.parametrize("name", ["../x", "/etc/x", "..", "a.b", "*", ">", "a b", "é" * 60])
def test_a11_a_role_of_an_odd_name_gains_nothing_and_leaves_the_cache_alone(
    tmp_path: Path, bus_of: BusOf, kind: str, name: str
) -> None:
    """Circles and diamonds: `tests/contract/test_tuf_delegations.py`."""

    async def scene(at: Scene) -> None:
        await at.publish(at.good)
        assert await at.turn() == at.good.data
        newest = max((at.home / "tuf").glob("*.targets.json"))
        document = opened(Targets, newest.read_bytes(), None, "targets")
        assert document.delegations is not None
        thief = CryptoSigner.generate_ed25519()
        odd = DelegatedRole(name, [thief.public_key.keyid], 1, False, ["m/toy/*", "p/*"])
        document.delegations.keys[thief.public_key.keyid] = thief.public_key
        document.delegations.roles = {name: odd, **(document.delegations.roles or {})}
        document.version += 1
        data = sealed(document, [at.key("targets")])
        await at.steal(("targets", data))
        view = await look(at.bus, at.root)
        listed = {role: n for role, n in view.versions.items() if role in {*ROLES[2:], "m-other"}}
        snapshot = snapshot_of(listed | {name: 1}, view.next("snapshot"), NOW_S)
        stamp = timestamp_of(view.next("snapshot"), view.next("timestamp"), NOW_S)
        files = {
            f"{snapshot.version}.snapshot": sealed(snapshot, [at.key("snapshot")]),
            "timestamp": sealed(stamp, [at.key("timestamp")]),
            f"1.{quote(name, '')}": sealed(Targets(version=1), [thief]),
        }
        for each, content in files.items():
            with contextlib.suppress(RequestError):  # a name that no broker can hold
                await at.bus.publish(subjects.metadata(each), content)
        before = around(tmp_path)
        assert await at.turn() in {at.served, "absent", "unreachable", "bad_metadata", "expired"}
        assert around(tmp_path) == before
        assert at.serving() == at.good.data

    play(tmp_path, scene, bus_of(kind))


@pytest.mark.parametrize("kind", ["memory", "nats"])
def test_p13_a_download_cut_anywhere_activates_nothing_until_it_is_whole(
    tmp_path: Path, bus_of: BusOf, kind: str
) -> None:
    async def scene(at: Scene) -> None:
        await at.publish(at.good)
        assert await at.turn() == at.good.data
        before, chance = at.served, random.Random(13)
        package = chance.randbytes(5 * CHUNK_BYTES + 1000)
        new = release("r2", package, 2)
        await at.publish(new)
        for index in range(6):
            subject = subjects.chunk(new.sha256, index)
            chunk = package[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            for lie, code in ((chunk[:-1], "wrong_length"), (chunk[::-1], "hash_mismatch")):
                await at.bus.publish(subject, lie)
                assert await at.turn() == code
                assert at.serving() == before
            await at.bus.publish(subject, chunk)
        assert await at.turn() == package

    play(tmp_path, scene, bus_of(kind))


class Interrupted(BusFetcher):
    """A device's line: what `meanwhile` does happens in the middle of a download, once."""

    def __init__(self, bus: Bus, at: int, meanwhile: Callable[[], None]) -> None:
        super().__init__(bus, asyncio.get_running_loop())
        self._at, self._meanwhile = at, meanwhile

    def chunks(self, sha256: str, length: int, first: int = 0) -> Iterator[bytes]:
        for number, chunk in enumerate(super().chunks(sha256, length, first), start=first):
            if number == self._at:
                self._at = -1
                self._meanwhile()
            yield chunk


def test_p13_a_server_that_restarts_in_the_middle_costs_a_batch_of_chunks_at_most(
    tmp_path: Path,
) -> None:
    async def whole() -> None:
        with Broker.start(tmp_path / "broker") as broker:
            bus = await nats.connect(broker.url, name="test")
            at = Scene(tmp_path, bus)
            await at.publish(at.good)
            before = await at.turn()
            assert before == at.good.data
            package = random.Random(13).randbytes(50 * CHUNK_BYTES + 1)
            await at.publish(release("r2", package, 2))

            def restart() -> None:
                broker.kill()
                assert at.serving() == before
                broker.restart()

            line = Interrupted(bus, 20, restart)
            assert await at.turn(FAMILY, line) == package
            assert line.statistics()["bytes"] - len(package) < BATCH_BYTES_MAX
            assert bus.statistics()["reconnects"] == 1
            await bus.close()

    asyncio.run(whole())


@pytest.mark.parametrize("left", [1, CHUNK_BYTES - 1, CHUNK_BYTES + 7, 4 * CHUNK_BYTES])
def test_p13_a_device_that_dies_at_any_byte_goes_on_from_its_last_whole_chunk(
    tmp_path: Path, left: int
) -> None:
    async def scene(at: Scene) -> None:
        await at.publish(at.good)
        assert await at.turn() == at.good.data
        package = random.Random(left).randbytes(5 * CHUNK_BYTES + 1000)
        new = release("r2", package, 2)
        await at.publish(new)
        part = at.packages / f".{new.sha256}.part"
        part.write_bytes(package[:left] + bytes(len(package) - left))
        assert at.serving() == b"good" * 100_000
        line = Interrupted(at.bus, -1, lambda: None)
        assert await at.turn(FAMILY, line) == package
        again = line.statistics()["bytes"] - (len(package) - left)
        assert 0 <= again < CHUNK_BYTES + 20_000  # and the metadata

    play(tmp_path, scene)


def test_p13_an_old_manifest_and_a_wrong_key_activate_nothing(tmp_path: Path) -> None:
    async def scene(at: Scene) -> None:
        await at.publish(at.good)
        old = await at.said("timestamp.json") or b""
        await at.publish(release("r2", b"second", 2))
        assert await at.turn() == b"second"
        await at.bus.publish(subjects.metadata("timestamp.json"), old)
        assert await at.turn() == "rolled_back"
        (tmp_path / "stranger").mkdir()
        stranger = Scene(tmp_path / "stranger", at.bus)
        await stranger.publish(release("r9", b"of a stranger", 9))
        assert await at.turn() == "below_threshold"
        assert at.serving() == b"second"

    play(tmp_path, scene)
