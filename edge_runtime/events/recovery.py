"""Opening a log directory: own it, cut what a crash tore, start the next epoch.

Why: after a crash the log has to find by itself, and fast, what it can vouch for. Only the last
segment of each class of the last epoch is read, and that not after a clean end: where any other
ends is said by the one that follows it, or by the tally.

Commit point: the tally's, which is written once, with the new epoch, before an id is handed out.

Invariants: opening twice without an append between changes nothing but the epoch; a record that
was durable is never cut, nor is what stands before a frame that proves itself; what is left after
the cut is made durable before it is offered. No damage of one file needs a person.
"""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from edge_runtime.errors import ConfigError
from edge_runtime.events import frames, segment, tally
from edge_runtime.events.segment import Segment
from edge_runtime.events.tally import CLASSES, Lane, Tally
from edge_runtime.files import Files
from edge_runtime.wire.messages import EventClass

STEP_MAX = 1 << 20


def random_step() -> int:
    """How far the next epoch lies above the last: so far that a disk which was restored, cloned or
    wiped does not hand out the ids of its other life.
    """
    return 1 + secrets.randbelow(STEP_MAX)


@dataclass
class Found:
    """What a directory holds at open, the new epoch begun; `counters` says what was amiss."""

    owner: int
    tally: Tally
    segments: dict[EventClass, list[Segment]]
    counters: dict[str, int]


def open_directory(files: Files, directory: Path, device: str, step: int) -> Found:
    """Own `directory`, recover it and begin an epoch, `step` above the last.

    Raises: ConfigError `already_owned`, `other_device`, `log_version`, `log_unusable`.
    """
    try:
        owner = files.own(directory)
    except BlockingIOError as error:
        raise ConfigError(
            "already_owned",
            f"the event log in {directory} is open in another process; nothing was changed",
            "stop that process, or give this one a state_dir of its own",
        ) from error
    except OSError as error:
        raise _unusable(directory, error) from error
    with contextlib.ExitStack() as undo:
        undo.callback(files.close, owner)
        try:
            found = _Recovery(files, directory, device).run(owner, step)
        except OSError as error:
            raise _unusable(directory, error) from error
        undo.pop_all()
    return found


class _Recovery:
    """One opening of `directory`."""

    def __init__(self, files: Files, directory: Path, device: str) -> None:
        self._files, self._directory, self._device = files, directory, device
        self._headless: set[Path] = set()
        self._cut_bytes = 0

    def run(self, owner: int, step: int) -> Found:
        """See `open_directory`. Raises: OSError, ConfigError."""
        book = Tally(self._files, self._directory)
        parts = self._segments()
        if not book.epoch and any(parts.values()):
            raise tally.missing(self._directory)
        known = [part.epoch for name in CLASSES for part in parts[name]]
        last = max([book.epoch, *known])
        for name in CLASSES:
            parts[name] = self._proven(name, parts[name], book, {*known, last} - {0})
        book.begin(last + step)
        kept = {part.path for name in CLASSES for part in parts[name]}
        bad_headers = len(self._headless & kept)
        return Found(owner, book, parts, {"cut_bytes": self._cut_bytes, "bad_headers": bad_headers})

    def _segments(self) -> dict[EventClass, list[Segment]]:
        """By class and in order, what the directory holds; what a crash left half made is gone."""
        found: dict[EventClass, list[Segment]] = {name: [] for name in CLASSES}
        for name in self._files.names(self._directory):
            if name.startswith(".") and name.endswith(".tmp"):
                self._files.unlink(self._directory / name)
            elif name.endswith(segment.SUFFIX):
                part = self._opened(self._directory / name)
                if part is not None:
                    found[part.event_class].append(part)
        for parts in found.values():
            parts.sort(key=lambda part: (part.epoch, part.base_seq))
        return found

    def _opened(self, path: Path) -> Segment | None:
        part = segment.open_header(self._files, path)
        if part is None:
            self._headless.add(path)
            part = segment.named(self._files, path, self._device)
        elif part.device != self._device:
            raise ConfigError(
                "other_device",
                f"the event log in {self._directory} belongs to device {part.device!r}, "
                f"not {self._device!r}",
                "give each device a state_dir of its own",
            )
        return part

    def _proven(
        self, name: EventClass, parts: list[Segment], book: Tally, epochs: set[int]
    ) -> list[Segment]:
        """`parts` with their last numbers, those that are needed no more left out."""
        for part, following in pairwise(parts):
            if part.epoch == following.epoch:
                part.last_seq = following.base_seq - 1
        kept = []
        for epoch in sorted(epochs | {lane.epoch for lane in book.lanes(name)}):
            of_epoch = [part for part in parts if part.epoch == epoch]
            lane = book.lane(name, epoch)
            if lane is None or lane.end < 0:
                of_epoch, lane = self._ended(name, epoch, of_epoch, lane or Lane(epoch, name))
                book.restore([lane])
            elif of_epoch:
                of_epoch[-1].last_seq = max(lane.end, of_epoch[-1].base_seq - 1)
            if book.is_migrated:
                lane.learned = of_epoch[0].base_seq - 1 if of_epoch else lane.end
            kept += [part for part in of_epoch if not self._is_needless(part, lane)]
        return kept

    def _ended(
        self, name: EventClass, epoch: int, parts: list[Segment], lane: Lane
    ) -> tuple[list[Segment], Lane]:
        """An epoch that did not end well: cut where it stops to prove itself."""
        end = max([lane.learned, *(gap.last for gap in lane.gaps)])
        if parts:
            end = max(end, parts[-1].base_seq - 1)
            proven = self._cut(parts.pop())
            if proven is not None:
                parts.append(proven)
                end = max(end, proven.last_seq)
        return parts, Lane(epoch, name, end, lane.learned, lane.gaps, lane.prior)

    def _cut(self, part: Segment) -> Segment | None:
        proven = frames.scan(self._files, part)
        with self._files.reader(part.path) as file:
            file.seek(proven.size)
            self._cut_bytes += len(file.read().rstrip(b"\0"))
        if proven.last_seq < proven.base_seq:
            self._files.unlink(part.path)
            return None
        fd = self._files.open(part.path)
        try:
            if proven.size < part.size:
                self._files.truncate(fd, proven.size)
            self._files.sync(fd)
        finally:
            self._files.close(fd)
        return proven

    def _is_needless(self, part: Segment, lane: Lane) -> bool:
        """Whether nothing in `part` is owed any more: its unlink failed, or came to nothing."""
        gap = lane.gap_from(part.base_seq)
        is_lost = bool(gap and gap.first <= part.base_seq and part.last_seq <= gap.last)
        if part.last_seq > lane.learned and not is_lost:
            return False
        with contextlib.suppress(OSError):
            self._files.unlink(part.path)
        return True


def _unusable(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(
        "log_unusable",
        f"the event log in {directory} cannot be opened: {error}",
        "check the owner, the permissions and the space of that directory",
    )
