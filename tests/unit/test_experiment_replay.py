"""A data file as a stream of events: what is wrong with it is said before anybody learns it."""

from __future__ import annotations

import duckdb
import pytest

from cloud_learner.experiment.replay import DataRow, read_rows
from cloud_learner.stats.tasks import Task
from cloud_learner.train.family import Family
from edge_runtime.errors import ConfigError, HeadwaterError, RequestError
from edge_runtime.inference.package import Interface, Kind

HEADER = "event_time,kind,device,side,x,y,label,label_time"
GOOD = "1970-01-01T00:16:40Z,asked,a,left,0.5,,1,1970-01-01T00:17:00Z"
EARLIER = "1970-01-01T00:16:30Z,seen,a,,,2.5,,"
LATER = "1970-01-01T00:16:50Z,seen,a,,,2.5,,"


@pytest.fixture(scope="module")
def interface(coin, tmp_path_factory):
    return Family.load(coin.write_family(tmp_path_factory.mktemp("coin"))).interface


@pytest.fixture
def read(tmp_path, interface):
    """`read(line, ...)` are the rows of a CSV file with these lines."""

    def rows(*lines, header=HEADER, **options):
        path = tmp_path / "data.csv"
        path.write_text("\n".join((header, *lines)) + "\n")
        return list(read_rows(path, interface, **options))

    return rows


def refused(read, *lines, **options) -> HeadwaterError:
    with pytest.raises(HeadwaterError) as caught:
        read(*lines, **options)
    assert "data.csv" in caught.value.message
    assert "1970-01-01T00:16:40Z" not in caught.value.message  # one cell, not the whole line
    return caught.value


def test_rows_carry_exactly_the_fields_of_their_kind(read):
    assert read(GOOD, LATER) == [
        DataRow(1000.0, "asked", "a", {"side": "left", "x": 0.5}, 1.0, 1020.0),
        DataRow(1010.0, "seen", "a", {"y": 2.5}, None, None),
    ]


def test_csv_and_parquet_are_the_same_stream(read, tmp_path, interface, coin):
    path = coin.write_csv(tmp_path / "coins.csv", coin.stream(40))
    parquet = tmp_path / "o'brien.parquet"  # a quote in a path is a character like any other
    quoted = str(parquet).replace("'", "''")
    duckdb.connect().execute(f"COPY (SELECT * FROM '{path}') TO '{quoted}' (FORMAT parquet)")

    assert list(read_rows(path, interface)) == list(read_rows(parquet, interface))


def test_a_csv_file_holds_the_events_that_were_written(tmp_path, interface, coin):
    events = coin.stream(40)

    rows = list(read_rows(coin.write_csv(tmp_path / "coins.csv", events), interface))

    assert [(r.time_s, r.kind, r.device, r.fields, r.label, r.label_time_s) for r in rows] == events


def test_a_word_of_digits_stays_a_word(read):
    (row,) = read("1970-01-01T00:16:40Z,asked,001,007,3,,,")

    assert (row.device, row.fields) == ("001", {"side": "007", "x": 3.0})


def test_without_kind_and_device_all_rows_are_predictions_of_one_device(read):
    (row,) = read("1970-01-01T00:16:40Z,left,1.5", header="event_time,side,x")

    assert (row.kind, row.device, row.label) == ("asked", "device", None)


def test_times_without_a_zone_are_utc(read):
    (row,) = read("1970-01-01 00:16:40,left,1.5", header="event_time,side,x")

    assert row.time_s == 1000.0


def test_the_limit_counts_predictions_only(read):
    assert len(read(GOOD, LATER, limit_predictions=1)) == 2
    assert len(read(GOOD, GOOD, LATER, limit_predictions=1)) == 1


@pytest.mark.parametrize("column", ["event_time", "side", "x", "y", "label_time", "label"])
def test_a_missing_column_is_named_with_the_nearest_that_is_there(read, column):
    names = [f"{name}s" if name == column else name for name in HEADER.split(",")]
    error = refused(read, header=",".join(names))

    assert isinstance(error, ConfigError)
    assert repr(column) in error.message
    assert repr(f"{column}s") in error.hint


