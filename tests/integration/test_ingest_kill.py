"""SIGKILL of an ingest at random points and at chosen system calls: what is left is some prefix.

The child takes in the messages of a few devices, a portion at a time, and says after each commit
what it would have told the devices; the parent kills it, looks at what is left, and starts another
that is sent everything again, until one comes to the end. Then everything came out exactly once.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from cloud_learner.ingest.guard import Batcher
from cloud_learner.ingest.intake import Intake, Strand
from cloud_learner.ingest.joiner import Rules
from cloud_learner.ingest.opening import Incoming
from cloud_learner.store.archive import Archive
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.raw import RawLog
from edge_runtime.clock import ManualClock
from edge_runtime.wire import codec
from edge_runtime.wire.messages import (
    WIRE_VERSION,
    Envelope,
    LabelRecord,
    ObservationRecord,
    PredictionRecord,
    Scored,
)

_CHILD = """
import sys
from pathlib import Path
import msgspec
sys.path.insert(0, sys.argv[1])
from test_ingest_kill import PORTION, opened, incoming

intake = opened(Path(sys.argv[2]))
messages = incoming(Path(sys.argv[3]))
for at in range(0, len(messages), PORTION):
    intake.commit(messages[at : at + PORTION], flush=at % (4 * PORTION) == 0)
    held = sum(account.seq for account in intake.accounting.accounts.values())
    sys.stdout.write(f"{held}\\n")
    sys.stdout.flush()
