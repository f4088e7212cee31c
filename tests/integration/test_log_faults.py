"""The log on a real disk that fails: killed at every N-th system call, full, slow, refusing.

The child appends and says, after each commit, what is durable; whatever stops it, the log opens
again and holds what was said.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_runtime.events.log import PENDING_BYTES_MAX, EventLog

_CHILD = """
import sys
from pathlib import Path
from edge_runtime.events.log import EventLog

def say():
    sys.stdout.write(f"{log.epoch} {log.durable('event')[1]} {log.durable('label')[1]}\\n")
    sys.stdout.flush()

log = EventLog(Path(sys.argv[1]), device="EWR", linger_ms=1.0, segment_bytes=2000, bytes_max=40_000)
say()
log.on_commit = say
for n in range(1, 400):
    while log.statistics()["pending"] > 20:
        pass
    log.append("event", b"event %d %d " % (log.epoch, n) + bytes(n % 97))
    if n % 3 == 0:
        log.append("label", b"label %d %d" % (log.epoch, n // 3))
    if n % 50 == 0:
        log.learned("event", log.epoch, log.durable("event")[1] // 2)
log.close()
"""
CALLS = ("fdatasync", "fsync", "pwrite64", "rename", "unlink", "ftruncate", "fallocate", "openat")


def told(log: EventLog, epoch: int, name: str) -> list[bytes | str]:
    numbers: list[bytes | str] = []
    while (piece := log.piece(name, epoch, len(numbers), 1 << 20, 99)) is not None:  # type: ignore[arg-type]
        numbers += [piece.reason] * piece.skipped + piece.records
    return numbers


def check(directory: Path, said: list[tuple[int, int, int]], context: str) -> None:
    with EventLog(directory, device="EWR", bytes_max=40_000) as log:
        assert log.epoch not in [epoch for epoch, _, _ in said], context
        for epoch, events, labels in said:
            for name, durable in (("event", events), ("label", labels)):
                numbers = told(log, epoch, name)
                assert len(numbers) >= durable, context
                for seq, what in enumerate(numbers, 1):
                    is_record = isinstance(what, bytes) and what.startswith(
                        b"%s %d %d" % (name.encode(), epoch, seq)
                    )
                    assert is_record or what in ("dropped", "trimmed"), f"{context}: {seq} {what!r}"


def run_under_strace(
    directory: Path, call: str, when: int
) -> tuple[int, tuple[int, int, int] | None]:
    """Kill the child at its `when`-th such call; its exit status, and the last that it said."""
    inject = f"inject={call}:signal=KILL:when={when}"
    trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject]
    done = subprocess.run(
        [*trace, sys.executable, "-c", _CHILD, str(directory)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        timeout=60,
    )
    whole = [line for line in done.stdout.splitlines(keepends=True) if line.endswith(b"\n")]
    last = tuple(map(int, whole[-1].split())) if whole else None
    return done.returncode, last  # type: ignore[return-value]


def kill_at_calls(directory: Path, points: list[tuple[str, int]]) -> int:
    """How often the child really was killed."""
    said: list[tuple[int, int, int]] = []
    kills = 0
    for call, when in points:
        status, last = run_under_strace(directory, call, when)
        kills += status != 0
        said += [last] if last else []
        check(directory, said[-3:], f"killed at {call} number {when}")
    return kills


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@needs_strace
def test_a_kill_at_a_system_call_loses_nothing_durable(tmp_path: Path) -> None:
    points = [("fdatasync", 9), ("pwrite64", 14), ("rename", 4), ("unlink", 8)]
    assert kill_at_calls(tmp_path, points) == len(points)


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_a_kill_at_every_system_call_loses_nothing_durable(tmp_path: Path, call: str) -> None:
    assert kill_at_calls(tmp_path, [(call, when) for when in (*range(1, 30), *range(30, 120, 7))])


def until(condition, within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def fill(log: EventLog, megabytes: int) -> int:
    for _ in range(megabytes * 4):
        seq = log.append("event", bytes(256 * 1024))
    return seq


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_for_long_is_seen_and_the_log_recovers_by_itself(
    tmp_path: Path, error: int, bad_disk
) -> None:
    with EventLog(tmp_path, device="EWR", linger_ms=1.0, files=bad_disk) as log:
        first = log.append("event", b"before")
        asyncio.run(log.wait_durable("event", first))
        bad_disk.error = error
        log.append("event", b"refused for now")
        until(lambda: log.statistics()["failing"], 1.0)
        last = fill(log, 80)
        numbers = log.statistics()
        assert numbers["pending_bytes"] <= PENDING_BYTES_MAX
        assert (numbers["event_durable"], numbers["failing"]) == (1, 1)
        assert numbers["event_stalled"] > 0
        bad_disk.error = 0
        asyncio.run(log.wait_durable("event", last))
        until(lambda: not log.statistics()["failing"])
        numbers_told = told(log, log.epoch, "event")
        assert numbers_told.count("stalled") == numbers["event_stalled"]
        assert numbers_told[:2] == [b"before", b"refused for now"]
        assert len(numbers_told) == last


def test_a_disk_that_hangs_is_seen_within_a_second_and_appends_go_on(
    tmp_path: Path, bad_disk
) -> None:
    with EventLog(tmp_path, device="EWR", linger_ms=1.0, files=bad_disk) as log:
        bad_disk.free.clear()
        log.append("event", b"in flight")
        until(lambda: log.statistics()["failing"], 1.0)
        last = fill(log, 40)
        assert log.durable("event") == (log.epoch, 0)
        assert log.statistics()["pending_bytes"] <= PENDING_BYTES_MAX
        bad_disk.free.set()
        asyncio.run(log.wait_durable("event", last))


def test_a_full_disk_is_met_early_and_the_log_recovers_when_there_is_space(small_disk) -> None:
    small = small_disk(8 << 20)
    (small / "other").write_bytes(bytes(5 << 20))
    with EventLog(small / "log", device="EWR", segment_bytes=1 << 20) as log:
        for _ in range(16):
            last = log.append("event", bytes(256 * 1024))
            log.append("label", b"label")
        until(lambda: log.statistics()["failing"])
        assert log.durable("event")[1] < last
        (small / "other").unlink()
        asyncio.run(log.wait_durable("event", last))
        assert told(log, log.epoch, "event") == [bytes(256 * 1024)] * last
