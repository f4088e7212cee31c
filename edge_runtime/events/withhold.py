"""What a device keeps to itself: samples, redacted fields, and a day's bytes, family by family.

Why: a link may be metered and a field private, while the log on the device keeps all of it. The
learner is told of every record that is kept back, so its accounts close.

Invariants: every record keeps its number: in the place of one that stays stands the number of the
reason. Whether an event is in the sample follows from its epoch and number alone, and a label goes
where its prediction went; labels are never over quota. What was decided stays decided: what is sent
again is neither counted again nor decided otherwise. A family that reached its quota sends no event
until the next day, UTC.

Commit point: one rename of the file with the day's counts; a crash may forget a sixteenth of a
quota. Knows nothing about envelopes or how they travel.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec

from edge_runtime.clock import Clock
from edge_runtime.config import UplinkConfig
from edge_runtime.errors import RequestError
from edge_runtime.events.quota import Position, Quotas
from edge_runtime.files import write_atomic
from edge_runtime.wire import codec
from edge_runtime.wire.messages import (
    OMITTED,
    EventClass,
    LabelRecord,
    ObservationRecord,
    PredictionRecord,
)

_COUNTS = ("sent", "sampled_out", "redacted", "over_quota")
_OMITTED = {reason: msgspec.Raw(codec.encode(code)) for code, reason in OMITTED.items()}
_POSITION = struct.Struct("<QQ")
_HASH_BYTES, _MASK = 8, (1 << 64) - 1


class _Prediction(msgspec.Struct, array_like=True, tag=1):
    family: str


class _Observation(msgspec.Struct, array_like=True, tag=2):
    family: str


class _Label(msgspec.Struct, array_like=True, tag=3):
    family: str
    epoch: int
    seq: int


_heads = msgspec.msgpack.Decoder(_Prediction | _Observation | _Label)

log = logging.getLogger("edge_runtime")


class Withhold:
    """Decides by `rules`, by family; the day's bytes are kept in the file at `path`.

    `epoch` is the running epoch of the log that is sent. May be asked from several threads.
    """

    def __init__(
        self, rules: Mapping[str, UplinkConfig], path: Path, clock: Clock, epoch: int
    ) -> None:
        self._rules = dict(rules)
        limits = {name: rule.bytes_per_day for name, rule in rules.items() if rule.bytes_per_day}
        self._path, self._quotas = path, Quotas(limits, path, clock, epoch)
        self._counters = {name: Counter(dict.fromkeys(_COUNTS, 0)) for name in rules}
        self._decided: dict[EventClass, Position] = {"label": (0, 0), "event": self._quotas.upto}
        self._lock = threading.Lock()

    def kept(
        self, event_class: EventClass, epoch: int, base_seq: int, records: list[bytes]
    ) -> list[msgspec.Raw]:
        """What may leave the device of consecutive `records` that start at `base_seq`."""
        found = []
        for seq, data in enumerate(records, base_seq):
            with self._lock:  # for one record, so that nobody waits for all of them
                found.append(self._decide(event_class, (epoch, seq), data))
        return found

    def _decide(self, event_class: EventClass, position: Position, data: bytes) -> msgspec.Raw:
        is_new = position > self._decided[event_class]
        raw = self._one(position, data, is_new=is_new)
        if is_new:
            self._decided[event_class] = position
            if event_class == "event":
                self._quotas.decided(position)
        return raw

    def _one(self, position: Position, data: bytes, *, is_new: bool) -> msgspec.Raw:
        try:
            head = _heads.decode(data)
        except msgspec.DecodeError:
            return msgspec.Raw(data)  # the learner quarantines it
        rule = self._rules.get(head.family)
        if rule is None:
            return msgspec.Raw(data)
        counts = self._counters[head.family]
        if isinstance(head, _Label):
            is_out = not in_sample(head.epoch, head.seq, rule.sample)
            counts["sampled_out" if is_out else "sent"] += is_new
            return _OMITTED["sampled_out"] if is_out else msgspec.Raw(data)
        if not in_sample(*position, rule.sample):
            counts["sampled_out"] += is_new
            return _OMITTED["sampled_out"]
        redacted = _redacted(data, rule.redact) if rule.redact else None
        data = redacted or data
        if not self._quotas.allows(head.family, position, len(data), is_new=is_new):
            counts["over_quota"] += is_new
            return _OMITTED["over_quota"]
        counts["sent"] += is_new
        counts["redacted"] += is_new and redacted is not None
        return msgspec.Raw(data)

    @property
    def unsaved(self) -> bool:
        """Whether enough has changed that `save` should be called."""
        return self._quotas.unsaved

    def save(self) -> None:
        """Write the day's counts, if they changed; what the disk refuses is tried again later."""
        with self._lock:
            data = self._quotas.to_save()
        if data is not None and not _write(self._path, data):
            with self._lock:
                self._quotas.not_saved()

    def statistics(self) -> dict[str, dict[str, int]]:
        """By family: records sent, sampled_out, redacted, over_quota since the start, each counted
        once; `bytes_today`, where there is a quota.
        """
        with self._lock:
            today = self._quotas.bytes_today()
            return {
                family: dict(counts) | ({"bytes_today": today[family]} if family in today else {})
                for family, counts in self._counters.items()
            }


def in_sample(epoch: int, seq: int, share: float) -> bool:
    """Whether the record is in a sample of `share`: BLAKE2b of both numbers, as 64 bits, lies below
    that share of them. Epoch and number are hashed as 8 bytes each, little-endian.
    """
    if share >= 1.0:
        return True
    position = _POSITION.pack(epoch & _MASK, seq & _MASK)
    digest = hashlib.blake2b(position, digest_size=_HASH_BYTES).digest()
    return int.from_bytes(digest, "little") < int(share * 2.0 ** (8 * _HASH_BYTES))


def _redacted(data: bytes, names: list[str]) -> bytes | None:
    """The record without the fields `names`; None when it has none of them."""
    try:
        record = codec.decode_record(data)
    except RequestError:
        return None  # the learner quarantines it
    assert not isinstance(record, LabelRecord)
    return _without(record, names)


def _without(record: PredictionRecord | ObservationRecord, names: list[str]) -> bytes | None:
    if record.fields.keys().isdisjoint(names):
        return None
    fields = {name: value for name, value in record.fields.items() if name not in names}
    return codec.encode(msgspec.structs.replace(record, fields=fields))


def _write(path: Path, data: bytes) -> bool:
    try:
        write_atomic(path, data)
    except OSError as error:
        log.warning("%s: the day's bytes are not saved: %s", path, error)
        return False
    return True
