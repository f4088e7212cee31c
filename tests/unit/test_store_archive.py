"""The archive: examples come back whole, to whoever reads Parquet, and files belong to commits."""

from __future__ import annotations

import json
import math
import os
import struct
from datetime import date, datetime

import duckdb
import msgspec
import pytest

from cloud_learner.store import parquet
from cloud_learner.store.archive import DAYS_AT_ONCE_MAX, Archive
from cloud_learner.store.examples import Example
from edge_runtime.errors import CapacityError, ConfigError
from edge_runtime.wire.messages import Scored

FEATURES = struct.pack("<3f", 1.5, -2.0, 0.0)  # ends in NUL bytes, which must not get lost
DAY_S = 86_400.0


def example(seq, time_s=10.0, **other):
    plain = Example(
        device="EWR",
        epoch=2,
        seq=seq,
        family="fam",
        time_s=time_s,
        label_time_s=12.0,
        features=FEATURES,
        spec="spec1",
        label=1.0,
        propensity=0.5,
        scored=[Scored("r2", "canary", [0.25]), Scored("r1", "stable", [0.75, 0.5])],
        arrived_s=20.0,
        matured_s=21.0,
        kind="scheduled",
        fields={"carrier": "UA", "distance": 1400},
        final=False,
        revision=3,
        weight=2.5,
        early=True,
    )
    return msgspec.structs.replace(plain, **other)


def rows(relation):
    return [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]


def seqs(archive, names=None):
    return [s for (s,) in archive.query("SELECT seq FROM examples ORDER BY seq", names).fetchall()]


