"""The recent hold-out: no device owns it, early examples stay out, a restart keeps it."""

from __future__ import annotations

import math
from collections import Counter
from itertools import count, islice

import numpy as np
import pytest

from cloud_learner.evaluate.holdout import HoldOut, largest_share
from cloud_learner.evaluate.offline import is_held_out
from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from edge_runtime.errors import ConfigError


def example(number, device="a", **changes):
    parts = {
        "device": device,
        "epoch": 1,
        "seq": number,
        "family": "toy",
        "spec": "",
        "time_s": float(number),
        "label_time_s": number + 10.0,
        "label": number % 2,
        "features": np.array([number, 1], "<f4").tobytes(),
        "propensity": 1.0,
        "scored": [],
        "arrived_s": 0.0,
        "matured_s": 0.0,
    }
    return Example(**parts | changes)


def held(amount, device="a", start=0, **changes):
    """The first examples of the device from `start` on that are held out."""
    found = (example(number, device, **changes) for number in count(start))
    return list(islice(filter(is_held_out, found), amount))


def by_device(hold_out):
    devices = hold_out.rows().devices
    return Counter(devices.names[code] for code in devices.codes)


def test_it_keeps_the_newest_held_out_examples_only():
    hold_out, a, b = HoldOut(6), held(4), held(4, "b", 1000)
    hold_out.add(example(n) for n in range(50) if not is_held_out(example(n)))
    hold_out.add(a)
    hold_out.add(b)

    assert hold_out.rows().times_s.tolist() == [e.time_s for e in (*a[1:], *b[1:])]
    assert hold_out.rows().features.shape == (6, 2)


def test_an_empty_hold_out_has_no_rows():
    assert len(HoldOut(5).rows()) == 0
    assert math.isnan(largest_share(HoldOut(5).rows()))


def test_a_lone_device_fills_it_up_to_its_share_only():
    hold_out = HoldOut(100, share=0.2)
    hold_out.add(held(150))

    assert by_device(hold_out) == {"a": 20}
    assert largest_share(hold_out.rows()) == 1.0


def test_no_share_goes_beyond_half():
    hold_out = HoldOut(10, share=1.0)
    hold_out.add(held(30))

    assert by_device(hold_out) == {"a": 5}


def test_a_device_that_floods_pushes_out_none_but_its_own_rows():
    hold_out = HoldOut(100, share=0.2)
    for part, device in enumerate("bcde"):
        hold_out.add(held(20, device, part))
    hold_out.add(held(2000, "flood", 10_000))

    assert by_device(hold_out) == {"b": 20, "c": 20, "d": 20, "e": 20, "flood": 20}


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_no_device_has_more_than_its_share_of_what_is_handed_out(share):
    hold_out = HoldOut(1000, share=share)
    for part in range(20):
        hold_out.add(held(3 + part, f"d{part}", 1000 * part))
    hold_out.add(held(500, "flood", 90_000))

    rows = hold_out.rows()

    assert largest_share(rows) <= share
    assert by_device(hold_out)["flood"] >= 22


def test_few_devices_have_equal_shares_where_the_share_is_smaller_than_that():
    hold_out = HoldOut(1000, share=0.1)
    hold_out.add(held(90))
    hold_out.add(held(30, "b", 5000))

    assert by_device(hold_out) == {"a": 30, "b": 30}


def test_a_device_that_brings_one_row_does_not_starve_the_gate():
    """Else it could stop all releases; that one device has most of the rows is told instead."""
    hold_out = HoldOut(1000, rows_min=40)
    hold_out.add(held(90))
    hold_out.add(held(1, "b", 5000))

    assert by_device(hold_out) == {"a": 39, "b": 1}
    assert largest_share(hold_out.rows()) == 39 / 40


def test_those_handed_out_are_the_newest_of_each_device():
    hold_out = HoldOut(1000)
    a, b = held(90), held(10, "b", 5000)
    hold_out.add([*a, *b])

    assert hold_out.rows().times_s.tolist() == [e.time_s for e in (*a[-10:], *b)]


def test_early_examples_never_enter():
    hold_out = HoldOut(100)
    hold_out.add(held(20, early=True, weight=3.0))

    assert len(hold_out.rows()) == 0


@pytest.mark.parametrize("label", [2.0, -0.1, math.nan])
def test_labels_that_are_none_of_the_task_never_enter(label):
    hold_out = HoldOut(100)
    hold_out.add(held(20, label=label))

    assert len(hold_out.rows()) == 0


def test_rows_carry_what_slices_and_ages_need():
    hold_out = HoldOut(100, fields=("carrier", "absent"))
    hold_out.add(held(2, fields={"carrier": 7}))

    rows = hold_out.rows()

    assert rows.ages_s.tolist() == [10.0, 10.0]
    assert (rows.fields["carrier"].names, rows.fields["absent"].names) == (["7"], [""])


def test_rows_that_compete_enter_together():
    hold_out = HoldOut(1000, task=Task(kind="ranking", group="query"))
    hold_out.add(example(n, "ab"[n % 2], fields={"query": n // 10}) for n in range(2000))

    sizes = Counter(hold_out.rows().groups.tolist())

    assert len(sizes) > 5
    assert set(sizes.values()) == {10}


def test_the_label_before_is_the_last_that_was_known_when_a_row_was_predicted():
    def one(number, time_s, label_time_s, label):
        features = np.array([number, 1], "<f4").tobytes()
        return example(
            number, features=features, time_s=time_s, label_time_s=label_time_s, label=label
        )

    hold_out, stream = HoldOut(10_000), []
    for number in range(400):  # labels come after 5, every third after 50
        lag = 50.0 if number % 3 == 0 else 5.0
        stream.append(one(number, float(number), number + lag, float(number % 7 == 0)))
    for part in range(0, 400, 25):
        hold_out.add(stream[part : part + 25])

    rows = hold_out.rows()
    for time_s, before in zip(rows.times_s.tolist(), rows.before.tolist(), strict=True):
        known = [e for e in stream if e.label_time_s <= time_s]
        newest = max(known, key=lambda e: (e.label_time_s, e.seq), default=None)
        assert before == newest.label if newest else math.isnan(before)


def test_it_goes_on_after_a_restart_as_if_there_had_been_none(tmp_path):
    whole, first, again = (HoldOut(60, fields=("carrier",)) for _ in range(3))
    stream = [example(n, "abc"[n % 3], fields={"carrier": n % 4}) for n in range(3000)]
    whole.add(stream)
    first.add(stream[:1500])
    first.save(tmp_path / "h")
    again.load(tmp_path / "h")
    again.add(stream[1500:])

    expected, found = whole.rows(), again.rows()

    assert expected.times_s.tolist() == found.times_s.tolist()
    assert expected.before.tolist() == found.before.tolist()
    assert expected.fields["carrier"].codes.tolist() == found.fields["carrier"].codes.tolist()


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", None])
def test_a_file_that_is_none_of_ours_is_refused_and_changes_nothing(tmp_path, data):
    hold_out = HoldOut(10)
    hold_out.add(held(3))
    if data is not None:
        (tmp_path / "h").write_bytes(data)

    with pytest.raises(ConfigError, match="remove it") as caught:
        hold_out.load(tmp_path / "h")

    assert caught.value.code == "bad_hold_out"
    assert len(hold_out.rows()) == 3
