"""Arrival: what interruptions, lying parts and failing disks do to a package on its way."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_runtime.errors import CapacityError, TransportError, TrustError
from edge_runtime.files import OsFiles
from edge_runtime.rollout.plan import Plan, PlanArm, model_path
from edge_runtime.update.arrival import Chunks, whole_chunks
from edge_runtime.update.shelf import Shelf
from edge_runtime.update.trust import CHUNK_BYTES

DATA = random.Random(6).randbytes(3 * CHUNK_BYTES + 1000)
SHA = hashlib.sha256(DATA).hexdigest()
GOOD = b"the package that runs"
GOOD_SHA = hashlib.sha256(GOOD).hexdigest()
WRITES = ("create", "allocate", "write", "sync", "replace", "sync_directory")


class Source:
    """Gives the chunks of `data`, notes from which one on it was asked, breaks off on demand."""

    def __init__(self, data: bytes = DATA, breaks_at: int | None = None) -> None:
        self.data, self.breaks_at = data, breaks_at
        self.asked: list[int] = []

    def __call__(self, first: int) -> Iterator[bytes]:
        self.asked.append(first)
        for start in range(first * CHUNK_BYTES, len(self.data), CHUNK_BYTES):
            if start // CHUNK_BYTES == self.breaks_at:
                raise TransportError("unreachable", "gone")
            yield self.data[start : start + CHUNK_BYTES]


class Failing(OsFiles):
    """A disk on which one kind of operation fails, at its n-th time."""

    def __init__(self, name: str, error: int, at: int = 1) -> None:
        super().__init__()
        self.left, self.error = at, error
        call = getattr(self, name)

        def fail(*args: object, **options: object) -> object:
            self.left -= 1
            if self.left == 0:
                raise OSError(self.error, os.strerror(self.error))
            return call(*args, **options)

        setattr(self, name, fail)


def part(home: Path) -> Path:
    return home / "packages" / f".{SHA}.part"


def names(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "packages").iterdir())


def interrupted(home: Path, at: int) -> None:
    with pytest.raises(TransportError):
        Shelf(home).put(SHA, len(DATA), Source(breaks_at=at))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_download_goes_on_from_its_last_whole_chunk_after_a_restart(
    tmp_path: Path, at: int
) -> None:
    interrupted(tmp_path, at)
    rest = Source()
    path = Shelf(tmp_path).put(SHA, len(DATA), rest)
    assert rest.asked == [at]
    assert path.read_bytes() == DATA
    assert names(tmp_path) == [path.name]


def test_a_chunk_that_was_half_written_is_fetched_again(tmp_path: Path) -> None:
    interrupted(tmp_path, 2)
    with part(tmp_path).open("r+b") as file:
        file.seek(2 * CHUNK_BYTES)
        file.write(b"half")
    rest = Source()
    assert Shelf(tmp_path).put(SHA, len(DATA), rest).read_bytes() == DATA
    assert rest.asked == [2]


def test_a_chunk_that_ends_in_zeros_costs_no_more_than_being_fetched_again(tmp_path: Path) -> None:
    data = DATA[:CHUNK_BYTES] + bytes(2 * CHUNK_BYTES) + DATA[:5]
    sha256 = hashlib.sha256(data).hexdigest()
    shelf, source = Shelf(tmp_path), Source(data, breaks_at=2)
    with pytest.raises(TransportError):
        shelf.put(sha256, len(data), source)
    source.breaks_at = None
    assert shelf.put(sha256, len(data), source).read_bytes() == data
    assert source.asked == [0, 1]


def garbage(_path: Path) -> bytes:
    return random.Random(7).randbytes(len(DATA))


def one_bit(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    return bytes(data)


def shorter(path: Path) -> bytes:
    return path.read_bytes()[:-1]


def longer(path: Path) -> bytes:
    return path.read_bytes() + b"\0"


@pytest.mark.parametrize("damage", [garbage, one_bit, shorter, longer])
def test_a_part_that_is_not_what_it_seems_costs_a_new_download_and_nothing_else(
    tmp_path: Path, damage: Callable[[Path], bytes]
) -> None:
    interrupted(tmp_path, 2)
    part(tmp_path).write_bytes(damage(part(tmp_path)))
    source = Source()
    assert Shelf(tmp_path).put(SHA, len(DATA), source).read_bytes() == DATA
    assert source.asked[-1] == 0


def test_a_part_whose_rest_is_wrong_too_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    interrupted(tmp_path, 2)
    wrong = Source(DATA[:-1] + bytes([DATA[-1] ^ 1]))
    with pytest.raises(TrustError, match="hash_mismatch"):
        Shelf(tmp_path).put(SHA, len(DATA), wrong)
    assert wrong.asked == [2, 0]
    assert names(tmp_path) == []


def test_an_endless_download_is_cut_at_the_signed_length(tmp_path: Path) -> None:
    taken = []

    def endless(_first: int) -> Iterator[bytes]:
        while True:
            taken.append(1)
            yield bytes(CHUNK_BYTES)

    with pytest.raises(TrustError, match="wrong_length"):
        Shelf(tmp_path).put(SHA, len(DATA), endless)
    assert len(taken) == 4
    assert names(tmp_path) == []


def test_the_space_of_a_package_is_taken_before_its_first_byte(tmp_path: Path) -> None:
    def look(_first: int) -> Iterator[bytes]:
        facts = part(tmp_path).stat()
        assert (facts.st_size, facts.st_blocks * 512 >= len(DATA)) == (len(DATA), True)
        yield from Source()(0)

    Shelf(tmp_path).put(SHA, len(DATA), look)


def running(home: Path, disk: Failing | None = None) -> Shelf:
    """A shelf with a package that runs, and its plan; the disk fails from here on."""
    Shelf(home).put_whole(GOOD_SHA, GOOD)
    Shelf(home).save_current(plan())
    at = disk.left if disk is not None else 0
    shelf = Shelf(home, disk)
    if disk is not None:
        disk.left = at
    return shelf


def plan() -> Plan:
    arm = PlanArm("r", model_path("f", "r"), GOOD_SHA, 1, 1.0)
    return Plan(family="f", seq=1, stable=arm)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("operation", WRITES)
def test_a_disk_that_fails_at_any_write_leaves_what_runs_and_gives_its_space_back(
    tmp_path: Path, operation: str, error: int
) -> None:
    shelf = running(tmp_path, Failing(operation, error))
    with pytest.raises(CapacityError, match="shelf_unwritable"):
        shelf.put(SHA, len(DATA), Source())
    left = [name for name in names(tmp_path) if name != f"{SHA}.onnx"]  # renamed, not yet synced
    assert left == [f"{GOOD_SHA}.onnx"]
    reborn = Shelf(tmp_path)
    assert reborn.load_current("f") == plan()
    good = reborn.path_of(GOOD_SHA)
    assert good is not None
    assert good.read_bytes() == GOOD
    assert reborn.put(SHA, len(DATA), Source()).read_bytes() == DATA


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("operation", ["create", "write", "sync", "replace"])
def test_a_plan_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, operation: str, error: int
) -> None:
    shelf = running(tmp_path, Failing(operation, error))
    newer = Plan(family="f", seq=2, stable=plan().stable)
    with pytest.raises(CapacityError, match="shelf_unwritable"):
        shelf.save_current(newer)
    assert Shelf(tmp_path).load_current("f") == plan()
    shelf.save_current(newer)
    assert Shelf(tmp_path).load_current("f") == newer


def test_a_full_disk_is_told_before_anything_is_fetched(tmp_path: Path) -> None:
    source = Source()
    with pytest.raises(CapacityError, match="shelf_unwritable"):
        running(tmp_path, Failing("allocate", errno.ENOSPC)).put(SHA, len(DATA), source)
    assert source.asked == []


def test_a_full_disk_gets_back_what_waits_to_be_gone_on_with(tmp_path: Path) -> None:
    interrupted(tmp_path, 2)
    other = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(CapacityError):
        running(tmp_path, Failing("allocate", errno.ENOSPC)).put_whole(other, b"other")
    assert names(tmp_path) == [f"{GOOD_SHA}.onnx"]


def test_a_package_that_the_disk_cannot_read_is_not_handed_out(tmp_path: Path) -> None:
    shelf = running(tmp_path, Failing("reader", errno.EIO))
    assert shelf.path_of(GOOD_SHA) is None
    assert shelf.statistics()["corrupt"] == 1
    assert shelf.path_of(GOOD_SHA) is not None


def test_what_is_there_of_a_part_is_told_in_whole_chunks(tmp_path: Path) -> None:
    path, disk = tmp_path / "part", OsFiles()
    assert whole_chunks(disk, path, 10) == 0
    path.write_bytes(bytes(3 * CHUNK_BYTES))
    assert whole_chunks(disk, path, 3 * CHUNK_BYTES) == 0
    path.write_bytes(b"\1" * CHUNK_BYTES + bytes(2 * CHUNK_BYTES))
    assert whole_chunks(disk, path, 3 * CHUNK_BYTES) == 1
    assert whole_chunks(disk, path, 3 * CHUNK_BYTES + 1) == 0


def test_a_small_file_system_that_is_full_keeps_what_runs(tmp_path: Path) -> None:
    """The kernel's own ENOSPC: more than any file system has."""
    source: Chunks = Source()
    with pytest.raises(CapacityError, match="shelf_unwritable"):
        running(tmp_path).put(SHA, 1 << 55, source)
    assert names(tmp_path) == [f"{GOOD_SHA}.onnx"]
