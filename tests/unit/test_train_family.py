"""A family folder: loaded whole, or refused with one error that names file and key."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cloud_learner.train.family import Family, load_module
from edge_runtime.errors import ConfigError

FLIGHTS = Path(__file__).parents[2] / "models" / "flight_delay"
ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


def refused(coin, tmp_path, **changes) -> ConfigError:
    """The error of loading the folder with one part of each named file replaced."""
    files = {"family": "family.toml", "features": "features.toml", "network": "network.py"}
    folder = coin.write_family(tmp_path / "f", {files[k]: change for k, change in changes.items()})
    with pytest.raises(ConfigError) as caught:
        Family.load(folder)
    assert str(folder) in caught.value.message
    return caught.value


def test_the_family_of_this_repository_is_whole():
    family = Family.load(FLIGHTS)

    assert family.name == "flight_delay"
    assert family.interface.kinds["scheduled"].predicts
    assert "dep_delay_1h" in family.spec.names


def test_a_family_declares_what_its_files_say(coin, tmp_path):
    family = Family.load(coin.write_family(tmp_path))

    assert family.spec.names == ["side", "x", "seen"]
    assert family.interface.kinds["asked"].fields == {"side": "str", "x": "float"}
    assert family.interface.output == "heads"
    label = family.config.label
    assert (label.window_s, label.expiry, label.amend_s) == (20.0, "drop", 0.0)


def test_a_restricted_family_builds_networks_for_its_own_features(coin, tmp_path):
    family = Family.load(coin.write_family(tmp_path)).restricted(["x", "side"])

    assert family.spec.names == ["side", "x"]
    assert family.build_student(ROWS[:, :2]).out.in_features == 2


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('output = "heads"', 'outptu = "heads"', "outptu"),
        ("batch_size", "batchsize", "batchsize"),
        ("batch_size = 50", "batch_size = 1", "learning.batch_size"),
        ("device_cap = 30", "device_cap = 51", "device_cap"),
        ("seed = 7", "seed = -1", "learning.seed"),
        ("window_s = 20.0", "window_s = 0.0", "label.window_s"),
        ("window_s = 20.0", "window_s = 'long'", "label.window_s"),
        ("window_s = 20.0", "", "window_s"),
        ("window_s = 20.0", "window_s = 20.0\nexpiry = 'positive'", "label.expiry"),
        ("window_s = 20.0", "window_s = 20.0\namend_s = -1.0", "label.amend_s"),
        ('x = "float"', 'x = "flaot"', "flaot"),
        ("predicts = true", "", "predicts"),
        ('name = "coin"', 'name = "co.in"', "co.in"),
        ('selector = { site = "a" }', "canary_share = 1.0\nselector = {}", "canary_share"),
        ("[label]", "[label", "line"),
    ],
)
def test_an_error_in_family_toml_names_file_and_key(coin, tmp_path, old, new, key):
    error = refused(coin, tmp_path, family=(old, new))

    assert "family.toml" in error.message
    assert key in error.message


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (('"mean"', '"mode"'), "unknown_statistic", ["seen", "window.statistic", "mode"]),
        (("bounds", "bound"), "unknown_key", ["x", "bound"]),
        (('over = "seen"', 'over = "sen"'), "bad_family", ["seen", "sen"]),
        (('value = "y"', 'value = "z"'), "bad_family", ["seen", "z"]),
        (('field = "x"', 'field = "xx"'), "bad_family", ["x", "asked", "xx"]),
        (('vocabulary = ["left", "right"]', ""), "bad_family", ["side", "number"]),
        (('over = "seen"', 'over = "seen", key = "side"'), "bad_family", ["seen", "side"]),
        (("version = 1", "version = "), "bad_toml", []),
        (("version = 1", ""), "bad_version", ["version"]),
    ],
)
def test_an_error_in_features_toml_names_file_feature_and_key(coin, tmp_path, change, code, words):
    error = refused(coin, tmp_path, features=change)

    assert error.code == code
    for word in ("features.toml", *words):
        assert word in error.message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("class Network(", "class Network((", ["SyntaxError"]),
        ("import torch\n", "import torhc\n", ["torhc"]),
        ("def build_student", "def built_student", ["build_student"]),
    ],
)
def test_an_error_in_network_py_names_the_file_and_what_is_wrong(coin, tmp_path, old, new, words):
    error = refused(coin, tmp_path, network=(old, new))

    for word in ("network.py", *words):
        assert word in error.message


@pytest.mark.parametrize("name", ["family.toml", "features.toml", "network.py"])
def test_a_missing_file_is_named(coin, tmp_path, name):
    with pytest.raises(ConfigError, match=name) as caught:
        Family.load(coin.write_family(tmp_path, {name: ("", None)}))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("return Network(spec, rows, 0.0)", "return Network(spec, rows)", "dropout"),
        ("nn.Linear(spec.size, 1)", "nn.Linear(spec.size, 2)", "(2, 2)"),
        ("nn.Linear(spec.size, 1)", "nn.Linear(spec.size + 1, 1)", "build_student"),
    ],
)
def test_a_network_that_cannot_be_built_or_run_is_named(coin, tmp_path, old, new, word):
    family = Family.load(coin.write_family(tmp_path, {"network.py": (old, new)}))

    with pytest.raises(ConfigError, match=r"network\.py: build_student") as caught:
        family.build_student(ROWS)
    assert word in caught.value.message


def test_a_network_file_may_define_dataclasses_with_late_annotations(tmp_path):
    path = tmp_path / "network.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Sizes:\n    hidden: int = 3\n"
    )

    assert load_module(path).Sizes().hidden == 3


def test_building_draws_no_more_random_numbers_than_the_network_itself(coin, tmp_path):
    family = Family.load(coin.write_family(tmp_path))
    torch.manual_seed(3)
    family._network.build_teacher(family.spec, ROWS)
    alone = torch.get_rng_state()

    torch.manual_seed(3)
    family.build_teacher(ROWS)

    assert torch.equal(alone, torch.get_rng_state())
