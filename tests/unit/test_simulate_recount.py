"""The recount: each record that an application said, once, from raw envelopes alone."""

from __future__ import annotations

import msgspec

from cloud_learner.simulate.recount import recount
from cloud_learner.store.raw import RawMessage
from edge_runtime.wire import codec
from edge_runtime.wire.messages import (
    WIRE_VERSION,
    Envelope,
    LabelRecord,
    ObservationRecord,
    PredictionRecord,
    Scored,
)

SCORED = [Scored("r1", "stable", [0.5])]
PREDICTION = PredictionRecord("fam", "asked", 1.0, {}, "spec", b"\0" * 400, 1.0, SCORED)
OBSERVATION = ObservationRecord("fam", "seen", 1.0, {})
LABEL = LabelRecord("fam", 1, 1, 1.0, 2.0)
LABEL_IN_A_WINDOW = ObservationRecord("fam", "label", 2.0, {"value": 1.0})


def message(*records, base_seq=1, device="EWR", epoch=1, event_class="event"):
    raws = [
        msgspec.Raw(each if isinstance(each, bytes) else codec.encode(each)) for each in records
    ]
    envelope = Envelope(WIRE_VERSION, device, epoch, event_class, base_seq, raws)
    data, headers = codec.pack_envelope(envelope)
    return RawMessage("subject", headers.get(codec.ENCODING_HEADER, ""), data, 0.0)


def test_every_kind_of_record_counts_deflated_or_not():
    deflated = message(*[PREDICTION] * 20)
    plain = message(LABEL, event_class="label")
    assert (deflated.encoding, plain.encoding) == ("deflate", "")
    assert recount([deflated, plain, message(OBSERVATION, base_seq=21)]) == 22


def test_what_came_twice_counts_once_also_where_envelopes_overlap():
    first, second = message(*[OBSERVATION] * 3), message(*[OBSERVATION] * 3, base_seq=2)
    assert recount([first, first, second]) == 4


def test_lanes_are_counted_apart():
    lanes = [{}, {"device": "JFK"}, {"epoch": 2}, {"event_class": "label"}]
    assert recount(message(LABEL, **lane) for lane in lanes) == 4


def test_what_nobody_said_does_not_count():
    kept_back = b"\x01"
    assert recount([message(kept_back, LABEL_IN_A_WINDOW, b"\xc0", OBSERVATION)]) == 1
    assert recount([RawMessage("s", "deflate", b"garbage", 0.0), RawMessage("s", "", b"", 0)]) == 0
