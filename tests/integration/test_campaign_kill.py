"""C2: SIGKILL of a controller at any point: same devices, no stage skipped or doubled.

The child is a real controller over a folder, told the same candidates, reports and labels in every
life; what it publishes goes into a file. It is killed at random words, or by strace as it enters
the n-th of the system calls that change the disk.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.rollout.plan import arms_for, decode_plan

_CHILD = """
import asyncio
import hashlib
import os
import sys
from pathlib import Path

from cloud_learner.controller import Controller
from cloud_learner.rollout.state import Offer, Rules
from cloud_learner.store.examples import Example
from cloud_learner.store.lineage import Lineage
from edge_runtime.clock import ManualClock
from edge_runtime.rollout.plan import arms_for, encode_plan
from edge_runtime.wire.messages import ArmReport, Report, Scored

home, batches = Path(sys.argv[1]), int(sys.argv[2])
clock = ManualClock(1_000.0)
devices = [f"device-{number}" for number in range(40)]
plans = []


def say(word):
    sys.stdout.write(word + "\\n")
    sys.stdout.flush()


async def publish(release, plan, approval):
    say("publishing")
    with open(home / "published", "ab") as file:
        file.write(encode_plan(plan) + b"\\n")
        os.fsync(file.fileno())
    say("published")
    plans.append(plan)
    return "signed"


def offer(counter):
    name, digest = f"r{counter}", hashlib.sha256(b"%d" % counter).hexdigest()
    facts = dict(path=f"m/f/{name}.onnx", file="", learned_through_s=0.0, arrived_s=0.0)
    return Offer(release=name, sha256=digest, counter=counter, **facts)


def example(seq, canary, plan):
    trying = [name for name in devices if len(arms_for(plan, name, {})) > 1]
    wave = 0.02 * (seq % 5 - 2)
    answers = [("r1", 0.25 + wave), (canary, 0.25 + 1.01 * wave)]
    scored = [Scored(name, "", [answer]) for name, answer in answers]
    facts = (trying[seq // 20 % len(trying)], 1, seq, "f", float(seq), 0.0, b"", "")
    return Example(*facts, float(seq % 4 == 0), 0.5, scored, 0.0, 0.0)


def report(name, plan, number):
    arms = [ArmReport("f", arm, each.release, 0.0) for arm, each in arms_for(plan, name, {})]
    facts = (1, name, 1, clock.now_s(), {}, arms, plan.seq, {}, {}, [], 0, 0)
    return Report(*facts, number=number)


async def main():
    rules = Rules(family="f", selector={}, stages=(10.0, 50.0, 100.0), pairs_min=100)
    lineage = Lineage(home / "lineage", clock)
    controller = Controller(rules, home / "campaign.json", publish, lineage, clock)
    say("open")
    await controller.start()
    for counter in (1, 2):
        await controller.offer(offer(counter))
    for batch in range(batches):
        clock.advance(1.0)
        canary = controller.status()["canary"]
        if canary is None:
            break
        plan = plans[-1] if plans else told()
        for name in devices:
            await controller.report(report(name, plan, batch + 1))
        seqs = range(100 * batch + 1, 100 * batch + 101)
        await controller.examples([example(seq, canary["release"], plan) for seq in seqs])
        await controller.tick()
        say("batch")
    await controller.close()
    say("end")


def told():
    from edge_runtime.rollout.plan import decode_plan

    return decode_plan((home / "published").read_bytes().split(b"\\n")[-2])


asyncio.run(main())
"""
BATCHES = 60


def command(home: Path) -> list[str]:
    return [sys.executable, "-c", _CHILD, str(home), str(BATCHES)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def lived(home: Path, words: int) -> bool:
    """One life that is killed after so many words; whether it came to its end before."""
    home.mkdir(exist_ok=True)
    with subprocess.Popen(command(home), stdout=subprocess.PIPE, env=environment()) as child:
        assert child.stdout is not None
        for _ in range(words):
            word = child.stdout.readline()
            assert word, "the child ended by itself"
            if word == b"end\n":
                return True
        child.kill()
    return False


def check(home: Path, *, is_over: bool) -> None:
    """What was published is a beginning of the one course there is; all of it where it is over."""
    plans = [decode_plan(line) for line, _ in itertools.groupby(published(home))]
    assert [plan.seq for plan in plans] == list(range(1, len(plans) + 1))
    course = [(plan.reason, plan.percent, plan.stable.release) for plan in plans]
    whole = [
        ("first_release", 100.0, "r1"),
        ("canary", 10.0, "r1"),
        ("stage", 50.0, "r1"),
        ("stage", 100.0, "r1"),
        ("promoted", 100.0, "r2"),
    ]
    assert course == (whole if is_over else whole[: len(course)])
    trials = [plan for plan in plans if plan.canary]
    assert len({plan.salt for plan in trials}) <= 1
    for before, after in itertools.pairwise(trials):
        assert after.stages[: len(before.stages)] == before.stages
        assert tried(before) <= tried(after)


def published(home: Path) -> list[bytes]:
    path = home / "published"
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def tried(plan) -> set[str]:
    names = [f"device-{number}" for number in range(40)]
    return {name for name in names if len(arms_for(plan, name, {})) > 1}


def kill_often(home: Path, seed: int, lives: int) -> None:
    chance = random.Random(seed)
    for life in range(lives):
        is_over = lived(home, chance.randrange(1, 30))
        try:
            check(home, is_over=is_over)
        except BaseException as error:
            error.add_note(f"seed {seed}, life {life}")
            raise
    assert lived(home, 10_000)
    check(home, is_over=True)
    lines = (home / "lineage" / "lineage.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert [word for word, _ in itertools.groupby(reasons)] == [
        *("first_release", "canary", "stage", "promoted")
    ]


def test_c2_a_kill_anywhere_leaves_the_same_devices_and_each_stage_once(tmp_path):
    kill_often(tmp_path / "home", seed=5, lives=5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_c2_many_kills_leave_the_same_devices_and_each_stage_once(tmp_path, seed):
    kill_often(tmp_path / "home", seed, lives=20)


def can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    probe = ["strace", "-f", "-o", os.devnull, "-e", "trace=fsync", "true"]
    return subprocess.run(probe, check=False, capture_output=True).returncode == 0


def kill_at_every(folder: Path, call: str, step: int) -> int:
    """Kill at every `step`-th `call`, each time in a new home; returns how often."""
    for kills in itertools.count():
        home = folder / f"{kills}"
        home.mkdir()
        strace = ["strace", "-f", "-o", os.devnull, "-e", f"trace={call}"]
        strace += ["-e", f"inject={call}:signal=KILL:when={1 + kills * step}"]
        done = subprocess.run(
            [*strace, *command(home)], env=environment(), stdout=subprocess.PIPE, check=False
        )
        check(home, is_over=done.returncode == 0)
        if done.returncode == 0:
            break
        assert lived(home, 10_000)
        check(home, is_over=True)
    return kills


needs_strace = pytest.mark.skipif(not can_trace(), reason="strace is not here, or may not trace")


@needs_strace
@pytest.mark.parametrize(("call", "step"), [("rename", 40), ("fsync", 90)])
def test_c2_a_kill_at_a_call_that_changes_the_disk_skips_and_doubles_no_stage(tmp_path, call, step):
    assert kill_at_every(tmp_path, call, step) >= 1


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize("call", ["rename", "fsync", "ftruncate"])
def test_c2_a_kill_at_every_call_that_changes_the_disk_skips_and_doubles_no_stage(tmp_path, call):
    assert kill_at_every(tmp_path, call, step=1) >= 10
