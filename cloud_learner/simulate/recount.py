"""The recount: how many records the learner holds, by what came and not by what it says.

Why: "answered = archived" is only proven by bytes on the disk, read again from the beginning.

Invariants: a record is counted once, however often an envelope with it came; what a device kept to
itself is not counted, nor is a label's second record, which is there for windows over labels.

Knows nothing about watermarks, counters or the ingest database.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from cloud_learner.store.raw import RawMessage
from edge_runtime.errors import RequestError
from edge_runtime.features.feature import LABEL
from edge_runtime.wire import codec
from edge_runtime.wire.messages import Envelope, EventClass, ObservationRecord


def recount(messages: Iterable[RawMessage]) -> int:
    """The number of records in raw envelopes that stand for something an application said."""
    seen: dict[tuple[str, int, EventClass], set[int]] = defaultdict(set)
    for message in messages:
        envelope = _envelope(message)
        if envelope is not None:
            lane = (envelope.device, envelope.epoch, envelope.event_class)
            for seq, raw in enumerate(envelope.records, envelope.base_seq):
                if _was_said(bytes(raw)):
                    seen[lane].add(seq)
    return sum(map(len, seen.values()))


def _envelope(message: RawMessage) -> Envelope | None:
    headers = {codec.ENCODING_HEADER: message.encoding} if message.encoding else {}
    try:
        return codec.decode_envelope(codec.unpack_envelope(message.data, headers))
    except RequestError:
        return None


def _was_said(raw: bytes) -> bool:
    try:
        record = codec.decode_record(raw)
    except RequestError:
        return False
    return not (isinstance(record, ObservationRecord) and record.kind == LABEL)
