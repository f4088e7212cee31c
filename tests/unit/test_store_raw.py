"""The raw log: what came is given back byte for byte, but for the stretch that is damaged."""

from __future__ import annotations

import contextlib
import os
import random
import resource

import pytest

from cloud_learner.store import raw_frames
from cloud_learner.store.raw import Position, RawLog, RawMessage
from edge_runtime.errors import CapacityError

DAY_S = 86_400.0


def message(number, arrived_s=0.0, size=50):
    data = random.Random(number).randbytes(size)
    encoding = "deflate" if number % 2 else ""
    return RawMessage(f"hw.events.d{number}", encoding, data, arrived_s or float(number))


def messages(*numbers):
    return [message(number) for number in numbers]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def replayed(folder, since_s=float("-inf")):
    """What a fresh consumer is given, and what was counted."""
    log = RawLog(folder)
    return list(log.replay(since_s)), log.statistics()


def test_messages_come_back_as_they_came_in_order(tmp_path):
    log = RawLog(tmp_path)
    log.append(messages(1, 2))
    log.append(messages(3))
    assert list(log.replay()) == messages(1, 2, 3)
    found, counts = replayed(tmp_path)
    assert found == messages(1, 2, 3)
    assert counts["raw_files"] == 1
    assert "raw_damaged_stretches" not in counts


def test_a_position_is_the_end_of_an_append(tmp_path):
    log = RawLog(tmp_path)
    first = log.append(messages(1))
    assert first == Position(1, (tmp_path / "000000000001.raw").stat().st_size)
    second = log.append(messages(2))
    assert second == Position(1, (tmp_path / "000000000001.raw").stat().st_size) > first


def test_a_full_file_is_followed_by_the_next(tmp_path):
    log = RawLog(tmp_path, file_bytes=200)
    positions = [log.append(messages(number, number + 1)) for number in range(1, 9, 2)]
    assert [position.file for position in positions] == [1, 2, 3, 4]
    assert list(log.replay()) == messages(*range(1, 9))


def test_a_start_never_appends_to_an_old_file(tmp_path):
    position = RawLog(tmp_path).append(messages(1))
    log = RawLog(tmp_path)
    log.adopt(position)
    assert log.append(messages(2)).file == 2
    assert replayed(tmp_path)[0] == messages(1, 2)


def test_adopting_cuts_what_no_transaction_names(tmp_path):
    log = RawLog(tmp_path, file_bytes=200)
    log.append(messages(1))
    named = log.append(messages(2))
    log.append(messages(3))
    log.append(messages(4))
    assert len(files(tmp_path)) == 2
    log = RawLog(tmp_path)
    log.adopt(named)
    assert files(tmp_path) == ["000000000001.raw"]
    assert list(log.replay()) == messages(1, 2)
    log.append(messages(5))
    assert replayed(tmp_path)[0] == messages(1, 2, 5)


def test_where_nothing_is_named_the_files_are_set_aside_and_can_be_brought_back(tmp_path):
    RawLog(tmp_path).append(messages(1))
    log = RawLog(tmp_path)
    log.adopt(None)
    assert list(log.replay()) == []
    assert log.statistics()["raw_files_aside"] == 1
    log.append(messages(2))
    RawLog(tmp_path).adopt(None)  # a second database is lost
    assert replayed(tmp_path / "aside-1")[0] == messages(1)
    assert replayed(tmp_path / "aside-2")[0] == messages(2)


def test_what_is_named_and_gone_is_counted_and_stops_nobody(tmp_path):
    log = RawLog(tmp_path)
    end = log.append(messages(1))
    log.adopt(Position(end.file, end.offset + 7))
    assert log.statistics()["raw_bytes_missing"] == 7
    log.adopt(Position(9, 100))
    assert log.statistics()["raw_bytes_missing"] == 107
    assert log.append(messages(2)).file == 10
    assert list(log.replay()) == messages(1, 2)


