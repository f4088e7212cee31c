"""The real data of this family: insects that flew through a light beam, by their wing-beats.

Why: a stream whose world changes gradually, with six classes (Souza et al. 2020, INSECTS gradual
balanced, CC BY 4.0; 24,150 rows of 33 features; the drift is centred near row 14,028).
`$HEADWATER_DATA` names the folder that holds it.

Invariants: the file has no times. Its order is time, so times are made up: one row a minute from
2020-01-01, each label known a second after its row. Classes are numbered 0 to 5 in the order of
the numbers that the file has for them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cloud_learner.experiment.outside import write_events

COLUMNS = 33

_FIELDS = ", ".join(f"column{i:02}::DOUBLE AS x{i + 1}" for i in range(COLUMNS))
_EVENTS = f"""
SELECT '2020-01-01 00:00:00Z'::TIMESTAMPTZ + to_minutes(row) AS event_time, {_FIELDS},
       (dense_rank() OVER (ORDER BY column{COLUMNS:02}::INT) - 1)::DOUBLE AS label,
       event_time + to_seconds(1) AS label_time
FROM (SELECT *, row_number() OVER () - 1 AS row
      FROM read_csv(?, header = false, all_varchar = true))
ORDER BY event_time
"""


def write_data(path: Path) -> int:
    """Write the data file (Parquet) at `path`.

    Returns: the number of rows. Raises: FileNotFoundError when the data set is not there.
    """
    return write_events(_EVENTS, "insects/gradual_balanced_24150.csv", path)


if __name__ == "__main__":
    write_data(Path(sys.argv[1]))
