"""The tally of a log: which epochs there were, where each ended, what was lost, what is learned.

Why: a number that was handed out is delivered or accounted for, also when its record is gone; and
a log that is opened again must not need to read what it holds to know what it owes.

Commit point: the rename of `tally.a` or of `tally.b`, both with the same content, durable with
the sync of the directory; at open the higher generation that proves itself holds. So neither a
crash nor a flipped bit costs an entry. It is written before a segment that it accounts for is
unlinked, and before an id of a new epoch is handed out. The file `epoch` of earlier releases is
read where there is no tally yet.

Invariants: what is known of an earlier epoch never changes, but for what is lost of it or learned;
gaps of a lane are apart and rise, and neighbours of one reason are one gap, so it stays small.

Knows nothing about segments or records. Any thread may call anything here.
"""

from __future__ import annotations

import threading
import zlib
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path

import msgspec

from edge_runtime.errors import ConfigError
from edge_runtime.events.gaps import Gap, with_gap
from edge_runtime.files import Files, replace_whole
from edge_runtime.wire.messages import EventClass

CLASSES: tuple[EventClass, EventClass] = ("label", "event")
VERSION = 1
EPOCHS_KEPT = 256
_COPIES = ("tally.a", "tally.b")
_OLD = "epoch"

Loss = tuple[EventClass, int, int, int, str]
"""(class, epoch, first, last, reason) of numbers that are lost."""


class Lane(msgspec.Struct, array_like=True):
    """One class of one epoch; `end` is its last number, -1 while the epoch runs.

    `learned`: up to there the learner held all when segments were given back. `mark` is how far it
    is as far as is known here, and is not kept. `prior` is the epoch before it, also when that is
    forgotten by now; -1, in a file of an earlier release, means the one that is listed before it.
    """

    epoch: int
    event_class: EventClass
    end: int = -1
    learned: int = 0
    gaps: list[Gap] = []
    prior: int = -1

    def gap_from(self, seq: int) -> Gap | None:
        """The first gap that ends at `seq` or above."""
        gaps = self.gaps  # another thread may replace them
        at = bisect_left(gaps, seq, key=lambda gap: gap.last)
        return gaps[at] if at < len(gaps) else None


class Book(msgspec.Struct):
    """What the file says; `before` is the epoch before the oldest that is listed."""

    version: int = VERSION
    generation: int = 0
    epoch: int = 0
    before: int = 0
    lanes: list[Lane] = []


class _Version(msgspec.Struct):
    version: int


class _Old(msgspec.Struct):
    """The file `epoch` of earlier releases."""

    epoch: int = 0
    ends: list[tuple[int, EventClass, int]] = []


