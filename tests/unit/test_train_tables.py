"""Tables from CSV files: their cells, and errors that name file and row; tokenizers from theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from cloud_learner.train.blocks import Inputs
from cloud_learner.train.family import Family
from cloud_learner.train.tables import expanded
from edge_runtime.errors import ConfigError

CSV = "code,height,zone,note\nABQ,1619.5,west,\nBOS,6,east,12\n\nXNA,,east,x\n"


def rows(folder, text=CSV, **keys):
    (folder / "places.csv").write_text(text)
    table = {"version": "1", "file": "places.csv", **keys}
    return expanded({"version": 1, "tables": {"places": table}}, folder)["tables"]["places"]


def test_a_column_of_numbers_holds_numbers_and_an_empty_cell_is_unknown(tmp_path):
    assert rows(tmp_path) == {
        "version": "1",
        "columns": ["height", "zone", "note"],
        "rows": {
            "ABQ": [1619.5, "west", None],
            "BOS": [6.0, "east", "12"],
            "XNA": [None, "east", "x"],
        },
    }


def test_columns_may_be_chosen(tmp_path):
    assert rows(tmp_path, columns=["zone"])["rows"] == {
        "ABQ": ["west"],
        "BOS": ["east"],
        "XNA": ["east"],
    }


@pytest.mark.parametrize(
    ("text", "keys", "words"),
    [
        ("", {}, ["places.csv", "cannot be read"]),
        ("code,height\nABQ\n", {}, ["row 'ABQ'", "1 cells of 2"]),
        ("code,height\nABQ,1\nABQ,2\n", {}, ["row 'ABQ'", "twice"]),
        ('code,height\nABQ,"1\n', {}, ["cannot be read"]),
        (CSV, {"columns": ["hight"]}, ["'hight'"]),
        (CSV, {"columns": "height"}, ["'height'"]),
        (CSV, {"columns": 5}, ["5"]),
        (CSV, {"rows": {}}, ["rows"]),
        (CSV, {"file": "other.csv"}, ["other.csv"]),
    ],
)
def test_an_error_names_the_file_and_what_is_wrong(tmp_path, text, keys, words):
    with pytest.raises(ConfigError) as caught:
        rows(tmp_path, text, **keys)
    assert caught.value.code == "bad_table"
    for word in ("table file", str(tmp_path), *words):
        assert word in caught.value.message


def test_a_family_carries_its_tables_in_its_spec(coin, tmp_path):
    feature = (
        '[[features]]\nname = "size"\nlookup = { table = "sides", key = "side", column = "n" }'
    )
    table = '[tables.sides]\nversion = "1"\nfile = "sides.csv"'
    change = ("version = 1", f"version = 1\n{feature}\n{table}")
    folder = coin.write_family(tmp_path / "coin", {"features.toml": change})
    (folder / "sides.csv").write_text("side,n\nleft,1\nright,2\n")
    spec = Family.load(folder).spec
    assert spec.names == ["size", "side", "x", "seen"]
    (folder / "sides.csv").write_text("side,n\nleft,1\nright,3\n")
    assert Family.load(folder).spec.hash != spec.hash
    (folder / "sides.csv").unlink()
    with pytest.raises(ConfigError, match=r"sides\.csv"):
        Family.load(folder)


def tokenizer_of(folder, **keys):
    return expanded({"tokenizers": {"tiny": keys}}, folder)["tokenizers"]["tiny"]


READ = """
from pathlib import Path
from cloud_learner.train.tables import expanded
keys = {"file": "model/tokenizer.json", "package": "of_words"}
print(expanded({"tokenizers": {"tiny": keys}}, Path("."))["tokenizers"]["tiny"])
"""


def test_a_tokenizer_is_read_from_a_file_without_its_layout(tmp_path, text_spec):
    text = text_spec().tokenizers["tiny"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(text), indent=2))
    assert tokenizer_of(tmp_path, file="tokenizer.json") == text


def test_a_tokenizer_is_read_from_an_installed_package(tmp_path, text_spec):
    text = text_spec().tokenizers["tiny"]
    package = tmp_path / "of_words"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "tokenizer.json").write_text(text)
    search = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    result = subprocess.run(
        [sys.executable, "-c", READ],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": search},
    )
    assert result.stdout.strip() == text


@pytest.mark.parametrize(
    ("keys", "code", "word"),
    [
        ({"file": "none.json"}, "bad_tokenizer", "none.json"),
        ({"file": "broken.json"}, "bad_tokenizer", "broken.json"),
        ({"file": "a.json", "package": "of_no_one"}, "bad_tokenizer", "is of_no_one installed?"),
        ({"file": "a.json", "pakage": "x"}, "unknown_key", "file and package"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_by_name(tmp_path, keys, code, word):
    (tmp_path / "broken.json").write_bytes(b"\xff{")
    with pytest.raises(ConfigError) as caught:
        tokenizer_of(tmp_path, **keys)
    assert (caught.value.code, word in str(caught.value)) == (code, True)


def text_feature(coin, folder, text, field="side"):
    """A family whose spec reads the event's text `field` as tokens, and nothing else."""
    folder = coin.write_family(folder)
    (folder / "tokenizer.json").write_text(text)
    (folder / "features.toml").write_text(
        "version = 1\n[[features]]\n"
        f'name = "text"\ntokens = {{ field = "{field}", tokenizer = "tiny", length = 8 }}\n'
        '[tokenizers.tiny]\nfile = "tokenizer.json"\n'
    )
    return folder


def test_a_family_carries_its_tokenizer_in_its_spec(coin, tmp_path, text_spec):
    text = text_spec().tokenizers["tiny"]
    spec = Family.load(text_feature(coin, tmp_path / "coin", text)).spec
    assert spec == text_spec(8).from_document(json.loads(spec.to_json()))
    assert spec.tokenizers == {"tiny": text}
    assert spec.padding is not None
    with pytest.raises(ConfigError, match=r"asked\.x to be text"):
        Family.load(text_feature(coin, tmp_path / "other" / "coin", text, field="x"))


def test_what_is_wrong_with_a_tokenizer_is_told_with_its_file(coin, tmp_path):
    with pytest.raises(ConfigError, match=r"features\.toml: tokenizer 'tiny'"):
        Family.load(text_feature(coin, tmp_path / "coin", "{}"))


def test_texts_are_no_words_side_by_side(text_spec):
    """Whose table would have a part for each column, each as large as the vocabulary."""
    with pytest.raises(ConfigError) as caught:
        Inputs(text_spec(8), [])
    assert caught.value.code == "text_columns"
    assert not any(column.is_key for column in text_spec(8).columns)
