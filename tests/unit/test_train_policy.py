"""The policy follows the student: what is known of people goes from embedding to embedding."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from cloud_learner.train.dataset import Rows
from cloud_learner.train.declaration import Personal
from cloud_learner.train.policy import FOLLOW_BATCHES, PolicyLearner, shortened
from edge_runtime.personal.head import Head
from edge_runtime.personal.prior import Prior

COLUMNS, WIDTH = 4, 5
PERSONAL = Personal(region=3.0, group="visit", memory=50, explore=0.2, optimism=1.5)
REFERENCE = np.random.default_rng(1).normal(size=(300, COLUMNS)).astype(np.float32)


class Student:
    """Answers 0.5 and embeds by a layer of its own; `embed` is what a package's runner has."""

    def __init__(self, seed: int = 0, step: float = 0.0) -> None:
        self.layer = np.random.default_rng(7).normal(0, 0.7, (COLUMNS, WIDTH))
        self.layer += step * np.random.default_rng(seed).normal(0, 1, (COLUMNS, WIDTH))
        self.asked = 0

    def embed(self, rows):
        self.asked += len(rows)
        embeddings = np.tanh(rows @ self.layer).astype(np.float32)
        return embeddings, np.full((len(rows), 1), 0.5, np.float32)


def visit(seed: int):
    """Rows and labels of a visitor who likes what the second column says, more or less."""
    chance = np.random.default_rng(seed)
    rows = chance.normal(size=(20, COLUMNS)).astype(np.float32)
    odds = chance.normal(0, 2) * np.tanh(rows[:, 1])
    return rows, (chance.logistic(odds) > 0).astype(np.float32)


def examples(count: int, seed: int = 100) -> tuple[list[Example], Rows]:
    found, rows, labels = [], [], []
    for number in range(count):
        features, liked = visit(seed + number)
        for place, label in enumerate(liked.tolist()):
            at_s = 1000.0 * number + place
            fields = {"visit": f"v{number}"}
            found.append(
                Example(
                    *("a", 1, len(found), "f", at_s, at_s, b"", "", label, 1.0, [], 0.0, 0.0),
                    fields=fields,
                )
            )
        rows.append(features)
        labels.append(liked)
    return found, Rows(np.concatenate(rows), np.concatenate(labels))


def learner(personal=PERSONAL) -> PolicyLearner:
    return PolicyLearner(personal, Task(), REFERENCE)


def taught(count: int = 30, batch: int = FOLLOW_BATCHES) -> PolicyLearner:
    made = learner()
    made.learn(batch, *examples(count), Student().embed)
    return made


def test_without_a_session_there_is_no_policy():
    assert learner().policy(Student()) is None


def test_a_family_that_declares_no_sessions_keeps_none_and_asks_nobody():
    student, undeclared = Student(), learner(None)
    undeclared.learn(FOLLOW_BATCHES, *examples(3), student.embed)

    assert undeclared.policy(student) is None
    assert undeclared.state() is None
    assert (len(undeclared), student.asked) == (0, 0)


def test_a_policy_says_what_the_family_declares_and_what_people_are_like():
    policy = taught().policy(Student())

    assert (policy.explore, policy.optimism) == (0.2, 1.5)
    assert (policy.prior.task, policy.prior.region, policy.prior.width) == ("binary", 3.0, WIDTH)
    taste = Student().embed(np.eye(COLUMNS, dtype=np.float32)[1:2])[0][0]
    other = Student().embed(np.eye(COLUMNS, dtype=np.float32)[2:3])[0][0]
    assert spread(policy.prior, taste) > 1.2 * spread(policy.prior, other)