def below(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_an_example_comes_back_whole(tmp_path):
    archive = Archive(tmp_path / "archive")
    names = archive.write([example(4)], 1)
    (row,) = rows(archive.query("SELECT * FROM examples", names))
    assert json.loads(row.pop("fields")) == {"carrier": "UA", "distance": 1400}
    assert row == {
        "device": "EWR",
        "epoch": 2,
        "seq": 4,
        "family": "fam",
        "time_s": 10.0,
        "label_time_s": 12.0,
        "features": [1.5, -2.0, 0.0],
        "spec": "spec1",
        "label": 1.0,
        "propensity": 0.5,
        "scored": [
            {"release": "r2", "arm": "canary", "outputs": [0.25]},
            {"release": "r1", "arm": "stable", "outputs": [0.75, 0.5]},
        ],
        "arrived_s": 20.0,
        "matured_s": 21.0,
        "kind": "scheduled",
        "final": False,
        "revision": 3,
        "weight": 2.5,
        "early": True,
        "time": datetime(1970, 1, 1, 0, 0, 10),  # noqa: DTZ001 - Parquet's is without a zone
    }


def test_every_field_of_an_example_is_a_column(tmp_path):
    archive = Archive(tmp_path / "archive")
    assert archive.query("SELECT * FROM examples").columns == [*Example.__struct_fields__, "time"]


def test_files_lie_by_family_and_day_of_the_event_in_the_order_of_the_examples(tmp_path):
    archive = Archive(tmp_path / "archive")
    given = [
        example(1, DAY_S - 0.001),
        example(3, DAY_S),
        example(2, DAY_S + 5),
        example(5, -1.0),
        example(4, 0.0, family="other"),
    ]
    names = archive.write(given, 7)
    assert sorted(names) == below(tmp_path / "archive")
    assert {name: seqs(archive, [name]) for name in names} == {
        "family=fam/day=1970-01-01/000000000007.parquet": [1],
        "family=fam/day=1970-01-02/000000000007.parquet": [2, 3],
        "family=fam/day=1969-12-31/000000000007.parquet": [5],
        "family=other/day=1970-01-01/000000000007.parquet": [4],
    }
    in_order = archive.query("SELECT seq FROM examples", names[1:2]).fetchall()
    assert in_order == [(3,), (2,)]


def test_examples_of_as_many_days_as_examples_do_not_make_as_many_files(tmp_path):
    archive = Archive(tmp_path / "archive")
    names = archive.write([example(at, at * DAY_S) for at in range(DAYS_AT_ONCE_MAX + 50)], 1)
    assert len(names) == DAYS_AT_ONCE_MAX
    assert seqs(archive, names) == list(range(DAYS_AT_ONCE_MAX + 50))


def test_duckdb_reads_the_folder_as_it_is(tmp_path):
    folder = tmp_path / "o'hare"
    Archive(folder).write([example(1), example(2, 3 * DAY_S)], 1)
    sql = "SELECT seq, family, day, features, scored[1].arm FROM read_parquet(?) ORDER BY seq"
    assert duckdb.execute(sql, [f"{folder}/**/*.parquet"]).fetchall() == [
        (1, "fam", date(1970, 1, 1), [1.5, -2.0, 0.0], "canary"),
        (2, "fam", date(1970, 1, 4), [1.5, -2.0, 0.0], "canary"),
    ]


def test_polars_reads_the_folder_as_it_is(tmp_path):
    polars = pytest.importorskip("polars", reason="polars is not installed: pip install polars")
    Archive(tmp_path / "archive").write([example(1), example(2, 3 * DAY_S)], 1)
    by_glob = polars.read_parquet(tmp_path / "archive" / "**" / "*.parquet").sort("seq")
    by_folder = polars.read_parquet(tmp_path / "archive").sort("seq")
    assert by_glob.columns == [*Example.__struct_fields__, "time"]
    assert by_glob.schema["features"] == polars.List(polars.Float32)
    assert by_glob["features"].to_list() == [[1.5, -2.0, 0.0]] * 2
    assert by_glob["scored"][1][1] == {"release": "r1", "arm": "stable", "outputs": [0.75, 0.5]}
    assert by_folder.columns == [*by_glob.columns, "day"]
    assert by_folder["day"].to_list() == [date(1970, 1, 1), date(1970, 1, 4)]
    assert by_folder["family"].to_list() == ["fam", "fam"]


HOSTILE = {
    "text": example(
        1, device="x\0y'\"\n\ud7ff", kind="\0", spec="", fields={"k\0'": "\0", "": 1e300}
    ),
    "arms": example(2, scored=[Scored("\0\\u0000", '"}]', [1e308, 5e-324]), Scored("", "", [])]),
    "no_arms": example(3, scored=[], fields={}),
    "not_numbers": example(4, scored=[Scored("r", "a", [math.nan, math.inf])], label=math.nan),
    "far": example(5, 1e300, label_time_s=-1e300),
    "long_ago": example(6, -1e300),
    "no_time": example(7, math.nan),
    "no_features": example(8, features=b""),
    "wide": example(9, features=bytes(4 * 250_000)),
    "large": example((1 << 53) - 1, epoch=(1 << 53) - 1),
    "family": example(11, family="../a=b/%2e\0 é"),
    "dots": example(12, family=".."),
}


@pytest.mark.parametrize("order", [list(HOSTILE), list(reversed(HOSTILE))], ids=["first", "last"])
def test_nothing_that_a_device_says_stops_the_writing_or_leaves_the_folder(tmp_path, order):
    archive = Archive(tmp_path / "archive")
    given = [HOSTILE[name] for name in order]
    names = archive.write(given, 1)
    found = {row["seq"]: row for row in rows(archive.query("SELECT * FROM examples", names))}
    assert sorted(found) == sorted(each.seq for each in given)
    for each in given:
        row = found[each.seq]
        assert [row["device"], row["kind"], row["spec"], row["family"]] == [
            *(each.device, each.kind, each.spec, each.family),
        ]
        assert json.loads(row["fields"]) == each.fields
        assert len(row["features"]) * 4 == len(each.features)
        assert [(s["release"], s["arm"], list(s["outputs"])) for s in row["scored"]] == [
            (s.release, s.arm, [v if math.isfinite(v) else None for v in s.outputs])
            for s in each.scored
        ]
        assert row["time_s"] == each.time_s or math.isnan(each.time_s)
    assert below(tmp_path) == sorted(f"archive/{name}" for name in names)
    assert len(duckdb.from_parquet(f"{tmp_path}/archive/**/*.parquet").fetchall()) == len(given)


def test_only_the_named_files_are_read(tmp_path):
    archive = Archive(tmp_path / "archive")
    first, _ = archive.write([example(1)], 1), archive.write([example(2)], 2)
    assert seqs(archive, first) == [1]
    assert seqs(archive) == [1, 2]


def test_no_files_are_an_empty_table_with_the_same_columns(tmp_path):
    archive = Archive(tmp_path / "archive")
    full = archive.query("SELECT * FROM examples", archive.write([example(1)], 1))
    empty = archive.query("SELECT * FROM examples", [])
    assert empty.fetchall() == []
    assert (empty.columns, empty.types) == (full.columns, full.types)


def test_no_examples_are_no_file(tmp_path):
    archive = Archive(tmp_path / "archive")
    assert archive.write([], 1) == []
    assert below(tmp_path) == []


def test_writing_a_commit_again_replaces_its_file(tmp_path):
    archive = Archive(tmp_path / "archive")
    archive.write([example(1), example(2)], 7)
    names = archive.write([example(3)], 7)
    assert seqs(archive) == [3]
    assert below(tmp_path / "archive") == names


def test_adopting_removes_our_files_that_no_commit_names_and_nothing_else(tmp_path):
    folder = tmp_path / "archive"
    archive = Archive(folder)
    kept, orphan = archive.write([example(1)], 1), archive.write([example(2)], 2)
    unfinished = tmp_path / ".archive.unfinished"
    (unfinished / "000000000003.parquet.tmp").write_bytes(b"torn")
    (unfinished / "spill").mkdir()
    (unfinished / "spill" / "block.tmp").write_bytes(b"of a merge")
    (folder / "mine.parquet").write_bytes(b"of somebody else")
    assert Archive(folder).adopt(kept) == orphan
    assert below(tmp_path) == [f"archive/{kept[0]}", "archive/mine.parquet"]


def test_a_named_file_that_is_gone_is_an_error_and_removes_nothing(tmp_path):
    archive = Archive(tmp_path / "archive")
    names = archive.write([example(1)], 1)
    with pytest.raises(ConfigError) as caught:
        archive.adopt(["family=fam/day=1970-01-01/000000000009.parquet"])
    assert caught.value.code == "archive_incomplete"
    assert below(tmp_path / "archive") == names


def test_a_write_that_fails_leaves_nothing_behind_not_even_of_other_days(tmp_path):
    folder = tmp_path / "archive"
    archive = Archive(folder)
    blocked = folder / "family=fam/day=1970-01-02/000000000001.parquet"
    blocked.mkdir(parents=True)  # the rename will fail
    with pytest.raises(CapacityError) as caught:
        archive.write([example(1), example(2, DAY_S)], 1)
    assert caught.value.code == "disk_full"
    assert below(tmp_path) == []
    blocked.rmdir()
    assert len(archive.write([example(1), example(2, DAY_S)], 1)) == 2
    assert seqs(archive) == [1, 2]


def test_a_link_to_another_disk_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "archive").symlink_to(tmp_path / "disk" / "big")
    archive = Archive(tmp_path / "archive")
    archive.write([example(1)], 1)
    assert sorted(os.listdir(tmp_path / "disk")) == [".big.unfinished", "big"]
    assert seqs(archive) == [1]


