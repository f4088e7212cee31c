"""The event log keeps what it called durable, numbers it once, and stays within its bounds."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import threading
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from edge_runtime.errors import CapacityError, ConfigError, RequestError
from edge_runtime.events import segment
from edge_runtime.events.log import PENDING_BYTES_MAX, RECORD_BYTES_MAX, EventLog
from edge_runtime.events.recent import RECENT_BYTES_MAX
from edge_runtime.events.recovery import STEP_MAX
from edge_runtime.events.segment import SUFFIX
from edge_runtime.events.tally import EPOCHS_KEPT
from edge_runtime.files import OsFiles

ALL = 1 << 30


class Hasty(OsFiles):
    """A disk that is quick, for tests that open a log many times."""

    def sync(self, fd: int) -> None: ...

    def sync_directory(self, path: Path) -> None: ...


def opened(directory: Path, **settings: object) -> EventLog:
    defaults = {"device": "EWR", "linger_ms": 0.0, "step": lambda: 1}
    return EventLog(directory, **{**defaults, **settings})  # type: ignore[arg-type]


def wait_durable(log: EventLog, event_class: str, seq: int) -> None:
    asyncio.run(asyncio.wait_for(log.wait_durable(event_class, seq), 5))  # type: ignore[arg-type]


def append_durably(log: EventLog, records: list[bytes], event_class: str = "event") -> None:
    for record in records:
        seq = log.append(event_class, record)  # type: ignore[arg-type]
    wait_durable(log, event_class, seq)


def delivered(
    log: EventLog, epoch: int = 1, event_class: str = "event", max_records: int = 7
) -> list[tuple[int, bytes | str]]:
    """Each number of an epoch as `piece` tells it: with its record, or the reason of its loss."""
    told: list[tuple[int, bytes | str]] = []
    while True:
        after = len(told)
        piece = log.piece(event_class, epoch, after, ALL, max_records)  # type: ignore[arg-type]
        if piece is None:
            return told
        assert bool(piece.reason) == bool(piece.skipped)
        assert piece.skipped or piece.records
        assert piece.base_seq == after + piece.skipped + 1
        told += [(after + 1 + at, piece.reason) for at in range(piece.skipped)]
        told += list(enumerate(piece.records, piece.base_seq))


def taken(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob(f"*{SUFFIX}"))


def numbered(first: int, last: int) -> list[bytes]:
    return [b"record %d" % seq for seq in range(first, last + 1)]


def segments(directory: Path, event_class: str = "event") -> list[Path]:
    return sorted(directory.glob(f"{event_class}-*{SUFFIX}"))


def everything(log: EventLog, event_class: str = "event") -> list[tuple[int, int, bytes]]:
    return list(log.tail(event_class, 0, 0))  # type: ignore[arg-type]


def test_sequence_numbers_count_from_one_in_each_class_and_epoch(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        assert [log.append("event", b"a"), log.append("event", b"b")] == [1, 2]
        assert log.append("label", b"c") == 1
    with opened(tmp_path) as log:
        assert log.epoch == 2
        assert log.append("event", b"d") == 1


def test_read_returns_records_in_order_within_the_bounds(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        append_durably(log, numbered(1, 10))
        assert log.read("event", 1, 0, ALL, 3) == list(enumerate(numbered(1, 3), 1))
        assert log.read("event", 1, 4, len(b"record 5record 6"), 99) == [
            (5, b"record 5"),
            (6, b"record 6"),
        ]
        assert log.read("event", 1, 8, 1, 99) == [(9, b"record 9")]
        assert log.read("event", 1, 10, ALL, 99) == []
        assert log.read("label", 1, 0, ALL, 99) == []


def test_empty_and_large_records_come_back_as_they_were(tmp_path: Path) -> None:
    records = [b"", os.urandom(RECORD_BYTES_MAX), b"", b"x" * 70_000, b"y"]
    with opened(tmp_path) as log:
        append_durably(log, records)
    with opened(tmp_path) as log:
        assert [data for _, _, data in everything(log)] == records


def test_records_stay_readable_across_segments_and_epochs(tmp_path: Path) -> None:
    expected = []
    for epoch in (1, 2, 3):
        with opened(tmp_path, segment_bytes=200) as log:
            for start in range(1, 40, 10):
                append_durably(log, numbered(start, start + 9))
            assert log.read("event", epoch, 17, ALL, 2) == list(enumerate(numbered(18, 19), 18))
            expected += [(epoch, seq, b"record %d" % seq) for seq in range(1, 41)]
            assert everything(log) == expected
    assert len(segments(tmp_path)) >= 6
    with opened(tmp_path) as log:
        assert log.epochs("event") == [(1, 1, 40), (2, 1, 40), (3, 1, 40)]
        assert log.ends("event") == [(1, 40), (2, 40), (3, 40)]
        assert log.ends("label") == [(1, 0), (2, 0), (3, 0)]
        assert list(log.tail("event", 2, 39)) == [e for e in expected if (e[0], e[1]) > (2, 39)]


def test_a_large_segment_of_an_earlier_run_is_read_from_the_middle(tmp_path: Path) -> None:
    with opened(tmp_path, segment_bytes=1 << 20) as log:
        for start in range(0, 2000, 50):
            append_durably(log, [b"%06d" % seq * 100 for seq in range(start + 1, start + 51)])
    with opened(tmp_path) as log:
        for after in (0, 1, 777, 1500, 1998):
            assert log.read("event", 1, after, ALL, 2) == [
                (seq, b"%06d" % seq * 100) for seq in range(after + 1, min(after + 3, 2001))
            ]


def test_what_was_just_committed_is_read_from_memory_as_from_disk(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        assert log.recent("event", 0, ALL, 99) is None
        for start in (1, 5, 9):
            append_durably(log, numbered(start, start + 3))
        for after in range(13):
            for bounds in ((ALL, 99), (ALL, 3), (1, 99), (20, 5)):
                assert log.recent("event", after, *bounds) == log.read("event", 1, after, *bounds)
    with opened(tmp_path) as log:
        assert log.recent("event", 0, ALL, 99) is None


def test_what_is_kept_in_memory_is_bounded_and_the_rest_is_read_from_disk(tmp_path: Path) -> None:
    half = bytes(RECENT_BYTES_MAX // 2 - 100)
    with opened(tmp_path, linger_ms=20.0) as log:
        for _ in range(3):
            append_durably(log, [half])
        assert log.recent("event", 0, ALL, 99) is None
        assert log.recent("event", 1, ALL, 99) == [(2, half), (3, half)]
        append_durably(log, [half] * 3)
        assert log.recent("event", 5, ALL, 99) is None
        assert log.read("event", 1, 5, ALL, 99) == [(6, half)]


def test_records_that_come_while_a_group_is_written_wait_for_no_other_bell(
    tmp_path: Path, bad_disk
) -> None:
    with opened(tmp_path, files=bad_disk) as log:
        for seq in range(1, 200):
            bad_disk.free.clear()
            log.append("event", b"first")
            log.append("label", b"beside")
            bad_disk.free.set()
            log.append("event", b"second")
            wait_durable(log, "event", 2 * seq)
            wait_durable(log, "label", seq)


def test_a_commit_is_announced_after_it_is_durable(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    announced = threading.Event()
    with opened(tmp_path) as log:
        log.on_commit = lambda: (seen.append(log.durable("event")), announced.set())[0]
        log.append("event", b"a")
        assert announced.wait(5)
    assert seen[0] == (1, 1)


def test_one_sync_serves_all_that_came_within_the_linger(tmp_path: Path, bad_disk) -> None:
    with opened(tmp_path, files=bad_disk, linger_ms=50.0) as log:
        append_durably(log, numbered(1, 1000))
        assert bad_disk.calls == 1


def test_who_waits_for_a_record_does_not_wait_for_the_linger(tmp_path: Path) -> None:
    with opened(tmp_path, linger_ms=60_000.0) as log:
        append_durably(log, [b"event"])
        append_durably(log, [b"label"], "label")
        assert log.statistics()["commits"] == 2


def test_closing_does_not_wait_for_the_linger(tmp_path: Path) -> None:
    with opened(tmp_path, linger_ms=60_000.0) as log:
        log.append("event", b"a")
    with opened(tmp_path) as log:
        assert everything(log) == [(1, 1, b"a")]


@pytest.mark.parametrize(("linger_max_ms", "expected"), [(60_000.0, 32), (4.0, 4), (0.0, 0)])
def test_the_linger_grows_while_each_commit_takes_one_record(
    tmp_path: Path, linger_max_ms: float, expected: int
) -> None:
    committed = threading.Semaphore(0)
    with opened(tmp_path, linger_max_ms=linger_max_ms) as log:
        log.on_commit = committed.release
        for _ in range(100):
            log.append("event", b"alone")
            assert committed.acquire(timeout=5)
            if log.statistics()["linger_ms"] == expected != 0:
                break
        assert log.statistics()["linger_ms"] == expected


def test_a_failed_sync_moves_nothing_and_the_records_go_into_a_new_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad_disk
) -> None:
    caplog.set_level("INFO", "edge_runtime")
    with opened(tmp_path, files=bad_disk) as log:
        append_durably(log, [b"record 1"])
        bad_disk.failures = 1
        bad_disk.free.clear()
        log.append("event", b"record 2")
        assert log.durable("event") == (1, 1)
        bad_disk.free.set()
        wait_durable(log, "event", 2)
        assert log.statistics()["sync_errors"] == 1
        assert everything(log) == [(1, 1, b"record 1"), (1, 2, b"record 2")]
    said = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert [each.partition(",")[0] for each in said] == [
        "the disk refuses records",
        "the disk takes records again",
    ]
    assert len(segments(tmp_path)) == 2
    with opened(tmp_path) as log:
        assert everything(log) == [(1, 1, b"record 1"), (1, 2, b"record 2")]


def test_a_segment_for_which_there_is_no_space_holds_none_of_it(tmp_path: Path) -> None:
    class Full(OsFiles):
        def __init__(self) -> None:
            super().__init__()
            self.tries, self.left = 3, list[int]()

        def allocate(self, fd: int, size: int) -> None:
            if self.tries:
                self.tries -= 1
                super().allocate(fd, size // 2)  # what there was
                raise OSError(errno.ENOSPC, "no space left")
            super().allocate(fd, size)

        def unlink(self, path: Path) -> None:
            if path.suffix == SUFFIX:
                self.left.append(path.stat().st_size if path.exists() else -1)
            super().unlink(path)

    disk = Full()
    with opened(tmp_path, files=disk, segment_bytes=1 << 20) as log:
        append_durably(log, [b"a"])
        assert everything(log) == [(1, 1, b"a")]
    assert disk.left == [-1, 0, -1, 0, -1, 0, -1]  # before each try, and after each failure


def test_a_disk_that_keeps_failing_is_visible_and_nothing_becomes_durable(
    tmp_path: Path, bad_disk
) -> None:
    log = opened(tmp_path, files=bad_disk)
    bad_disk.failures = 1_000_000
    log.append("event", b"a")
    log.append("label", b"b")
    with pytest.raises(CapacityError) as refused:
        log.close()
    assert refused.value.code == "log_not_durable"
    numbers = log.statistics()
    assert (numbers["failing"], numbers["pending"]) == (1, 2)
    assert numbers["sync_errors"] > 0
    assert log.durable("event") == log.durable("label") == (1, 0)


def test_a_hanging_disk_bounds_memory_and_the_oldest_events_go(tmp_path: Path, bad_disk) -> None:
    with opened(tmp_path, files=bad_disk) as log:
        append_durably(log, [b"kept"])
        append_durably(log, [b"kept"], "label")
        bad_disk.free.clear()
        count = 3 * PENDING_BYTES_MAX // RECORD_BYTES_MAX
        for _ in range(count):
            log.append("event", bytes(RECORD_BYTES_MAX))
        labels = [log.append("label", b"still taken") for _ in range(10)]
        numbers = log.statistics()
        assert numbers["pending_bytes"] <= PENDING_BYTES_MAX
        assert numbers["event_stalled"] > count // 2
        assert numbers["label_stalled"] == 0
        bad_disk.free.set()
        wait_durable(log, "event", count + 1)
        wait_durable(log, "label", labels[-1])
        told = delivered(log)
        assert [seq for seq, _ in told] == list(range(1, count + 2))
        lost = [seq for seq, data in told if data == "stalled"]
        assert len(lost) == numbers["event_stalled"]
        assert log.statistics()["event_durable"] == count + 1
    with opened(tmp_path) as log:
        assert delivered(log) == told


def test_labels_go_from_memory_only_where_no_event_waits(tmp_path: Path, bad_disk) -> None:
    with opened(tmp_path, files=bad_disk) as log:
        bad_disk.free.clear()
        for _ in range(PENDING_BYTES_MAX // RECORD_BYTES_MAX + 10):
            log.append("label", bytes(RECORD_BYTES_MAX))
        assert log.statistics()["label_stalled"] > 0
        bad_disk.free.set()


def test_who_waits_for_what_is_dropped_from_memory_is_told(tmp_path: Path, bad_disk) -> None:
    log = opened(tmp_path, files=bad_disk)

    async def drop_under_a_waiter() -> None:
        bad_disk.free.clear()
        log.append("event", b"in flight")
        await asyncio.to_thread(bad_disk.asked.wait, 5)
        seq = log.append("event", b"to be dropped")
        waiter = asyncio.ensure_future(log.wait_durable("event", seq))
        await asyncio.sleep(0)
        for _ in range(PENDING_BYTES_MAX // RECORD_BYTES_MAX + 1):
            log.append("event", bytes(RECORD_BYTES_MAX))
        with pytest.raises(CapacityError, match="record_dropped"):
            await waiter
        with pytest.raises(CapacityError, match="record_dropped"):
            await log.wait_durable("event", seq)
        bad_disk.free.set()
        await log.wait_durable("event", log.handed_out("event"))
        with pytest.raises(CapacityError, match="record_dropped"):
            await log.wait_durable("event", seq)

    asyncio.run(drop_under_a_waiter())
    log.close()


def test_a_full_log_drops_the_oldest_events_and_says_so(tmp_path: Path) -> None:
    with opened(tmp_path, bytes_max=16_000, segment_bytes=1000) as log:
        append_durably(log, [b"a label"], "label")
        for _ in range(300):
            append_durably(log, [bytes(96)])
        assert taken(tmp_path) <= 16_000 + 4096  # beside the segments
        told = delivered(log)
        assert [seq for seq, _ in told] == list(range(1, 301))
        dropped = [seq for seq, data in told if data == "dropped"]
        assert 150 < len(dropped) == dropped[-1] == log.statistics()["event_dropped"]
        assert delivered(log, event_class="label") == [(1, b"a label")]
    with opened(tmp_path, bytes_max=16_000, segment_bytes=1000) as log:
        assert delivered(log) == told
        assert log.owed("event") == [(1, 300)]


def test_labels_go_where_no_event_is_left_to_go(tmp_path: Path) -> None:
    with opened(tmp_path, bytes_max=16_000, segment_bytes=1000) as log:
        append_durably(log, numbered(1, 3))
        for _ in range(300):
            append_durably(log, [bytes(96)], "label")
        assert taken(tmp_path) <= 16_000 + 4096
        assert delivered(log) == list(enumerate(numbered(1, 3), 1))
        told = delivered(log, event_class="label")
        assert [seq for seq, _ in told] == list(range(1, 301))
        assert log.statistics()["label_dropped"] > 0
    with opened(tmp_path, bytes_max=16_000) as log:
        for _ in range(300):  # what no epoch needs goes first, class event before class label
            append_durably(log, [bytes(96)], "label")
        assert delivered(log, 1) == [(seq, "dropped") for seq in (1, 2, 3)]
        assert delivered(log, 1, "label") == [(seq, "dropped") for seq in range(1, 301)]
        assert log.owed("event") == [(1, 3)]


def test_what_the_learner_holds_is_not_called_dropped(tmp_path: Path) -> None:
    with opened(tmp_path, bytes_max=16_000, segment_bytes=1000) as log:
        for _ in range(20):
            append_durably(log, [bytes(96)])
        log.learned("event", 1, 18)
        for _ in range(300):
            append_durably(log, [bytes(96)])
        reasons = dict(delivered(log))
        assert {reasons[seq] for seq in range(1, 19)} == {"trimmed"}
        assert reasons[19] == "dropped"


def test_trim_gives_back_whole_segments_and_never_the_newest(tmp_path: Path) -> None:
    with opened(tmp_path, segment_bytes=100) as log:
        for start in range(1, 31, 10):
            append_durably(log, numbered(start, start + 9))
        assert len(segments(tmp_path)) == 3
        log.learned("event", 1, 19)
        assert log.epochs("event") == [(1, 11, 30)]
        log.learned("label", 1, 30)
        log.learned("event", 2, 30)
        assert log.epochs("event") == [(1, 11, 30)]
        log.learned("event", 1, 30)
        assert log.epochs("event") == [(1, 21, 30)]
        assert len(segments(tmp_path)) == 1
    with opened(tmp_path) as log:
        log.learned("event", 1, 30)
        assert segments(tmp_path) == []
    with opened(tmp_path) as log:
        assert log.ends("event") == [(1, 30), (2, 0)]


def test_a_record_above_the_bound_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        with pytest.raises(RequestError) as refused:
            log.append("event", bytes(RECORD_BYTES_MAX + 1))
        assert refused.value.code == "too_large"
        assert log.append("event", b"next") == 1


def test_a_second_owner_and_another_device_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        append_durably(log, [b"a"])
        with pytest.raises(ConfigError) as refused:
            opened(tmp_path)
        assert refused.value.code == "already_owned"
    with pytest.raises(ConfigError) as refused:
        opened(tmp_path, device="JFK")
    assert refused.value.code == "other_device"
    with opened(tmp_path) as log:
        assert log.epoch == 2


@pytest.mark.parametrize("copy", ["tally.a", "tally.b"])
def test_a_flipped_bit_in_the_tally_costs_nothing(tmp_path: Path, copy: str) -> None:
    with opened(tmp_path) as log:
        append_durably(log, [b"record 1"])
    path = tmp_path / copy
    path.write_bytes(path.read_bytes().replace(b'"epoch":1', b'"epoch":0'))
    with opened(tmp_path) as log:
        assert (log.epoch, log.prior(2), log.ends("event")) == (2, 1, [(1, 1)])


def test_a_tally_of_which_no_copy_proves_itself_is_refused_because_ids_could_repeat(
    tmp_path: Path,
) -> None:
    opened(tmp_path).close()
    for path in tmp_path.glob("tally.*"):
        path.write_bytes(path.read_bytes().replace(b'"epoch":1', b'"epoch":0'))
    with pytest.raises(ConfigError) as refused:
        opened(tmp_path)
    assert refused.value.code == "log_unusable"


def test_a_missing_tally_is_refused_where_there_are_segments(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        append_durably(log, [b"record 1"])
    for path in tmp_path.glob("tally.*"):
        path.unlink()
    with pytest.raises(ConfigError) as refused:
        opened(tmp_path)
    assert refused.value.code == "log_unusable"
    assert segments(tmp_path)


def test_a_tally_of_a_later_format_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    for path in tmp_path.glob("tally.*"):
        body = b'{"version":2,"anything":{}}'
        path.write_bytes(b"%08x\n%s" % (zlib.crc32(body), body))
    with pytest.raises(ConfigError) as refused:
        opened(tmp_path)
    assert refused.value.code == "log_version"


def test_a_log_of_an_earlier_release_is_taken_over(tmp_path: Path) -> None:
    crash = crashed(tmp_path, numbered(1, 5), numbered(6, 9))
    for path in crash.glob("tally.*"):
        path.unlink()
    for path, data in EARLIER.items():
        (crash / path).write_bytes(data)
    with opened(crash, device="EWR") as log:
        assert (log.epoch, log.prior(4), log.prior(3), log.prior(2)) == (4, 3, 2, 1)
        assert log.ends("event") == [(1, 9), (2, 7), (3, 0)]
        assert delivered(log, 1) == list(enumerate(numbered(1, 9), 1))
        assert log.owed("event") == [(1, 9)]  # of epoch 2 no segment is left: it was learned
        assert not (crash / "epoch").exists()
    with opened(crash) as log:
        assert log.ends("event") == [(1, 9), (2, 7), (3, 0), (4, 0)]


def test_a_log_that_an_earlier_release_wrote_is_read_whole(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "log-1", tmp_path / "log")
    for _ in range(2):
        with opened(tmp_path / "log") as log:
            assert log.ends("event")[:3] == [(1, 10), (2, 20), (3, 20)]
            assert log.owed("event") == [(2, 20), (3, 20)]  # the learner held epoch 1
            assert log.owed("label") == [(1, 1), (2, 1), (3, 1)]
            for epoch in (2, 3):
                expected = [(seq, b"event %d of epoch %d" % (seq, epoch)) for seq in range(1, 21)]
                trimmed = 10 if epoch == 3 else 0
                told = delivered(log, epoch)
                assert told[trimmed:] == expected[trimmed:]
                assert told[:trimmed] == [(seq, "trimmed") for seq in range(1, trimmed + 1)]
            assert delivered(log, 1) == [(seq, "trimmed") for seq in range(1, 11)]


def earlier(epoch: int, ends: str) -> bytes:
    body = b'{"epoch":%d,"ends":%s}' % (epoch, ends.encode())
    return b"%08x\n%s" % (zlib.crc32(body), body)


EARLIER = {"epoch": earlier(3, '[[1,"event",9],[1,"label",0],[2,"event",7],[2,"label",0]]')}


def test_epochs_rise_by_random_steps(tmp_path: Path) -> None:
    epochs = []
    for _ in range(5):
        with EventLog(tmp_path, device="EWR") as log:
            epochs.append(log.epoch)
            assert log.prior(log.epoch) == (epochs[-2] if len(epochs) > 1 else 0)
    steps = [after - before for before, after in pairwise([0, *epochs])]
    assert all(1 <= step <= STEP_MAX for step in steps)
    assert len(set(steps)) > 1


def test_only_what_is_owed_and_the_newest_epochs_are_remembered(tmp_path: Path) -> None:
    with opened(tmp_path, files=Hasty()) as log:
        append_durably(log, [b"owed"])
    for _ in range(EPOCHS_KEPT + 10):
        opened(tmp_path, files=Hasty()).close()
    with opened(tmp_path, files=Hasty()) as log:
        assert log.owed("event") == [(1, 1)]
        assert len(log.ends("event")) == EPOCHS_KEPT
        assert log.ends("event")[0] == (1, 1)
        assert delivered(log, 1) == [(1, b"owed")]
        assert log.prior(log.epoch) == log.epoch - 1


def test_a_closed_log_refuses_and_tells_who_waits(tmp_path: Path, bad_disk) -> None:
    log = opened(tmp_path, files=bad_disk)

    async def close_under_a_waiter() -> None:
        bad_disk.failures = 1_000_000
        waiter = asyncio.ensure_future(log.wait_durable("event", log.append("event", b"a")))
        await asyncio.sleep(0)
        with pytest.raises(CapacityError, match="log_not_durable"):
            await asyncio.to_thread(log.close)
        with pytest.raises(CapacityError, match="log_closed"):
            await waiter

    asyncio.run(close_under_a_waiter())
    with pytest.raises(CapacityError) as refused:
        log.append("event", b"b")
    assert refused.value.code == "log_closed"
    log.close()


def crashed(directory: Path, *groups: list[bytes], **settings: object) -> Path:
    """A copy of what a log that made `groups` durable has on its disk, while it is still open."""
    live, copy = directory / "live", directory / "crashed"
    with opened(live, **settings) as log:
        for group in groups:
            append_durably(log, group)
        shutil.copytree(live, copy)
    return copy


def content(path: Path) -> bytes:
    """A segment without the zeros that are still to be written."""
    return path.read_bytes().rstrip(b"\0")


def cut_middle_of_last_frame(data: bytes) -> bytes:
    return data[:-5]


def cut_inside_frame_header(data: bytes) -> bytes:
    return data[: data.rindex(b"HWFR") + 9]


def flip_bit_of_last_frame(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 4]) + data[-2:]


def zeros_at_the_end_of_the_last_frame(data: bytes) -> bytes:
    return data[:-5] + bytes(5)


@pytest.mark.parametrize("zeros", [0, 1, 100_000])
@pytest.mark.parametrize(
    "tear",
    [
        cut_middle_of_last_frame,
        cut_inside_frame_header,
        flip_bit_of_last_frame,
        zeros_at_the_end_of_the_last_frame,
    ],
)
def test_a_torn_last_frame_is_cut_and_the_rest_kept(
    tmp_path: Path, tear: Callable[[bytes], bytes], zeros: int
) -> None:
    crash = crashed(tmp_path, numbered(1, 5), numbered(6, 9))
    path = segments(crash)[0]
    path.write_bytes(tear(content(path)) + bytes(zeros))
    with opened(crash) as log:
        assert log.epochs("event") == [(1, 1, 5)]
        assert log.ends("event") == [(1, 5)]
        assert log.statistics()["cut_bytes"] > 0
        append_durably(log, [b"next"])
        assert everything(log)[-2:] == [(1, 5, b"record 5"), (2, 1, b"next")]
    with opened(crash) as log:
        assert log.statistics()["cut_bytes"] == 0


@pytest.mark.parametrize(
    "garbage",
    [b"\1", b"HWFR", b"HWFR" + bytes(4096) + b"x", random.Random(1).randbytes(5000) + b"x"],
)
def test_garbage_at_the_tail_is_cut(tmp_path: Path, garbage: bytes) -> None:
    crash = crashed(tmp_path, numbered(1, 5))
    path = segments(crash)[0]
    path.write_bytes(content(path) + garbage)
    with opened(crash) as log:
        assert log.statistics()["cut_bytes"] == len(garbage)
        assert [seq for _, seq, _ in everything(log)] == [1, 2, 3, 4, 5]


def test_a_copy_of_an_older_frame_at_the_tail_is_not_taken_for_new(tmp_path: Path) -> None:
    crash = crashed(tmp_path, numbered(1, 5), numbered(6, 9))
    path = segments(crash)[0]
    data = content(path)
    first_frame = data[data.index(b"HWFR") : data.rindex(b"HWFR")]
    path.write_bytes(data + first_frame)
    with opened(crash) as log:
        assert [seq for _, seq, _ in everything(log)] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_segment_torn_before_its_first_frame_is_removed(tmp_path: Path) -> None:
    crash = crashed(tmp_path, numbered(1, 5))
    following = segment.new(crash, "EWR", "event", 1, 6)
    header = segment.encode_header(following)
    for number, torn in enumerate((b"", header[:40], header, header + b"HWFR", bytes(9000))):
        copy = tmp_path / f"{number}"
        shutil.copytree(crash, copy)
        (copy / following.path.name).write_bytes(torn)
        with opened(copy) as log:
            assert [seq for _, seq, _ in everything(log)] == [1, 2, 3, 4, 5]
            assert log.ends("event") == [(1, 5)]
            assert log.statistics()["bad_headers"] == 0
        assert len(segments(copy)) == 1


def test_a_segment_of_a_later_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        append_durably(log, [b"a"])
    path = segments(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[4:6] = (2).to_bytes(2, "little")
    data[88:92] = crc32(data[:88])
    path.write_bytes(data)
    with pytest.raises(ConfigError) as refused:
        opened(tmp_path)
    assert refused.value.code == "log_version"
    assert path.read_bytes() == data


def crc32(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")
