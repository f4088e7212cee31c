"""Test, then learn: what answers a row had learned nothing of it, and nothing held out."""

from __future__ import annotations

import numpy as np
import pytest

from cloud_learner.evaluate.offline import is_held_out
from cloud_learner.experiment.asked import Asked
from cloud_learner.experiment.prequential import course
from cloud_learner.experiment.stream import streamed
from cloud_learner.train.family import Family

ROWS = 900


@pytest.fixture(scope="module")
def family(coin, tmp_path_factory):
    return Family.load(coin.write_family(tmp_path_factory.mktemp("coin")))


@pytest.fixture(scope="module")
def stream(family):
    """Labels that the second feature tells."""
    random = np.random.default_rng(1)
    times_s = 1000.0 + np.arange(ROWS)
    features = random.normal(size=(ROWS, 3)).astype(np.float32)
    features[:, 0] = np.arange(ROWS) % 3  # an index
    labels = (features[:, 1] > 0).astype(np.float32)
    devices = ["ab"[row % 2] for row in range(ROWS)]
    asked = Asked(
        devices, times_s, times_s + 5.0, features, labels, [], 1000.0, float(times_s[-1] + 60)
    )
    return streamed(family, asked)


def test_every_row_is_answered_by_what_was_learned_before_it(family, stream):
    found, seen = course(family, stream), []
    features = stream.asked.features[found.truth.rows]
    again = course(family, stream, looks=lambda cycle: seen.append(cycle.answers(features)))
    answers = again.answers["student"]
    learning = family.config.learning
    cuts = stream.cuts(family.config, float(found.truth.times_s[0]) - 1.0)

    assert again.batches == len(seen) == len(cuts)
    assert learning.batch_size * len(cuts) < ROWS
    for number, cut in enumerate(cuts[:-1]):
        between = (found.truth.times_s > cut.released_s) & (
            found.truth.times_s <= cuts[number + 1].released_s
        )
        assert np.allclose(answers[between], seen[number][between], atol=1e-6)


def test_until_anything_is_learned_student_and_frozen_answer_alike(family, stream):
    found = course(family, stream)
    first_s = stream.cuts(family.config, float(found.truth.times_s[0]) - 1.0)[0].released_s
    before = found.truth.times_s <= first_s

    assert before.any()
    assert np.array_equal(found.answers["student"][before], found.answers["frozen"][before])


def test_the_same_stream_gives_the_same_answers(family, stream):
    first, again = course(family, stream), course(family, stream)

    assert (
        first.answers.keys()
        == again.answers.keys()
        == {"frozen", "student", "mixed", "fast", "stable"}
    )
    for name, answers in first.answers.items():
        assert np.array_equal(answers, again.answers[name])


def test_what_is_held_out_is_never_learned_before_the_stream(family, stream):
    found = course(family, stream)
    known = stream.known_before(float(found.truth.times_s[0]))
    held = {stream.example(int(at)).seq - 1 for at in known if is_held_out(stream.example(int(at)))}

    assert len(held) > 3
    assert held == set(found.warm_held_out.tolist())
    assert not held & set(found.warm.tolist())
