"""What replicas remember: bounded, uniform, repeatable."""

from __future__ import annotations

import numpy as np
import pytest

from cloud_learner.train.dataset import Rows
from cloud_learner.train.memory import Newest, Reservoir


def rows(start, count, width=2):
    numbers = np.arange(start, start + count, dtype=np.float32)
    return Rows(np.tile(numbers[:, None], width), numbers)


def filled(count, bound=100, seed=1, step=37):
    reservoir = Reservoir(bound, 2, 1, seed)
    for start in range(0, count, step):
        add(reservoir, start, min(step, count - start))
    return reservoir


def add(reservoir, start, count):
    new = rows(start, count)
    reservoir.add(new, new.labels[:, None] + 0.5)


def kept(reservoir):
    return reservoir.state()["labels"]


def test_until_it_is_full_a_reservoir_keeps_every_row():
    assert kept(filled(80)).tolist() == list(range(80))


def test_a_reservoir_never_passes_its_bound_and_keeps_labels_with_their_features():
    reservoir = filled(5000)
    drawn, answers = reservoir.draw(500)

    assert (len(reservoir), reservoir.seen) == (100, 5000)
    assert len(set(kept(reservoir))) == 100
    assert np.array_equal(drawn.features[:, 0], drawn.labels)
    assert np.array_equal(answers[:, 0], drawn.labels + 0.5)


def test_every_row_ever_added_has_the_same_chance():
    counts = np.zeros(4)
    for seed in range(200):
        counts += np.histogram(kept(filled(1000, seed=seed)), bins=4, range=(0, 1000))[0]

    share = counts / counts.sum()
    assert np.abs(share - 0.25).max() < 0.015, share  # 20,000 rows: five standard deviations


def test_an_empty_reservoir_draws_and_spreads_nothing():
    empty = Reservoir(10, 2, 1, 1)

    assert len(empty.draw(5)[0]) == 0
    assert len(empty.spread(5)) == 0


def test_looking_at_a_spread_changes_no_later_draw():
    looked, untouched = filled(300), filled(300)

    spread = looked.spread(40)

    assert spread.shape == (40, 2)
    assert len({row[0] for row in spread.tolist()}) == 40
    assert looked.spread(1000).shape == (100, 2)
    assert np.array_equal(looked.draw(50)[0].labels, untouched.draw(50)[0].labels)


def test_the_same_rows_and_seed_give_the_same_reservoir_and_another_seed_another():
    assert np.array_equal(kept(filled(1000)), kept(filled(1000)))
    assert not np.array_equal(kept(filled(1000)), kept(filled(1000, seed=2)))


def test_a_restored_reservoir_goes_on_as_the_first_would_have():
    first, second = filled(1000), Reservoir(100, 2, 1, 99)
    second.restore(first.state())
    for each in (first, second):
        add(each, 1000, 500)

    assert np.array_equal(kept(first), kept(second))
    assert np.array_equal(first.draw(20)[0].labels, second.draw(20)[0].labels)


@pytest.mark.parametrize(("bound", "width"), [(50, 2), (200, 2), (100, 3)])
def test_a_reservoir_of_another_size_is_not_restored(bound, width):
    with pytest.raises(ValueError, match=r"reservoir|broadcast|shape"):
        Reservoir(bound, width, 1, 1).restore(filled(1000).state())


def test_the_newest_rows_are_whole_batches_and_no_more_than_are_needed():
    newest, none = Newest(100, 2), Newest(0, 2)
    for start in range(0, 300, 60):
        newest.add(rows(start, 60))
        none.add(rows(start, 60))

    assert newest.rows().labels.tolist() == list(range(180, 300))
    assert len(newest) == 120
    assert len(none) == len(none.rows()) == 0


def test_restored_newest_rows_go_on():
    newest, other = Newest(100, 2), Newest(100, 2)
    newest.add(rows(0, 60))
    other.restore(newest.state())
    other.add(rows(60, 60))

    assert other.rows().labels.tolist() == list(range(120))


def test_of_rows_that_compete_whole_groups_are_drawn():
    reservoir = Reservoir(400, 2, 1, 1)
    numbers = np.arange(300, dtype=np.float32)
    new = Rows(np.tile(numbers[:, None], 2), numbers, groups=1 + np.arange(300) // 6)
    reservoir.add(new, numbers[:, None])

    for count in (1, 50, 120):
        drawn, answers = reservoir.draw(count)
        _, sizes = np.unique(drawn.groups, return_counts=True)
        assert (sizes == 6).all()
        assert len(drawn) == max(6, count - count % 6)
        assert np.array_equal(answers[:, 0], drawn.labels)
