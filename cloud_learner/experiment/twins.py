"""Twins: examples of the archive once more, under a feature spec that their devices did not have.

Why: training, worlds and gates read the examples of one spec; a new spec has none until its history
is told to them.

A twin is its example with other feature values and the hash of the new spec: same id, label, time
and revision. It lies in files beside the others, so whoever asks for a spec sees its rows alone,
and whoever counts all rows has to say which spec.

Invariants: an example has at most one twin of a spec, however often it is asked for. Commit point:
the transaction of the ingest database that names all files; what it does not name is removed by
`Archive.adopt`. The ingest database must be open here, hence in no other process.

Knows nothing about how vectors come about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import duckdb
import msgspec
import numpy as np

from cloud_learner.experiment.hindsight import Vector
from cloud_learner.store import parquet
from cloud_learner.store.archive import Archive
from cloud_learner.store.examples import Example
from cloud_learner.store.ingest_db import IngestDb, put_files
from cloud_learner.store.ingest_state import number_key
from edge_runtime.errors import CapacityError, ConfigError
from edge_runtime.wire.messages import Scored, Value

ROWS = 20_000
"""So many rows at once are in memory, about, and lie in a file."""

_fields = msgspec.json.Decoder(dict[str, Value]).decode
_NONE = (
    "(SELECT '' AS device, 0 AS epoch, 0 AS seq, 0.0 AS time_s, '' AS spec, "
    "NULL::FLOAT[] AS features WHERE false)"
)
_COPY = """
COPY (
    SELECT device::VARCHAR AS device, epoch, seq, time_s, spec::VARCHAR AS spec,
    features::FLOAT[] AS features FROM batch
) TO {} (FORMAT parquet, COMPRESSION zstd)
"""
_TWINS = """
SELECT e.* EXCLUDE (features, spec, time), v.features AS features, '{spec}' AS spec
FROM examples e JOIN {vectors} v USING (device, epoch, seq, spec)
WHERE e.family = '{family}' AND v.time_s >= {start_s!r} AND v.time_s < {end_s!r}
AND NOT EXISTS (
    SELECT 1 FROM examples t WHERE t.spec = '{spec}' AND t.family = e.family
    AND t.device = e.device AND t.epoch = e.epoch AND t.seq = e.seq AND t.revision = e.revision
    AND coalesce(t.early, false) = coalesce(e.early, false)
)
ORDER BY e.time_s, e.device, e.epoch, e.seq, e.revision
"""
_DAYS = "SELECT floor(time_s / 86400.0) AS day, count(*) FROM {} GROUP BY day ORDER BY day"


class Vectors:
    """Vectors on disk, in files in `directory`, until their examples are found."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._directory, self._files = directory, 0

    def write(self, device: str, vectors: Iterable[Vector]) -> None:
        """Keep the vectors of a device. Raises: CapacityError `disk_full`."""
        with parquet.connect() as connection:
            following = iter(vectors)
            while some := list(islice(following, ROWS)):
                self._files += 1
                path = self._directory / f"{self._files:06d}.parquet"
                connection.register("batch", _columns(device, some))
                try:
                    connection.execute(_COPY.format(parquet.quoted(path)))
                except duckdb.Error as error:
                    raise CapacityError("disk_full", f"{path} was not written: {error}") from error

    def table(self) -> str:
        """The SQL of a table of them all."""
        if not self._files:
            return _NONE
        return parquet.read(sorted(self._directory.glob("*.parquet")))

    def days(self) -> list[tuple[float, float]]:
        """Stretches of time, in order, from and up to, with some ROWS vectors in each."""
        with parquet.connect() as connection:
            days = connection.sql(_DAYS.format(self.table())).fetchall()
        stretches, start, held = list[tuple[float, float]](), None, 0
        for day, count in days:
            start, held = day if start is None else start, held + count
            if held >= ROWS or day == days[-1][0]:
                stretches.append((start * parquet.DAY_S, (day + 1) * parquet.DAY_S))
                start, held = None, 0
        return stretches


