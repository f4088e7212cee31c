"""The learner's part of tools/bench-events: opening envelopes, storing what waits, joining labels.

Why: one core has to keep up with a fleet, and months of predictions wait for their labels on disk
while memory stays small.

Invariants: the product's own intake over its own files; what is sent was packed as a device packs
it. The join runs in a process of its own, so that what it needs of memory is all its own.

Run by itself: bench_events_learner.py FOLDER PENDING, prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from bench_events_model import FAMILY, FEATURES, POOL, SPEC, START_S, encoded, label
from bench_rows import Row

from cloud_learner.ingest.accounting import Accounting
from cloud_learner.ingest.guard import Batcher
from cloud_learner.ingest.intake import Intake, Strand
from cloud_learner.ingest.joiner import Rules
from cloud_learner.ingest.opening import Incoming, Opened, opened
from cloud_learner.ingest.sequencer import Sequencer
from cloud_learner.store.archive import Archive
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.raw import RawLog
from edge_runtime.clock import SystemClock
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import WIRE_VERSION, Envelope, EventClass

DEVICES = 8
IN_ENVELOPE = 300
IN_COMMIT = 64  # envelopes
WINDOW_S = 90 * 86400.0
INDICES = {SPEC: [0] * FEATURES}
ROUNDS = 7
COLD_SHARE = 4  # of the labels, how many are joined with nothing in memory: one in so many


def intake(home: Path) -> Intake:
    """An intake over the files in `home`."""
    rules = Rules(family=FAMILY, label_window_s=WINDOW_S, idle_s=60.0)
    db, raw, archive = (
        IngestDb(home / "db", [FAMILY]),
        RawLog(home / "raw"),
        Archive(home / "archive"),
    )
    guard = Batcher(500, 500)
    return Intake(db, raw, archive, [Strand(rules, guard)], clock=SystemClock(), indices=INDICES)


def message(device: str, event_class: EventClass, base_seq: int, records: list[bytes]) -> Incoming:
    """An envelope as it comes from the broker, not deflated."""
    raws = [msgspec.Raw(record) for record in records]
    envelope = Envelope(WIRE_VERSION, device, 1, event_class, base_seq, raws)
    subject = subjects.events(device, event_class)
    return Incoming(subject, codec.encode(envelope), START_S, None)


def deflated(plain: Incoming) -> Incoming:
    """The same as a device packs it."""
    data, headers = codec.pack_envelope(codec.decode_envelope(plain.data))
    return Incoming(plain.subject, data, plain.arrived_s, None, headers)


def events(count: int, seed: int) -> Iterator[Incoming]:
    """Envelopes of so many predictions of DEVICES devices."""
    pool = encoded(POOL, seed)
    for at in range(0, count, IN_ENVELOPE):
        round_, device = divmod(at // IN_ENVELOPE, DEVICES)
        from_ = at % (POOL - IN_ENVELOPE)
        records = pool[from_ : from_ + min(IN_ENVELOPE, count - at)]
        yield message(f"device-{device}", "event", 1 + round_ * IN_ENVELOPE, records)


def in_commits(messages: Iterator[Incoming]) -> Iterator[list[Incoming]]:
    batch: list[Incoming] = []
    for each in messages:
        batch.append(each)
        if len(batch) == IN_COMMIT:
            yield batch
            batch = []
    if batch:
        yield batch


def ingest(home: Path, count: int) -> list[Row]:
    """What a core opens, and what it stores."""
    plain = list(events(count, 4))
    packed = [deflated(each) for each in plain[: len(plain) // 4]]
    name = "ingest per core"
    rows = [
        Row(
            f"{name}: decode, validate, dedupe",
            max(opening(plain) for _ in range(ROUNDS)),
            "events/s",
            1e6,
            True,
        ),
        Row(
            f"{name}: inflate, decode, validate, dedupe",
            max(opening(packed) for _ in range(ROUNDS)),
            "events/s",
        ),
    ]
    store = intake(home / "ingest")
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    for batch in in_commits(iter(plain)):
        store.commit(batch)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    store.close()
    what = f"{name}: with pending predictions stored"
    rows.append(Row(what, count / wall_s, "events/s", 200_000, True))
    rows.append(Row(f"{what}, a second of CPU, compaction included", count / cpu_s, "events/s"))
    return rows


def opening(messages: list[Incoming]) -> float:
    """Events a second that are opened and entered, each once though each envelope comes twice."""
    sequencer: Sequencer[Opened] = Sequencer({})
    accounting, entered = Accounting({}), 0
    gc.collect()
    gc.disable()
    started_s = time.perf_counter()
    for each in messages:
        arrival = opened(each, INDICES)
        for part in sequencer.accept(arrival):
            what = part.arrival.what
            accounting.enter(
                part.arrival.lane, part.lost, what.reason, what.records, what.prior, newest_s={}
            )
            entered += len(what.records)
    took_s = time.perf_counter() - started_s
    gc.enable()
    return entered / took_s


def join(home: Path, pending: int) -> list[Row]:
    """The join in a process of its own."""
    command = [sys.executable, __file__, str(home / "join"), str(pending)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout)
    name = f"join, {pending / 1e6:g} million predictions pending on disk, labels in random order"
    return [
        Row(f"{name}, warm", found["warm"], "labels/s", 80_000, True),
        Row(f"{name}, cold", found["cold"], "labels/s", 25_000, True),
        Row(f"{name}, learner RSS", found["rss_mb"], "MB", 600),
    ]


def joined(home: Path, pending: int) -> dict[str, float]:
    """Store the predictions, then label them in random order: warm, then cold."""
    store = intake(home)
    for batch in in_commits(events(pending, 5)):
        store.commit(batch)
    labels = random_labels(pending, max(pending // 10, 60_000))
    cold = len(labels) // COLD_SHARE
    store.commit(labels[:IN_COMMIT])
    warm_rate = labelled(store, labels[IN_COMMIT:-cold])
    store.abandon()
    os.sync()
    drop_caches(home)
    store = intake(home)
    cold_rate = labelled(store, labels[-cold:])
    store.abandon()
    return {"warm": warm_rate, "cold": cold_rate, "rss_mb": peak_rss_mb()}


def random_labels(pending: int, count: int) -> list[Incoming]:
    """Labels of predictions drawn at random, none twice, as each device would send its own."""
    chance = random.Random(6)  # noqa: S311 - data
    of: dict[int, list[int]] = {device: [] for device in range(DEVICES)}
    for at in chance.sample(range(pending), count):
        round_, device = divmod(at // IN_ENVELOPE, DEVICES)
        of[device].append(1 + round_ * IN_ENVELOPE + at % IN_ENVELOPE)
    messages = []
    for device, seqs in of.items():
        for at in range(0, len(seqs), IN_ENVELOPE):
            records = [
                codec.encode(label(1, seq, START_S + 1e5)) for seq in seqs[at : at + IN_ENVELOPE]
            ]
            messages.append((at, message(f"device-{device}", "label", at + 1, records)))
    return [each for _, each in sorted(messages, key=lambda pair: pair[0])]


def labelled(store: Intake, messages: list[Incoming]) -> float:
    """Labels joined a second."""
    before = store.counters().get("labels_joined", 0)
    started_s = time.perf_counter()
    for batch in in_commits(iter(messages)):
        store.commit(batch)
    took_s = time.perf_counter() - started_s
    return (store.counters()["labels_joined"] - before) / took_s


def drop_caches(home: Path) -> None:
    """Let go of what the system keeps in memory of the files in `home`."""
    for path in home.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def peak_rss_mb() -> float:
    """The most memory that this process has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise AssertionError("Linux tells it")


if __name__ == "__main__":
    print(json.dumps(joined(Path(sys.argv[1]), int(sys.argv[2]))))
