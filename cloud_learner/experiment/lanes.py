"""Raw envelopes in the order of the devices: lane by lane, record by record, with what is missing.

Why: raw envelopes lie in the order of their arrival, of all devices mixed, labels before events; to
repeat what a device did, its records must come as its log had them, and nothing else in memory.

How: one pass puts each envelope into a database on disk under (device, epoch, class, number); its
order is the order of the devices' logs. It takes as much disk as the raw envelopes, for as long.

Invariants: each number of a lane comes at most once, ascending; numbers that are not there come as
`Lost`, with why, before what follows them. The same raw log gives the same sequence.

Knows nothing about features, families or time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from cloud_learner.ingest.opening import Incoming, opened
from cloud_learner.store.ingest_state import Account, Lane, lane_prefix, number_key
from cloud_learner.store.raw import RawLog, RawMessage
from cloud_learner.store.rocks import Rocks, Table
from edge_runtime.errors import ConfigError, RequestError
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.codec import ENCODING_HEADER
from edge_runtime.wire.messages import OMITTED, Envelope, EventClass, Record

TABLES = {
    "envelopes": Table(buffer_bytes=32 << 20, has_blobs=True),
    "epochs": Table(),
}
AT_ONCE = 500  # envelopes in one transaction
NOT_KEPT, REFUSED = "not_kept", "refused"
_CLASSES: dict[EventClass, bytes] = {"event": b"e", "label": b"l"}
_END = b"\xff" * 96

_encode = msgspec.msgpack.Encoder().encode
_raw = msgspec.msgpack.Decoder(RawMessage).decode
_prior = msgspec.msgpack.Decoder(int).decode

Step = Callable[[int], None]


class Lost(msgspec.Struct, frozen=True):
    """So many consecutive numbers of a lane that did not come, and why.

    The reason is that of the device, as in LOSSES or OMITTED; `refused`, where ingest took the
    record for no fact; or `not_kept`, where the envelope is damaged or no longer kept.
    """

    reason: str
    count: int


class Lanes:
    """What `raw` keeps, sorted into a database in `directory`, which is made for it.

    `accounts` say where each lane ends that ingest holds: beyond the last envelope of a lane there
    may be a damaged one.
    """

    def __init__(self, directory: Path, accounts: Mapping[Lane, Account]) -> None:
        self._rocks = Rocks(directory, TABLES, damaged="bad_backfill")
        self._accounts = accounts
        self.counts: Counter[str] = Counter()

    def sort(self, raw: RawLog, step: Step) -> None:
        """Put all that `raw` keeps in order; `step` hears how many bytes each envelope has.

        Raises: CapacityError.
        """
        change, waiting = self._rocks.begin(), 0
        for number, message in enumerate(raw.replay()):
            step(len(message.data))
            try:
                envelope = _envelope(message)
            except RequestError:  # of a release that took what this one does not
                self.counts["unreadable"] += 1
                continue
            self.counts["envelopes"] += 1
            lane = lane_prefix(envelope.device, envelope.epoch)
            key = lane + _CLASSES[envelope.event_class] + number_key(envelope.base_seq)
            change.put("envelopes", key + number_key(number), _encode(message))
            change.put("epochs", lane, _encode(envelope.prior))
            waiting += 1
            if waiting == AT_ONCE:
                self._rocks.write(change)
                change, waiting = self._rocks.begin(), 0
        self._rocks.write(change)

    def epochs(self) -> Iterator[tuple[str, list[tuple[int, int]]]]:
        """Each device with its epochs, ascending, each with the epoch before it in its log.

        They begin with the first of which there is an envelope; after it, none is left out.
        """
        kept: dict[str, dict[int, int]] = defaultdict(dict)
        for key, value in self._rocks.scan("epochs", b"", _END):
            kept[key[:-9].decode()][int.from_bytes(key[-8:], "big")] = _prior(value)
        for (device, epoch, _), account in self._accounts.items():
            if account.seq and epoch > min(kept.get(device, {epoch: 0})):
                kept[device].setdefault(epoch, account.prior)
        for device, priors in sorted(kept.items()):
            yield device, sorted(priors.items())

    def lane(
        self, device: str, epoch: int, event_class: EventClass, step: Step
    ) -> Iterator[tuple[int, Record | Lost]]:
        """The records of a lane with their numbers; `step` hears of each envelope's bytes."""
        start = lane_prefix(device, epoch) + _CLASSES[event_class]
        following = 1
        for _, value in self._rocks.scan("envelopes", start, start + b"\xff" * 17):
            message = _raw(value)
            step(len(message.data))
            try:
                arrival = opened(_incoming(message), {})
            except (RequestError, ConfigError):
                continue  # its numbers are not kept, as the next envelope shows
            missing = arrival.base_seq - following
            if missing > 0:
                reason = arrival.what.reason if missing <= arrival.skipped else NOT_KEPT
                yield following, Lost(reason, missing)
            cut = max(0, following - arrival.base_seq)
            for seq, record in enumerate(arrival.what.records[cut:], arrival.base_seq + cut):
                lost = type(record) is int
                yield seq, (Lost(OMITTED.get(record, REFUSED), 1) if lost else record)  # type: ignore[arg-type, misc]
            following = max(following, arrival.base_seq + arrival.count)
        account = self._accounts.get((device, epoch, event_class))
        if account is not None and account.seq >= following:
            yield following, Lost(NOT_KEPT, account.seq - following + 1)

    def close(self) -> None:
        """Close the database; whoever made its folder removes it."""
        self._rocks.close()


def _incoming(message: RawMessage) -> Incoming:
    headers = {ENCODING_HEADER: message.encoding} if message.encoding else {}
    return Incoming(message.subject, message.data, message.arrived_s, None, headers)


def _envelope(message: RawMessage) -> Envelope:
    headers = {ENCODING_HEADER: message.encoding} if message.encoding else {}
    envelope = codec.decode_envelope(codec.unpack_envelope(message.data, headers))
    if subjects.device_of(message.subject) != envelope.device:
        raise RequestError("wrong_subject", f"{message.subject} carries another device's records")
    return envelope
