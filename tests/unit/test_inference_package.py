"""The package's metadata and the interface: what is taken, what is refused, and what is named."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from edge_runtime.errors import PackageError, RequestError
from edge_runtime.features.spec import Spec
from edge_runtime.inference.package import (
    Interface,
    Kind,
    check_agreement,
    metadata_of,
    read_package,
)

GOOD = {"carrier": "AA", "distance": 1.5}


@pytest.fixture
def metadata(toy_interface, toy_spec):
    return metadata_of(
        toy_interface,
        toy_spec,
        golden_inputs=np.arange(10, dtype=np.float32).reshape(2, 5),
        golden_outputs=np.array([[0.25], [0.5]], dtype=np.float32),
        tolerance=1e-4,
        provenance={"parent": "r1", "rows": 500},
    )


def test_a_package_reads_back_as_it_was_written(metadata, toy_interface, toy_spec):
    info = read_package(metadata)
    assert (info.family, info.interface, info.spec) == ("toy", toy_interface, toy_spec)
    assert info.golden_inputs.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert info.golden_outputs.tolist() == [[0.25], [0.5]]
    assert (info.tolerance, info.provenance) == (1e-4, {"parent": "r1", "rows": 500})


@pytest.mark.parametrize("key", ["family", "interface", "features", "golden", "provenance"])
def test_a_missing_key_is_named(metadata, key):
    del metadata[f"headwater.{key}"]
    with pytest.raises(PackageError) as caught:
        read_package(metadata)
    assert caught.value.code == "missing_metadata"
    assert f"headwater.{key}" in caught.value.message


def test_a_package_whose_texts_this_library_reads_otherwise_is_refused(text_interface, text_spec):
    spec = text_spec(8)
    rows = np.float32([spec.encoders["text"](text) for text in ("my card", "")])
    answers = np.full((2, 3), 1 / 3, np.float32)
    golden = {"golden_inputs": rows, "golden_outputs": answers, "tolerance": 1e-4}
    metadata = metadata_of(text_interface, spec, **golden, provenance={})
    told = metadata["headwater.golden"]
    here = spec.encoders["text"].digest
    assert told.count(here) == 1
    metadata["headwater.golden"] = told.replace(here, "0" * 16)
    with pytest.raises(PackageError, match="other ids on this machine") as caught:
        read_package(metadata)
    assert caught.value.code == "other_tokens"
    metadata["headwater.golden"] = told.replace(f',"tokens":"{here}"', "")
    assert read_package(metadata).spec == spec


def test_a_package_without_texts_says_nothing_of_them(metadata):
    assert "tokens" not in metadata["headwater.golden"]


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"text"', "[" * 100_000])
@pytest.mark.parametrize("key", ["interface", "features", "golden", "provenance"])
def test_garbage_under_a_key_is_named(metadata, key, text):
    metadata[f"headwater.{key}"] = text
    with pytest.raises(PackageError) as caught:
        read_package(metadata)
    assert caught.value.code == "bad_metadata"
    assert f"headwater.{key}" in caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, 4]},
        {"shape": [0, 5]},
        {"shape": [3, 5]},
        {"tolerance": -1},
        {"inputs_b64": "!"},
        {"outputs_b64": ""},
        {"outputs_b64": "AAA="},
        {"outputs_b64": "AAAAAA=="},
        {"outputs_b64": "AADAfwAAwH8="},
    ],
)
def test_golden_samples_that_cannot_be_checked_are_refused(metadata, change):
    golden = msgspec.json.decode(metadata["headwater.golden"]) | change
    metadata["headwater.golden"] = msgspec.json.encode(golden).decode()
    with pytest.raises(PackageError) as caught:
        read_package(metadata)
    assert caught.value.code == "bad_metadata"


def test_an_interface_of_a_later_version_or_another_family_is_refused(metadata, toy_interface):
    for change in ({"version": 2}, {"family": "other"}):
        interface = msgspec.structs.replace(toy_interface, **change)
        text = msgspec.json.encode(interface).decode()
        with pytest.raises(PackageError) as caught:
            read_package(metadata | {"headwater.interface": text})
        assert caught.value.code == "bad_metadata"


@pytest.mark.parametrize(
    ("kinds", "named"),
    [
        ({}, "no kind"),
        ({"scheduled": Kind(predicts=True, fields={"carrier": "str"})}, "scheduled.distance"),
        (
            {"scheduled": Kind(predicts=True, fields={"carrier": "str", "distance": "str"})},
            "scheduled.distance",
        ),
        (
            {"scheduled": Kind(predicts=True, fields={"carrier": "str", "distance": "int"})},
            "'departed'",
        ),
        (
            {
                "scheduled": Kind(predicts=True, fields={"carrier": "str", "distance": "int"}),
                "departed": Kind(predicts=False, fields={"carrier": "str"}),
            },
            "departed.delay",
        ),
        (
            {
                "scheduled": Kind(predicts=True, fields={"carrier": "str", "distance": "int"}),
                "departed": Kind(predicts=False, fields={"delay": "int"}),
            },
            "departed.carrier",
        ),
    ],
)
def test_features_that_the_events_cannot_feed_are_refused(toy_interface, metadata, kinds, named):
    interface = msgspec.structs.replace(toy_interface, kinds=kinds)
    with pytest.raises(PackageError) as caught:
        read_package(metadata | {"headwater.interface": msgspec.json.encode(interface).decode()})
    assert caught.value.code == "spec_mismatch"
    assert named in caught.value.message


KINDS = {
    "asked": Kind(predicts=True, fields={"who": "str", "n": "int", "x": "float"}),
    "seen": Kind(predicts=False, fields={"who": "str", "what": "str", "y": "float"}),
}
TABLE = '[tables.facts]\nversion = "1"\ncolumns = ["size"]\nrows = { a = [1.0] }\n'


@pytest.mark.parametrize(
    ("feature", "words"),
    [
        ('window = { over = "label", statistic = "mean", key = "what", span_s = 9 }', "asked.what"),
        ('window = { over = "labels", statistic = "count", span_s = 9 }', "'labels' is not a kind"),
        (
            'window = { over = "seen", statistic = "std", value = "what", span_s = 9 }',
            "seen.what to be a number",
        ),
        (
            'window = { over = "seen", statistic = "last", value = "y", key = "n", span_s = 9 }',
            "seen.n",
        ),
        ('lookup = { table = "facts", key = "what", column = "size" }', "asked.what"),
        (
            'lookup = { table = "facts", key = "x", column = "size" }',
            "asked.x to be text or an int",
        ),
        ('field = "x"\nhash = 8', "asked.x to be text or an int"),
        ('field = "who"\nbucket = [1.0]', "asked.who to be a number"),
        ('field = "nn"', "asked.nn"),
    ],
)
def test_a_source_that_the_interface_cannot_feed_is_refused_by_name(toy_interface, feature, words):
    spec = Spec.from_toml(f'version = 1\n[[features]]\nname = "f"\n{feature}\n{TABLE}')
    with pytest.raises(PackageError) as caught:
        check_agreement(msgspec.structs.replace(toy_interface, kinds=KINDS), spec)
    assert caught.value.code == "spec_mismatch"
    assert words in caught.value.message
    assert "'f'" in caught.value.message


@pytest.mark.parametrize(
    "feature",
    [
        'window = { over = "label", statistic = "mean", key = "who", span_s = 9 }',
        'window = { over = "seen", statistic = "distinct", value = "what", span_s = 9 }',
        'lookup = { table = "facts", key = "n", column = "size" }',
        'field = "n"\nhash = 8\none_hot = true',
        'cycle = { of = "day" }',
    ],
)
def test_a_source_that_the_interface_can_feed_is_taken(toy_interface, feature):
    spec = Spec.from_toml(f'version = 1\n[[features]]\nname = "f"\n{feature}\n{TABLE}')
    check_agreement(msgspec.structs.replace(toy_interface, kinds=KINDS), spec)


def test_no_kind_of_event_is_called_label(toy_interface, toy_spec):
    kinds = toy_interface.kinds | {"label": Kind(predicts=False, fields={})}
    with pytest.raises(PackageError, match="'label'"):
        check_agreement(msgspec.structs.replace(toy_interface, kinds=kinds), toy_spec)


@pytest.mark.parametrize(
    "fields",
    [
        GOOD,
        {"carrier": "", "distance": 0},
        {"distance": 2**63 - 1, "carrier": "Zoë ✈"},
        {"carrier": "x" * 1024, "distance": -1e308},
    ],
)
def test_events_of_the_interface_are_taken(toy_interface, fields):
    toy_interface.check("scheduled", 1.0, fields)
    toy_interface.check("scheduled", 1, fields)


@pytest.mark.parametrize(
    ("event", "code", "named"),
    [
        (("schedule", 1.0, GOOD), "unknown_kind", "'schedule'"),
        (("scheduled", 1.0, GOOD | {"tail": "N1"}), "unknown_field", "scheduled.tail"),
        (("scheduled", 1.0, {"carrier": "AA", "distanse": 1.0}), "unknown_field", "distanse"),
        (("scheduled", 1.0, {"carrier": "AA"}), "missing_field", "scheduled.distance"),
        (("scheduled", 1.0, {}), "missing_field", "scheduled.carrier"),
        (("scheduled", 1.0, GOOD | {"distance": "far"}), "wrong_type", "scheduled.distance"),
        (("scheduled", 1.0, GOOD | {"distance": True}), "wrong_type", "scheduled.distance"),
        (("scheduled", 1.0, GOOD | {"distance": None}), "wrong_type", "scheduled.distance"),
        (("scheduled", 1.0, GOOD | {"distance": [1]}), "wrong_type", "scheduled.distance"),
        (("scheduled", 1.0, GOOD | {"distance": np.float64(1)}), "wrong_type", "distance"),
        (("scheduled", 1.0, GOOD | {"carrier": 7}), "wrong_type", "scheduled.carrier"),
        (("scheduled", 1.0, GOOD | {"distance": math.nan}), "not_finite", "scheduled.distance"),
        (("scheduled", 1.0, GOOD | {"distance": -math.inf}), "not_finite", "scheduled.distance"),
        (("scheduled", 1.0, GOOD | {"distance": 2**63}), "out_of_range", "scheduled.distance"),
        (("scheduled", 1.0, GOOD | {"carrier": "x" * 1025}), "out_of_range", "scheduled.carrier"),
        (("scheduled", 1.0, GOOD | {"carrier": "\ud800"}), "out_of_range", "scheduled.carrier"),
        (("scheduled", math.nan, GOOD), "not_finite", "scheduled.time_s"),
        (("scheduled", "now", GOOD), "wrong_type", "scheduled.time_s"),
        (("scheduled", True, GOOD), "wrong_type", "scheduled.time_s"),
        (("scheduled", 10**400, GOOD), "out_of_range", "scheduled.time_s"),
    ],
)
def test_each_bad_event_has_its_code_and_names_its_field(toy_interface, event, code, named):
    with pytest.raises(RequestError) as caught:
        toy_interface.check(*event)
    assert caught.value.code == code
    assert named in caught.value.message


def test_a_float_is_no_int(toy_interface):
    interface = msgspec.structs.replace(
        toy_interface, kinds={"k": Kind(predicts=True, fields={"n": "int"})}
    )
    interface.check("k", 1.0, {"n": 3})
    with pytest.raises(RequestError) as caught:
        interface.check("k", 1.0, {"n": 3.0})
    assert caught.value.code == "wrong_type"


def test_a_typo_is_answered_with_the_nearest_word(toy_interface: Interface):
    with pytest.raises(RequestError) as caught:
        toy_interface.check("schedulled", 1.0, GOOD)
    assert "'scheduled'" in caught.value.hint
    with pytest.raises(RequestError) as caught:
        toy_interface.check("scheduled", 1.0, {"carrier": "AA", "distanse": 1.0})
    assert "'distance'" in caught.value.hint
