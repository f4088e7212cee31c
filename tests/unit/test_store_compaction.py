"""Compaction: small files become one; at no step does a reader see an example twice, or not."""

from __future__ import annotations

import errno
import importlib.util
import os
import struct
from concurrent.futures import ThreadPoolExecutor

import duckdb
import pytest

from cloud_learner.store import compaction
from cloud_learner.store.archive import Archive
from cloud_learner.store.examples import Example
from edge_runtime.errors import CapacityError, ConfigError
from edge_runtime.wire.messages import Scored

DAY_S = 86_400.0
SETTLING = ["linked", "exchanged", "settled", "removed"]
PREPARING = ["folder made", "merged", "prepared"]


class Crash(BaseException):
    """The process dies here: no handler of ours catches it."""


def example(seq, day=0, family="fam"):
    scored = [Scored("r1", "stable", [seq / 1000])]
    features = struct.pack("<2f", seq, 0.0)
    time_s = day * DAY_S + seq
    return Example(
        "EWR", 1, seq, family, time_s, time_s, features, "spec", 1.0, 1.0, scored, 0.0, 0.0
    )


class Learner:
    """An archive, and the transactions that name its files."""

    def __init__(self, folder, **options):
        self.folder, self.names, self.commits = folder, set(), 0
        self.archive = Archive(folder, **options)
        self.archive.adopt(self.names)

    def commit(self, *examples):
        self.commits += 1
        self.names |= set(self.archive.write(examples, self.commits))

    def compact(self, between=lambda: None):
        """A whole compaction; `between` runs after its transaction."""
        done = self.archive.compact(self.names, self.commits)
        if done is not None:
            self.name(done)
            between()
            self.archive.settle(done)
        return done

    def name(self, done):
        self.names = self.names - set(done.gone) | {done.new}

    def restart(self, **options):
        self.archive = Archive(self.folder, **options)
        return self.archive.adopt(self.names)

    def seqs(self, names=None):
        found = self.archive.query("SELECT seq FROM examples ORDER BY seq", names).fetchall()
        return [seq for (seq,) in found]


def globbed(folder):
    """What DuckDB and Polars see in the folder as it is."""
    sql = "SELECT seq FROM read_parquet(?) ORDER BY seq"
    seen = [seq for (seq,) in duckdb.execute(sql, [f"{folder}/**/*.parquet"]).fetchall()]
    if importlib.util.find_spec("polars"):
        import polars as pl

        for source in (folder, folder / "**" / "*.parquet"):
            assert pl.scan_parquet(source).collect()["seq"].sort().to_list() == seen
    return seen


