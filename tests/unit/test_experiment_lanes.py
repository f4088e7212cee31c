"""Raw envelopes in the order of the devices' logs, whatever order they came in, and their gaps."""

from __future__ import annotations

import msgspec
import pytest

from cloud_learner.experiment.lanes import Lanes, Lost
from cloud_learner.store.ingest_state import Account
from cloud_learner.store.raw import RawLog, RawMessage
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import (
    NO_PRIOR,
    WIRE_VERSION,
    Envelope,
    LabelRecord,
    ObservationRecord,
    Record,
)

OMITTED, OVER_QUOTA = 1, 2


def seen(time_s: float) -> ObservationRecord:
    return ObservationRecord("toy", "departed", time_s, {"delay": time_s})


def message(device, epoch, base_seq, records, *, prior=NO_PRIOR, skipped=0, reason=""):
    label = any(isinstance(record, LabelRecord) for record in records)
    event_class = "label" if label else "event"
    raws = [msgspec.Raw(codec.encode(record)) for record in records]
    said = (WIRE_VERSION, device, epoch, event_class, base_seq, raws, skipped, reason, prior)
    data, headers = codec.pack_envelope(Envelope(*said))
    encoding = headers.get(codec.ENCODING_HEADER, "")
    return RawMessage(subjects.events(device, event_class), encoding, data, 0.0)


@pytest.fixture
def sort(tmp_path):
    """`sort(messages, accounts)`: by device its epochs, and by lane what is in it."""

    def sorted_(messages, accounts=None):
        raw = RawLog(tmp_path / "raw")
        raw.append(messages)
        lanes = Lanes(tmp_path / "lanes", accounts or {})
        lanes.sort(raw, lambda _size: None)
        epochs = dict(lanes.epochs())
        found: dict[tuple[str, int, str], list[tuple[int, Record | Lost]]] = {
            (device, epoch, event_class): list(
                lanes.lane(device, epoch, event_class, lambda _size: None)
            )
            for device, each in epochs.items()
            for epoch, _ in each
            for event_class in ("event", "label")
        }
        lanes.close()
        raw.close()
        return epochs, found

    return sorted_


def test_devices_epochs_and_numbers_come_in_order_and_each_once(sort) -> None:
    label = LabelRecord("toy", 5, 1, 1.0, 9.0)
    first, more = [seen(1.0), seen(2.0)], [seen(2.0), seen(3.0), seen(4.0)]

    epochs, found = sort(
        [
            message("b", 9, 1, [seen(7.0)], prior=5),
            message("b", 5, 1, [label]),
            message("b", 5, 2, more),
            message("a", 2, 1, [seen(1.0)]),
            message("b", 5, 1, first),
            message("b", 5, 1, first),
        ]
    )

    assert epochs == {"a": [(2, NO_PRIOR)], "b": [(5, NO_PRIOR), (9, 5)]}
    assert found["b", 5, "event"] == [(seq, seen(float(seq))) for seq in (1, 2, 3, 4)]
    assert found["b", 5, "label"] == [(1, label)]
    assert found["b", 9, "event"] == [(1, seen(7.0))]


def test_what_is_missing_comes_with_its_reason(sort) -> None:
    _, found = sort(
        [
            message("a", 1, 5, [seen(5.0), OMITTED, OVER_QUOTA, "no record", seen(9.0)]),
            message("a", 1, 13, [seen(13.0)], skipped=3, reason="dropped"),
            message("a", 1, 20, [seen(20.0)], skipped=2, reason="stalled"),
        ]
    )

    assert found["a", 1, "event"] == [
        (1, Lost("not_kept", 4)),
        (5, seen(5.0)),
        (6, Lost("sampled_out", 1)),
        (7, Lost("over_quota", 1)),
        (8, Lost("refused", 1)),
        (9, seen(9.0)),
        (10, Lost("dropped", 3)),
        (13, seen(13.0)),
        (14, Lost("not_kept", 6)),
        (20, seen(20.0)),
    ]


def test_what_ingest_holds_beyond_the_last_envelope_is_missing(sort) -> None:
    accounts = {
        ("a", 1, "event"): Account(seq=9),  # before the first envelope: it has expired
        ("a", 2, "event"): Account(seq=5, prior=1),
        ("a", 3, "event"): Account(seq=2, prior=2),
        ("gone", 1, "event"): Account(seq=5),
    }

    epochs, found = sort([message("a", 2, 1, [seen(1.0)], prior=1)], accounts)

    assert epochs["a"] == [(2, 1), (3, 2)]
    assert found["a", 2, "event"] == [(1, seen(1.0)), (2, Lost("not_kept", 4))]
    assert found["a", 3, "event"] == [(1, Lost("not_kept", 2))]
