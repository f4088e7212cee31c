"""Families of real data: rows and labels as their sources have them, and no look into the future.

Each is skipped where its data set is not there.
"""

from __future__ import annotations

import random
from pathlib import Path

import duckdb
import msgspec
import numpy as np
import pytest

from cloud_learner.bootstrap import RefusedError, bootstrap
from cloud_learner.config import Home
from cloud_learner.experiment.features import featured
from cloud_learner.experiment.replay import read_rows
from cloud_learner.train.family import Family
from cloud_learner.train.modules import load_module

MODELS = Path(__file__).parents[2] / "models"
HEAD = 3000
"""Rows that are read, or learned from: the start of a file."""

# rows, those that ask, those with a label, the sum of the labels, longest delay in days (up to)
FACTS = {
    "electricity": (45_312, 45_312, 45_312, 19_237, 0.001),
    "electricity_lags": (45_312, 45_312, 45_312, 19_237, 0.001),
    "flight_weather": (362_891, 336_776, 327_346, 77_630, 2.0),
    "hotel_cancellation": (119_390, 119_390, 119_390, 44_224, 738.0),
    "insects": (24_150, 24_150, 24_150, 60_375, 0.001),
}

# What does not change in the first rows: Victoria joined the market a year later.
VICTORIA = {"vicprice", "vicdemand", "transfer"}
FLAT = {
    "electricity": VICTORIA,
    "electricity_lags": VICTORIA,
    "flight_weather": {"precip"},
}


@pytest.fixture(scope="module", params=FACTS)
def real(request, tmp_path_factory):
    """A family of real data and its data file."""
    name = request.param
    path = tmp_path_factory.mktemp(name) / "data.parquet"
    try:
        written = load_module(MODELS / name / "data.py").write_data(path)
    except FileNotFoundError as error:
        pytest.skip(f"{name}: {error}")
    assert written == FACTS[name][0]
    return Family.load(MODELS / name), path


@pytest.fixture(scope="module")
def start(real):
    """The first rows of the file as events, and which of them have features, with these."""
    family, path = real
    rows = []
    for row in read_rows(path, family.interface, task=family.config.task):
        rows.append(row)
        if len(rows) == HEAD:
            break
    return rows, vectors(family, rows)


def vectors(family, rows):
    return [vector for _, vector in featured(rows, family.interface, family.spec)]


def test_rows_and_labels_are_those_of_the_source(real):
    family, path = real
    asking = [kind for kind, declared in family.interface.kinds.items() if declared.predicts]
    kind = "kind" if len(family.interface.kinds) > 1 else f"'{asking[0]}'"

    (found,) = duckdb.sql(f"""
        SELECT count(*), count(*) FILTER ({kind} = '{asking[0]}'), count(label),
               sum(label)::BIGINT, max(epoch(label_time - event_time)) / 86400,
               count(*) FILTER (label_time < event_time OR (label IS NULL) != (label_time IS NULL))
        FROM '{path}'
    """).fetchall()

    *counts, delay, wrong = found
    assert tuple(counts) == FACTS[family.name][:4]
    assert 0 < delay <= FACTS[family.name][4]
    assert wrong == 0


@pytest.mark.slow
def test_every_row_is_one_that_a_device_would_take(real):
    family, path = real
    rows = read_rows(path, family.interface, task=family.config.task)

    assert sum(1 for _ in rows) == FACTS[family.name][0]


def test_no_row_is_given_what_came_after_it(real, start):
    """All that comes after a row, and its own outcome, may be otherwise: its features stay."""
    family, _ = real
    rows, expected = start
    for cut in random.Random(3).sample(range(HEAD // 2, HEAD), 3):
        changed = [
            *rows[:cut],
            msgspec.structs.replace(rows[cut], **otherwise(rows[cut], family, fields=False)),
            *(
                msgspec.structs.replace(row, **otherwise(row, family, fields=True))
                for row in rows[cut + 1 :]
            ),
        ]

        found = vectors(family, changed)

        assert all(map(same, expected[: cut + 1], found[: cut + 1])), f"row {cut}"
        assert not all(map(same, expected[cut + 1 :], found[cut + 1 :]))


def otherwise(row, family, *, fields):
    """Another outcome, and with `fields` another event."""
    new = {}
    if row.label is not None:
        new["label"] = (row.label + 1) % family.config.task.classes
    if fields:
        new["fields"] = {
            name: value if isinstance(value, str) else value + 1
            for name, value in row.fields.items()
        }
    return new


def same(one, other):
    return one is other is None or np.array_equal(one, other)


def test_every_feature_tells_apart_but_those_that_come_to_life_later(real, start):
    family, _ = real
    features = np.stack([vector for vector in start[1] if vector is not None])

    assert set(family.constants(features)) == FLAT.get(family.name, set())


@pytest.mark.parametrize("real", ["electricity_lags"], indirect=True)
def test_label_windows_know_the_label_before(real, start):
    family, _ = real
    rows, features = start
    at = family.spec.names.index("mean_1")

    assert [row.label for row in rows[:-1]] == [float(vector[at]) for vector in features[1:]]


@pytest.mark.parametrize("real", ["hotel_cancellation", "insects"], indirect=True)
def test_the_start_of_a_file_makes_a_release_or_is_refused_with_verdicts(real, tmp_path):
    family, path = real
    head = tmp_path / "head.parquet"
    duckdb.sql(f"FROM '{path}' LIMIT {HEAD}").write_parquet(str(head))
    told = []

    refused = reasons_of(family, head, tmp_path / "home", told)

    assert all("must be at" in reason for reason in refused), refused
    assert f"{HEAD:,} labelled rows" in told[0]


def reasons_of(family, data, home, told) -> list[str]:
    """Why the gate refused the first release; none when it passed."""
    try:
        bootstrap(family.folder, data, Home(home), told.append)
    except RefusedError as error:
        return error.message.partition("did not pass: ")[2].split("; ")
    return []


@pytest.mark.slow
def test_a_whole_file_makes_a_release(real, tmp_path):
    family, path = real

    assert bootstrap(family.folder, path, Home(tmp_path / "home"), print).outcome == "pass"
