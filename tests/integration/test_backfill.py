"""`cloud-learner backfill` over a home that has served: raw envelopes to a release on trial."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import signal
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
from cloud_learner.console.backfilled import table
from cloud_learner.evaluate.offline import load_set
from cloud_learner.experiment.backfill import SkewError, fill, known_releases, owned
from cloud_learner.experiment.logged import Known
from cloud_learner.experiment.worlds import history
from cloud_learner.host import Host
from cloud_learner.package.inspect import spec_of
from cloud_learner.store.archive import Archive
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.registry import Registry
from cloud_learner.train.family import Family
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import SystemClock
from edge_runtime.errors import ConfigError
from edge_runtime.features.engine import Engine
from edge_runtime.features.spec import Spec
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


def packed(events, spec, device, epoch=1):
    """What `device` sends of a stream, its features by the engine: when, subject, envelope."""
    engine, lanes, due = Engine(spec), {"event": [], "label": []}, []
    for time_s, kind, of, fields, heads, label_time_s in events:
        if of != device:
            continue
        seq = len(lanes["event"]) + 1
        values = engine.packed(time_s, fields)
        engine.observe(kind, time_s, fields)
        if heads is None:
            lanes["event"].append(ObservationRecord("coin", kind, time_s, fields))
            continue
        said = ("coin", kind, time_s, fields, spec.hash, values, 1.0)
        lanes["event"].append(PredictionRecord(*said, [Scored("r00001", "stable", [0.5])]))
        due.append(LabelRecord("coin", epoch, seq, heads, label_time_s))
    lanes["label"] = due
    found = []
    for event_class, records in lanes.items():
        for start in range(0, len(records), ENVELOPE_RECORDS):
            few = records[start : start + ENVELOPE_RECORDS]
            raws = [msgspec.Raw(codec.encode(record)) for record in few]
            said = (WIRE_VERSION, device, epoch, event_class, start + 1, raws, 0, "", NO_PRIOR)
            name = subjects.events(device, event_class)
            found.append((few[0].time_s, name, codec.encode(Envelope(*said))))
    return found


async def served(home: Home, family: Family, messages, until=lambda _host: True) -> Host:
    """Serve the home over a memory broker until it holds all the messages and more, and stop."""
    broker = MemoryBroker()
    host = Host(home, [family], await broker.connect(name="learner"), SystemClock())
    running = asyncio.create_task(host.run())
    bus = await broker.connect(name="devices")
    try:
        async with asyncio.timeout(WAIT_S):
            while subjects.EVENTS_STREAM not in broker.streams:  # noqa: ASYNC110 - as below
                await asyncio.sleep(0)
            for _, subject, data in messages:
                await bus.publish(subject, data)
            stream = broker.streams[subjects.EVENTS_STREAM]
            while stream.messages or not until(host):  # noqa: ASYNC110 - others bring it about
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


@pytest.fixture(scope="module")
def backfilled(served_home, tmp_path_factory):
    """The same home after a backfill, and what that told as JSON."""
    var = with_new_features(served_home, tmp_path_factory.mktemp("backfilled") / "var")
    return var, json.loads(run(var, "--json").stdout)


def with_new_features(served_home: Path, var: Path, more: str = NEW_FEATURES) -> Path:
    """A copy in `var`, its folder with features that are new."""
    shutil.copytree(served_home, var)
    features, own = var / "coin" / "features.toml", Home(var / "home").of("coin")
    features.write_text(features.read_text() + more)
    own.write_origin(msgspec.structs.replace(own.origin(), folder=str(var / "coin")))
    return var


@pytest.fixture
def var(served_home, tmp_path):
    return with_new_features(served_home, tmp_path / "var")


def run(var: Path, *options: str, code: int = 0):
    command = ["backfill", str(var / "coin"), "--home", str(var / "home"), *options]
    result = CliRunner().invoke(main, command)
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


def specs(served_home: Path, var: Path) -> tuple[Spec, Spec]:
    return tuple(Family.load(each / "coin").spec for each in (served_home, var))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_feature_gets_its_history(served_home, backfilled):
    var, found = backfilled
    old, new = (rows(Home(var / "home"), spec.hash) for spec in specs(served_home, var))
    devices = found["filled"]["devices"]

    assert devices.keys() == {"a", "b"}
    for each in devices.values():
        assert each["whole"] == each["predictions"] == each["compared"] == 600
        assert not each["differing"]
        assert not each["lost"]
        assert each["first_s"] < 2010.0
    assert len(old) == len(new) == found["filled"]["twins"] > 1000


def test_twins_differ_from_their_examples_in_their_features_alone(served_home, backfilled):
    var, _ = backfilled
    old_spec, new_spec = specs(served_home, var)
    old, new = (rows(Home(var / "home"), spec.hash) for spec in (old_spec, new_spec))

    at = 6  # the column of features
    assert [row[:at] + row[at + 1 :] for row in old] == [row[:at] + row[at + 1 :] for row in new]
    assert [row[at] for row in old] == [row[at][: old_spec.size] for row in new]
    assert np.std([row[at][3] for row in new]) > 0.1
    assert np.std([row[at][4] for row in new]) > 0.1


def test_its_release_goes_on_trial_with_the_next_counter(served_home, backfilled):
    var, found = backfilled
    home, before = Home(var / "home"), Home(served_home / "home")
    counters = [e["counter"] for e in Lineage(before.lineage).of("coin").read("release")]
    origin, released = home.of("coin").origin(), found["released"]
    state = json.loads(home.of("coin").campaign.read_bytes())["state"]

    assert released["counter"] == max(counters) + 1
    assert origin.release == released["release"]
    offers = (state["trial"] and state["trial"]["offer"], state["pending"])
    assert origin.release in {offer["release"] for offer in offers if offer}
    assert spec_of(Registry(home.registry).path(origin.sha256)) == specs(served_home, var)[1]
    assert released["judgement"]["outcome"] == "pass"


def test_training_and_gates_go_by_the_twins_alone(served_home, backfilled):
    var, found = backfilled
    home, family, released = Home(var / "home"), Family.load(var / "coin"), found["released"]
    archive = Archive(home.archive)
    past = history(archive, family)
    archive.close()

    parts = (released[name] for name in ("learned", "held_out", "static"))
    assert sum(parts) == len(past) == found["filled"]["twins"]
    assert len(load_set(home.of("coin").static)) == released["static"]
    assert load_set(home.of("coin").static).features.shape[1] == family.spec.size


def test_a_person_reads_how_far_back_it_went_and_what_is_missing(backfilled):
    _, found = backfilled
    devices = {**found["filled"]["devices"]}
    devices["b"] = {**devices["b"], "lost": {"dropped": 4000}, "after_gap": 12}
    found = {**found, "filled": {**found["filled"], "devices": devices}}

    lines = table(found).splitlines()

    assert lines[1].split() == [
        "a",
        "1970-01-01",
        "00:33",
        "1970-01-01",
        "00:59",
        *["600", "600", "0", "0", "0"],
    ]
    assert "b: missing: dropped 4,000" in lines
    assert not any(line.startswith("a: ") for line in lines)
    assert f"release {found['released']['release']} is offered" in lines


def test_a_second_call_has_nothing_to_do_and_changes_nothing(backfilled):
    var, _ = backfilled
    before = contents(var / "home")

    result = run(var)

    assert "nothing to do" in result.output
    assert contents(var / "home") == before
    assert not (var / "home" / "backfill").exists()


def test_the_home_serves_and_learns_on_under_the_new_features(coin, backfilled, tmp_path):
    shutil.copytree(backfilled[0] / "home", tmp_path / "home")
    home, family = Home(tmp_path / "home"), Family.load(backfilled[0] / "coin")
    db = IngestDb(home.ingest_db)
    learned = db.meta().families["coin"].batch
    db.close()
    events = coin.stream(800, seed=5, start_s=4000.0)
    sent = [*packed(events, family.spec, "a", epoch=2), *packed(events, family.spec, "b", epoch=2)]

    def is_enough(host):
        return (
            host.learner.courses["coin"].number >= learned + 4
            and host.releasing["coin"].door.gate.counts["judged"]
        )

    host = asyncio.run(served(home, family, sorted(sent, key=lambda each: each[0]), is_enough))

    judged = host.releasing["coin"].door.gate.counts
    assert judged["judged"] == judged["pass"] + judged["hold"] > 0
    assert len(host.learner.courses["coin"].cycle.ledger) > 0


def test_serving_waits_for_the_backfill(var):
    home, family = Home(var / "home"), Family.load(var / "coin")

    with pytest.raises(ConfigError, match="is not what") as refused:
        asyncio.run(served(home, family, []))

    assert refused.value.code == "other_spec"
    assert f"cloud-learner backfill {family.folder}" in refused.value.hint


def test_a_home_that_is_served_is_not_touched(var):
    with Home(var / "home").owned():
        result = run(var, code=2)

    assert "already_owned" in result.output


def test_a_family_that_the_home_has_not_is_named(coin, var):
    coin.write_family(var / "other", {"family.toml": ('name = "coin"', 'name = "dice"')})

    result = CliRunner().invoke(main, ["backfill", str(var / "other"), "--home", str(var / "home")])

    assert result.exit_code == 2
    assert "has no family 'dice', but coin" in result.output


def test_without_raw_envelopes_nothing_is_changed(var):
    shutil.rmtree(var / "home" / "raw")
    before = contents(var / "home" / "examples")

    result = run(var, code=2)

    assert "no_raw" in result.output
    assert contents(var / "home" / "examples") == before


def test_a_field_that_no_old_event_has_is_named(served_home, tmp_path):
    more = '[[features]]\nname = "z"\nfield = "z"\n'
    var = with_new_features(served_home, tmp_path / "var", more)
    declared = var / "coin" / "family.toml"
    declared.write_text(declared.read_text().replace('x = "float"', 'x = "float", z = "float"', 1))

    result = run(var, code=2)

    assert "field_missing" in result.output
    assert "asked.z (1,200 events)" in result.output


@pytest.mark.parametrize("at", [0.02, 0.5, 0.99])
def test_a_damaged_raw_file_costs_what_lies_in_it_and_is_counted(backfilled, var, at):
    (path,) = (var / "home" / "raw").glob("*.raw")
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 0xFF
    path.write_bytes(data)
    home, family = Home(var / "home"), Family.load(var / "coin")

    with owned(home) as db:
        filled = fill(home, db, family, known_releases(home, "coin"), lambda _text: None)

    lost = {name: n for found in filled.devices.values() for name, n in found.lost.items()}
    whole = {row[:3]: row for row in rows(Home(backfilled[0] / "home"), family.spec.hash)}
    assert filled.damaged_bytes > 0
    assert lost.keys() <= {"not_kept", "before_raw"}
    assert sum(lost.values()) == ENVELOPE_RECORDS
    assert 0 < filled.twins < len(whole)
    assert all(whole[row[:3]] == row for row in rows(home, family.spec.hash))


def test_values_that_were_logged_otherwise_stop_it_before_anything_is_written(var):
    home, family = Home(var / "home"), Family.load(var / "coin")
    known, before = known_releases(home, "coin"), contents(home.archive)
    text = (var / "coin" / "features.toml").read_text().replace("span_s = 30.0", "span_s = 31.0")
    family.spec = Spec.from_toml(text)
    logged = family.spec.subset(["side", "x", "seen"])  # what the home believes, and it is wrong

    believed = Known(dict.fromkeys(known.specs, logged), known.saw_labels)
    with owned(home) as db, pytest.raises(SkewError, match=r"seen \("):
        fill(home, db, family, believed, lambda _text: None)

    assert contents(home.archive) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from cloud_learner.config import Home
from cloud_learner.experiment.backfill import backfill

left = int(sys.argv[3])

def tell(text):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

backfill(Path(sys.argv[1]), Home(Path(sys.argv[2])), tell)
"""


