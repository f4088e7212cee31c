"""Comparison worlds: scored once per prediction, from what the learner could know."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np
import pytest

from cloud_learner.experiment.worlds import History, _batches, frozen, history, static_worlds
from cloud_learner.store.archive import Archive
from cloud_learner.store.examples import Example
from cloud_learner.train.family import Family
from edge_runtime.wire.messages import Scored


@pytest.fixture(scope="module")
def family(coin, tmp_path_factory):
    return Family.load(coin.write_family(tmp_path_factory.mktemp("coin")))


def past(count, known_after_s=5.0):
    random = np.random.default_rng(2)
    features = random.normal(size=(count, 3)).astype(np.float32)
    times_s = 1000.0 + np.arange(count)
    return History(
        devices=["a"] * count,
        times_s=times_s,
        known_s=times_s + known_after_s,
        features=features,
        labels=(features[:, 1] > 0).astype(np.float32),
        served=np.full(count, 0.5),
    )


def test_history_is_each_example_once_in_order_as_it_stands_now(family, tmp_path):
    def example(device, seq, time_s, label=1.0, **other):
        plain = Example(
            device=device,
            epoch=1,
            seq=seq,
            family="coin",
            time_s=time_s,
            label_time_s=time_s + 5,
            features=np.array([1, time_s, 0], "<f4").tobytes(),
            spec=family.spec.hash,
            label=label,
            propensity=1.0,
            scored=[Scored("r2", "canary", [time_s / 100]), Scored("r1", "stable", [1.0])],
            arrived_s=0.0,
            matured_s=0.0,
        )
        return msgspec.structs.replace(plain, **other)

    archive = Archive(tmp_path / "archive")
    first = [
        example("b", 1, 20.0),
        example("a", 1, 30.0),
        example("a", 2, 10.0, final=False),
        example("a", 3, 40.0, final=False),  # labelled only provisionally
        example("a", 4, 50.0, family="other"),
        example("a", 5, 60.0, spec="another", features=bytes(4)),
    ]
    amended = [
        example("a", 1, 30.0, label=0.0, label_time_s=90.0, revision=2),
        example("a", 1, 30.0, revision=1),
        example("a", 2, 10.0, revision=1),
    ]
    archive.write(first, 1)
    archive.write(amended, 2)

    found = history(archive, family)

    assert found.devices == ["a", "b", "a"]
    assert found.times_s.tolist() == [10.0, 20.0, 30.0]
    assert found.known_s.tolist() == [15.0, 25.0, 90.0]
    assert found.labels.tolist() == [1.0, 1.0, 0.0]
    assert found.features[:, 1].tolist() == [10.0, 20.0, 30.0]
    assert found.served.tolist() == [0.1, 0.2, 0.3]
    archive.close()


def test_no_examples_are_an_empty_history(family, tmp_path):
    found = history(Archive(tmp_path / "archive"), family)

    assert len(found) == 0
    assert found.features.shape == (0, family.spec.size)


def test_a_frozen_world_answers_every_row_with_its_one_package(write_package):
    path, sha256 = write_package()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    rows = msgspec.structs.replace(past(20), features=np.zeros((20, 5), np.float32))

    assert frozen(path, rows).tolist() == [0.5] * 20


def test_batches_hold_what_came_after_the_bootstrap_within_the_label_window(family):
    some = past(130)
    some.known_s[40] = some.times_s[40] + 20.5  # too late for the window of 20 s

    first, second = _batches(family, some, learned_through_s=1010.0)

    assert first.tolist() == [row for row in range(10, 61) if row != 40]
    assert second.tolist() == list(range(61, 111))


def test_the_continual_world_differs_only_after_its_first_release(family):
    some = past(420)

    kept, scores = static_worlds(family, some, 1200.0, lambda _text: None)

    # Four batches of 50 after second 1200 mature at 1399 + 20: the last row is answered anew.
    assert np.array_equal(kept[:419], scores[:419])
    assert kept[419] != scores[419]
