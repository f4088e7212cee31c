"""The family session_ranker: visitors that a seed repeats, data that a family reads, its table."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from cloud_learner.experiment.features import featured
from cloud_learner.experiment.replay import read_rows
from cloud_learner.train.family import Family
from cloud_learner.train.hidden import looked_into
from cloud_learner.train.modules import load_module

FOLDER = Path(__file__).parents[2] / "models" / "session_ranker"
VISITS = 30


@pytest.fixture(scope="module")
def simulator():
    return load_module(FOLDER / "simulator.py")


@pytest.fixture(scope="module")
def items():
    return load_module(FOLDER / "items.py")


@pytest.fixture(scope="module")
def data():
    return load_module(FOLDER / "data.py")


@pytest.fixture(scope="module")
def family():
    return Family.load(FOLDER)


def pages(simulator, visit) -> list[list[int]]:
    return [visit.clicks(page, offer) for page, offer in enumerate(visit.offers.tolist())]


def test_a_seed_repeats_world_and_visit(simulator):
    first, again = (simulator.Visit(simulator.World.drawn(), (7, 1)) for _ in range(2))
    other = simulator.Visit(simulator.World.drawn(), (7, 2))

    assert first.id == again.id
    assert (first.chances == again.chances).all()
    assert pages(simulator, first) == pages(simulator, again)
    assert first.id != other.id
    assert pages(simulator, first) != pages(simulator, other)


def test_what_is_shown_changes_nobody(simulator):
    visit = simulator.Visit(simulator.World.drawn(), 7)
    offer = visit.offers[3].tolist()
    before = visit.clicks(3, offer)
    backwards = visit.clicks(3, offer[::-1])

    assert len(backwards) == len(before) <= simulator.PLACES
    assert visit.clicks(3, offer) == before


def test_no_story_is_offered_twice_in_a_visit(simulator):
    offers = simulator.Visit(simulator.World.drawn(), 7).offers

    assert offers.shape == (simulator.PAGES, simulator.OFFERED)
    assert sorted(offers.ravel().tolist()) == list(range(simulator.STORIES))


def test_clicks_come_as_often_as_their_chances_say(simulator):
    world, looked, wanted = simulator.World.drawn(), [], []
    for seed in range(200):
        visit = simulator.Visit(world, seed)
        for page, offer in enumerate(visit.offers):
            clicks = visit.clicks(page, offer.tolist())
            looked += visit.chances[offer[: len(clicks)]].tolist()
            wanted += clicks

    assert np.mean(wanted) == pytest.approx(np.mean(looked), abs=0.01)
    likely = np.array(looked) > 0.5
    assert np.array(wanted)[likely].mean() == pytest.approx(
        np.array(looked)[likely].mean(), abs=0.03
    )


def test_tastes_drift_and_stay_of_their_distribution(simulator):
    """A story's log odds less what everybody makes of it, on the first page and on the last."""
    world, found = simulator.World.drawn(), []
    for seed in range(400):
        visit = simulator.Visit(world, seed)
        odds = np.log(visit.chances / (1 - visit.chances)) - world.liked[visit.hour]
        tastes = [
            np.linalg.lstsq(world.facts[offer], odds[offer], rcond=None)[0]
            for offer in visit.offers[[0, 1, -1]]
        ]
        found.append(tastes)
    first, second, last = np.moveaxis(np.array(found), 1, 0)[:, :, 0]

    assert first.std() == pytest.approx(simulator.GENRE, rel=0.1)
    assert last.std() == pytest.approx(simulator.GENRE, rel=0.1)
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(simulator.LASTS, abs=0.03)
    end = simulator.LASTS ** (simulator.PAGES - 1)
    assert np.corrcoef(first, last)[0, 1] == pytest.approx(end, abs=0.1)


def test_the_data_file_is_what_the_family_reads(data, family, tmp_path):
    count = data.write_data(tmp_path / "visits.csv", VISITS)
    data.write_data(tmp_path / "again.csv", VISITS)
    rows = read_rows(tmp_path / "visits.csv", family.interface, task=family.config.task)
    vectors = [vector for _, vector in featured(rows, family.interface, family.spec)]

    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "visits.csv").read_bytes()
    assert len(vectors) == count > VISITS * 30
    values = np.stack(vectors)
    assert values.shape == (count, 23)
    assert family.constants(values) == []


def test_labels_are_known_after_their_events_and_both_occur(data, tmp_path):
    data.write_data(tmp_path / "visits.csv", VISITS)
    with (tmp_path / "visits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert all(row["event_time"] < row["label_time"] for row in rows)
    assert 0.05 < np.mean([float(row["label"]) for row in rows]) < 0.4
    assert len({row["visit"] for row in rows}) == VISITS


def test_the_table_knows_every_story_of_the_world(simulator, items, family):
    world, table = simulator.World.drawn(), family.spec.tables["items"]

    assert table.columns == items.columns(simulator.GENRES)
    assert len(table.rows) == simulator.STORIES
    for story in range(simulator.STORIES):
        row = dict(zip(table.columns, table.rows[f"{story}"], strict=True))
        assert [name for name in simulator.GENRES if row[name]] == world.genres(story)


def test_the_table_finds_what_is_liked_and_what_goes_together(items):
    """Two sorts of items, two sorts of visitors: each likes one sort, and all like item 0."""
    chance, count = np.random.default_rng(3), 20
    visits, shown = np.repeat(np.arange(300), 15), chance.integers(count - 1, size=4500)
    alike = np.where((visits + shown) % 2 == 0, 0.8, 0.2)
    labels = (chance.random(4500) < np.where(shown == 0, 0.95, alike)).astype(float)
    table = items.facts(visits, shown, labels, np.zeros((count, 1)))

    assert table.shape == (count, 2 + items.WIDTH + 1)
    assert np.argmax(table[:, 0]) == 0
    assert table[-1, 0] == 0
    assert (table[-1, 2:] == 0).all()
    alike = table[1:-1, 2:] @ table[1:-1, 2:].T
    same = (np.arange(1, count - 1)[:, None] + np.arange(1, count - 1)) % 2 == 0
    assert alike[same].mean() > 1
    assert alike[~same].mean() < -1


def test_the_facts_of_an_item_reach_the_embedding_as_they_are(family):
    rows = np.random.default_rng(1).normal(0, 1, (64, family.spec.size)).astype(np.float32)
    rows[:, 0] = np.arange(64) % 25
    network = family.build_student(rows)
    _, embedding = looked_into(network, torch.tensor(rows))

    assert embedding.shape == (64, 31)
    facts = (rows[:, 1:] - rows[:, 1:].mean(0)) / rows[:, 1:].std(0, ddof=1)
    np.testing.assert_allclose(embedding[:, :22].detach().numpy(), facts, atol=0.02)