def test_what_ships_has_short_numbers():
    prior = taught().policy(Student()).prior

    for values in (prior.mean, prior.covariance):
        assert not (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any()


@pytest.mark.parametrize("seed", range(5))
def test_short_numbers_make_no_direction_surer_than_it_was(seed):
    """Though some directions are all but certain."""
    chance = np.random.default_rng(seed)
    axes = np.linalg.qr(chance.normal(size=(WIDTH + 1, WIDTH + 1)))[0]
    whole = (axes * np.geomspace(1e-5, 1, WIDTH + 1)) @ axes.T
    covariance = ((whole + whole.T) / 2).astype(np.float32)
    prior = Prior("binary", chance.normal(size=WIDTH + 1).astype(np.float32), covariance, 3.0, 9.0)
    short = shortened(prior)

    more = short.covariance.astype(float) - covariance
    assert np.linalg.eigvalsh(more)[0] >= 0
    assert np.abs(more).max() < 0.02
    np.testing.assert_allclose(short.mean, prior.mean, rtol=2**-8)
    assert shortened(short).mean.tobytes() == short.mean.tobytes()


def spread(prior, embedding) -> float:
    return Head(prior).deviation(embedding) / float(np.linalg.norm(embedding))


def test_asking_changes_nothing():
    asked, never = taught(), taught()
    first = asked.policy(Student())
    asked.policy(Student(3, 0.5))

    assert asked.policy(Student()).to_json() == first.to_json() == text(never)


def text(made: PolicyLearner) -> str:
    return made.policy(Student()).to_json()


def test_a_policy_is_of_the_embedding_that_it_is_asked_for():
    assert taught().policy(Student(3, 0.5)).to_json() != text(taught())


def test_rounds_add_up_while_the_student_moves():
    """Carried and improved, the prior ends nearer to a long learned one than where it began."""
    followed, last = taught(), Student()
    for step in range(40):
        last = Student(1, 0.01 * step)
        followed.follow(last.embed)
    long = taught()
    for _ in range(200):
        long.follow(last.embed)
    cold, there = (made.policy(last).prior.covariance for made in (taught(batch=1), long))

    def far(covariance) -> float:
        return float(np.linalg.norm(covariance - there))

    assert far(followed.policy(last).prior.covariance) < 0.75 * far(cold)


def test_a_prior_follows_only_now_and_then():
    student, made = Student(), learner()
    for batch in range(1, FOLLOW_BATCHES):
        made.learn(batch, *examples(2), student.embed)
    assert student.asked == 0

    made.learn(FOLLOW_BATCHES, *examples(2), student.embed)
    assert student.asked > 0


def test_what_was_kept_goes_on_as_if_nothing_had_happened():
    straight, first, again = taught(), taught(), learner()
    again.restore(first.state())
    assert text(again) == text(straight)

    for made in (straight, again):
        made.learn(2 * FOLLOW_BATCHES, *examples(5, seed=7), Student(1, 0.1).embed)
    assert text(again) == text(straight)


def test_a_checkpoint_from_before_sessions_begins_with_none():
    made = learner()
    made.restore(None)

    assert made.policy(Student()) is None


def test_rows_that_the_student_makes_no_numbers_of_say_nothing():
    class Torn(Student):
        def embed(self, rows):
            embeddings, answers = super().embed(rows)
            embeddings[np.abs(rows[:, 0]) > 50] = np.inf
            return embeddings, answers

    wild = taught()
    strange = Rows(np.full((2, COLUMNS), 99, np.float32), np.ones(2, np.float32))
    wild.remember(strange, ["a", "a"], ["nobody", "nobody"], [1e9, 1e9])

    assert len(wild) == 31
    assert wild.policy(Torn()).to_json() == text(taught())


@pytest.mark.parametrize("kind", ["regression", "ranking"])
def test_other_tasks_of_one_number_have_a_policy_too(kind):
    task = Task(kind=kind, group="visit" if kind == "ranking" else "")
    made = PolicyLearner(msgspec.structs.replace(PERSONAL, forgetting=0.05), task, REFERENCE)
    made.learn(FOLLOW_BATCHES, *examples(10), Student().embed)
    prior = made.policy(Student()).prior

    assert (prior.task, prior.forgetting) == (kind, 0.05)