class Tally:
    """The tally in `directory`. Raises: ConfigError `log_unusable` when no copy can be read."""

    def __init__(self, files: Files, directory: Path) -> None:
        self._files, self._directory = files, directory
        self._lock = threading.RLock()
        self._book, self.is_migrated = _read(files, directory)
        self._marks: dict[tuple[EventClass, int], int] = {}
        self._index()

    @property
    def epoch(self) -> int:
        """The epoch that was started last; 0 before the first."""
        return self._book.epoch

    def lane(self, event_class: EventClass, epoch: int) -> Lane | None:
        """What is known of a class of an epoch."""
        return self._lanes.get((event_class, epoch))

    def lanes(self, event_class: EventClass) -> list[Lane]:
        """What is known of a class, oldest epoch first."""
        return self._by_class[event_class]

    def prior(self, epoch: int) -> int:
        """The epoch before `epoch` in this log; 0 before the first, itself if it is forgotten."""
        return self._priors.get(epoch, epoch)

    def reason(self, event_class: EventClass, epoch: int, seq: int) -> str:
        """Why a number is lost; empty where it is not, as far as is known."""
        lane = self.lane(event_class, epoch)
        gap = lane and lane.gap_from(seq)
        return gap.reason if gap and gap.first <= seq else ""

    def mark(self, event_class: EventClass, epoch: int) -> int:
        """How far the learner is, as far as is known here."""
        lane = self.lane(event_class, epoch)
        return self._marks.get((event_class, epoch), lane.learned if lane else 0)

    def restore(self, lanes: Iterable[Lane]) -> None:
        """Take in what segments say of lanes that are not known; not yet written."""
        with self._lock:
            self._lanes |= {(lane.event_class, lane.epoch): lane for lane in lanes}
            self._order()

    def begin(self, epoch: int) -> None:
        """Start `epoch`, durably. Raises: OSError."""
        with self._lock:
            self._book.epoch = epoch
            self.restore(Lane(epoch, event_class) for event_class in CLASSES)
            self._write()
            self._files.unlink(self._directory / _OLD)

    def end(self, ends: dict[EventClass, int]) -> None:
        """Say, durably, where the running epoch ended. Raises: OSError."""
        with self._lock:
            for event_class, end in ends.items():
                self._lanes[event_class, self.epoch].end = end
            self._write()

    def lose(self, losses: Iterable[Loss]) -> int:
        """Account, durably, for what is lost and not known yet; how many numbers that are.

        Raises: OSError, with nothing changed.
        """
        with self._lock:
            before, count = [], 0
            for event_class, epoch, first, last, reason in losses:
                lane = self._lanes[event_class, epoch]
                before.append((lane, lane.gaps))
                lane.gaps, added = with_gap(lane.gaps, Gap(first, last, reason))
                count += added
            if count:
                self._write_or_undo(before)
            return count

    def learn(self, event_class: EventClass, epoch: int, seq: int, *, gives_back: bool) -> None:
        """The learner holds all up to `seq`; kept where segments are given back for it, and where
        an earlier epoch is learned whole. Raises: OSError, with nothing changed on disk.
        """
        with self._lock:
            lane = self.lane(event_class, epoch)
            if lane is None:
                return
            self._marks[event_class, epoch] = seq
            if seq > lane.learned and (gives_back or 0 <= lane.end <= seq):
                before, lane.learned = lane.learned, seq
                gaps, lane.gaps = lane.gaps, [gap for gap in lane.gaps if gap.last > seq]
                try:
                    self._write()
                except OSError:
                    lane.learned, lane.gaps = before, gaps
                    raise

    def _write_or_undo(self, before: list[tuple[Lane, list[Gap]]]) -> None:
        try:
            self._write()
        except OSError:
            for lane, gaps in reversed(before):
                lane.gaps = gaps
            raise

    def _order(self) -> None:
        """Keep the lanes by epoch, and forget old ones of which nothing is owed."""
        lanes = sorted(self._lanes.values(), key=lambda lane: (lane.epoch, lane.event_class))
        kept = sorted({lane.epoch for lane in lanes})[-EPOCHS_KEPT:]
        owed = {lane.epoch for lane in lanes if lane.end > lane.learned or lane.end < 0}
        self._book.lanes = [lane for lane in lanes if lane.epoch >= kept[0] or lane.epoch in owed]
        oldest = self._book.lanes[0].epoch
        gone = [lane.epoch for lane in lanes if lane.epoch < oldest]
        self._book.before = max([self._book.before, *gone])
        self._index()

    def _index(self) -> None:
        lanes = self._book.lanes
        self._lanes = {(lane.event_class, lane.epoch): lane for lane in lanes}
        self._by_class = {
            name: [lane for lane in lanes if lane.event_class == name] for name in CLASSES
        }
        epochs = sorted({lane.epoch for lane in lanes})
        listed = dict(zip(epochs, [self._book.before, *epochs], strict=False))
        self._priors = listed | {lane.epoch: lane.prior for lane in lanes if lane.prior >= 0}
        for lane in lanes:
            lane.prior = self._priors[lane.epoch]

    def _write(self) -> None:
        self._book.generation += 1
        body = msgspec.json.encode(self._book)
        data = b"%08x\n%s" % (zlib.crc32(body), body)
        for name in _COPIES:
            replace_whole(self._directory / name, data, 0o600, self._files)
        self._files.sync_directory(self._directory)


def _read(files: Files, directory: Path) -> tuple[Book, bool]:
    """The newest copy that proves itself, and whether it is of an earlier release."""
    books: list[Book] = []
    damaged: list[Path] = []
    for name in _COPIES:
        body = _proven(files, directory / name, damaged)
        if body is not None:
            books.append(_decoded(body, directory / name))
    if books:
        return max(books, key=lambda book: book.generation), False
    body = _proven(files, directory / _OLD, damaged)
    if damaged:
        raise _unsafe(damaged[0], "damaged")
    if body is None:
        return Book(), False
    return _migrated(msgspec.json.decode(body, type=_Old)), True


def _decoded(body: bytes, path: Path) -> Book:
    version = msgspec.json.decode(body, type=_Version).version
    if version != VERSION:
        raise ConfigError(
            "log_version",
            f"{path} has format version {version}; this reads {VERSION}; nothing was changed",
            "open the log with the release that wrote it",
        )
    return msgspec.json.decode(body, type=Book)


def _migrated(old: _Old) -> Book:
    lanes = [Lane(epoch, event_class, end) for epoch, event_class, end in old.ends]
    return Book(epoch=old.epoch, lanes=lanes)


def _proven(files: Files, path: Path, damaged: list[Path]) -> bytes | None:
    try:
        with files.reader(path) as file:
            head, _, body = file.read().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError:
        head = body = b""
    if head == b"%08x" % zlib.crc32(body):
        return body
    damaged.append(path)
    return None


def missing(directory: Path) -> ConfigError:
    """What a directory gets that has segments and no tally."""
    return _unsafe(directory / _COPIES[0], "missing, though there are segments")


def _unsafe(path: Path, how: str) -> ConfigError:
    return ConfigError(
        "log_unusable",
        f"{path} is {how}, so no new id is safe to hand out; nothing was changed",
        "move the directory away and register the device under a new name",
    )
