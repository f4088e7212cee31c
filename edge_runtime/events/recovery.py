"""Opening a log directory: own it, cut what a crash tore, start the next epoch.

Why: after a crash the log has to find by itself, and fast, what it can vouch for. Only the last
segment of each class and epoch is read; where any other ends is said by the one that follows it.

Commit point: the rename of the file `epoch`. It holds the epoch that was started last and, for the
newest earlier epochs, where each ended, so that an id which a crash took can be told from one
that is merely trimmed.

Invariants: opening twice without an append between changes nothing but the epoch; a record that
was durable is never cut; what is left after the cut is made durable before it is offered.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import msgspec

from edge_runtime.errors import ConfigError
from edge_runtime.events import segment
from edge_runtime.events.segment import Segment
from edge_runtime.files import write_atomic
from edge_runtime.wire.messages import EventClass

ENDS_MAX = 512
CLASSES: tuple[EventClass, EventClass] = ("label", "event")
_EPOCH_FILE = "epoch"


class _Epochs(msgspec.Struct):
    """The file `epoch`: the last epoch started, and (epoch, class, last seq) of earlier ones."""

    epoch: int = 0
    ends: list[tuple[int, EventClass, int]] = []


@dataclass
class Found:
    """What a directory holds at open; `epoch` is the one that starts now."""

    epoch: int
    ends: list[tuple[int, EventClass, int]]
    segments: dict[EventClass, list[Segment]]
    counters: dict[str, int] = field(default_factory=dict)


def open_directory(directory: Path, device: str, sync: Callable[[int], None]) -> tuple[int, Found]:
    """Own `directory` and recover it; returns the file descriptor that owns it, and what it holds.

    Raises: ConfigError `already_owned`, `other_device`, `log_version`, `log_unusable`.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        owner = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, owner)
            _own(owner, directory)
            found = _recover(directory, device, sync)
            undo.pop_all()
    except OSError as error:
        raise ConfigError(
            "log_unusable",
            f"the event log in {directory} cannot be opened: {error}",
            "check the owner, the permissions and the space of that directory",
        ) from error
    return owner, found


def _own(owner: int, directory: Path) -> None:
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            "already_owned",
            f"the event log in {directory} is open in another process; nothing was changed",
            "stop that process, or give this one a state_dir of its own",
        ) from error


def _recover(directory: Path, device: str, sync: Callable[[int], None]) -> Found:
    epochs = _read_epochs(directory / _EPOCH_FILE)
    found = Found(0, epochs.ends, {"label": [], "event": []}, {"cut_bytes": 0, "bad_headers": 0})
    for part in _headers(directory, device, found):
        found.segments[part.event_class].append(part)
    if not epochs.epoch and any(found.segments.values()):
        raise _unsafe(directory / _EPOCH_FILE, "missing, though there are segments")
    last = max([epochs.epoch, *(part.epoch for name in CLASSES for part in found.segments[name])])
    for name in CLASSES:
        found.segments[name] = _proven(found.segments[name], found, sync)
        found.ends = _with_end(found.ends, last, name, found.segments[name])
    found.epoch = last + 1
    _write_epochs(directory / _EPOCH_FILE, _Epochs(found.epoch, found.ends))
    return found


def _headers(directory: Path, device: str, found: Found) -> list[Segment]:
    parts = []
    for path in directory.glob(f"*{segment.SUFFIX}"):
        part = segment.open_header(path)
        if part is None:
            _set_aside(path, found)
        elif part.device != device:
            raise ConfigError(
                "other_device",
                f"the event log in {directory} belongs to device {part.device!r}, not {device!r}",
                "give each device a state_dir of its own",
            )
        else:
            parts.append(part)
    return sorted(parts, key=lambda part: (part.epoch, part.base_seq))


def _set_aside(path: Path, found: Found) -> None:
    """A header torn by a crash holds nothing; any other file without one is kept for a person."""
    if path.stat().st_size <= segment.HEADER_BYTES:
        path.unlink()
    else:
        path.rename(path.with_suffix(".damaged"))
        found.counters["bad_headers"] += 1


def _proven(parts: list[Segment], found: Found, sync: Callable[[int], None]) -> list[Segment]:
    for part, following in pairwise(parts):
        if part.epoch == following.epoch:
            part.last_seq = following.base_seq - 1
    ends = {part.epoch: part for part in parts}  # the last of each epoch
    return [
        proven
        for part in parts
        if (proven := _cut(part, found, sync) if part is ends[part.epoch] else part) is not None
    ]


def _cut(part: Segment, found: Found, sync: Callable[[int], None]) -> Segment | None:
    proven = segment.scan(part)
    found.counters["cut_bytes"] += part.size - proven.size
    if proven.last_seq < proven.base_seq:
        part.path.unlink()
        return None
    fd = os.open(part.path, os.O_WRONLY)
    try:
        if proven.size < part.size:
            os.ftruncate(fd, proven.size)
        sync(fd)
    finally:
        os.close(fd)
    return proven


def _with_end(
    ends: list[tuple[int, EventClass, int]], epoch: int, name: EventClass, parts: list[Segment]
) -> list[tuple[int, EventClass, int]]:
    if epoch == 0 or any(end[:2] == (epoch, name) for end in ends):
        return ends
    last_seq = max((part.last_seq for part in parts if part.epoch == epoch), default=0)
    return [*ends, (epoch, name, last_seq)][-ENDS_MAX:]


def _read_epochs(path: Path) -> _Epochs:
    try:
        head, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return _Epochs()
    try:
        if int(head, 16) != zlib.crc32(body):
            raise ValueError("checksum")  # noqa: TRY301
        return msgspec.json.decode(body, type=_Epochs)
    except (ValueError, msgspec.DecodeError) as error:
        raise _unsafe(path, "damaged") from error


def _unsafe(path: Path, how: str) -> ConfigError:
    return ConfigError(
        "log_unusable",
        f"{path} is {how}, so no new id is safe to hand out; nothing was changed",
        "move the directory away and register the device under a new name",
    )


def _write_epochs(path: Path, epochs: _Epochs) -> None:
    body = msgspec.json.encode(epochs)
    write_atomic(path, b"%08x\n%s" % (zlib.crc32(body), body), mode=0o600)
