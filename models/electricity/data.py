"""The real data of this family: New South Wales electricity, 1996 to 1998, half-hourly.

Why: the stream that learners of drift are compared on (Harries 1999), 45,312 rows, in the copy that
river's documentation uses; `$HEADWATER_DATA` names the folder that holds it.

Invariants: rows are consecutive half-hours from Tuesday, 1996-05-07, written as if the market's
time were UTC. The file's own `date` is garbled and is not used: weekday and half-hour count on
without a gap, which is what the times are made of. A label is known a minute after its row, so
before the next.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cloud_learner.experiment.outside import write_events

_EVENTS = """
SELECT '1996-05-07 00:00:00Z'::TIMESTAMPTZ + to_minutes(30 * row) AS event_time,
       day::INT - 1 AS weekday, (row % 48)::INT AS half_hour,
       nswprice::DOUBLE AS nswprice, nswdemand::DOUBLE AS nswdemand,
       vicprice::DOUBLE AS vicprice, vicdemand::DOUBLE AS vicdemand,
       transfer::DOUBLE AS transfer,
       CASE class WHEN 'UP' THEN 1.0 WHEN 'DOWN' THEN 0.0 END AS label,
       event_time + to_minutes(1) AS label_time
FROM (SELECT *, row_number() OVER () - 1 AS row FROM read_csv(?, all_varchar = true))
ORDER BY event_time
"""


def write_data(path: Path) -> int:
    """Write the data file (Parquet) at `path`.

    Returns: the number of rows. Raises: FileNotFoundError when the data set is not there.
    """
    return write_events(_EVENTS, "elec2/electricity_river.zip", path, member="electricity.csv")


if __name__ == "__main__":
    write_data(Path(sys.argv[1]))
