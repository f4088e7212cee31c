"""Headlines of the simulated stories: each has one of its own, by its genres."""

from __future__ import annotations

from pathlib import Path

from cloud_learner.train.modules import load_module

FOLDER = Path(__file__).parents[2] / "models" / "session_ranker"
simulator, names = (load_module(FOLDER / f"{name}.py") for name in ("simulator", "headlines"))


def test_no_two_stories_of_the_simulated_world_have_one_headline():
    world = simulator.World.drawn()
    genres = [world.genres(story) for story in range(simulator.STORIES)]

    assert len(set(names.headlines(genres))) == simulator.STORIES


def test_a_headline_has_its_subject_from_the_first_genre_and_its_fate_from_the_last():
    [headline] = names.headlines([["music", "travel"]])

    assert any(headline.startswith(subject) for subject in names.SUBJECTS["music"])
    assert any(headline.endswith(fate) for fate in names.FATES["travel"])


def test_every_genre_of_the_simulator_has_subjects_and_fates():
    assert set(names.SUBJECTS) == set(names.FATES) == set(simulator.GENRES)