def test_replay_begins_at_a_time_of_arrival(tmp_path):
    log = RawLog(tmp_path, file_bytes=1)
    for number in range(1, 6):
        log.append(messages(number))
    assert list(log.replay(3.0)) == messages(3, 4, 5)
    assert replayed(tmp_path, since_s=3.5)[0] == messages(4, 5)


def test_a_replay_ends_at_what_was_whole_when_it_began(tmp_path):
    log = RawLog(tmp_path)
    log.append(messages(1, 2))
    replay = log.replay()
    assert next(replay) == message(1)
    log.append(messages(3))
    assert list(replay) == messages(2)


def test_files_expire_by_the_arrival_of_their_newest_message_but_never_the_current(tmp_path):
    log = RawLog(tmp_path, keep_s=7 * DAY_S, file_bytes=1)
    for number, arrived_s in enumerate((3 * DAY_S, 1 * DAY_S, 2 * DAY_S), start=1):
        log.append([message(number, arrived_s)])
    assert log.expire(8 * DAY_S) == 0
    assert log.expire(9.5 * DAY_S) == 1  # the second; the third is the current one
    assert files(tmp_path) == ["000000000001.raw", "000000000003.raw"]
    log.append([message(4, 99 * DAY_S)])
    assert log.expire(10.5 * DAY_S) == 2
    assert log.expire(1000 * DAY_S) == 0
    assert log.statistics()["raw_files_expired"] == 3
    assert list(log.replay()) == [message(4, 99 * DAY_S)]


def test_a_start_knows_from_the_heads_when_files_expire(tmp_path):
    log = RawLog(tmp_path, file_bytes=1)
    for number in range(1, 4):
        log.append([message(number, number * DAY_S)])
    for name in files(tmp_path)[:2]:  # nothing but the head is read of files that are followed
        path = tmp_path / name
        data = path.read_bytes()
        path.write_bytes(data[: raw_frames.HEAD_SIZE] + bytes(len(data) - raw_frames.HEAD_SIZE))
    log = RawLog(tmp_path, keep_s=DAY_S)
    assert log.expire(2.5 * DAY_S) == 1
    assert files(tmp_path) == ["000000000002.raw", "000000000003.raw"]


def test_what_was_set_aside_expires_by_when_it_was_written(tmp_path):
    RawLog(tmp_path).append(messages(1))
    log = RawLog(tmp_path, keep_s=DAY_S)
    log.adopt(None)
    written_s = (tmp_path / "aside-1" / "000000000001.raw").stat().st_mtime
    assert log.expire(written_s + 0.9 * DAY_S) == 0
    assert log.expire(written_s + 1.1 * DAY_S) == 1
    assert files(tmp_path / "aside-1") == []


def test_every_torn_tail_gives_the_whole_messages_before_it(tmp_path):
    log = RawLog(tmp_path / "whole")
    ends = [log.append(messages(number)).offset for number in range(1, 4)]
    data = (tmp_path / "whole" / "000000000001.raw").read_bytes()
    torn = tmp_path / "torn"
    torn.mkdir()
    for size in range(len(data) + 1):
        (torn / "000000000001.raw").write_bytes(data[:size])
        found, counts = replayed(torn)
        whole = sum(end <= size for end in ends)
        assert found == messages(*range(1, whole + 1)), size
        is_torn = size not in {0, raw_frames.HEAD_SIZE, *ends}
        assert counts.get("raw_damaged_stretches", 0) == is_torn, size


def test_every_flipped_bit_costs_one_message_at_most(tmp_path):
    log = RawLog(tmp_path)
    for number in range(1, 4):
        log.append([message(number, size=8)])
    path = tmp_path / "000000000001.raw"
    data = path.read_bytes()
    expected = list(log.replay())
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        found, counts = replayed(tmp_path)
        missing = 0 if bit < 8 * raw_frames.HEAD_SIZE else 1
        assert len(found) == 3 - missing, bit
        assert [each for each in expected if each in found] == found, bit
        assert counts["raw_damaged_stretches"] == 1, bit


