"""The watch over a stream: what changed is named with its kind, and a quiet world stays quiet."""

from __future__ import annotations

import csv
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from cloud_learner.evaluate.alarms import Alarms, Sign
from cloud_learner.evaluate.watch import Watch
from cloud_learner.stats.tasks import Task
from cloud_learner.train.declaration import Drift
from edge_runtime.features.feature import Column

ROWS, SEED = 300, 1
COLUMNS = [Column("x", 0), Column("z", 0), Column("carrier", 5)]
DATA = Path(os.environ.get("HEADWATER_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


class World:
    """A stream whose label follows `x`, and a student that answers as it once was right to."""

    def __init__(self, seed, **drift):
        self.random, self.batch = np.random.default_rng(seed), 0
        self.watch = Watch(Drift(**drift), Task(), COLUMNS, self.features(2000), SEED)

    def features(self, count, mean=0.0, spread=1.0):
        x = self.random.normal(mean, spread, (count, 2))
        return np.c_[x, self.random.integers(1, 5, count)].astype("f4")

    @staticmethod
    def answers(features):
        return (1 / (1 + np.exp(-2.0 * features[:, :1]))).astype("f4")

    def labels(self, outputs, turned=0.0):
        chance = (1 - turned) * outputs[:, 0] + turned * (1 - outputs[:, 0])
        return (self.random.random(len(outputs)) < chance).astype("f4")

    def live(self, count, *, mean=0.0, turned=0.0):
        """So many micro-batches; the alarms they raise. `turned` may be a climb."""
        raised = []
        for level in np.broadcast_to(turned, count):
            self.batch += 1
            features = self.features(ROWS, mean)
            outputs = self.answers(features)
            labels = self.labels(outputs, level)
            raised += self.watch.observe(
                *(labels, outputs, features, lambda rows: rows[:, :2]),
                batch=self.batch,
                time_s=60.0 * self.batch,
            )
        return raised


def named(alarms):
    return [(each.kind, each.source, each.name) for each in alarms]


@pytest.mark.parametrize(
    "worlds", [pytest.param(2, id="few"), pytest.param(40, id="many", marks=pytest.mark.slow)]
)
def test_a_world_that_stands_still_raises_fewer_alarms_than_delta_of_its_micro_batches(worlds):
    alarms = [each for seed in range(worlds) for each in World(100 + seed).live(100)]
    print(f"{len(alarms)} alarms in {worlds * 100} micro-batches that stand still")

    assert len(alarms) <= 1 + 2 * Drift().delta * worlds * 100, named(alarms)


@pytest.mark.parametrize("seed", range(3))
def test_labels_that_turn_are_a_sudden_alarm_of_the_loss_alone_within_two_micro_batches(seed):
    world = World(seed)
    assert world.live(25) == []
    raised = world.live(2, turned=0.7)

    assert named(raised) == [("sudden", "loss", "")], f"seed {seed}"
    assert raised[0].batch in (26, 27)
    assert raised[0].time_s == 60.0 * raised[0].batch
    assert raised[0].found > raised[0].reach


def test_labels_that_turn_bit_by_bit_are_a_gradual_alarm():
    world = World(4)
    world.live(25)
    raised = world.live(30, turned=np.linspace(0, 0.7, 30))

    assert named(raised)[0] == ("gradual", "loss", "")


def test_rows_that_move_are_alarms_of_scores_feature_and_embedding():
    world = World(5)
    world.live(25)
    raised = world.live(2, mean=1.2)

    assert ("sudden", "score", "") in named(raised)
    assert ("sudden", "feature", "x") in named(raised)
    assert ("sudden", "embedding", "") in named(raised)
    assert not any(each.name == "carrier" for each in raised)
    assert (world.watch.stands, world.watch.hurts) == (True, False)


def test_a_change_that_comes_back_at_even_distances_is_cyclic():
    world, kinds = World(6), []
    world.live(20)
    for _ in range(4):
        found = [each.kind for each in world.live(15, turned=0.7) if each.source == "loss"]
        kinds += found[:1]
        world.live(25)

    assert kinds == ["sudden", "sudden", "cyclic", "cyclic"]


def test_an_alarm_stands_until_its_batches_are_calm():
    world = World(7, calm_batches=10)
    world.live(25)
    [alarm] = world.live(2, turned=0.7)[:1]
    assert [each.source for each in world.watch.standing] == ["loss"]
    assert world.watch.hurts

    world.live(alarm.batch + 9 - world.batch)
    assert world.watch.stands
    world.live(5)
    assert not world.watch.stands


def test_what_the_learner_recalled_is_cyclic_and_is_told_once():
    world = World(8)
    world.live(25)
    world.live(2, turned=0.7)

    assert named(world.watch.recalled()) == [("cyclic", "loss", "")]
    assert world.watch.recalled() == []
    assert [each.kind for each in world.watch.standing] == ["cyclic"]


@pytest.mark.parametrize("task", [Task(kind="regression"), Task(kind="ranking", group="q")])
def test_every_task_is_watched_by_its_loss(task):
    random = np.random.default_rng(1)
    watch, raised = Watch(Drift(), task, COLUMNS[:1], random.normal(size=(900, 1)), SEED), []
    for batch in range(1, 31):
        x = random.normal(size=(ROWS, 1)).astype("f4")
        y = np.abs(x[:, 0] * (-1 if batch > 28 else 1) + random.normal(0, 0.1, ROWS)).astype("f4")
        raised += watch.observe(y, np.abs(x) if batch < 29 else -x, x, batch=batch, time_s=batch)

    assert ("sudden", "loss", "") in named(raised)
    assert min(each.batch for each in raised) >= 29


@pytest.mark.parametrize("broken", ["outputs", "features"])
def test_rows_that_are_no_numbers_are_left_out(broken):
    world = World(11)
    features = world.features(ROWS)
    outputs = world.answers(features)
    labels = world.labels(outputs)
    {"outputs": outputs, "features": features}[broken][:, 0] = [np.nan, np.inf] * (ROWS // 2)

    assert world.watch.observe(labels, outputs, features, batch=1, time_s=1.0) == []
    world.batch = 1
    assert world.live(20) == []


def test_embeddings_that_overflow_raise_nothing_and_leave_the_rest_watched():
    world = World(11)
    features = world.features(ROWS)
    outputs = world.answers(features)
    for batch in range(1, 12):
        raised = world.watch.observe(
            *(world.labels(outputs), outputs, features, lambda rows: np.full_like(rows, np.inf)),
            batch=batch,
            time_s=1.0,
        )
        assert raised == []


def test_a_family_that_watches_nothing_has_no_alarm():
    world = World(12, on=False)
    world.live(10)

    assert world.live(5, mean=3.0, turned=1.0) == []


def test_a_restored_watch_goes_on_as_the_first_would_have():
    straight, other = World(13), World(14)
    straight.live(15)
    buffer = io.BytesIO()
    torch.save(straight.watch.state(), buffer)
    buffer.seek(0)
    other.watch.restore(torch.load(buffer, weights_only=False))
    other.random.bit_generator.state = straight.random.bit_generator.state
    other.batch = straight.batch

    def story(world):
        return world.live(10) + world.live(3, turned=0.7) + world.live(5, mean=1.2)

    told = story(straight)
    assert told == story(other)
    assert len(told) >= 4


def test_a_sign_that_goes_on_is_one_alarm_and_one_that_returns_is_another():
    alarms, sign = Alarms(calm_batches=20), Sign("loss", "", 0.4, 0.2)
    raised = {
        batch: bool(alarms.take([sign] if batch in (3, 4, 6, 12) else [], batch, 0.0))
        for batch in range(1, 20)
    }

    assert [batch for batch, each in raised.items() if each] == [3, 12]


# Real streams, and a model that learns each micro-batch after it was watched.


class Softmax:
    """Multinomial logistic regression by plain SGD."""

    def __init__(self, features, labels, classes):
        self.mean, self.spread = features.mean(0), np.maximum(features.std(0), 0.05)
        self.weights = np.zeros((features.shape[1] + 1, classes))
        for _ in range(5):
            self.learn(features, labels)

    def answers(self, features):
        z = np.c_[(features - self.mean) / self.spread, np.ones(len(features))] @ self.weights
        e = np.exp(z - z.max(1, keepdims=True))
        return (e / e.sum(1, keepdims=True)).astype("f4")

    def learn(self, features, labels):
        for at in range(0, len(labels), 50):
            x, y = features[at : at + 50], labels[at : at + 50].astype(int)
            wrong = self.answers(x) - np.eye(self.weights.shape[1])[y]
            scaled = np.c_[(x - self.mean) / self.spread, np.ones(len(x))]
            self.weights -= 0.1 * scaled.T @ wrong / len(y)


def insects():
    path = DATA / "insects" / "gradual_balanced_24150.csv"
    if not path.exists():
        pytest.skip(f"no {path}")
    table = np.loadtxt(path, delimiter=",", dtype="f4", max_rows=8000)
    classes = np.unique(table[:, -1])
    return table[:, :-1], np.searchsorted(classes, table[:, -1]).astype("f4"), len(classes)


def elec2():
    path = DATA / "elec2" / "electricity_river.zip"
    if not path.exists():
        pytest.skip(f"no {path}")
    with zipfile.ZipFile(path) as archive:
        rows = list(csv.reader(archive.read("electricity.csv").decode().splitlines()))[1:9001]
    labels = np.array([row[-1] == "UP" for row in rows], "f4")
    return np.array([[float(cell) for cell in row[1:-1]] for row in rows], "f4"), labels, 2


@pytest.mark.parametrize("stream", [elec2, insects])
def test_a_real_stream_is_mostly_silent_and_labels_that_turn_in_it_are_alarmed_at_once(stream):
    features, labels, classes = stream()
    shift, size, warm = 7000, 100, 2000
    labels[shift:] = classes - 1 - labels[shift:]
    task = Task() if classes == 2 else Task(kind="multiclass", classes=classes)
    columns = [Column(f"x{at}", 0) for at in range(features.shape[1])]
    watch = Watch(Drift(), task, columns, features[:warm], SEED)
    model, losses = Softmax(features[:warm], labels[:warm], classes), []
    for batch, start in enumerate(range(warm, len(labels) - size, size)):
        x, y = features[start : start + size], labels[start : start + size]
        outputs = model.answers(x) if classes > 2 else model.answers(x)[:, 1:]
        raised = watch.observe(y, outputs, x, batch=batch, time_s=float(start))
        losses += [each.batch for each in raised if each.source == "loss"]
        model.learn(x, y)
    first = (shift - warm) // size
    print(f"{stream.__name__}: loss alarms at {losses} of {batch + 1}, the shift at {first}")

    assert any(first <= each <= first + 3 for each in losses)
    assert sum(each < first for each in losses) <= 0.1 * first
