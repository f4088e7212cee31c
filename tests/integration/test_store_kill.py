"""SIGKILL at seeded random points of what the learner stores: examples and raw envelopes.

The child commits, compacts and says each step; the parent reads the folder as it is while the child
works, kills it after a random number of steps, and looks at what is left.
"""

from __future__ import annotations

import json
import os
import random
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
while True:
    commit = state["commits"]
    messages = [RawMessage("s", "", b"%d" % (2 * commit + at) * 50, commit) for at in range(2)]
    state["raw"] = raw.append(messages)
    say("raw")
    state["names"] += archive.write(list(examples(commit)), commit + 1)
    state["commits"] += 1
    write_atomic(path, json.dumps(state).encode())  # the transaction
    say("commit")
    while (done := archive.compact(state["names"], state["commits"])) is not None:
        state["names"] = sorted(set(state["names"]) - set(done.gone)) + [done.new]
        write_atomic(path, json.dumps(state).encode())
        say("named")
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


def run_and_kill(home: Path, words: int) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(home)], stdout=subprocess.PIPE, env=environment
    )
    with child:
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