intake.close()
"""
PORTION = 3
PREDICTIONS = 240
WINDOW_S = 20.0
FAMILIES = ["coin", "dice"]


def opened(home: Path) -> Intake:
    """An intake of both families over the files in `home`."""
    strands = [
        Strand(
            Rules(family=name, label_window_s=WINDOW_S, idle_s=60.0, expiry="negative"),
            Batcher(10, 10),
        )
        for name in FAMILIES
    ]
    db, raw = IngestDb(home / "db", FAMILIES), RawLog(home / "raw")
    return Intake(db, raw, Archive(home / "archive"), strands, clock=ManualClock(), indices={})


def incoming(path: Path) -> list[Incoming]:
    """The messages in a file."""
    rows = msgspec.msgpack.decode(path.read_bytes(), type=list[tuple[str, bytes]])
    return [Incoming(subject, data, 0.0, at) for at, (subject, data) in enumerate(rows)]


def life(device: str, chance: random.Random) -> list[tuple[str, bytes]]:
    """What a device sends: predictions, some things lost and left out, labels that lag a little."""
    sent: list[tuple[float, str, bytes]] = []
    base = {"event": 1, "label": 1}

    def send(event_class: str, time_s: float, records: list, skipped: int = 0) -> None:
        raws = [
            msgspec.Raw(msgspec.msgpack.encode(r) if isinstance(r, int) else codec.encode(r))
            for r in records
        ]
        reason = "dropped" if skipped else ""
        first = base[event_class] + skipped
        whole = Envelope(WIRE_VERSION, device, 3, event_class, first, raws, skipped, reason)  # type: ignore[arg-type]
        base[event_class] = first + len(raws)
        sent.append((time_s, f"hw.ev.{device}.{event_class}", codec.encode(whole)))

    at = 0
    while at < PREDICTIONS:
        count = chance.randrange(1, 9)
        skipped = chance.choice([0, 0, 0, 2])
        first = base["event"] + skipped
        scored = [Scored("r1", "stable", [0.5])]
        names = [chance.choice(FAMILIES) for _ in range(count)]
        asked: list = [
            PredictionRecord(
                names[each],
                "k",
                float(at + each),
                {},
                "s",
                struct.pack("<f", at + each),
                1.0,
                scored,
            )
            for each in range(count)
        ]
        send("event", at + count, [*asked, chance.choice([1, 2])], skipped)
        labels = [
            LabelRecord(names[each], 3, first + each, float(at + each), at + each + 5.0)
            for each in range(count)
            if chance.random() < 0.8
        ]
        if labels:
            send("label", at + count + 7.0, labels)
        at += count
    end_s = PREDICTIONS + 5 * WINDOW_S
    send("event", end_s, [ObservationRecord(name, "o", end_s, {}) for name in FAMILIES])
    send("label", end_s, [LabelRecord(name, 3, 10**6, 0.0, end_s) for name in FAMILIES])
    return [(subject, data) for _, subject, data in sorted(sent, key=lambda each: each[0])]


class Story:
    """The messages of two devices, and what comes of them when nobody is killed."""

    def __init__(self, folder: Path, seed: int) -> None:
        chance = random.Random(seed)
        lives = [life("EWR", chance), life("JFK", chance)]
        rows = []
        while any(lives):
            rows.append(chance.choice([each for each in lives if each]).pop(0))
        self.seed, self.folder, self.messages = seed, folder, folder / "messages"
        self.messages.write_bytes(msgspec.msgpack.encode(rows))
        self.home, quiet = folder / "home", folder / "quiet"
        intake = opened(quiet)
        messages = incoming(self.messages)
        for at in range(0, len(messages), PORTION):
            intake.commit(messages[at : at + PORTION])
        self.accounts = intake.accounting.accounts
        intake.close()
        db = IngestDb(quiet / "db")
        self.batches = {name: list(db.batches_after(name, 0)) for name in FAMILIES}
        db.close()
        self.raw = [message.data for message in RawLog(quiet / "raw").replay()]
        assert min(map(len, self.batches.values())) > 15

    def run(self, *prefix: str, words: int | None = None) -> tuple[int, int]:
        """One life of the child, killed after `words`; its exit code and its last word."""
        here = str(Path(__file__).parent)
        command = [*prefix, sys.executable, "-c", _CHILD, here, str(self.home), str(self.messages)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        child = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        with child:
            assert child.stdout is not None
            if words is None:
                lines = child.stdout.readlines()
            else:
                lines = [child.stdout.readline() for _ in range(words)]
                child.kill()
                lines += child.stdout.readlines()
        whole = [int(line) for line in lines if line.endswith(b"\n")]
        return child.returncode, max(whole, default=0)

    def check(self, said: int) -> None:
        """What is left is some prefix, not less than what the child has said."""
        intake = opened(self.home)
        accounts, counters = intake.accounting.accounts, intake.counters() | intake.waiting()
        reached = intake.reached
        batches = {name: list(intake.batches_after(name, 0)) for name in FAMILIES}
        rows = intake.query("SELECT device, epoch, seq FROM examples")
        intake.abandon()
        raw = [message.data for message in RawLog(self.home / "raw").replay()]
        at = f"seed {self.seed}, {self.home}"
        assert sum(each.seq for each in accounts.values()) >= said, at
        assert all(each.is_balanced for each in accounts.values()), at
        for name, found in batches.items():
            assert found == self.batches[name][: len(found)], at
        assert raw == self.raw[: len(raw)], at
        waits = counters.get("pending", 0) + counters.get("examples", 0)
        assert waits == counters.get("predictions", 0), at
        assert reached.released == counters.get("examples", 0), at
        assert len(rows) == len(set(rows)) == reached.released - counters["unwritten"], at

    def finish(self) -> None:
        """A life to the end, and everything came out exactly once."""
        code, _ = self.run()
        assert code == 0
        self.check(0)
        intake = opened(self.home)
        assert intake.accounting.accounts == self.accounts, self.seed
        for name in FAMILIES:
            assert list(intake.batches_after(name, 0)) == self.batches[name], self.seed
        released = intake.reached.released
        assert intake.counters()["predictions"] == released >= 2 * PREDICTIONS
        assert len(set(intake.query("SELECT device, epoch, seq FROM examples"))) == released
        intake.abandon()


def random_kills(folder: Path, seed: int, count: int) -> None:
    story, chance = Story(folder, seed), random.Random(seed)
    for _ in range(count):
        _, said = story.run(words=chance.randrange(1, 30))
        story.check(said)
    story.finish()


def test_over_kills_at_random_points_everything_comes_out_once(tmp_path):
    random_kills(tmp_path, seed=1, count=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_the_same_over_many_kills(tmp_path, seed):
    random_kills(tmp_path, seed, count=12)


def kills_at_calls(folder: Path, calls: str, points: list[int]) -> None:
    """Each life is killed as it begins the n-th of these system calls."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: it kills at a chosen system call")
    story, killed = Story(folder, 1), 0
    for point in points:
        inject = f"inject={calls}:signal=KILL:when={point}"
        strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e", inject]
        code, said = story.run(*strace)
        killed += code != 0
        story.check(said)
    assert killed, "no call was reached"
    story.finish()


_SYNCS = "fdatasync,fsync"
_WRITES = "write,pwrite64,rename,renameat2,unlink"


def test_over_kills_at_syncs_everything_comes_out_once(tmp_path):
    kills_at_calls(tmp_path, _SYNCS, [1, 2, 5, 8])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 60, 10))
@pytest.mark.parametrize("calls", [_SYNCS, _WRITES])
def test_over_kills_at_every_sync_and_write_everything_comes_out_once(tmp_path, calls, first):
    kills_at_calls(tmp_path, calls, list(range(first + 1, first + 11)))


def test_a_killed_child_is_seen_as_killed(tmp_path):
    """Guards the guard: the parent must know a death when it sees one."""
    code, said = Story(tmp_path, 1).run(words=2)
    assert code == -signal.SIGKILL
    assert said > 0
