"""What ingest knows of each lane and each prediction, as plain data and as the bytes of its keys.

Why: the ingest database stores these shapes and the ingest room moves them; they meet here, so that
neither reaches into the other.

Invariants: no I/O. Keys sort as what they name: a prediction's by device, epoch and number, so the
predictions of a lane lie side by side, and so do moments. For each lane, `archived`, `quarantined`
and all of `dropped` add up to `seq`: every number is exactly one of them. A prediction is pending
until it settles as exactly one of released, expired (no label in its window) or covered (joined,
but the bootstrap has learned its time).

Knows nothing about databases, envelopes or how a state is decided.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from cloud_learner.store.examples import Example
from edge_runtime.wire.messages import EventClass

PENDING, RELEASED, EXPIRED, COVERED = 0, 1, 2, 3

Id = tuple[str, int, int]
Lane = tuple[str, int, EventClass]

_NEVER_S = float("-inf")
_ROW = struct.Struct("<dBI")  # time, state, place in the run
_ROWS = np.dtype([("time_s", "<f8"), ("state", "u1"), ("place", "<u4")])
_LABEL = struct.Struct("<dd?d")
_REVISION = struct.Struct("<I")
_EARLY = struct.Struct("<d")
_FIRST = _REVISION.pack(0)
_REVISION_AT = _ROW.size + _LABEL.size
_EARLY_AT = _REVISION_AT + _REVISION.size
_STATE_AT = 8
_MOMENT = struct.Struct(">d")
_SIGN, _ALL = 1 << 63, (1 << 64) - 1
_CLASS_BYTE: dict[EventClass, bytes] = {"event": b"e", "label": b"l"}


class Account(msgspec.Struct, gc=False):
    """What became of the records 1 to `seq` of a lane; `newest_s` holds the newest event time of
    each family's records among them.

    `dropped` counts by reason what the device never sent. `prior` is the epoch before this one in
    the log of the device; `durable` is where the lane ends there, by the device's last report.
    """

    seq: int = 0
    newest_s: dict[str, float] = {}
    archived: int = 0
    quarantined: int = 0
    dropped: dict[str, int] = {}
    prior: int = 0
    durable: int = 0

    @property
    def is_balanced(self) -> bool:
        """Whether every number up to `seq` is accounted for, once."""
        return self.archived + self.quarantined + sum(self.dropped.values()) == self.seq


class Label(msgspec.Struct, frozen=True, gc=False):
    """What a label record says; `arrived_s` is the wall time at which it reached the learner."""

    value: float
    time_s: float
    final: bool
    arrived_s: float

    def packed(self) -> bytes:
        """The label as it is stored."""
        return _LABEL.pack(self.value, self.time_s, self.final, self.arrived_s)

    @classmethod
    def unpacked(cls, data: bytes, at: int = 0) -> Label:
        """A stored label."""
        return cls(*_LABEL.unpack_from(data, at))

    @classmethod
    def all_unpacked(cls, data: bytes) -> list[Label]:
        """Stored labels, one after the other."""
        return [cls(*each) for each in _LABEL.iter_unpack(data)]


class Row(msgspec.Struct, gc=False):
    """Where a prediction stands: its time, its state, the label that stands for it so far.

    `place` is how far it lies from the first number of its run; `revision` counts amendments;
    `early` is the outcome that it went out with before its time, if it did.
    """

    time_s: float
    state: int
    place: int
    label: Label | None = None
    revision: int = 0
    early: float | None = None

    def packed(self) -> bytes:
        """The row as it is stored; `pending_rows` makes the same of new ones."""
        head = _ROW.pack(self.time_s, self.state, self.place)
        if self.label is None:
            return head
        early = b"" if self.early is None else _EARLY.pack(self.early)
        return head + self.label.packed() + _REVISION.pack(self.revision) + early

    @classmethod
    def unpacked(cls, data: bytes) -> Row:
        """A stored row."""
        if len(data) == _ROW.size:
            return cls(*_ROW.unpack(data))
        time_s, state, place = _ROW.unpack_from(data)
        (revision,) = _REVISION.unpack_from(data, _REVISION_AT)
        early = _EARLY.unpack_from(data, _EARLY_AT)[0] if len(data) > _EARLY_AT else None
        return cls(time_s, state, place, Label.unpacked(data, _ROW.size), revision, early)


def pending_rows(
    prefix: bytes, first_seq: int, places: Sequence[int], times_s: Sequence[float]
) -> Iterator[tuple[bytes, bytes]]:
    """Keys and stored rows of the predictions of a run that were just taken in.

    Each lies at a place after `first_seq`; all of them at once, for there are many.
    """
    rows = np.zeros(len(places), _ROWS)
    rows["time_s"], rows["state"], rows["place"] = times_s, PENDING, places
    seqs = (np.asarray(places, ">u8") + first_seq).astype(">u8").tobytes()
    packed, size = rows.tobytes(), _ROW.size
    for at in range(len(places)):
        yield prefix + seqs[8 * at : 8 * at + 8], packed[size * at : size * (at + 1)]


def is_unlabelled(row: bytes) -> bool:
    """Whether a stored row is of a prediction that waits, with no label yet."""
    return len(row) == _ROW.size and row[_STATE_AT] == PENDING


def time_of(row: bytes) -> float:
    """The time of the prediction of a stored row."""
    time_s: float = _ROW.unpack_from(row)[0]
    return time_s


def labelled(row: bytes, label: Label) -> bytes:
    """The stored row of an unlabelled prediction, with its label."""
    return row + label.packed() + _FIRST


class Progress(msgspec.Struct, array_like=True):
    """How far one family is: the event time up to which all that is mature was released, the number
    of its last batch, and up to which number its batches were forgotten.
    """

    clock_s: float = _NEVER_S
    batch: int = 0
    trimmed: int = 0


class Meta(msgspec.Struct, array_like=True):
    """The numbers of a commit. `released` and `quarantined` number what came out, of all families,
    and what was refused; examples up to `archived` lie in files, of which `file` is the newest.

    `raw` is the position of the raw log: file and offset, None before the first message.
    """

    version: int
    commit: int = 0
    released: int = 0
    archived: int = 0
    file: int = 0
    quarantined: int = 0
    raw: tuple[int, int] | None = None
    families: dict[str, Progress] = {}


class IngestState(msgspec.Struct):
    """What a start reads back. `counters` are those of each family, by its name, and under "" those
    that belong to none; `unbatched` and `unarchived` are numbered, in release order; no
    batch will hold the numbers in `for_files_only`.
    """

    meta: Meta
    accounts: dict[Lane, Account] = {}
    counters: dict[str, dict[str, int]] = {}
    unbatched: list[tuple[int, Example]] = []
    unarchived: list[tuple[int, Example]] = []
    for_files_only: list[int] = []
    files: list[str] = []


def lane_prefix(device: str, epoch: int) -> bytes:
    """What the keys of the predictions of a device and epoch begin with."""
    return b"%s\0%s" % (device.encode(), epoch.to_bytes(8, "big"))


def prediction_key(prefix: bytes, seq: int) -> bytes:
    """The key of a prediction below `lane_prefix`."""
    return prefix + seq.to_bytes(8, "big")


def id_of(key: bytes) -> Id:
    """What a prediction's key names."""
    return key[:-17].decode(), int.from_bytes(key[-16:-8], "big"), int.from_bytes(key[-8:], "big")


def account_key(lane: Lane) -> bytes:
    """The key of a lane's account."""
    return lane_prefix(lane[0], lane[1]) + _CLASS_BYTE[lane[2]]


def lane_of(key: bytes) -> Lane:
    """What an account's key names."""
    epoch = int.from_bytes(key[-9:-1], "big")
    return key[:-10].decode(), epoch, "event" if key[-1:] == b"e" else "label"


def number_key(number: int) -> bytes:
    """A number as a key that sorts as the number does."""
    return number.to_bytes(8, "big")


def moment_key(time_s: float) -> bytes:
    """An event time as bytes that sort as the times do."""
    (bits,) = struct.unpack(">Q", _MOMENT.pack(time_s))
    return int(bits ^ (_ALL if bits & _SIGN else _SIGN)).to_bytes(8, "big")


def moment_of(key: bytes) -> float:
    """What `moment_key` was made of."""
    bits = int.from_bytes(key, "big")
    (time_s,) = _MOMENT.unpack((bits ^ (_SIGN if bits & _SIGN else _ALL)).to_bytes(8, "big"))
    return float(time_s)
