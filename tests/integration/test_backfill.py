"""`cloud-learner backfill` over a home that has served: from raw envelopes to a release on trial."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from cloud_learner.bootstrap import bootstrap
from cloud_learner.cli import main
from cloud_learner.config import Home
from cloud_learner.evaluate.offline import load_set
from cloud_learner.experiment.worlds import history
from cloud_learner.host import Host
from cloud_learner.package.inspect import spec_of
from cloud_learner.rollout.campaign import Offer
from cloud_learner.store.archive import Archive
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.registry import Registry
from cloud_learner.train.family import Family
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import SystemClock
from edge_runtime.errors import ConfigError
from edge_runtime.features.engine import Engine
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import (
    NO_PRIOR,
    WIRE_VERSION,
    Envelope,
    LabelRecord,
    ObservationRecord,
    PredictionRecord,
    Scored,
)

WAIT_S = 30.0
EVENTS = 1600
ENVELOPE_RECORDS = 40
NEW_FEATURES = """
[[features]]
name = "heads_1m"
fill = -1.0
window = { over = "label", key = "side", statistic = "mean", span_s = 60.0 }
[[features]]
name = "spread"
window = { over = "seen", value = "y", statistic = "std", span_s = 60.0 }
"""


def packed(events, spec, device, drop=range(0), redact=(), epoch=1):
    """What `device` sends of a stream: its features by the engine, `drop` a range of numbers."""
    engine, lanes, due = Engine(spec), {"event": [], "label": []}, []
    for time_s, kind, of, fields, heads, label_time_s in events:
        if of != device:
            continue
        seq = len(lanes["event"]) + 1
        values = engine.packed(time_s, fields)
        engine.observe(kind, time_s, fields)
        sent = {name: value for name, value in fields.items() if name not in redact}
        if heads is None:
            lanes["event"].append(ObservationRecord("coin", kind, time_s, sent))
            continue
        said = ("coin", kind, time_s, sent, spec.hash, values, 1.0)
        lanes["event"].append(PredictionRecord(*said, [Scored("r00001", "stable", [0.5])]))
        due.append(LabelRecord("coin", epoch, seq, heads, label_time_s))
    lanes["label"] = due
    found = []
    for event_class, records in lanes.items():
        for start in range(0, len(records), ENVELOPE_RECORDS):
            few = records[start : start + ENVELOPE_RECORDS]
            raws = [msgspec.Raw(codec.encode(record)) for record in few]
            if event_class == "event" and start in drop:
                raws = [msgspec.Raw(codec.encode(1)) for _ in raws]
            said = (WIRE_VERSION, device, epoch, event_class, start + 1, raws, 0, "", NO_PRIOR)
            name = subjects.events(device, event_class)
            found.append((few[0].time_s, name, codec.encode(Envelope(*said))))
    return found


async def served(home: Home, family: Family, messages, until=None) -> Host:
    """Serve the home over a memory broker until it holds all the messages, and stop."""
    broker = MemoryBroker()
    host = Host(home, family, await broker.connect(name="learner"), SystemClock())
    running = asyncio.create_task(host.run())
    bus = await broker.connect(name="devices")
    try:
        async with asyncio.timeout(WAIT_S):
            while subjects.EVENTS_STREAM not in broker.streams:
                await asyncio.sleep(0)
            for _, subject, data in messages:
                await bus.publish(subject, data)
            while not (until or (lambda host: not broker.streams[subjects.EVENTS_STREAM].messages))(
                host
            ):
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
        await asyncio.wait([running])
    return host


@pytest.fixture(scope="module")
def served_home(coin, tmp_path_factory):
    """A family and its home, bootstrapped, which has heard two devices."""
    var = tmp_path_factory.mktemp("backfill")
    folder = coin.write_family(var / "coin")
    data = coin.write_csv(var / "data.csv", coin.stream(600))
    bootstrap(folder, data, Home(var / "home"), lambda _text: None)
    family = Family.load(folder)
    events = coin.stream(EVENTS, seed=3, start_s=2000.0)
    messages = [*packed(events, family.spec, "a"), *packed(events, family.spec, "b")]
    asyncio.run(served(Home(var / "home"), family, sorted(messages, key=lambda each: each[0])))
    return var


@pytest.fixture
def var(served_home, tmp_path):
    """The same, with a feature that is new."""
    shutil.copytree(served_home, tmp_path / "var")
    folder = tmp_path / "var" / "coin"
    text = (folder / "features.toml").read_text()
    (folder / "features.toml").write_text(text + NEW_FEATURES)
    home = Home(tmp_path / "var" / "home")
    origin = home.origin()
    home.write_origin(msgspec.structs.replace(origin, folder=str(folder)))
    return tmp_path / "var"


def run(var: Path, *options: str, code: int = 0):
    result = CliRunner().invoke(
        main, ["backfill", str(var / "coin"), "--home", str(var / "home"), *options]
    )
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def rows(home: Home, spec: str):
    """The archive's rows of a spec that the ingest database names, in order."""
    db, archive = IngestDb(home.ingest_db), Archive(home.archive)
    sql = f"SELECT * EXCLUDE (spec) FROM examples WHERE spec = '{spec}' ORDER BY device, seq"
    try:
        return archive.query(sql, db.files()).fetchall()
    finally:
        archive.close()
        db.close()


