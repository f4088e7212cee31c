"""Data sets that lie outside of the project, as data files of a family.

Why: real data is not ours to copy; whoever has it names the folder, and each family's `data.py`
says in one query what its rows are as events.

`$HEADWATER_DATA` names the folder; by default it is `shared/data` beside the project.

Invariants: nothing is changed in that folder; times are written in UTC.

Knows nothing about families. Implements outside data of DESIGN's surfaces.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

import duckdb

_BESIDE = Path(__file__).parents[2] / "../shared/data"


def write_events(events: str, source: str, target: Path, *, member: str = "") -> int:
    """Write what the query `events` makes of a CSV file to `target`, as Parquet.

    `source` is a path below the folder; of a zip archive `member` is the file. The query reads it
    as its one parameter.

    Returns: the number of rows. Raises: FileNotFoundError when the data set is not there.
    """
    path = Path(os.environ.get("HEADWATER_DATA", _BESIDE)) / source
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; set HEADWATER_DATA")
    with tempfile.TemporaryDirectory() as folder, duckdb.connect() as database:
        if member:
            with zipfile.ZipFile(path) as archive:
                path = Path(archive.extract(member, folder))
        database.execute("SET TimeZone = 'UTC'")
        found = database.sql(events, params=[str(path)])
        found.write_parquet(str(target))
        return len(found)
