"""Tables from CSV files: their cells, and errors that name file and row."""

from __future__ import annotations

import pytest

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