def test_bytes_of_a_device_never_look_like_a_frame_even_if_what_holds_them_is_damaged(tmp_path):
    other = RawLog(tmp_path / "other")
    other.append([RawMessage("hw.events.victim", "", b"forged", 1.0)])
    forged = (tmp_path / "other" / "000000000001.raw").read_bytes()
    log = RawLog(tmp_path / "log")
    log.append([message(1), RawMessage("hw.events.hostile", "", forged * 3, 2.0), message(3)])
    path = tmp_path / "log" / "000000000001.raw"
    data = bytearray(path.read_bytes())
    data[data.index(b"hostile")] ^= 1
    path.write_bytes(data)
    found, counts = replayed(tmp_path / "log")
    assert found == messages(1, 3)
    assert counts["raw_damaged_stretches"] == 1


def test_a_head_that_is_gone_costs_no_message(tmp_path):
    RawLog(tmp_path).append(messages(1, 2))
    path = tmp_path / "000000000001.raw"
    data = path.read_bytes()
    path.write_bytes(bytes(raw_frames.HEAD_SIZE) + data[raw_frames.HEAD_SIZE :])
    assert replayed(tmp_path)[0] == messages(1, 2)


def test_random_rot_never_raises_and_never_makes_up_a_message(tmp_path):
    seed = 11
    log = RawLog(tmp_path)
    log.append(messages(*range(40)))
    path = tmp_path / "000000000001.raw"
    data = path.read_bytes()
    chance = random.Random(seed)
    for turn in range(200):
        damaged = bytearray(data)
        at = chance.randrange(len(data))
        size = chance.randrange(1, 400)
        match turn % 3:
            case 0:
                del damaged[at : at + size]
            case 1:
                damaged[at:at] = chance.randbytes(size)
            case _:
                damaged[at : at + size] = bytes(size)
        path.write_bytes(damaged)
        found, _ = replayed(tmp_path)
        assert [each for each in messages(*range(40)) if each in found] == found, (seed, turn)
        assert len(found) >= 40 - 2 - size // 50, (seed, turn)


@contextlib.contextmanager
def no_larger_than(size):
    """In here writing beyond `size` of a file fails with EFBIG, after what fits."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("is_first", [True, False], ids=["of a file", "in a file"])
def test_a_write_that_fails_half_way_is_cut_and_the_next_goes_to_a_new_file(tmp_path, is_first):
    log = RawLog(tmp_path)
    if not is_first:
        log.append(messages(1, 2))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for _ in range(2):
        with no_larger_than(300), pytest.raises(CapacityError) as caught:
            log.append(messages(*range(3, 20)))
        assert caught.value.code == "disk_full"
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    end = log.append(messages(3))
    assert end.file == (1 if is_first else 2)
    assert list(log.replay()) == (messages(3) if is_first else messages(1, 2, 3))
    assert replayed(tmp_path)[0] == list(log.replay())


def test_what_cannot_be_cut_is_cut_before_the_next_append(tmp_path):
    log = RawLog(tmp_path)
    log.append(messages(1))
    path = tmp_path / "000000000001.raw"
    moved = tmp_path / "moved"

    class Unlucky(list):
        """The file goes away while the messages are on their way."""

        def __iter__(self):
            if path.exists():
                path.rename(moved)
            return super().__iter__()

    for _ in range(2):
        with no_larger_than(300), pytest.raises(CapacityError):
            log.append(Unlucky(messages(*range(2, 20))))
    moved.rename(path)
    assert len(path.read_bytes()) == 300
    assert list(log.replay()) == messages(1)
    log.append(messages(2))
    assert replayed(tmp_path) == (
        messages(1, 2),
        {"raw_files": 2, "raw_bytes": sum(os.path.getsize(p) for p in tmp_path.iterdir())},
    )
