"""The real data of this family: what customers write to a bank, and what they want.

Why: short texts of 77 intents (Casanueva et al. 2020, BANKING77, CC BY 4.0; 10,003 texts to learn
from, 3,080 to test with) show what a pretrained transformer is worth, and that intents may come
later. `$HEADWATER_DATA` names the folder that holds them. `sample.csv` beside this file, 96
sentences of 8 of these intents, is our own.

Invariants: the file has no times, so they are made up: one text a minute from 2020-01-01, each
label known a second later. An intent is its place in `intents.txt`, a list that only grows. Those
that come later come in `STEPS`; within a step texts are in the order of their hashes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cloud_learner.experiment.outside import write_events

HERE = Path(__file__).resolve().parent
INTENTS = (HERE / "intents.txt").read_text("utf-8").split()
SAMPLE = str(HERE / "sample.csv")
STEPS = (50, 59, 68)
"""The first intent of each step after the start."""

_NAMES = ", ".join(f"'{name}'" for name in INTENTS)
_EVENTS = f"""
WITH told AS (
    SELECT text, list_position([{_NAMES}], category) - 1 AS intent
    FROM read_csv(?, header = true, all_varchar = true)
), ordered AS (
    SELECT *, row_number() OVER (
        ORDER BY list_count(list_filter({list(STEPS)}, lambda first: first <= intent)), md5(text)
    ) - 1 AS row
    FROM told
)
SELECT '2020-01-01 00:00:00Z'::TIMESTAMPTZ + to_minutes(row) AS event_time, text,
       intent::DOUBLE AS label, event_time + to_seconds(1) AS label_time
FROM ordered ORDER BY row
"""


def write_data(path: Path, source: str = "banking77/train.csv") -> int:
    """Write the data file (Parquet) at `path`; `source` may be `SAMPLE`, or the texts of the test.

    Returns: the number of rows. Raises: FileNotFoundError when the data set is not there.
    """
    return write_events(_EVENTS, source, path)


if __name__ == "__main__":
    write_data(Path(sys.argv[1]))
