"""SIGKILL at seeded random points: what was durable is there, and no id comes twice.

The child appends to both classes as fast as it can and says, after each commit, what is durable;
the parent kills it after a random number of those words and looks at what is left.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.events.log import EventLog
from edge_runtime.events.segment import SUFFIX

_CHILD = """
import sys
from pathlib import Path
from edge_runtime.events.log import EventLog

log = EventLog(Path(sys.argv[1]), device="EWR", linger_ms=1.0, segment_bytes=20_000)
words = sys.stdout
def say():
    words.write(f"{log.epoch} {log.durable('event')[1]} {log.durable('label')[1]}\\n")
    words.flush()
say()
log.on_commit = say
for n in range(1, 10_000_000):
    while log.statistics()["pending"] > 500:
        pass
    log.append("event", b"event %d %d " % (log.epoch, n) + bytes(n % 97) + b".")
    if n % 3 == 0:
        log.append("label", b"label %d %d" % (log.epoch, n // 3))
"""


def run_and_kill(directory: Path, words: int) -> tuple[int, int, int]:
    """Run the child until it has spoken `words` times, kill it; returns its last whole word."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(directory)], stdout=subprocess.PIPE, env=environment
    )
    with child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(words)]
        child.kill()
        lines += child.stdout.readlines()
    whole = [line for line in lines if line.endswith(b"\n")]
    assert whole, "the child never opened its log"
    epoch, events, labels = map(int, whole[-1].split())
    return epoch, events, labels


def tear(directory: Path, chance: random.Random) -> None:
    """What a crash may leave behind the last durable frame: garbage, half a frame, nothing."""
    for event_class in ("event", "label"):
        newest = max(directory.glob(f"{event_class}-*{SUFFIX}"), default=None)
        if newest is None:
            continue
        data = newest.read_bytes().rstrip(b"\0")
        whole_frame = data[data.rindex(b"HWFR") :] if b"HWFR" in data else b"HWFR"
        half_frame = whole_frame[: chance.randrange(len(whole_frame))]
        newest.write_bytes(data + chance.choice([b"", chance.randbytes(300), half_frame]))


def check(log: EventLog, said: list[tuple[int, int, int]], seed: int) -> None:
    context = f"seed {seed}, said {said}"
    assert log.epoch > said[-1][0], context
    for event_class, column in (("event", 1), ("label", 2)):
        found: dict[int, list[int]] = {}
        for epoch, seq, data in log.tail(event_class, 0, 0):  # type: ignore[arg-type]
            found.setdefault(epoch, []).append(seq)
            assert data.startswith(b"%s %d %d" % (event_class.encode(), epoch, seq)), context
        for word in said:
            seqs = found.get(word[0], [])
            assert seqs == list(range(1, len(seqs) + 1)), context
            assert len(seqs) >= word[column], context
        ends = dict(log.ends(event_class))  # type: ignore[arg-type]
        assert ends == {word[0]: len(found.get(word[0], [])) for word in said}, context


def kills(directory: Path, seed: int, count: int) -> None:
    chance = random.Random(seed)
    said: list[tuple[int, int, int]] = []
    for _ in range(count):
        said.append(run_and_kill(directory, chance.randrange(1, 40)))
        assert [word[0] for word in said] == sorted({word[0] for word in said}), f"seed {seed}"
        tear(directory, chance)
        with EventLog(directory, device="EWR") as log:
            check(log, said, seed)
            said.append((log.epoch, 0, 0))


def test_no_durable_record_is_lost_and_no_id_comes_twice_over_kills(tmp_path: Path) -> None:
    kills(tmp_path, seed=1, count=5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 22))
def test_the_same_over_many_kills(tmp_path: Path, seed: int) -> None:
    kills(tmp_path, seed, count=25)
