"""The journal: when windows are worth a snapshot, and what nobody reads is given back."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec
import pytest

from edge_runtime.config import EdgeConfig, LogConfig
from edge_runtime.events.journal import SNAPSHOT_EVERY, Journal
from edge_runtime.wire.messages import LabelRecord, ObservationRecord


@pytest.fixture
def config(tmp_path):
    return EdgeConfig(
        device="EWR",
        families=["toy"],
        state_dir=tmp_path / "state",
        socket=tmp_path / "edge.sock",
        log=LogConfig(bytes_max_mb=32),
    )


@pytest.fixture
def open_journal(config):
    opened = []

    def open_journal(**changes):
        states = {"toy": b""}
        journal = Journal(
            msgspec.structs.replace(config, **changes), lambda: dict(states), step=lambda: 1
        )
        journal.start()
        opened.append(journal)
        return journal, states

    yield open_journal
    for journal in opened:
        journal.close()


def record(size=0):
    return ObservationRecord("toy", "departed", 1.0, {"text": "x" * size})


def settle(journal):
    """Wait until what was logged is durable and the commit thread has done all that follows."""
    for _ in range(2):  # the second is committed after the first was followed up
        seq = journal.label(LabelRecord("toy", 1, 1, 1.0, 1.0))
        asyncio.run(journal.log.wait_durable("label", seq))


def written(journal):
    return journal.statistics()["snapshots"]["written"]


def test_an_id_names_the_device_the_epoch_and_the_number(open_journal):
    journal, _ = open_journal()
    assert (journal.next_seq(), journal.event(record()), journal.next_seq()) == (1, 1, 2)
    assert journal.id_of(1) == "EWR.1.1"
    journal.close()
    journal, _ = open_journal()
    assert journal.id_of(journal.next_seq()) == "EWR.2.1"


def test_a_snapshot_is_written_once_so_many_events_have_moved_the_windows(open_journal):
    journal, states = open_journal()
    for _ in range(SNAPSHOT_EVERY - 1):
        journal.event(record())
        journal.moved()
    settle(journal)
    assert written(journal) == 0
    journal.event(record())
    states["toy"] = b"as of here"
    journal.moved()
    states["toy"] = b"later"
    settle(journal)
    assert written(journal) == 1
    snapshot = journal.snapshots.load()
    assert (snapshot.epoch, snapshot.seq) == (1, SNAPSHOT_EVERY) == journal.snapshots.floor
    assert snapshot.families == {"toy": b"as of here"}


def test_many_at_once_count_as_many(open_journal):
    journal, _ = open_journal()
    for _ in range(2):
        journal.event(record())
        journal.moved(SNAPSHOT_EVERY // 2)
    settle(journal)
    assert journal.snapshots.floor == (1, 2)


def test_what_changed_what_is_kept_brings_the_next_snapshot_forward(open_journal):
    journal, _ = open_journal()
    journal.hasten_snapshot()
    for _ in range(3):
        journal.event(record())
        journal.moved()
    settle(journal)
    assert journal.snapshots.floor == (1, 1)


def test_large_records_bring_a_snapshot_before_they_fill_the_log(open_journal):
    journal, _ = open_journal()
    for _ in range(12):
        journal.event(record(500_000))
        journal.moved()
        settle(journal)
    assert written(journal) >= 1


def test_a_snapshot_never_stands_before_what_it_knows_is_durable(open_journal):
    journal, _ = open_journal()
    seen = []
    journal.on_commit = lambda: seen.append((journal.snapshots.floor, journal.log.durable("event")))
    for _ in range(2 * SNAPSHOT_EVERY):
        journal.event(record())
        journal.moved()
    settle(journal)
    assert seen
    assert all(floor <= durable for floor, durable in seen)


def test_close_leaves_a_snapshot_of_everything(open_journal):
    journal, states = open_journal()
    for _ in range(3):
        journal.event(record())
    states["toy"] = b"the end"
    journal.close()
    assert journal.snapshots.load().families == {"toy": b"the end"}
    assert journal.snapshots.floor == (1, 3)


def test_without_a_learner_the_log_gives_back_what_the_windows_no_longer_need(
    open_journal, tmp_path
):
    journal, _ = open_journal(package=tmp_path / "model.onnx")
    for number in range(160):  # 80 MB into a log of 32
        journal.event(record(500_000))
        journal.moved()
        if number % 4 == 0:
            settle(journal)
    settle(journal)
    assert journal.statistics()["log"]["bytes"] < 32 << 20
    assert journal.log.handed_out("event") == 160


def test_with_a_learner_nothing_is_given_back_unasked(open_journal):
    journal, _ = open_journal()
    for number in range(50):  # 25 MB into a log of 32
        journal.event(record(500_000))
        journal.moved()
        if number % 4 == 0:
            settle(journal)
    settle(journal)
    assert len(list(journal.log.tail("event", 0, 0))) == journal.log.handed_out("event")


def test_what_cannot_be_given_back_stays_and_the_log_goes_on(open_journal, tmp_path):
    journal, _ = open_journal(package=tmp_path / "model.onnx")

    async def fill(count):
        async with asyncio.timeout(30):
            for _ in range(count):
                seq = journal.event(record(500_000))
                journal.moved()
                await journal.log.wait_durable("event", seq)

    asyncio.run(fill(1))
    [first] = journal.log.directory.glob("event*")
    first.unlink()
    (first / "in the way").mkdir(parents=True)
    asyncio.run(fill(40))
    settle(journal)
    assert journal.snapshots.floor > (1, 1)  # what comes first in the log is needed no more
    assert (first / "in the way").exists()
    assert journal.log.durable("event")[1] == 41


def test_a_disk_that_takes_no_tally_stops_no_commit_and_is_tried_again(open_journal):
    journal, _ = open_journal(package=Path("model.onnx"))

    def fill(count):
        for _ in range(count):
            seq = journal.event(record(500_000))
            journal.moved()
            asyncio.run(asyncio.wait_for(journal.log.wait_durable("event", seq), 5))
        settle(journal)

    in_the_way = journal.log.directory / f".tally.a.{os.getpid()}.tmp"
    (in_the_way / "x").mkdir(parents=True)
    fill(20)
    assert journal.snapshots.floor > (1, 9)
    assert journal.log.epochs("event") == [(1, 1, 20)]
    (in_the_way / "x").rmdir()
    in_the_way.rmdir()
    fill(20)
    assert journal.log.epochs("event")[0][1] > 20
