"""Bounded trust: who harms is found by others' rows, and who stops harming is heard again."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from cloud_learner.stats.tasks import Task
from cloud_learner.train.dataset import Rows
from cloud_learner.train.replica import Replica
from cloud_learner.train.trust import JUDGES_MIN, SUSPICION_MAX, HeldOut, Trust, trimmed

TASK = Task()
DEVICES = [f"kiosk-{number}" for number in range(10)]


def rows(count, seed):
    random = np.random.default_rng(seed)
    features = random.normal(size=(count, 2)).astype(np.float32)
    noise = random.normal(size=count)
    return Rows(features, (features[:, 0] + 0.7 * noise > 0).astype(np.float32))


def names(count, seed, hostile_share=0.3):
    random = np.random.default_rng(1000 + seed)
    drawn = random.choice(DEVICES[1:], count)
    return np.where(random.random(count) < hostile_share, DEVICES[0], drawn).tolist()


def flipped(some, devices, hostile):
    lies = np.array([device == hostile for device in devices])
    return Rows(some.features, np.where(lies, 1 - some.labels, some.labels).astype(np.float32))


class Stream:
    """A replica that learns a stream of micro-batches, with a judge of devices beside it."""

    def __init__(self):
        torch.manual_seed(1)
        self.replica = Replica(nn.Linear(2, 1), TASK, 3e-3)
        self.trust = Trust(TASK, contributors=3)
        self.number = 0

    def play(self, batches, hostile=None):
        """The shares of each batch's rows that were admitted."""
        shares = []
        for _ in range(batches):
            self.number += 1
            devices = names(200, self.number)
            some = flipped(rows(200, self.number), devices, hostile)
            admitted = self.trust.admitted(self.replica, some, devices)
            self.replica.step(some.take(np.flatnonzero(admitted)))
            shares.append(admitted.mean())
        return shares


def test_a_device_that_flips_labels_is_quarantined_with_a_reason():
    stream = Stream()
    stream.play(10, hostile=DEVICES[0])

    assert list(stream.trust.quarantined) == [DEVICES[0]]
    assert DEVICES[0] in stream.trust.quarantined[DEVICES[0]].reason
    assert stream.trust.counters["quarantined_rows"] > 0


def test_honest_devices_are_left_alone():
    stream = Stream()
    shares = stream.play(100)

    assert np.mean(shares) > 0.98
    assert stream.trust.counters["quarantines"] <= 1


def test_who_is_merely_different_is_left_alone():
    """Its rows lie elsewhere, and follow the same law."""
    stream = Stream()
    for number in range(1, 60):
        devices, some = names(200, number), rows(200, number)
        theirs = np.array([device == DEVICES[0] for device in devices])
        moved = some.features + np.where(theirs, 2.0, 0.0)[:, None].astype(np.float32)
        labels = np.where(theirs, moved[:, 0] > 0, some.labels).astype(np.float32)
        admitted = stream.trust.admitted(stream.replica, Rows(moved, labels), devices)
        stream.replica.step(Rows(moved, labels).take(np.flatnonzero(admitted)))

    assert stream.trust.counters["quarantines"] == 0


def test_who_becomes_honest_again_is_heard_again():
    stream = Stream()
    stream.play(10, hostile=DEVICES[0])
    assert stream.trust.quarantined

    shares = stream.play(20)

    assert stream.trust.quarantined == {}
    assert shares[-1] == 1.0


def test_who_is_merely_hard_to_foresee_is_suspected_and_left_alone():
    """Half of its labels are chance: they fit worse, and pull nowhere."""
    stream = Stream()
    stream.play(20)
    for number in range(100, 160):
        devices, some = names(200, number), rows(200, number)
        theirs = np.array([device == DEVICES[0] for device in devices])
        chance = np.random.default_rng(number).integers(0, 2, 200)
        labels = np.where(theirs & (some.features[:, 1] > 0), chance, some.labels)
        mixed = Rows(some.features, labels.astype(np.float32))
        admitted = stream.trust.admitted(stream.replica, mixed, devices)
        stream.replica.step(mixed.take(np.flatnonzero(admitted)))

    assert stream.trust.standings[DEVICES[0]].suspicion > SUSPICION_MAX
    assert stream.trust.counters["quarantines"] == 0


def test_nobody_is_judged_by_rows_of_his_own_or_by_too_few():
    stream = Stream()
    some = flipped(rows(200, 1), [DEVICES[0]] * 200, DEVICES[0])
    devices = [DEVICES[0]] * (201 - JUDGES_MIN) + [DEVICES[1]] * (JUDGES_MIN - 1)

    for _ in range(10):
        assert stream.trust.admitted(stream.replica, some, devices).all()

    assert DEVICES[0] not in stream.trust.standings


def test_a_lone_device_is_learned_from():
    stream = Stream()
    some = rows(100, 3)

    admitted = stream.trust.admitted(stream.replica, some, ["only"] * 100)

    assert admitted.all()


def test_no_device_fills_the_held_out_rows_and_the_newest_stay():
    held_out = HeldOut(100, 2)
    held_out.add(rows(500, 1), ["flood"] * 500)
    assert len(held_out.rows) == 50

    held_out.add(rows(80, 2), ["a", "b"] * 40)

    assert len(held_out.rows) == 100
    assert np.array_equal(held_out.rows.features[-1], rows(80, 2).features[-1])


def test_a_restored_judge_goes_on_as_the_first_would_have():
    straight, first, second = Stream(), Stream(), Stream()
    straight.play(8, hostile=DEVICES[0])
    first.play(4, hostile=DEVICES[0])
    second.replica.restore(first.replica.state())
    second.trust.restore(first.trust.state())
    second.number = 4
    second.play(4, hostile=DEVICES[0])

    assert second.trust.state() == straight.trust.state()


def test_trimming_leaves_out_the_rows_with_the_largest_loss():
    kept = trimmed(np.array([0.1, 5.0, 0.2, 3.0, 0.3]), 0.4)

    assert kept.tolist() == [True, False, True, False, True]
    assert trimmed(np.ones(9), 0.1).all()


def test_rows_without_a_number_are_no_largest_loss_that_is_kept():
    losses = np.array([0.1, np.nan, 0.3, 0.2])
    assert trimmed(losses, 0.25).tolist() == [True, False, True, True]


def test_a_batch_that_leaves_no_numbers_blinds_no_judge():
    stream = Stream()
    wild = Rows(np.full((200, 2), np.inf, np.float32), np.ones(200, np.float32))
    stream.trust.admitted(stream.replica, wild, names(200, 0))

    stream.play(12, hostile=DEVICES[0])

    assert set(stream.trust.quarantined) == {DEVICES[0]}


def test_dropout_makes_nobody_seem_harmful():
    stream = Stream()
    stream.replica = Replica(nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1)), TASK, 3e-2)

    stream.play(30)

    assert stream.trust.counters["quarantines"] == 0
