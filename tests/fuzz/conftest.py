"""What the fuzz of updates shares: a genuine history of a home, and a device that took part.

A broker that lies is a dictionary; the loop that real fetchers want runs in a thread of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Root

from cloud_learner.publisher import Publisher
from cloud_learner.release import keys
from cloud_learner.release.metadata import ReleaseFile, opened, sealed
from edge_runtime.bus.base import Message
from edge_runtime.clock import ManualClock
from edge_runtime.errors import TransportError
from edge_runtime.inference.onnxfile import metadata_in
from edge_runtime.inference.package import read_package
from edge_runtime.rollout.plan import Plan, PlanArm
from edge_runtime.update.client import UpdateClient
from edge_runtime.update.fetcher import BusFetcher
from edge_runtime.update.shelf import Shelf

NOW_S = 1_800_000_000.0
FAMILY = "toy"
Files = dict[str, bytes]
Outcome = tuple[Plan, tuple[bytes, ...]]


class Store:
    """A bus to a broker that holds exactly `files`, by subject."""

    def __init__(self) -> None:
        self.files: Files = {}
        self.asked: set[str] = set()

    async def publish(self, subject: str, data: bytes, **_: Any) -> int:
        self.files[subject] = data
        return 1

    async def send(self, subject: str, data: bytes) -> None:
        """Nobody listens."""

    async def ensure_stream(self, *_: Any, **__: Any) -> None:
        """It is there."""

    async def ask(self, subject: str, _question: bytes, **__: Any) -> bytes:
        raise TransportError("unreachable", f"nobody answers {subject}")

    async def last(self, _stream: str, subject: str) -> Message | None:
        self.asked.add(subject)
        data = self.files.get(subject)
        return None if data is None else Message(subject, data, seq=1)

    async def last_many(self, stream: str, names: list[str]) -> list[Message | None]:
        return [await self.last(stream, name) for name in names]


@dataclass
class History:
    """`states` are what the broker held after each publication, `outcomes` what each one says.

    `signers` are the keys of the home by name, and a stranger's. `read` is what a new device asks
    for of the last state.
    """

    root: bytes
    states: list[Files]
    outcomes: list[Outcome]
    signers: dict[str, CryptoSigner]
    read: list[str]


def release(name: str, counter: int, package: bytes) -> ReleaseFile:
    sha256 = hashlib.sha256(package).hexdigest()
    verdict = {"outcome": "pass", "rules": ["recent"], "sha256": sha256}
    return ReleaseFile(FAMILY, name, counter, package, verdict)


def arm(of: ReleaseFile, weight: float = 1.0) -> PlanArm:
    return PlanArm(of.release, of.path, of.sha256, of.counter, weight)


async def publish_history(home: Path, packages: list[bytes]) -> History:
    """Three releases, a canary and a newer root, each in a publication of its own."""
    clock, store = ManualClock(NOW_S), Store()
    keys.create(home, [FAMILY, "other"], clock)
    history = History((home / "trust" / "root.json").read_bytes(), [], [], {}, [])
    history.signers = {
        path.stem: keys.load_signer(home, path.stem) for path in (home / "keys").glob("*.pem")
    }
    releases = [release(f"r{at}", at + 1, data) for at, data in enumerate(packages)]

    async def published(plan: Plan, new: ReleaseFile | None = None) -> None:
        await Publisher(home, store, keys.load(home), clock).publish(new, plan)
        history.states.append(dict(store.files))
        named = {each.sha256: each.data for each in releases}
        history.outcomes.append((plan, tuple(named[each.sha256] for each in plan.arms)))

    for at, new in enumerate(releases):
        await published(Plan(family=FAMILY, seq=at + 1, stable=arm(new)), new)
    canary = arm(releases[-1], 0.5)
    await published(Plan(family=FAMILY, seq=9, stable=arm(releases[-2]), canary=canary))
    root = opened(Root, history.root, None, "root")
    root.version = 2
    signers = [history.signers[name] for name in keys.ROOT_KEYS[:2]]
    (home / "tuf" / "2.root.json").write_bytes(sealed(root, signers))
    await published(Plan(family=FAMILY, seq=10, stable=arm(releases[-1])))
    history.signers["stranger"] = CryptoSigner.generate_ed25519()
    return history


class Device:
    """A device in `folder`, whose state can be put back to what it was at a given time."""

    def __init__(self, folder: Path, loop: asyncio.AbstractEventLoop, root: bytes) -> None:
        self.folder, self._root = folder, root
        self.store = Store()
        self._fetcher = BusFetcher(self.store, loop)
        folder.mkdir()

    def turn(self, files: Files) -> Outcome:
        """Update from a broker that holds `files`, as the agent does; what serves afterwards.

        Raises: HeadwaterError, where anything is refused.
        """
        self.store.files = files
        clock = ManualClock(NOW_S + 60)
        with closing(UpdateClient(self.folder, self._root, self._fetcher, clock)) as client:
            shelf = Shelf(self.folder / "shelf")
            client.refresh()
            plan = client.plan(FAMILY)
            paths = [client.fetch(arm, each, shelf) for arm in plan.arms for each in arm.packages]
            for path in paths:
                assert read_package(metadata_in(path)).family == FAMILY
            packages = tuple(path.read_bytes() for path in paths)
            client.confirm(plan)
            return plan, packages

    def floor(self) -> dict[str, int]:
        """The versions below which this device goes no more."""
        with closing(
            UpdateClient(self.folder, self._root, self._fetcher, ManualClock(NOW_S))
        ) as client:
            return dict(client.floor.versions)

    def state(self) -> dict[str, bytes | str]:
        """Its files, and the targets of its links, by path."""
        return {
            str(path.relative_to(self.folder)): (
                os.readlink(path) if path.is_symlink() else path.read_bytes()
            )
            for path in self.folder.rglob("*")
            if path.is_symlink() or path.is_file()
        }

    def restore(self, state: dict[str, bytes | str]) -> None:
        """Make its files what `state` says."""
        now = self.state()
        for name in now.keys() - state.keys():
            (self.folder / name).unlink()
        for name, held in state.items():
            if now.get(name) == held:
                continue
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if isinstance(held, str):
                path.symlink_to(held)
            else:
                path.write_bytes(held)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder whose syncs cost nothing, where the machine has one."""
    fast = Path("/dev/shm")
    with TemporaryDirectory(dir=fast if os.access(fast, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def updates(
    memory: Path,
    write_package: Callable[..., tuple[Path, str]],
    loop: asyncio.AbstractEventLoop,
) -> SimpleNamespace:
    """A history, a device, and the device's states: new, one publication behind, and up to date."""
    packages = [
        write_package(bias=number / 10, ballast=110 * number)[0].read_bytes() for number in range(3)
    ]
    history = asyncio.run(publish_history(memory / "home", packages))
    device = Device(memory / "device", loop, history.root)
    states = [device.state()]
    device.turn(dict(history.states[-1]))
    history.read = sorted(device.store.asked & history.states[-1].keys())
    device.restore(states[0])
    for files in history.states[-2:]:
        device.turn(dict(files))
        states.append(device.state())
    return SimpleNamespace(history=history, device=device, states=states)