def killed(var: Path, told: int) -> int:
    """The exit status of a backfill in a process of its own, killed after so many words."""
    command = [sys.executable, "-c", KILLED, str(var / "coin"), str(var / "home"), str(told)]
    return subprocess.run(command, timeout=60, check=False).returncode


def test_killed_when_the_twins_are_written_none_is_written_twice(served_home, backfilled, var):
    home, family = Home(var / "home"), Family.load(var / "coin")

    assert killed(var, 1) == -signal.SIGKILL
    with owned(home) as db:
        again = fill(home, db, family, known_releases(home, "coin"), lambda _text: None)

    spec = family.spec.hash
    assert (again.whole, again.twins) == (1200, 0)
    assert rows(home, spec) == rows(Home(backfilled[0] / "home"), spec)


def test_killed_before_the_last_write_it_offers_the_same_release_and_no_second(
    served_home, backfilled, tmp_path
):
    var = tmp_path / "var"
    shutil.copytree(backfilled[0], var)
    own, before = (Home(each / "home").of("coin") for each in (var, served_home))
    own.write_origin(msgspec.structs.replace(before.origin(), folder=str(var / "coin")))
    campaign = own.campaign.read_bytes()

    found = json.loads(run(var, "--json").stdout)

    assert found["released"]["release"] == backfilled[1]["released"]["release"]
    assert found["filled"]["twins"] == 0
    assert own.campaign.read_bytes() == campaign


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_any_moment_it_comes_to_the_same_end(served_home, backfilled, var, seed):
    home, chance = var / "home", random.Random(seed)

    command = [sys.executable, "-c", KILLED, str(var / "coin"), str(home), "99"]
    running = subprocess.Popen(command)
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.wait(timeout=chance.uniform(0.5, 6.0))
    running.kill()
    running.wait()
    run(var)

    spec = specs(served_home, var)[1].hash
    assert rows(Home(home), spec) == rows(Home(backfilled[0] / "home"), spec), f"seed {seed}"
    origins = [Home(each / "home").of("coin").origin() for each in (var, backfilled[0])]
    assert origins[0].sha256 == origins[1].sha256, f"seed {seed}"