@pytest.mark.parametrize(
    ("line", "code", "word"),
    [
        (GOOD.replace("asked", "askd"), "unknown_kind", "askd"),
        (GOOD.replace("left", ""), "missing_field", "asked.side"),
        (GOOD.replace("0.5", "nan"), "not_finite", "asked.x"),
        (GOOD.replace("0.5", "inf"), "not_finite", "asked.x"),
        (GOOD.replace(",a,", ",,"), "missing_field", "device"),
        (GOOD.replace(",1,", ",nan,"), "bad_label", "nan"),
        (GOOD.replace(",1,", ",2,"), "bad_label", "2.0"),
        (GOOD.replace("1970-01-01T00:17:00Z", ""), "bad_label", "label_time"),
        (GOOD.replace(",1,", ",,"), "bad_label", "label_time without a label"),
        (GOOD.replace("17:00Z", "16:39Z"), "bad_label", "before event_time"),
        (GOOD.replace("asked", "seen").replace(",,1,", ",2.5,1,"), "bad_label", "no prediction"),
        (GOOD.replace("asked", ""), "unknown_kind", "kind is empty"),
        (GOOD.replace("1970-01-01T00:16:40Z", ""), "not_in_order", "event_time"),
    ],
)
def test_a_bad_row_is_refused_by_name(read, line, code, word):
    error = refused(read, EARLIER, line)

    assert isinstance(error, RequestError)
    assert error.code == code
    assert word in error.message
    assert "row 2 (line 3)" in error.message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (GOOD.replace("0.5", "much"), ["x 'much'", "a number"]),
        (GOOD.replace("0.5", '"0,5"'), ["x '0,5'", "a number"]),
        (GOOD.replace(",1,", ",yes,"), ["label 'yes'", "a number"]),
        (GOOD.replace("1970-01-01T00:16:40Z", "1 January"), ["event_time '1 January'", "a time"]),
        (GOOD.replace("1970-01-01T00:16:40Z", "1000"), ["event_time '1000'", "a time"]),
        (GOOD.replace("1970-01-01T00:17:00Z", "13/13/70"), ["label_time '13/13/70'", "a time"]),
    ],
)
def test_a_cell_that_is_no_number_or_time_is_named_with_row_and_line(read, line, words):
    several = GOOD.replace(",left,", ',"two\nlines",')
    error = refused(read, several, "", line)

    assert error.code == "bad_data"
    for word in ("row 2 (line 5)", *words):
        assert word in error.message


def test_a_whole_number_is_not_rounded_from_one_that_is_not(tmp_path):
    interface = Interface("f", {"k": Kind(predicts=True, fields={"n": "int"})}, "event", 1, 1, "o")
    path = tmp_path / "data.csv"
    path.write_text("event_time,n\n1970-01-01,3.0\n1970-01-01,9007199254740993\n1970-01-01,3.5\n")
    rows = read_rows(path, interface)

    assert [next(rows).fields["n"], next(rows).fields["n"]] == [3, 2**53 + 1]
    with pytest.raises(ConfigError, match=r"row 3 \(line 4\): n '3.5' is not a whole number"):
        next(rows)


def test_a_field_may_be_of_another_type_in_another_kind(tmp_path):
    kinds = {
        "a": Kind(predicts=True, fields={"v": "int"}),
        "b": Kind(predicts=False, fields={"v": "str"}),
    }
    path = tmp_path / "data.csv"
    path.write_text("event_time,kind,v\n1970-01-01,b,7\n")

    (row,) = read_rows(path, Interface("f", kinds, "event", 1, 1, "o"))
    assert row.fields == {"v": "7"}
    path.write_text("event_time,v\n1970-01-01,7\n")
    (row,) = read_rows(path, Interface("f", kinds, "event", 1, 1, "o"))
    assert row.fields == {"v": 7}