def home_batch(home: Home) -> int:
    db = IngestDb(home.ingest_db)
    try:
        return db.meta().batch
    finally:
        db.close()


def stable_and_canary(home: Home) -> tuple[Offer, Offer]:
    state = json.loads(home.campaign.read_bytes())["state"]
    return tuple(msgspec.convert(state[arm], Offer) for arm in ("stable", "canary"))


def test_a_new_feature_gets_its_history_and_its_release_is_offered(coin, var):
    home, family = Home(var / "home"), Family.load(var / "coin")
    before = home.origin()
    counters = [entry["counter"] for entry in Lineage(home.lineage).read("release")]
    old_spec = spec_of(Registry(home.registry).path(before.sha256))

    with pytest.raises(ConfigError, match="is not what") as refused:
        Host(home, family, None, SystemClock())
    found = json.loads(run(var, "--json").stdout)

    assert refused.value.code == "other_spec"
    assert f"cloud-learner backfill {family.folder}" in refused.value.hint
    devices = found["filled"]["devices"]
    assert devices.keys() == {"a", "b"}
    assert all(each["whole"] == each["predictions"] == 600 for each in devices.values())
    assert all(each["compared"] == 600 and not each["differing"] for each in devices.values())
    old, new = rows(home, old_spec.hash), rows(home, family.spec.hash)
    assert len(old) == len(new) == found["filled"]["twins"] > 1000
    released = found["released"]
    origin = home.origin()
    assert released["learned"] + released["held_out"] + released["static"] == len(new)
    assert released["counter"] == max(counters) + 1
    assert origin.release == released["release"] != before.release
    assert spec_of(Registry(home.registry).path(origin.sha256)) == family.spec
    assert load_set(home.static).features.shape == (released["static"], family.spec.size)
    archive = Archive(home.archive)
    assert len(history(archive, family)) == len(new)
    archive.close()


def test_twins_differ_from_their_examples_in_their_features_alone(var):
    home, family = Home(var / "home"), Family.load(var / "coin")
    old_spec = spec_of(Registry(home.registry).path(home.origin().sha256))
    run(var)

    old, new = rows(home, old_spec.hash), rows(home, family.spec.hash)
    at = 6  # the column of features
    assert [row[:at] + row[at + 1 :] for row in old] == [row[:at] + row[at + 1 :] for row in new]
    assert [row[at] for row in old] == [row[at][: old_spec.size] for row in new]
    assert np.std([row[at][3] for row in new]) > 0.1
    assert np.std([row[at][4] for row in new]) > 0.1


def test_the_home_serves_and_learns_on_under_the_new_features(coin, var):
    home, family = Home(var / "home"), Family.load(var / "coin")
    run(var)
    learned = home_batch(home)
    events = coin.stream(800, seed=5, start_s=4000.0)

    host = asyncio.run(
        served(
            home,
            family,
            packed(events, family.spec, "a", epoch=2),
            until=lambda host: host.learner.cycle.number >= learned + 4 and host.gate.counts["judged"],
        )
    )
    assert host.gate.counts["pass"] > 0
    assert host.learner.cycle.ledger.other_spec == 0


def test_a_second_call_has_nothing_to_do_and_changes_nothing(var):
    home = Home(var / "home")
    run(var)
    before = {path: path.read_bytes() for path in sorted(var.rglob("*")) if path.is_file()}

    result = run(var)

    assert "nothing to do" in result.output
    after = {path: path.read_bytes() for path in sorted(var.rglob("*")) if path.is_file()}
    assert after == before
    assert not (home.root / "backfill").exists()
