"""The archive: rows come back as they were logged, and files belong to commits."""

from __future__ import annotations

import json
import struct

import pytest

from cloud_learner.store.archive import Archive, ArchivedRecord
from edge_runtime.errors import CapacityError, ConfigError
from edge_runtime.wire.messages import LabelRecord, ObservationRecord, PredictionRecord, Scored

FEATURES = struct.pack("<3f", 1.5, -2.0, 0.0)  # ends in NUL bytes, which must not get lost


def archived(seq, record, device="EWR", epoch=2):
    event_class = "label" if isinstance(record, LabelRecord) else "event"
    return ArchivedRecord(device, epoch, event_class, seq, record, b"raw", 0.0)


def prediction(seq):
    scored = [Scored("r2", "canary", [0.25]), Scored("r1", "stable", [0.75])]
    fields = {"carrier": "UA", "distance": 1400}
    record = PredictionRecord("fam", "scheduled", 10.0, fields, "spec1", FEATURES, 0.5, scored)
    return archived(seq, record)


def observation(seq):
    return archived(seq, ObservationRecord("fam", "landed", 11.0, {"delay": 3.5}))


def label(seq, *, final=True):
    return archived(seq, LabelRecord("fam", 1, 7, 1.0, 12.0, final))


def rows(archive, names, sql="SELECT * FROM records ORDER BY event_class, seq"):
    relation = archive.query(sql, names)
    return [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]


def test_a_prediction_comes_back_whole(tmp_path):
    archive = Archive(tmp_path)
    (row,) = rows(archive, [archive.write([prediction(4)], 1)])
    assert json.loads(row.pop("fields")) == {"carrier": "UA", "distance": 1400}
    assert json.loads(row.pop("scored")) == [
        {"release": "r2", "arm": "canary", "outputs": [0.25]},
        {"release": "r1", "arm": "stable", "outputs": [0.75]},
    ]
    assert row == {
        "device": "EWR",
        "epoch": 2,
        "event_class": "event",
        "seq": 4,
        "type": "prediction",
        "family": "fam",
        "time_s": 10.0,
        "kind": "scheduled",
        "spec": "spec1",
        "features": FEATURES,
        "propensity": 0.5,
        "release": "r2",
        "arm": "canary",
        "score": 0.25,
        "label_epoch": None,
        "label_seq": None,
        "label_value": None,
        "final": None,
    }


def test_what_a_type_of_record_lacks_is_null(tmp_path):
    archive = Archive(tmp_path)
    found = rows(archive, [archive.write([observation(1), label(1, final=False)], 1)])
    present = [{name for name, value in row.items() if value is not None} for row in found]
    identity = {"device", "epoch", "event_class", "seq", "type", "family", "time_s"}
    assert present == [
        identity | {"kind", "fields"},
        identity | {"label_epoch", "label_seq", "label_value", "final"},
    ]
    assert found[1]["final"] is False


def test_files_with_different_types_of_records_read_as_one_table(tmp_path):
    archive = Archive(tmp_path)
    names = [
        archive.write([record], number)
        for number, record in enumerate([label(1), prediction(1), observation(2)], start=1)
    ]
    counts = rows(archive, names, "SELECT type, count(*) AS n FROM records GROUP BY 1 ORDER BY 1")
    assert counts == [{"type": t, "n": 1} for t in ("label", "observation", "prediction")]
    assert [row["features"] for row in rows(archive, names)] == [FEATURES, None, None]


def test_only_the_named_files_are_read(tmp_path):
    archive = Archive(tmp_path)
    first, _ = archive.write([observation(1)], 1), archive.write([observation(2)], 2)
    assert [row["seq"] for row in rows(archive, [first])] == [1]


def test_no_files_are_an_empty_table_with_the_same_columns(tmp_path):
    archive = Archive(tmp_path)
    full = archive.query("SELECT * FROM records", [archive.write([prediction(1)], 1)])
    empty = archive.query("SELECT * FROM records", [])
    assert empty.fetchall() == []
    assert (empty.columns, empty.types) == (full.columns, full.types)


def test_writing_a_commit_again_replaces_its_file(tmp_path):
    archive = Archive(tmp_path)
    archive.write([observation(1), observation(2)], 7)
    name = archive.write([observation(3)], 7)
    assert [row["seq"] for row in rows(archive, [name])] == [3]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_adopting_removes_our_files_that_no_commit_names_and_nothing_else(tmp_path):
    archive = Archive(tmp_path)
    kept, orphan = archive.write([observation(1)], 1), archive.write([observation(2)], 2)
    (tmp_path / ".000000000003.parquet.tmp").write_bytes(b"torn")
    (tmp_path / "mine.parquet").write_bytes(b"of somebody else")
    assert Archive(tmp_path).adopt([kept]) == [".000000000003.parquet.tmp", orphan]
    assert {path.name for path in tmp_path.iterdir()} == {kept, "mine.parquet"}


def test_a_named_file_that_is_gone_is_an_error_and_removes_nothing(tmp_path):
    archive = Archive(tmp_path)
    archive.write([observation(1)], 1)
    with pytest.raises(ConfigError) as caught:
        archive.adopt(["000000000009.parquet"])
    assert caught.value.code == "archive_incomplete"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_directory_with_a_quote_in_its_name_works(tmp_path):
    archive = Archive(tmp_path / "o'hare")
    assert len(rows(archive, [archive.write([observation(1)], 1)])) == 1


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    archive = Archive(tmp_path)
    (tmp_path / "000000000001.parquet").mkdir()  # the rename will fail
    with pytest.raises(CapacityError) as caught:
        archive.write([observation(1)], 1)
    assert caught.value.code == "disk_full"
    assert [path.name for path in tmp_path.iterdir()] == ["000000000001.parquet"]
    assert archive.write([observation(1)], 2) == "000000000002.parquet"
