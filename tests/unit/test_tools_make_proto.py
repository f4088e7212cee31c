"""tools/make-proto: the committed schemas equal the structs, and drift is named."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "make-proto"


@pytest.fixture(scope="module")
def make_proto():
    loader = SourceFileLoader("make_proto", str(TOOL))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("make_proto", loader))
    loader.exec_module(module)
    return module


def test_the_committed_schemas_are_those_of_the_structs():
    result = subprocess.run(
        [sys.executable, TOOL, "--check"], capture_output=True, text=True, check=False
    )

    assert (result.stderr, result.returncode) == ("", 0)


def test_a_stale_a_missing_and_a_left_over_schema_are_named(make_proto, tmp_path):
    (tmp_path / "same.json").write_text("{}")
    (tmp_path / "stale.json").write_text("{}")
    (tmp_path / "left-over.json").write_text("{}")
    wanted = {"same.json": "{}", "stale.json": '{"new": 1}', "missing.json": "{}"}

    names = make_proto.differing(tmp_path, wanted)

    assert names == ["left-over.json", "missing.json", "stale.json"]
    assert make_proto.report(names) == 1


def test_array_positions_carry_their_names_and_the_tag_comes_first(make_proto):
    schema = json.loads(make_proto.text_of("record"))

    label = schema["$defs"]["LabelRecord"]["prefixItems"]
    assert [item["title"] for item in label] == [
        *("tag", "family", "epoch", "seq", "value", "time_s", "final")
    ]


def test_bytes_are_shown_as_messagepack_bin(make_proto):
    schema = json.loads(make_proto.text_of("record"))

    features = schema["$defs"]["PredictionRecord"]["prefixItems"][6]
    assert features == {"type": "string", "title": "features", "x-msgpack": "bin"}


def test_a_wrong_argument_is_a_usage_error(make_proto):
    assert make_proto.main(["--chekc"]) == 2