def test_without_kind_a_family_that_asks_in_two_ways_is_refused(tmp_path):
    kind = Kind(predicts=True, fields={"x": "float"})
    path = tmp_path / "data.csv"
    path.write_text("event_time,x\n1970-01-01,1\n")

    with pytest.raises(ConfigError, match=r"no column 'kind', which of a, b a row is"):
        list(read_rows(path, Interface("f", {"a": kind, "b": kind}, "event", 1, 1, "o")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["is empty"]),
        ("\n\n", ["is empty"]),
        (HEADER + "\n", ["no rows"]),
        (HEADER.replace(",", ";") + "\n", ["';'"]),
        (HEADER.replace(",", "\t") + "\n", ["\\t"]),
        (HEADER + ",x\n", ["two columns 'x'"]),
        (f"{HEADER}\n{GOOD}\n{GOOD},5\n", ["line 3", "Expected Number of Columns: 8 Found: 9"]),
        (f"{HEADER}\n{GOOD}\n1970-01-01,asked\n", ["line 3", "Found: 2"]),
        (f"{HEADER}\n{GOOD.replace('left', chr(34) + 'left')}\n", ["line 2", "quote"]),
    ],
)
def test_a_file_of_another_form_is_refused_with_what_is_wrong(tmp_path, interface, text, words):
    path = tmp_path / "data.csv"
    path.write_text(text)

    with pytest.raises(ConfigError) as caught:
        list(read_rows(path, interface))
    assert caught.value.code == "bad_data"
    for word in (str(path), *words):
        assert word in caught.value.message


def test_bytes_that_are_no_text_are_refused(tmp_path, interface):
    path = tmp_path / "data.csv"
    path.write_bytes(f"{HEADER}\n{GOOD}\n".encode() + b"\xff\xfe,asked\n")

    with pytest.raises(ConfigError, match=r"data\.csv cannot be read") as caught:
        list(read_rows(path, interface))
    assert caught.value.code == "bad_data"


def test_a_mark_of_byte_order_and_ends_of_lines_of_another_system_do_no_harm(tmp_path, interface):
    path = tmp_path / "data.CSV"
    path.write_bytes(f"\ufeff{HEADER}\r\n{GOOD}\r\n".encode())

    (row,) = read_rows(path, interface)
    assert (row.time_s, row.label_time_s) == (1000.0, 1020.0)


def test_lines_that_end_in_two_ways_are_refused_in_words(tmp_path, interface):
    path = tmp_path / "data.csv"
    path.write_bytes(f"{HEADER}\r\n{GOOD}\n{GOOD}\r\n".encode())

    with pytest.raises(ConfigError, match="do not all end alike"):
        list(read_rows(path, interface))


def test_a_column_of_times_that_holds_numbers_is_refused_in_parquet(tmp_path, interface):
    path = tmp_path / "data.parquet"
    duckdb.sql("SELECT 1000.0 AS event_time, 'l' AS side, 1.0 AS x").write_parquet(str(path))

    with pytest.raises(
        ConfigError, match=r"'event_time' of type DECIMAL.*, not of times"
    ) as caught:
        list(read_rows(path, interface))
    assert "2024-05-01T12:00:00Z" in caught.value.hint


@pytest.mark.parametrize(
    ("task", "good", "bad", "why"),
    [
        (Task(kind="multiclass", classes=3), "2", "3", "is not one of the classes 0 to 2"),
        (Task(kind="multiclass", classes=3), "0", "0.5", "is not one of the classes"),
        (Task(kind="regression"), "-12.5", "inf", "is not a finite number"),
        (Task(kind="ranking", group="side"), "4", "-1", "is below 0"),
    ],
)
def test_labels_are_those_of_the_task(read, task, good, bad, why):
    (row,) = read(GOOD.replace(",1,", f",{good},"), task=task)

    assert row.label == float(good)
    error = refused(read, GOOD.replace(",1,", f",{bad},"), task=task)
    assert (error.code, why in error.message, task.kind in error.message) == (
        "bad_label",
        True,
        True,
    )


def test_time_that_goes_back_is_refused_after_the_rows_before_it(tmp_path, interface):
    path = tmp_path / "data.csv"
    path.write_text(f"{HEADER}\n{LATER}\n{GOOD}\n")
    rows = read_rows(path, interface)

    assert next(rows).kind == "seen"
    with pytest.raises(RequestError, match="goes back"):
        next(rows)


def test_a_file_that_is_none_is_refused(tmp_path, interface):
    (tmp_path / "data.parquet").write_bytes(b"garbage")

    for name, code in (("data.parquet", "bad_data"), ("none.parquet", "no_data")):
        with pytest.raises(ConfigError, match=name) as caught:
            list(read_rows(tmp_path / name, interface))
        assert caught.value.code == code
