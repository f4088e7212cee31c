"""A data file as a stream of events: what is wrong with it is said before anybody learns it."""

from __future__ import annotations

import duckdb
import pytest

from cloud_learner.experiment.replay import DataRow, read_rows
from cloud_learner.train.family import Family
from edge_runtime.errors import ConfigError, HeadwaterError, RequestError

HEADER = "event_time,kind,device,side,x,y,label,label_time"
GOOD = "1970-01-01T00:16:40Z,asked,a,left,0.5,,1,1970-01-01T00:17:00Z"
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


@pytest.mark.parametrize("column", ["event_time", "side", "x", "y", "label_time"])
def test_a_missing_column_is_named(read, column):
    error = refused(read, header=HEADER.replace(column, "other"))

    assert isinstance(error, ConfigError)
    assert repr(column) in error.message


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
        (GOOD.replace("1970-01-01T00:16:40Z", ""), "not_in_order", "event_time"),
    ],
)
def test_a_bad_row_is_refused_by_name(read, line, code, word):
    error = refused(read, line)

    assert isinstance(error, RequestError)
    assert error.code == code
    assert word in error.message


@pytest.mark.parametrize("line", [GOOD.replace("0.5", "much"), GOOD.replace("1970-01-01T", "1 T")])
def test_a_cell_that_is_no_number_or_time_is_an_error_of_the_file(read, line):
    assert refused(read, GOOD, line).code == "bad_data"


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
