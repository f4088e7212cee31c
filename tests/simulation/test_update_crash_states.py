"""Whatever a power cut leaves of an update: the old release or the new one, whole, above the floor.

The real shelf and floor write to a disk that records each operation; for each prefix of the record,
states are made that the disk could be in (`tools/crash_states.py` says how), and both are opened on
each. A directory whose own name was not synced may be gone with all that is in it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edge_runtime.files import OsFiles
from edge_runtime.rollout.plan import Plan, PlanArm, model_path
from edge_runtime.update.floorfile import FloorFile
from edge_runtime.update.shelf import Shelf
from edge_runtime.update.trust import CHUNK_BYTES, planned

TOOL = Path(__file__).parents[2] / "tools" / "crash_states.py"
DATA = {seq: bytes([seq]) * (CHUNK_BYTES + 1000 * seq) for seq in (1, 2, 3)}


def plan(seq: int) -> Plan:
    sha256 = hashlib.sha256(DATA[seq]).hexdigest()
    arm = PlanArm(f"r{seq}", model_path("toy", f"r{seq}"), sha256, seq, 1.0)
    return Plan(family="toy", seq=seq, stable=arm)


PLANS = {seq: plan(seq) for seq in DATA}


class Recorded(OsFiles):
    """The machine's disk, with a record of what is done to it that `crash` reads."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []
        self._inodes: dict[Path, int] = {}
        self._open: dict[int, int] = {}
        self._last = 0

    def create(self, path: Path, mode: int = 0o600) -> int:
        fd = super().create(path, mode)
        self._last += 1
        self._inodes[path] = self._open[fd] = self._last
        self.operations.append(("create", path, self._last))
        return fd

    def open(self, path: Path) -> int:
        fd = super().open(path)
        self._open[fd] = self._inodes[path]
        return fd

    def allocate(self, fd: int, size: int) -> None:
        super().allocate(fd, size)
        self.operations.append(("allocate", self._open[fd], size))

    def write(self, fd: int, data: bytes, offset: int) -> None:
        super().write(fd, data, offset)
        self.operations.append(("write", self._open[fd], offset, bytes(data)))

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self.operations.append(("sync", self._open[fd]))

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self._inodes[target] = self._inodes.pop(source)
        self.operations.append(("replace", source, target, self._inodes[target]))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        if self._inodes.pop(path, None) is not None:
            self.operations.append(("unlink", path))

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.operations.append(("sync_directory", path))


class Forgetful(Recorded):
    """A disk that does nothing when it is asked to make names durable."""

    def sync_directory(self, path: Path) -> None:
        """Nothing."""


@dataclass
class History:
    """A device that takes three releases, and leaves the third; what holds after each step."""

    state: Path
    files: Recorded = field(default_factory=Recorded)
    known: list[tuple[int, set[int], int]] = field(default_factory=lambda: [(0, {0}, 0)])

    def play(self) -> None:
        """As the agent does: a package, the plan remembered, the floor raised, the shelf pruned."""
        shelf = Shelf(self.state / "shelf", self.files)
        floors = FloorFile(self.state, self.files)
        for seq, new in PLANS.items():
            self._say({max(seq - 1, 0)}, 0)
            shelf.put_whole(new.stable.sha256, DATA[seq])
            self._say({max(seq - 1, 0), seq}, 0)
            shelf.save_current(new, max(seq - 1, 0))
            self._say({seq}, 0)
            floors.raise_to(planned(floors.floor, new, max(seq - 1, 0)))
            shelf.prune({PLANS[each].stable.sha256 for each in PLANS if seq - 1 <= each <= seq})
        self._say({3}, 0)
        shelf.quarantine(PLANS[3].stable.sha256, "rolled_back")
        self._say({2, 3}, 1)
        shelf.save_current(PLANS[2])
        self._say({2}, 1)

    def _say(self, serves: set[int], left: int) -> None:
        self.known.append((len(self.files.operations), serves, left))

    def states(self, tool: ModuleType, seeds: int) -> Iterator[tuple[str, int, dict[Path, bytes]]]:
        """A name for each state, after how many operations, and the files by their paths there."""
        for prefix in range(len(self.files.operations) + 1):
            done = self.files.operations[:prefix]
            for seed in range(seeds):
                for share in tool.SHARES:
                    chance = random.Random(f"{seed} {prefix} {share}")
                    found = tool.crash(done, chance, share)
                    lost = {each for each in self._unsynced(done) if chance.random() >= share}
                    left = {
                        path: data for path, data in found.items() if not lost & {*path.parents}
                    }
                    yield f"prefix {prefix}, seed {seed}, share {share}", prefix, left

    def _unsynced(self, done: list[tuple[Any, ...]]) -> list[Path]:
        synced = {op[1] for op in done if op[0] == "sync_directory"}
        made = (self.state / "shelf", self.state / "shelf/packages", self.state / "shelf/current")
        return [path for path in made if path.parent not in synced]

    def expected(self, prefix: int) -> tuple[set[int], int]:
        """Which plans may be current after so many operations, and how many must be left."""
        around = [known for known in self.known if known[0] <= prefix][-1:]
        around += [known for known in self.known if known[0] > prefix][:1]
        return set().union(*(serves for _, serves, _ in around)), around[0][2]


def violations(
    state: Path, files: dict[Path, bytes], home: Path, serves: set[int], left: int
) -> Iterator[str]:
    """What is wrong with a device that starts on these files."""
    shutil.rmtree(home, ignore_errors=True)
    for path, data in files.items():
        there = home / path.relative_to(state)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(data)
    home.mkdir(exist_ok=True)
    disk = Forgetful()  # what is looked at here outlives nothing
    shelf, floor = Shelf(home / "shelf", disk), FloorFile(home, disk).floor
    current, previous = shelf.load_current("toy"), shelf.load_previous("toy")
    seq = current.seq if current else 0
    if seq not in serves:
        yield f"plan {seq} is current, and not one of {serves}"
    lowest = floor.release_counter.get("toy", 0)
    for each in (current, previous):
        if each is None:
            continue
        path = shelf.path_of(each.stable.sha256)
        if path is None or path.read_bytes() != DATA[each.seq]:
            yield f"plan {each.seq} has no package"
        if each.stable.counter < lowest:
            yield f"plan {each.seq} is below the floor {lowest}"
    if len(shelf.quarantined()) < left:
        yield "what was left is not in quarantine"


def found_in(tool: ModuleType, folder: Path, seeds: int, history: History) -> Iterator[str]:
    history.play()
    for name, prefix, files in history.states(tool, seeds):
        expected = history.expected(prefix)
        for wrong in violations(history.state, files, folder / "after", *expected):
            yield f"{name}: {wrong}"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("crash_states", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seeds", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_r1_no_power_cut_leaves_a_half_update(tool: ModuleType, tmp_path: Path, seeds: int) -> None:
    found = [*found_in(tool, tmp_path, seeds, History(tmp_path / "state"))]
    assert not found, "\n".join(found[:20])


def test_a_shelf_that_does_not_sync_its_names_is_found_out(
    tool: ModuleType, tmp_path: Path
) -> None:
    assert next(found_in(tool, tmp_path, 1, History(tmp_path / "state", Forgetful())), None)
