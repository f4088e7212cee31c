"""Features over history: labels move windows when they become known, as on a device."""

from __future__ import annotations

import heapq
import random

import msgspec

from cloud_learner.experiment.features import featured
from cloud_learner.experiment.needs import Needs, common
from cloud_learner.experiment.replay import DataRow
from edge_runtime.features.feature import LABEL
from edge_runtime.features.spec import Spec
from edge_runtime.inference.pipeline import Pipeline
from edge_runtime.inference.slot import load_arm

SPEC = Spec.from_toml("""
version = 1
[[features]]
name = "labels"
window = { over = "label", key = "carrier", statistic = "count", span_s = 1000.0 }
[[features]]
name = "late"
fill = -1.0
window = { over = "label", statistic = "mean", span_s = 1000.0 }
[[features]]
name = "departed"
window = { over = "departed", statistic = "count", span_s = 1000.0 }
""")


def asked(time_s, label=None, known_s=None, device="a", carrier="AA"):
    fields = {"carrier": carrier, "distance": 1.0}
    return DataRow(time_s, "scheduled", device, fields, label, known_s)


def vectors(rows, interface):
    found = [vector for _, vector in featured(rows, interface, SPEC)]
    return [None if vector is None else vector.tolist() for vector in found]


def test_a_label_counts_from_when_it_is_known_by_device_and_key(toy_interface):
    rows = [
        asked(0.0, 1.0, 50.0),
        asked(10.0, 0.0, 20.0),
        asked(20.0, 1.0, 90.0, carrier="UA"),
        asked(60.0, 0.0, 99.0, device="b"),
        asked(60.0, 0.0, 99.0),
    ]
    assert vectors(rows, toy_interface) == [
        [0, -1, 0],
        [0, -1, 0],
        [0, 0, 0],  # known at the very time of the question; of another carrier
        [0, -1, 0],
        [2, 0.5, 0],
    ]


def test_rows_without_a_label_are_seen_and_not_answered(toy_interface):
    rows = [
        DataRow(1.0, "departed", "a", {"carrier": "AA", "delay": 1.0}, None, None),
        asked(2.0),
        asked(3.0, 1.0, 9.0),
    ]
    assert vectors(rows, toy_interface) == [None, None, [0, -1, 1]]


def test_a_label_that_a_device_would_not_let_move_its_windows_moves_none_here(toy_interface):
    interface = msgspec.structs.replace(toy_interface, skew_s_max=100.0, lateness_s_max=10.0)
    rows = [
        asked(500.0, 1.0, 400.0),  # known before it was asked: too late for the windows
        asked(510.0, 1.0, 620.0),  # known long after the newest event: too far ahead
        asked(700.0, 1.0, 705.0),
        asked(710.0, 1.0, 800.0),
    ]
    assert vectors(rows, interface) == [[0, -1, 0], [0, -1, 0], [0, -1, 0], [1, 1, 0]]


def device_vectors(rows, package) -> list[bytes]:
    """What a device answers from, when each prediction is labelled as its label becomes known."""
    pipeline, due, found = Pipeline("toy"), [], []
    pipeline.swap([load_arm(*package, "stable", "r1", 1.0)])
    for number, row in enumerate(rows):
        while due and due[0][0] <= row.time_s:
            known_s, asked, label = heapq.heappop(due)
            fields = pipeline.labelled((1, asked), label, known_s)
            if fields is not None:
                pipeline.move(LABEL, known_s, fields)
        if row.label is not None:
            pipeline.admitted(row.kind, row.time_s, row.fields)
            found += pipeline.rows(row.time_s, row.fields)
            pipeline.answered.remember((1, number), row.fields)
            heapq.heappush(due, (row.label_time_s, number, row.label))
        pipeline.move(row.kind, row.time_s, row.fields)
    return found


def test_history_gives_the_very_bits_that_a_device_would_have_logged(toy_interface, write_package):
    chance, time_s, rows = random.Random(3), 0.0, []
    interface = msgspec.structs.replace(toy_interface, skew_s_max=400.0, lateness_s_max=50.0)
    for _ in range(400):
        time_s += chance.choice([0.0, 1.0, 40.0, 300.0])
        if chance.random() < 0.3:
            fields = {"carrier": "AA", "delay": 3.0}
            rows.append(DataRow(time_s, "departed", "a", fields, None, None))
        else:
            known_s = time_s + chance.choice([-80.0, -20.0, 0.0, 10.0, 350.0, 700.0])
            rows.append(asked(time_s, chance.random(), known_s, carrier=chance.choice("AU")))
    package = write_package(spec=SPEC, interface=interface)
    found = [vector for _, vector in featured(rows, interface, SPEC) if vector is not None]
    assert [vector.tobytes() for vector in found] == device_vectors(rows, package)
    assert max(vector[0] for vector in found) > 3


def test_texts_are_in_common_while_their_tokenizer_is_and_need_their_field(
    text_spec, toy_interface
):
    spec = text_spec(8)
    other = text_spec(8, spec.tokenizers["tiny"].replace('"lost"', '"gone"'))
    assert common(spec, spec).names == {"text"}
    assert len(common(spec, spec).old) == 8
    assert common(spec, other).names == set()
    needs = Needs(spec, toy_interface)
    assert needs.lacking({"carrier": "AA"}) == {"text": {"text"}}
    assert needs.lacking({"text": ""}) == {}