class Twins(msgspec.Struct, frozen=True):
    """The twins of spec `spec` (its hash) that come of vectors."""

    family: str
    spec: str
    vectors: Vectors

    def write(self, db: IngestDb, directory: Path, step: Callable[[], None]) -> int:
        """Give each example with a vector its twin, where it has none; returns how many got one.

        The archive is in `directory`; `step` is called for each of `vectors.days()`.
        Raises: CapacityError, ConfigError; then no twin is named.
        """
        archive = Archive(directory)
        try:
            archive.adopt(db.files())
            _file_what_waits(db, archive)
            return self._write(db, directory, archive, step)
        finally:
            archive.close()

    def _write(
        self, db: IngestDb, directory: Path, archive: Archive, step: Callable[[], None]
    ) -> int:
        state = db.load()
        names = files_of(db, self.family)
        new, written = list[str](), 0
        for start_s, end_s in self.vectors.days():
            for twins in examples_of(directory, names, self._sql(start_s, end_s)):
                state.meta.file += 1
                new += archive.write(twins, state.meta.file)
                written += len(twins)
            step()
        change = db.begin()
        put_files(change, new)
        db.commit(change, state.meta, state.counters)
        return written

    def _sql(self, start_s: float, end_s: float) -> str:
        return _TWINS.format(
            spec=self.spec,
            family=self.family,
            vectors=self.vectors.table(),
            start_s=start_s,
            end_s=end_s,
        )


def files_of(db: IngestDb, family: str) -> list[str]:
    """The names of the files of examples of a family."""
    prefix = f"family={quote(family, safe='')}/"
    return [name for name in db.files() if name.startswith(prefix)]


def examples_of(directory: Path, names: Sequence[str], sql: str) -> Iterator[list[Example]]:
    """What a query of the view `examples`, over named files of the archive in `directory`, finds,
    ROWS at a time. Raises: ConfigError `archive_damaged`.
    """
    view = f"CREATE VIEW examples AS {parquet.EMPTY}"  # has the columns that old files have not
    if names:
        view += f" UNION ALL BY NAME SELECT * FROM {parquet.read([directory / n for n in names])}"
    try:
        with parquet.connect() as connection:
            connection.execute(view)
            found = connection.execute(sql)
            columns = [column[0] for column in found.description or ()]
            while rows := found.fetchmany(ROWS):
                yield [_example(dict(zip(columns, row, strict=True))) for row in rows]
    except duckdb.Error as error:
        raise ConfigError(
            "archive_damaged",
            f"{directory}: a file of examples cannot be read: {error}",
            "restore the learner's home from a copy",
        ) from error


def _file_what_waits(db: IngestDb, archive: Archive) -> None:
    """Write to files what was released and lies in none yet, as ingest does when it ends."""
    state = db.load()
    if not state.unarchived:
        return
    change = db.begin()
    state.meta.file += 1
    names = archive.write([example for _, example in state.unarchived], state.meta.file)
    put_files(change, names)
    state.meta.archived = state.unarchived[-1][0]
    for number in state.for_files_only:
        change.delete("examples", number_key(number))
    db.commit(change, state.meta, state.counters)


def _example(row: dict[str, Any]) -> Example:
    """An example from its columns; a column that its file had not is as by default."""
    names = Example.__struct_fields__
    row = {name: value for name, value in row.items() if value is not None and name in names}
    row["features"] = np.array(row["features"], "<f4").tobytes()
    row["fields"] = _fields(row.get("fields", "{}"))
    row["scored"] = [
        Scored(arm["release"], arm["arm"], [_number(value) for value in arm["outputs"]])
        for arm in row.get("scored", ())
    ]
    return Example(**row)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _columns(device: str, vectors: list[Vector]) -> dict[str, Any]:
    count = len(vectors)
    features = np.empty(count, "O")
    features[:] = [np.frombuffer(vector.features, "<f4") for vector in vectors]
    return {
        "device": np.full(count, device, "O"),
        "epoch": np.fromiter((vector.epoch for vector in vectors), "i8", count),
        "seq": np.fromiter((vector.seq for vector in vectors), "i8", count),
        "time_s": np.fromiter((vector.time_s for vector in vectors), "f8", count),
        "spec": np.array([vector.spec for vector in vectors], "O"),
        "features": features,
    }
