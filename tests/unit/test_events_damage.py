"""Damage on disk costs what it hit, is told as an exact range, and stays told."""

from __future__ import annotations

import asyncio
import errno
import io
import random

import pytest

from edge_runtime.errors import CapacityError
from edge_runtime.events.log import EventLog
from edge_runtime.events.segment import HEADER_BYTES, SUFFIX
from edge_runtime.files import OsFiles

GROUP = 20
GROUPS = 30


class Hasty(OsFiles):
    def sync(self, fd): ...

    def sync_directory(self, path): ...


def opened(directory, files=None):
    return EventLog(
        directory,
        device="EWR",
        linger_ms=60_000,
        segment_bytes=6000,
        files=files or Hasty(),
        step=lambda: 1,
    )


def record(seq):
    return b"record %d " % seq * (1 + seq % 7)


@pytest.fixture
def home(tmp_path):
    """A log with segments of several frames of GROUP records each."""

    async def fill(log):
        for _ in range(GROUPS):
            for _ in range(GROUP):
                seq = log.append("event", record(log.handed_out("event") + 1))
            await log.wait_durable("event", seq)

    with opened(tmp_path / "log") as log:
        asyncio.run(fill(log))
    return tmp_path / "log"


def told(log):
    """Each number of epoch 1 as `piece` tells it, read in pieces of another size each time."""
    numbers, size = [], 1
    while (piece := log.piece("event", 1, len(numbers), 1 << 20, size)) is not None:
        assert piece.base_seq == len(numbers) + piece.skipped + 1
        assert piece.skipped or piece.records
        numbers += [piece.reason] * piece.skipped + piece.records
        size = size % 50 + 1
    return numbers


def lost(numbers):
    """The numbers that are lost; the others are what was logged."""
    gone = [seq for seq, what in enumerate(numbers, 1) if what == "damaged"]
    assert len(numbers) == GROUP * GROUPS
    assert all(what in ("damaged", record(seq)) for seq, what in enumerate(numbers, 1))
    assert gone == list(range(gone[0], gone[-1] + 1)) if gone else True
    return gone


def segments(home):
    return sorted(home.glob(f"event-*{SUFFIX}"))


def check(home, expected, context, before=0):
    with opened(home) as log:
        first = told(log)
        assert log.statistics()["event_damaged"] == len(lost(first)) - before, context
        assert told(log) == first, context
        assert log.owed("event") == [(1, GROUP * GROUPS)], context
    assert expected(lost(first)), f"{context}: {lost(first)}"
    with opened(home) as log:
        assert told(log) == first, context
        assert log.statistics()["event_damaged"] == 0, context


@pytest.mark.parametrize(
    "seed", [*range(20), *(pytest.param(n, marks=pytest.mark.slow) for n in range(20, 1000))]
)
def test_a_flipped_bit_costs_one_frame_at_most(home, seed):
    chance = random.Random(seed)
    path = chance.choice(segments(home))
    data = bytearray(path.read_bytes())
    at = chance.randrange(len(data))
    data[at] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    expected = 0 if at < HEADER_BYTES else GROUP
    check(home, lambda gone: len(gone) == expected, f"seed {seed}, {path.name} at {at}")


@pytest.mark.parametrize("seed", range(10))
def test_a_truncated_segment_costs_what_is_cut_off(home, seed):
    chance = random.Random(seed)
    path = chance.choice(segments(home))
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(chance.randrange(whole))
    per_frame = [*range(0, GROUP * GROUPS + 1, GROUP)]
    check(home, lambda gone: len(gone) in per_frame and len(gone) > 0, f"seed {seed}, {path.name}")


def test_a_missing_segment_costs_what_it_held(home):
    before = 0
    for path in segments(home)[::-1]:
        first = int(path.name.split("-")[2].removesuffix(SUFFIX))
        path.unlink()
        check(home, lambda gone, first=first: gone[0] == first, path.name, before)
        before = GROUP * GROUPS - first + 1
    with opened(home) as log:
        assert told(log) == ["damaged"] * GROUP * GROUPS


def test_a_damaged_header_is_replaced_by_the_name_of_its_file(home):
    for path in segments(home):
        path.write_bytes(bytes(HEADER_BYTES) + path.read_bytes()[HEADER_BYTES:])
    with opened(home) as log:
        assert lost(told(log)) == []
        assert log.statistics()["bad_headers"] == len(segments(home))


def test_a_record_that_looks_like_a_frame_is_not_taken_for_one(tmp_path):
    from edge_runtime.events import frames

    forged = frames.encode_frames(2, [b"forged"])

    async def fill(log):
        for data in (forged, b"real"):
            await log.wait_durable("event", log.append("event", data))

    with opened(tmp_path / "log") as log:
        asyncio.run(fill(log))
    [path] = segments(tmp_path / "log")
    data = bytearray(path.read_bytes())
    data[data.index(forged) - 1] ^= 1  # in the frame around it
    path.write_bytes(data)
    with opened(tmp_path / "log") as log:
        assert told(log) == ["damaged", b"real"]


class BadSector(io.BytesIO):
    """A file of which 512 bytes at `bad` cannot be read."""

    bad = 0

    def read(self, size=-1):
        at = self.tell()
        end = len(self.getbuffer()) if size < 0 else at + size
        if at < self.bad + 512 and self.bad < end:
            raise OSError(errno.EIO, "bad sector")
        return super().read(size)


class BadDisk(Hasty):
    def __init__(self, error=None):
        super().__init__()
        self.error, self.bad, self.path = error, 0, None

    def reader(self, path):
        if path.suffix != SUFFIX:
            return super().reader(path)
        if self.error:
            raise OSError(self.error, "no")
        file = BadSector(path.read_bytes())
        file.bad = self.bad if path == self.path else 1 << 30
        return file


def test_a_sector_that_cannot_be_read_costs_the_frames_around_it(home):
    disk = BadDisk()
    disk.bad, disk.path = 3000, segments(home)[3]
    with opened(home, disk) as log:
        numbers = told(log)
    gone = [seq for seq, what in enumerate(numbers, 1) if what == "damaged"]
    assert 0 < len(gone) < GROUP * GROUPS / 2
    assert len(numbers) == GROUP * GROUPS


def test_what_cannot_be_read_for_now_is_no_damage(home):
    disk = BadDisk()
    with opened(home, disk) as log:
        disk.error = errno.EMFILE
        with pytest.raises(CapacityError, match="log_unreadable"):
            log.piece("event", 1, 0, 1 << 20, 99)
        disk.error = None
        assert lost(told(log)) == []