def below(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def filled(folder, **options):
    """Three files of one day and one of the next; and the numbers in them."""
    learner = Learner(folder, **options)
    for seq in range(0, 9, 3):
        learner.commit(*(example(each) for each in range(seq, seq + 3)))
    learner.commit(example(9, day=1))
    return learner, list(range(10))


def test_the_files_of_a_day_that_is_over_become_one(tmp_path):
    learner, all_seqs = filled(tmp_path / "archive")
    done = learner.compact()
    assert done.new == "family=fam/day=1970-01-01/000000000004-day.parquet"
    assert len(done.gone) == 3
    assert below(tmp_path / "archive") == sorted(learner.names)
    assert len(learner.names) == 2
    assert learner.seqs() == learner.seqs(learner.names) == all_seqs == globbed(learner.folder)
    assert below(tmp_path / ".archive.unfinished") == []
    in_order = learner.archive.query("SELECT seq FROM examples", [done.new]).fetchall()
    assert in_order == [(seq,) for seq in range(9)]


def test_the_newest_day_of_each_family_is_left_alone(tmp_path):
    learner = Learner(tmp_path / "archive")
    for seq in range(4):
        learner.commit(example(seq), example(seq + 10, day=5, family="other"))
    assert learner.compact() is None
    learner.commit(example(4, day=1))
    assert learner.compact().new.startswith("family=fam/day=1970-01-01/")
    assert learner.compact() is None


def test_days_come_one_at_a_time_the_oldest_first(tmp_path):
    learner = Learner(tmp_path / "archive")
    for day in (2, 0, 1):
        for seq in range(2):
            learner.commit(example(10 * day + seq, day))
    days = [learner.compact().new.split("/")[1] for _ in range(2)]
    assert days == ["day=1970-01-01", "day=1970-01-02"]
    assert learner.compact() is None
    assert globbed(learner.folder) == [0, 1, 10, 11, 20, 21]


def test_a_late_example_waits_until_rewriting_its_day_is_worth_it(tmp_path):
    learner = Learner(tmp_path / "archive")
    learner.commit(*(example(seq) for seq in range(5000)))
    learner.commit(*(example(seq) for seq in range(5000, 9000)))
    learner.commit(example(9000, day=1))
    assert learner.compact() is not None
    late = 0
    while late < 200:
        late += 1
        learner.commit(example(10_000 + late))
        if learner.compact() is not None:
            break
    assert 3 < late <= compaction.FILES_MAX
    assert len(globbed(learner.folder)) == 9001 + late


def test_nothing_to_compact_is_none(tmp_path):
    learner = Learner(tmp_path / "archive")
    assert learner.compact() is None
    learner.commit(example(1))
    learner.commit(example(2, day=1))
    assert learner.compact() is None


def test_readers_see_each_example_once_at_every_step(tmp_path):
    folder, steps = tmp_path / "archive", []

    def look(step):
        if step in PREPARING + SETTLING:
            assert globbed(folder) == list(range(10)), step
            steps.append(step)

    learner, all_seqs = filled(folder)
    learner.restart(at=look)
    learner.compact(between=lambda: steps.append(learner.seqs(learner.names)))
    assert steps == [*PREPARING, all_seqs, *SETTLING]


@pytest.mark.parametrize("with_late", [False, True], ids=["alone", "beside a late example"])
@pytest.mark.parametrize("last", [*PREPARING, "named", *SETTLING])
def test_a_crash_after_any_step_leaves_each_example_once(tmp_path, last, with_late):
    folder = tmp_path / "archive"

    def crash(step):
        if step == last:
            raise Crash(step)

    def between():
        if with_late:
            learner.commit(example(100))
            all_seqs.append(100)
        crash("named")

    learner, all_seqs = filled(folder)
    learner.restart(at=crash)
    with pytest.raises(Crash):
        learner.compact(between)
    assert globbed(folder) == all_seqs
    assert learner.seqs(learner.names) == all_seqs

    assert learner.restart() == []

    assert globbed(folder) == all_seqs == learner.seqs(learner.names)
    assert below(folder) == sorted(learner.names)
    assert below(tmp_path / ".archive.unfinished") == []
    while learner.compact() is not None:
        pass
    assert globbed(folder) == all_seqs == learner.seqs(learner.names)
    assert len(learner.names) == 2


@pytest.mark.parametrize("last", ["written", "synced", "place made", "renamed"])
def test_a_crash_while_writing_leaves_whole_files_and_then_none_of_the_commit(tmp_path, last):
    folder = tmp_path / "archive"
    learner, all_seqs = filled(folder)
    seen = []

    def crash(step):
        seen.append(step)
        if step == last and seen.count(step) == 2:
            raise Crash(step)

    learner.restart(at=crash)
    with pytest.raises(Crash):
        learner.commit(example(50), example(51, day=1))
    assert globbed(folder) in ([*all_seqs, 50], [*all_seqs, 50, 51])
    learner.restart()
    assert globbed(folder) == all_seqs
    assert below(tmp_path / ".archive.unfinished") == []
    learner.commit(example(50), example(51, day=1))
    assert globbed(folder) == [*all_seqs, 50, 51]


def test_adopting_finishes_a_compaction_and_removes_what_was_written_beside_it(tmp_path):
    learner, all_seqs = filled(tmp_path / "archive")
    learner.name(learner.archive.compact(learner.names, 4))
    learner.archive.write([example(70), example(71, day=1)], 5)
    assert learner.restart() == ["family=fam/day=1970-01-02/000000000005.parquet"]
    assert globbed(learner.folder) == all_seqs
    assert below(learner.folder) == sorted(learner.names)


def test_a_day_whose_new_file_is_lost_before_it_is_shown_is_an_error_and_stays(tmp_path):
    learner, all_seqs = filled(tmp_path / "archive")
    done = learner.archive.compact(learner.names, 4)
    learner.name(done)
    (tmp_path / ".archive.unfinished" / done.new).unlink()
    with pytest.raises(ConfigError) as caught:
        learner.restart()
    assert caught.value.code == "archive_incomplete"
    assert globbed(learner.folder) == all_seqs


def test_settling_again_changes_nothing(tmp_path):
    learner, all_seqs = filled(tmp_path / "archive")
    done = learner.compact()
    learner.archive.settle(done)
    assert globbed(learner.folder) == all_seqs
    assert below(learner.folder) == sorted(learner.names)


def test_where_folders_cannot_be_exchanged_the_small_files_stay_and_it_is_counted(tmp_path):
    def refuse(one, _other):
        raise OSError(errno.EINVAL, "not here", str(one))

    learner, all_seqs = filled(tmp_path / "archive", swap=refuse)
    assert learner.compact() is None
    assert learner.archive.statistics()["archive_compaction_refused"] == 1
    assert globbed(learner.folder) == all_seqs
    assert below(learner.folder) == sorted(learner.names)


def test_a_disk_that_fails_in_the_exchange_is_an_error_and_the_next_start_finishes(tmp_path):
    fails = []

    def swap(one, other):
        if fails and one.name != ".exchange":
            raise OSError(errno.ENOSPC, "full", str(one))
        compaction.exchange(one, other)

    learner, all_seqs = filled(tmp_path / "archive", swap=swap)
    fails.append(True)
    with pytest.raises(CapacityError) as caught:
        learner.compact()
    assert caught.value.code == "disk_full"
    assert learner.seqs(learner.names) == all_seqs == globbed(learner.folder)
    with pytest.raises(CapacityError):
        learner.restart(swap=swap)
    assert globbed(learner.folder) == all_seqs
    fails.clear()
    learner.restart(swap=swap)
    assert globbed(learner.folder) == all_seqs
    assert below(learner.folder) == sorted(learner.names)


def test_a_damaged_file_is_not_merged_and_nothing_is_lost_of_the_others(tmp_path):
    learner, _ = filled(tmp_path / "archive")
    damaged = tmp_path / "archive" / min(learner.names)
    damaged.write_bytes(damaged.read_bytes()[:-20])
    before = below(tmp_path / "archive")
    with pytest.raises(CapacityError, match="not compacted"):
        learner.compact()
    assert below(tmp_path / "archive") == before
    assert below(tmp_path / ".archive.unfinished") == []


def test_an_exchange_is_never_seen_half_done(tmp_path):
    shown, hidden = tmp_path / "shown", tmp_path / "hidden"
    for folder in (shown, hidden):
        folder.mkdir()
        (folder / folder.name).touch()
    seen = []
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(lambda: [compaction.exchange(shown, hidden) for _ in range(4000)])
        while not work.done():
            seen += [os.listdir(shown), os.listdir(hidden)]
        work.result()
    assert all(len(names) == 1 for names in seen)
    assert {name for names in seen for name in names} == {"shown", "hidden"}


def test_an_exchange_that_is_refused_changes_nothing(tmp_path):
    shown = tmp_path / "shown"
    shown.mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        compaction.exchange(shown, tmp_path / "absent")
    assert caught.value.filename == str(shown)
    assert os.listdir(tmp_path) == ["shown"]
