"""Comparison worlds: scored once per prediction, from what the learner could know."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np
import pytest

from cloud_learner.experiment.worlds import History, _batches, frozen, history, static_worlds
from cloud_learner.store.archive import Archive, ArchivedRecord
from cloud_learner.train.family import Family
from edge_runtime.wire import codec
from edge_runtime.wire.messages import LabelRecord, PredictionRecord, Scored


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


def test_history_joins_predictions_with_their_final_labels_in_order(family, tmp_path):
    def prediction(time_s, kind_family="coin"):
        features = np.array([1, time_s, 0], "<f4").tobytes()
        scored = [Scored("r1", "stable", [time_s / 100])]
        fields = {"side": "left", "x": 1.0}
        return PredictionRecord(
            kind_family, "asked", time_s, fields, family.spec.hash, features, 1.0, scored
        )

    def archived(device, event_class, seq, record):
        return ArchivedRecord(device, 1, event_class, seq, record, codec.encode(record), 0.0)

    records = [
        archived("b", "event", 1, prediction(20.0)),
        archived("a", "event", 1, prediction(30.0)),
        archived("a", "event", 2, prediction(10.0)),
        archived("a", "event", 3, prediction(40.0)),  # labelled only provisionally
        archived("a", "event", 4, prediction(50.0, "other")),
        archived("b", "label", 1, LabelRecord("coin", 1, 1, 1.0, 25.0)),
        archived("a", "label", 1, LabelRecord("coin", 1, 1, 0.0, 35.0)),
        archived("a", "label", 2, LabelRecord("coin", 1, 2, 1.0, 15.0)),
        archived("a", "label", 3, LabelRecord("coin", 1, 3, 1.0, 45.0, final=False)),
        archived("a", "label", 4, LabelRecord("other", 1, 4, 1.0, 55.0)),
    ]
    archive = Archive(tmp_path / "archive")
    name = archive.write(records, 1)

    found = history(archive, [name], family)

    assert found.devices == ["a", "b", "a"]
    assert found.times_s.tolist() == [10.0, 20.0, 30.0]
    assert found.known_s.tolist() == [15.0, 25.0, 35.0]
    assert found.labels.tolist() == [1.0, 1.0, 0.0]
    assert found.features[:, 1].tolist() == [10.0, 20.0, 30.0]
    assert found.served.tolist() == [0.1, 0.2, 0.3]
    archive.close()


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
