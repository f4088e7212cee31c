"""A data file as a stream: what the production joiner and batcher make of it."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from cloud_learner.experiment.asked import Asked, read_asked
from cloud_learner.experiment.stream import streamed
from cloud_learner.store.examples import Batch
from cloud_learner.train.family import Family


@pytest.fixture(scope="module")
def family(coin, tmp_path_factory):
    return Family.load(coin.write_family(tmp_path_factory.mktemp("coin")))


def asked(known_after_s, devices=None, every_s=1.0):
    """Predictions one after the other, each known so much later; None: never."""
    count = len(known_after_s)
    times_s = 1000.0 + every_s * np.arange(count)
    after = np.array([np.nan if each is None else each for each in known_after_s])
    labels = np.where(np.isnan(after), np.nan, np.arange(count) % 2).astype(np.float32)
    features = np.arange(3 * count, dtype=np.float32).reshape(-1, 3)
    known_s = times_s + after
    end_s = float(max(times_s[-1], np.nanmax(known_s)))
    names = devices or ["a"] * count
    return Asked(names, times_s, known_s, features, labels, [], 1000.0, end_s)


def test_a_file_gives_all_predictions_with_the_features_of_their_time(coin, family, tmp_path):
    events = coin.stream(40)
    data = coin.write_csv(tmp_path / "coins.csv", events)

    found = read_asked(family, data)

    predictions = [event for event in events if event[1] == "asked"]
    assert len(found) == len(predictions)
    assert found.times_s.tolist() == [event[0] for event in predictions]
    assert found.devices == [event[2] for event in predictions]
    assert found.features[:, 1] == pytest.approx([event[3]["x"] for event in predictions])
    assert found.labels.tolist() == [event[4] for event in predictions]
    assert found.known_s.tolist() == [event[5] for event in predictions]
    assert (found.start_s, found.end_s) == (1000.0, max(event[5] for event in predictions))


def test_mature_examples_come_out_when_their_window_has_passed_and_no_label_was_late(family):
    some = asked([5, 20, None, 20.5, 0, 19, *[1] * 60])

    released = streamed(family, some).released

    # The window is 20 s: row 2 has no label, that of row 3 comes too late.
    assert released.rows[:4].tolist() == [0, 1, 4, 5]
    assert (released.released_s == some.times_s[released.rows] + 20.0).all()
    assert released.labels.tolist() == some.labels[released.rows].tolist()
    assert not released.early.any()


def test_an_example_can_be_released_only_when_the_stream_has_come_so_far(family):
    some = asked([1] * 50)

    released = streamed(family, some).released

    assert (released.released_s <= some.end_s).all()
    assert released.rows.tolist() == list(range(30))


def test_a_family_that_counts_silence_gets_an_example_of_it(coin, tmp_path):
    change = {"family.toml": ("window_s = 20.0", 'window_s = 20.0\nexpiry = "negative"')}
    silent = Family.load(coin.write_family(tmp_path, change))

    released = streamed(silent, asked([None, 3, *[1] * 40])).released

    assert released.rows[:2].tolist() == [0, 1]
    assert released.labels[:2].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_how_much_is_joined_at_once_changes_nothing(family, at_once):
    random = np.random.default_rng(8)
    waits = [None if random.random() < 0.1 else float(random.integers(0, 24)) for _ in range(150)]
    devices = [("a", "b", "c")[int(random.integers(3))] for _ in waits]
    some = asked(waits, devices)

    whole, parts = streamed(family, some), streamed(family, some, at_once=at_once)

    for name in ("rows", "released_s", "known_s", "labels", "weights", "early"):
        assert np.array_equal(getattr(whole.released, name), getattr(parts.released, name)), name


def test_batches_are_cut_by_the_batcher_from_what_comes_after_the_warm_up(family):
    some = asked([1.0] * 160, ["a", "a", "a", "b"] * 40)
    stream = streamed(family, some)

    learning = msgspec.structs.replace(family.config.learning, batch_size=20, device_cap=12)
    cuts = stream.cuts(family.learning_otherwise(learning).config, after_s=1045.0)

    batch = stream.batch(1, cuts[0])
    assert isinstance(batch, Batch)
    assert all(example.time_s + 20.0 > 1045.0 for example in batch.examples)
    for cut in cuts:
        names = [some.devices[row] for row in stream.released.rows[cut.positions]]
        assert (len(names), max(names.count("a"), names.count("b")) <= 12) == (20, True)
        assert cut.released_s >= stream.released.released_s[cut.positions].max()
    assert stream.known_before(1045.0).tolist() == list(range(26))


def test_a_shuffle_keeps_each_outcome_with_its_features_and_its_delay():
    some = asked([float(at % 7) for at in range(60)])

    mixed = some.shuffled(3)

    pair = {
        row[0]: (label, at % 7)
        for at, (row, label) in enumerate(zip(some.features, some.labels, strict=True))
    }
    assert not np.array_equal(mixed.labels, some.labels)
    assert mixed.times_s.tolist() == some.times_s.tolist()
    for features, label, delay in zip(
        mixed.features, mixed.labels, mixed.known_s - mixed.times_s, strict=True
    ):
        assert pair[features[0]] == (label, delay)


def with_label(family, **label):
    """The family with another label policy."""
    replace = msgspec.structs.replace
    config = replace(family.config, label=replace(family.config.label, **label))
    return Family(family.folder, config, family.spec, family._network)


def test_by_arrival_an_example_comes_out_with_its_label(family):
    some = asked([5, 30, None, 3, 0, *[1] * 60])

    released = streamed(with_label(family, policy="arrival"), some).released

    # Row 1 comes too late for its window; row 3 is known at 1006, after row 4 at 1004.
    assert released.rows[:4].tolist() == [4, 0, 3, 5]
    assert (released.released_s == some.known_s[released.rows]).all()


def test_by_weight_a_soon_label_comes_out_at_once_and_once_more_mature(family):
    some = asked([float(at % 15) for at in range(120)])

    released = streamed(with_label(family, policy="weighted", early_s=5.0), some).released

    early = released.rows[released.early]
    assert sorted(early.tolist()) == [row for row in range(120) if row % 15 <= 5]
    assert (released.released_s[released.early] == some.known_s[early]).all()
    mature = released.rows[~released.early]
    assert mature.tolist() == [row for row in range(120) if some.times_s[row] + 20 < some.end_s]
    assert (np.diff(released.released_s) >= 0).all()
    assert (released.weights[~released.early] == 1).all()
    assert (released.weights[released.early] >= 1).all()
