"""A disk that is full: nothing half-written is seen, and with space again it goes on."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import duckdb
import pytest

from cloud_learner.store.archive import Archive
from cloud_learner.store.examples import Example
from cloud_learner.store.raw import RawLog, RawMessage
from edge_runtime.errors import CapacityError
from edge_runtime.wire.messages import Scored

DAY_S = 86_400.0
DISK = 2 << 20


@pytest.fixture
def disk(small_disk):
    """A file system that is small."""
    return small_disk(DISK)


def fill(folder: Path, leaving: int) -> Path:
    """Fill the disk but for a few bytes; removing the file makes it empty again."""
    path = folder / "filler"
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    path.write_bytes(bytes(max(0, free - leaving)))
    return path


def example(seq, day):
    features = os.urandom(400)  # 100 numbers that do not shrink
    features = struct.pack("<100f", *(byte / 7 for byte in features[:100]))
    scored, time_s = [Scored("r1", "stable", [seq / 7])], day * DAY_S + seq
    return Example(
        "EWR", 1, seq, "fam", time_s, time_s, features, "spec", 1.0, 1.0, scored, 0.0, 0.0
    )


def seen(folder):
    sql = "SELECT seq FROM read_parquet(?) ORDER BY seq"
    return [s for (s,) in duckdb.execute(sql, [f"{folder}/**/*.parquet"]).fetchall()]


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("leaving", [0, 4096, 40_000])
def test_examples_that_do_not_fit_leave_nothing_and_fit_later(disk, leaving):
    archive = Archive(disk / "archive")
    names = archive.write([example(seq, 0) for seq in range(50)], 1)
    filler = fill(disk, leaving)
    given = [example(seq, seq % 3) for seq in range(50, 2000)]
    before = files(disk)
    for _ in range(2):
        with pytest.raises(CapacityError) as caught:
            archive.write(given, 2)
        assert caught.value.code == "disk_full"
        assert files(disk) == before
        assert seen(disk / "archive") == list(range(50))
    filler.unlink()
    names += archive.write(given[:500], 2)
    assert seen(disk / "archive") == list(range(550))
    assert Archive(disk / "archive").adopt(names) == []


@pytest.mark.parametrize("leaving", [0, 4096, 40_000])
def test_a_day_that_cannot_be_merged_stays_as_it_is_and_is_merged_later(disk, leaving):
    archive, names = Archive(disk / "archive"), []
    for number in range(4):
        part = [example(100 * number + at, 0) for at in range(100)]
        names += archive.write(part, number + 1)
    names += archive.write([example(1000, 1)], 5)
    filler = fill(disk, leaving)
    before = files(disk)
    with pytest.raises(CapacityError) as caught:
        archive.compact(names, 5)
    assert caught.value.code == "disk_full"
    assert files(disk) == before
    assert seen(disk / "archive") == [*range(400), 1000]
    filler.unlink()
    done = archive.compact(names, 5)
    archive.settle(done)
    assert seen(disk / "archive") == [*range(400), 1000]
    assert len(files(disk)) == 2


@pytest.mark.parametrize("leaving", [0, 4096, 40_000])
@pytest.mark.parametrize("is_first", [True, False])
def test_raw_messages_that_do_not_fit_leave_nothing_and_fit_later(disk, leaving, is_first):
    log = RawLog(disk / "raw")
    small = [] if is_first else [RawMessage("s", "", b"small", 1.0)]
    if small:
        log.append(small)
    filler = fill(disk, leaving)
    large = [RawMessage("s", "", os.urandom(60_000), 2.0) for _ in range(3)]
    before = [path.read_bytes() for path in files(disk / "raw")]
    for _ in range(2):
        with pytest.raises(CapacityError) as caught:
            log.append(large)
        assert caught.value.code == "disk_full"
        assert [path.read_bytes() for path in files(disk / "raw")] == before
        assert list(log.replay()) == small
    filler.unlink()
    end = log.append(large)
    assert list(RawLog(disk / "raw").replay()) == small + large
    log.adopt(end)
    assert list(log.replay()) == small + large
