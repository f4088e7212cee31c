"""SIGKILL at seeded random points of what the learner stores: examples and raw envelopes.

The child commits, compacts and says each step; the parent reads the folder as it is while the child
works, kills it after a random number of steps, and looks at what is left. Or strace kills it as it
enters the n-th of the system calls that change the disk.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from cloud_learner.store.archive import Archive
from cloud_learner.store.raw import Position, RawLog

_CHILD = '''
import json
import struct
import sys
from pathlib import Path

from cloud_learner.store.archive import Archive
from cloud_learner.store.examples import Example
from cloud_learner.store.raw import Position, RawLog, RawMessage
from edge_runtime.files import write_atomic
from edge_runtime.wire.messages import Scored

DAY_S = 86_400.0


def say(step):
    sys.stdout.write(step + "\\n")
    sys.stdout.flush()


def examples(commit):
    """Five examples: four of a day that lasts six commits, one that is late by two days."""
    for at in range(5):
        seq, day = 5 * commit + at, max(0, commit // 6 - (2 if at == 4 else 0))
        scored, features = [Scored("r1", "stable", [0.5])], struct.pack("<2f", seq, 1.0)
        time_s = DAY_S * day + seq
        values = (features, "spec", 1.0, 1.0, scored, 0.0, 0.0)
        yield Example("EWR", 1, seq, "fam", time_s, time_s, *values)


home = Path(sys.argv[1])
archive, raw = Archive(home / "archive", say), RawLog(home / "raw", file_bytes=2000)
path = home / "state.json"
state = json.loads(path.read_text()) if path.exists() else dict(commits=0, names=[], raw=None)
archive.adopt(state["names"])
raw.adopt(Position(*state["raw"]) if state["raw"] else None)
say("open")


def commit():
    number = state["commits"]
    messages = [RawMessage("s", "", b"%d" % (2 * number + at) * 50, number) for at in range(2)]
    state["raw"] = raw.append(messages)
    say("raw")
    state["names"] += archive.write(list(examples(number)), number + 1)
    state["commits"] += 1
    write_atomic(path, json.dumps(state).encode())  # the transaction
    say("commit")


while state["commits"] < int(sys.argv[2]):
    commit()
    if (done := archive.compact(state["names"], state["commits"])) is not None:
        state["names"] = sorted(set(state["names"]) - set(done.gone)) + [done.new]
        write_atomic(path, json.dumps(state).encode())
        say("named")
        commit()  # one that comes before the day is shown as one file
        archive.settle(done)
'''


def state_of(home: Path) -> dict:
    path = home / "state.json"
    if not path.exists():
        return {"commits": 0, "names": [], "raw": None}
    return json.loads(path.read_text())


def seen(home: Path) -> list[int]:
    """What a reader sees that knows nothing of us."""
    if not list(home.glob("archive/*/*/*.parquet")):
        return []
    sql = "SELECT seq FROM read_parquet(?) ORDER BY seq"
    while True:
        try:
            return [s for (s,) in duckdb.execute(sql, [f"{home}/archive/**/*.parquet"]).fetchall()]
        except duckdb.IOException as error:  # a day was compacted under its eyes
            if "No such file" not in str(error) and "No files found" not in str(error):
                raise


def check_seen(home: Path) -> None:
    """Each example at most once, and all that was committed before."""
    committed = 5 * state_of(home)["commits"]
    found = seen(home)
    assert len(set(found)) == len(found)
    assert set(range(committed)) <= set(found)


def _command(home: Path, commits: int) -> list[str]:
    return [sys.executable, "-c", _CHILD, str(home), str(commits)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def run_and_kill(home: Path, words: int) -> None:
    command = [*_command(home, commits=1_000_000)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=_environment()) as child:
        assert child.stdout is not None
        for word in range(words):
            assert child.stdout.readline(), "the child ended by itself"
            if word % 10 == 9:
                check_seen(home)
        child.kill()


def check(home: Path) -> int:
    """What is there after a kill, and after the next start; returns the number of commits."""
    check_seen(home)
    state = state_of(home)
    archive, raw = Archive(home / "archive"), RawLog(home / "raw", file_bytes=2000)
    archive.adopt(state["names"])
    raw.adopt(Position(*state["raw"]) if state["raw"] else None)
    assert seen(home) == list(range(5 * state["commits"]))
    replayed = [message.data for message in raw.replay()]
    assert replayed == [b"%d" % number * 50 for number in range(2 * state["commits"])]
    assert "raw_damaged_stretches" not in raw.statistics()
    assert raw.statistics()["raw_bytes_missing"] == 0
    assert [path for path in home.glob(".archive.unfinished/**/*") if path.is_file()] == []
    archive.close()
    return int(state["commits"])


def kill_often(home: Path, seed: int, lives: int) -> None:
    chance = random.Random(seed)
    for life in range(lives):
        run_and_kill(home, chance.randrange(1, 200))
        try:
            commits = check(home)
        except BaseException as error:
            error.add_note(f"seed {seed}, life {life}")
            raise
    assert commits > lives
    assert any("-day" in name for name in state_of(home)["names"])


def test_a_kill_anywhere_leaves_each_committed_example_and_message_once(tmp_path):
    kill_often(tmp_path, seed=3, lives=6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_many_kills_leave_each_committed_example_and_message_once(tmp_path, seed):
    kill_often(tmp_path, seed, lives=25)


_CALLS = (
    *("mkdir", "rename", "renameat2", "link", "unlink", "unlinkat", "rmdir"),
    *("fsync", "fdatasync", "ftruncate", "pwrite64"),
)
_COMMITS = 8


def run_traced(home: Path, call: str, kill_at: int) -> bool:
    """Run a few commits under strace; True when it was killed, False when it came to its end."""
    strace = ["strace", "-f", "-y", "-s", "0", "-o", str(home.with_suffix(".calls"))]
    strace += ["-e", f"trace=write,{','.join(_CALLS)}"]
    strace += ["-e", f"inject={call}:signal=KILL:when={kill_at}"]
    command = [*strace, *_command(home, _COMMITS)]
    done = subprocess.run(command, env=_environment(), stdout=subprocess.PIPE, check=False)
    assert done.returncode in {0, -9, 137}, done
    return done.returncode != 0


def can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    probe = ["strace", "-f", "-o", os.devnull, "-e", "trace=fsync", "true"]
    return subprocess.run(probe, check=False, capture_output=True).returncode == 0


def kill_at_every(home: Path, call: str, step: int) -> int:
    """Kill at every `step`-th `call`; returns how many kills there were."""
    for kills in itertools.count():
        kill_at = 1 + kills * step
        folder = home / f"{kill_at}"
        folder.mkdir()
        is_killed = run_traced(folder, call, kill_at)
        try:
            commits = check(folder)
        except BaseException as error:
            error.add_note(f"killed at {call} {kill_at}: see {folder.with_suffix('.calls')}")
            raise
        if not is_killed:
            assert commits >= _COMMITS
            break
    return kills


needs_strace = pytest.mark.skipif(not can_trace(), reason="strace is not here, or may not trace")


@needs_strace
@pytest.mark.parametrize("call", ["renameat2", "rename", "fdatasync"])
def test_a_kill_at_a_call_that_changes_the_disk_loses_and_doubles_nothing(tmp_path, call):
    assert kill_at_every(tmp_path, call, step=7) >= 1


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize("call", sorted(set(_CALLS) - {"unlink"}))
def test_a_kill_at_every_call_that_changes_the_disk_loses_and_doubles_nothing(tmp_path, call):
    assert kill_at_every(tmp_path, call, step=1) >= 1


_CALL = re.compile(r"\d+ +(\w+)\((?:\d+<([^>]*)>)?(.*)")


class Disk:
    """What a power cut may take, by the calls so far: files with bytes, folders with names."""

    def __init__(self, home: Path) -> None:
        self.home, self.exchanges = str(home), 0
        self.unsynced: set[str] = set()
        self.known: set[str] = set()

    def call(self, line: str) -> None:
        found = _CALL.fullmatch(line)
        assert found, line
        name, path, rest = found.groups()
        if name in {"write", "pwrite64", "ftruncate"} and (path or "").startswith(self.home):
            if path not in self.known:
                self.unsynced.add(os.path.dirname(path))
            self.known.add(path)
            self.unsynced.add(path)
        elif name in {"fsync", "fdatasync"}:
            self.unsynced.discard(path)
        elif name == "rename":
            old, new = re.findall(r'"([^"]*)"', rest)
            if new.endswith("state.json"):  # the commit point
                assert self.unsynced == {os.path.dirname(old)}, line
            assert old not in self.unsynced, line
            self.known.discard(old)
            self.unsynced.discard(os.path.dirname(old))  # a name that comes back does no harm
            self.unsynced.add(os.path.dirname(new))
        elif name == "renameat2":
            assert self.unsynced == set(), line
            self.unsynced |= {os.path.dirname(each) for each in re.findall(r'"([^"]*)"', rest)}
            self.exchanges += 1
        elif name in {"unlink", "unlinkat"}:
            assert self.unsynced == set(), line
        elif name == "mkdir" and rest.endswith("= 0"):
            self.unsynced.add(os.path.dirname(re.findall(r'"([^"]*)"', rest)[0]))


@needs_strace
def test_all_is_synced_before_it_is_named_exchanged_or_removed(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    assert not run_traced(home, "rename", 60_000)
    disk = Disk(home)
    for line in home.with_suffix(".calls").read_text().splitlines():
        if str(home) in line and "resumed>" not in line and "/.exchange" not in line:
            disk.call(line)
    assert disk.exchanges >= 1
    assert disk.unsynced == set()
