"""What a log writes to flash is counted by day and kept over restarts."""

from __future__ import annotations

import asyncio

import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.events.log import EventLog
from edge_runtime.events.usage import Usage
from edge_runtime.files import OsFiles, write_atomic

DAY_S = 86400.0


@pytest.fixture
def clock():
    return ManualClock(100 * DAY_S)


@pytest.fixture
def open_usage(tmp_path, clock):
    def open_usage():
        files = OsFiles()
        return files, Usage(files, tmp_path / "usage", clock)

    return open_usage


def counted(usage):
    return tuple(usage.statistics().values())


def test_bytes_are_counted_on_the_day_on_which_they_are_written(open_usage, clock, tmp_path):
    files, usage = open_usage()
    write_atomic(tmp_path / "a", bytes(100), files=files)
    assert counted(usage) == (100, 0)
    clock.advance(DAY_S)
    assert counted(usage) == (0, 100)
    write_atomic(tmp_path / "a", bytes(30), files=files)
    clock.advance(DAY_S - 1)
    assert counted(usage) == (30, 100)
    clock.advance(2 * DAY_S)
    assert counted(usage) == (0, 0)


def test_the_count_goes_on_after_a_restart_and_costs_a_few_bytes(open_usage, tmp_path):
    files, usage = open_usage()
    write_atomic(tmp_path / "a", bytes(1000), files=files)
    usage.save()
    usage.save()
    today, _ = counted(open_usage()[1])
    assert 1000 <= today <= 1000 + 64


def test_a_count_that_cannot_be_read_begins_anew(open_usage, tmp_path):
    files, usage = open_usage()
    write_atomic(tmp_path / "a", bytes(1000), files=files)
    usage.save()
    path = tmp_path / "usage"
    path.write_bytes(path.read_bytes().replace(b"HWUS", b"HWUT"))
    assert counted(open_usage()[1]) == (0, 0)
    path.write_bytes(b"")
    assert counted(open_usage()[1]) == (0, 0)


def test_a_count_that_cannot_be_kept_is_counted_on(open_usage, tmp_path):
    (tmp_path / "usage").mkdir()
    files, usage = open_usage()
    write_atomic(tmp_path / "a", bytes(10), files=files)
    usage.save()
    assert counted(usage) == (10, 0)


def test_at_load_the_log_writes_little_more_than_it_is_given(tmp_path):
    async def fill(log):
        for _ in range(20):
            for _ in range(1000):
                seq = log.append("event", bytes(200))
            await log.wait_durable("event", seq)

    with EventLog(tmp_path, device="EWR", linger_ms=60_000) as log:
        asyncio.run(fill(log))
        numbers = log.statistics()
    assert numbers["payload_bytes"] == 20 * 1000 * 200
    assert numbers["written_bytes"] < 1.1 * numbers["payload_bytes"]
    assert numbers["flash_bytes_today"] == numbers["written_bytes"]
    with EventLog(tmp_path, device="EWR") as log:
        assert log.statistics()["flash_bytes_today"] > numbers["written_bytes"]
