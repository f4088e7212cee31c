"""From a data file to the first signed release, through files, keys and a device's own checks."""

from __future__ import annotations

import hashlib
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from cloud_learner.bootstrap import bootstrap, labelled_rows
from cloud_learner.cli import main
from cloud_learner.config import Home
from cloud_learner.cycle import Cycle
from cloud_learner.evaluate.offline import load_set
from cloud_learner.experiment.replay import read_rows
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.registry import Registry
from cloud_learner.train.family import Family
from edge_runtime.errors import ConfigError
from edge_runtime.inference.pipeline import Pipeline
from edge_runtime.inference.slot import load_arm

ROWS = 800
"""Of the data file; three of four ask."""


@pytest.fixture(scope="module")
def made(coin, tmp_path_factory):
    """A family, its data and a home that a bootstrap made of them, with what it told."""
    var = tmp_path_factory.mktemp("bootstrap")
    folder = coin.write_family(var / "coin")
    data = coin.write_csv(var / "data.csv", coin.stream(ROWS))
    told = []
    judgement = bootstrap(folder, data, Home(var / "home"), told.append)
    return folder, data, Home(var / "home"), judgement, told


def test_the_first_release_passed_the_gate_and_says_so(made):
    _, _, home, judgement, told = made
    (verdict,) = Lineage(home.lineage).read("verdict")
    (release,) = Lineage(home.lineage).read("release")

    assert judgement.outcome == verdict["outcome"] == "pass"
    assert judgement.sha256 == release["sha256"] == home.of("coin").origin().sha256
    assert release["release"] == home.of("coin").origin().release
    assert release["counter"] == 1
    assert "600 labelled rows" in told[0]
    assert home.of("coin").origin().release in told[-1]


def test_the_package_learned_something_and_a_device_can_load_it(made):
    _, _, home, judgement, _ = made
    path = Registry(home.registry).path(judgement.sha256)

    arm = load_arm(path, judgement.sha256, "stable", "r1", 1.0)

    assert arm.info.family == "coin"
    assert judgement.evidence.forms["int8"].static.quality > 0.65
    assert judgement.evidence.forms["int8"].static.rows == 600 // 8


def test_static_rows_are_set_aside_before_anything_is_learned(made):
    folder, data, home, _, _ = made
    rows, _ = labelled_rows(Family.load(folder), data)
    cycle = restored(made)
    static = {row.tobytes() for row in load_set(home.of("coin").static).features}
    remembered = {row.tobytes() for row in cycle.replicas.reservoir.state()["features"]}
    reference = {row.tobytes() for row in load_set(home.of("coin").reference).features}

    assert len(static) == 75
    assert static <= {row.tobytes() for row in rows.features}
    assert not static & (remembered | reference)


def restored(made) -> Cycle:
    folder, _, home, _, _ = made
    cycle = Cycle(Family.load(folder), load_set(home.of("coin").reference).features)
    cycle.restore(home.of("coin").checkpoint)
    cycle.take_graph(home.of("coin").graph)
    return cycle


def test_the_checkpoint_goes_on_from_the_very_package_that_was_released(made):
    package = restored(made).candidate().package

    assert made[3].sha256 == hashlib.sha256(package).hexdigest()


def test_features_of_history_are_those_that_a_device_would_have_computed(made):
    folder, data, home, judgement, _ = made
    family = Family.load(folder)
    rows, learned_through_s = labelled_rows(family, data)
    package = Registry(home.registry).path(judgement.sha256)
    pipelines = {name: Pipeline("coin") for name in "ab"}
    for pipeline in pipelines.values():
        pipeline.swap([load_arm(package, judgement.sha256, "stable", "r1", 1.0)])
    vectors = []
    for row in read_rows(data, family.interface):
        pipeline = pipelines[row.device]
        if row.label is not None:
            pipeline.admitted(row.kind, row.time_s, row.fields)
            [packed] = pipeline.rows(row.time_s, row.fields)
            vectors.append(np.frombuffer(packed, "<f4"))
        pipeline.move(row.kind, row.time_s, row.fields)
        newest_s = row.time_s

    assert np.array_equal(np.stack(vectors), rows.features)
    assert learned_through_s == newest_s


def test_a_second_bootstrap_leaves_a_home_as_it_is(made):
    folder, data, home, _, _ = made
    before = {path: path.stat().st_mtime_ns for path in home.root.rglob("*")}

    with pytest.raises(ConfigError, match="unchanged") as caught:
        bootstrap(folder, data, home, lambda _text: None)

    assert caught.value.code == "family_exists"
    assert before == {path: path.stat().st_mtime_ns for path in home.root.rglob("*")}


def test_the_same_file_and_seed_give_the_same_package(made, tmp_path):
    folder, data, _, judgement, _ = made

    again = bootstrap(folder, data, Home(tmp_path / "home"), lambda _text: None)

    assert judgement.sha256 == again.sha256


def test_a_gate_that_refuses_ends_with_code_3_and_no_home(coin, tmp_path):
    folder = coin.write_family(
        tmp_path / "coin", {"family.toml": ("quality_min = 0.6", "quality_min = 0.99")}
    )
    data = coin.write_csv(tmp_path / "data.csv", coin.stream(ROWS))

    done = CliRunner().invoke(
        main, ["bootstrap", str(folder), str(data), "--home", str(tmp_path / "home")]
    )

    assert done.exit_code == 3
    assert "must be at least 0.9900" in done.stderr
    assert Home(tmp_path / "home").families() == []
    assert not (tmp_path / "home" / "keys").exists()
    (verdict,) = Lineage(tmp_path / "home" / "lineage").read("verdict")
    assert verdict["outcome"] == "fail"


def test_a_bootstrap_that_was_killed_before_its_last_write_is_done_again(made, tmp_path):
    folder, data, home, _, _ = made
    again = Home(tmp_path / "home")
    shutil.copytree(home.root, again.root)
    again.of("coin").marker.unlink()

    bootstrap(folder, data, again, lambda _text: None)

    assert again.of("coin").origin() == home.of("coin").origin()
    assert [entry["counter"] for entry in Lineage(again.lineage).read("release")] == [1]
    assert again.trusted_root.read_bytes() == home.trusted_root.read_bytes()