def aged(folder, name):
    """Take from a file the columns that files had no names for when there was no early example."""
    path, older = folder / name, folder / "older"
    source = (
        f"SELECT * EXCLUDE (weight, early) FROM read_parquet('{path}', hive_partitioning = false)"
    )
    duckdb.connect().execute(f"COPY ({source}) TO '{older}' (FORMAT parquet)")
    os.replace(older, path)


def test_files_without_weights_are_read_as_mature_examples_of_weight_one(tmp_path):
    folder = tmp_path / "archive"
    archive = Archive(folder)
    (old,) = archive.write([example(2), example(1)], 1)
    (new,) = archive.write([example(3)], 2)
    aged(folder, old)
    columns = [*Example.__struct_fields__, "time"]
    for names in ([old], [old, new]):
        assert archive.query("SELECT * FROM examples", names).columns == columns
    found = archive.query("SELECT seq, weight, early FROM examples", [old, new]).fetchall()
    assert found == [(2, 1.0, False), (1, 1.0, False), (3, 2.5, True)]


def test_a_day_of_older_files_is_compacted_to_one_of_the_present_form(tmp_path):
    folder = tmp_path / "archive"
    archive = Archive(folder)
    names = [archive.write([example(seq)], seq)[0] for seq in (1, 2)]
    aged(folder, names[0])
    paths = [folder / name for name in names]
    assert parquet.merge(paths, tmp_path / "day.parquet", tmp_path, 100) == 2
    read = duckdb.sql(f"SELECT seq, weight, early FROM '{tmp_path / 'day.parquet'}'").fetchall()
    assert read == [(1, 1.0, False), (2, 2.5, True)]
