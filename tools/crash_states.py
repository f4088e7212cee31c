"""Crash states of the event log: what a power cut may leave behind, and what must be true of it.

Why: a crash comes between any two operations of a disk, and of what was not synced any part may be
there. So a history is played over a disk in memory that records each operation; for each prefix of
the record, states are made that a disk could be in, and the log is opened on each (the method of
ALICE: Pillai et al., OSDI 2014).

The disk: what was written to a file and not synced is there in any subset of its sectors of 512 or
4096 bytes; a change of a file's size, and each name that was made, moved or removed, is there or
not, in any combination, until file or directory is synced.

    .venv/bin/python tools/crash_states.py 10000
"""

from __future__ import annotations

import asyncio
import io
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge_runtime.events.log import CLASSES, EventLog
from edge_runtime.wire.messages import EventClass

HOME = Path("/log")
SEGMENT_BYTES = 2048
LOG_BYTES = 16 * SEGMENT_BYTES
STEPS = 40
SHARES = (0.0, 1.0, 0.5, 0.9)

Lane = tuple[int, EventClass]
State = dict[Path, bytes]


class MemoryFiles:
    """A disk in memory that records what is done to it; begins with `state`."""

    def __init__(self, state: State | None = None) -> None:
        self.written = 0
        self.operations: list[tuple] = []
        self.inodes: list[bytearray] = []
        self.paths: dict[Path, int] = {}
        self._open: dict[int, int] = {}
        self._owned: dict[int, Path] = {}
        self._last_fd = 2
        for path, data in (state or {}).items():
            self.paths[path] = self._inode(bytearray(data))

    def own(self, directory: Path) -> int:
        if directory in self._owned.values():
            raise BlockingIOError(f"{directory} has an owner")
        fd = self._opened(-1)
        self._owned[fd] = directory
        return fd

    def names(self, directory: Path) -> list[str]:
        return sorted(path.name for path in self.paths if path.parent == directory)

    def size(self, path: Path) -> int:
        return len(self.inodes[self._at(path)])

    def reader(self, path: Path) -> BinaryIO:
        return io.BytesIO(self.inodes[self._at(path)])

    def create(self, path: Path, mode: int = 0o600) -> int:  # noqa: ARG002
        if path in self.paths:
            raise FileExistsError(path)
        self.paths[path] = inode = self._inode(bytearray())
        self.operations.append(("create", path, inode))
        return self._opened(inode)

    def open(self, path: Path) -> int:
        return self._opened(self._at(path))

    def allocate(self, fd: int, size: int) -> None:
        self._resize("allocate", fd, max(size, len(self.inodes[self._open[fd]])))

    def truncate(self, fd: int, size: int) -> None:
        self._resize("truncate", fd, size)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        self.operations.append(("write", self._open[fd], offset, bytes(data)))
        _put(self.inodes[self._open[fd]], data, offset)
        self.written += len(data)

    def sync(self, fd: int) -> None:
        self.operations.append(("sync", self._open[fd]))

    def close(self, fd: int) -> None:
        del self._open[fd]
        self._owned.pop(fd, None)

    def replace(self, source: Path, target: Path) -> None:
        self.paths[target] = inode = self.paths.pop(source)
        self.operations.append(("replace", source, target, inode))

    def unlink(self, path: Path) -> None:
        if self.paths.pop(path, None) is not None:
            self.operations.append(("unlink", path))

    def sync_directory(self, path: Path) -> None:
        self.operations.append(("sync_directory", path))

    def _resize(self, name: str, fd: int, size: int) -> None:
        self.operations.append((name, self._open[fd], size))
        _set_size(self.inodes[self._open[fd]], size)

    def _inode(self, data: bytearray) -> int:
        self.inodes.append(data)
        return len(self.inodes) - 1

    def _at(self, path: Path) -> int:
        if path not in self.paths:
            raise FileNotFoundError(path)
        return self.paths[path]

    def _opened(self, inode: int) -> int:
        self._last_fd += 1
        self._open[self._last_fd] = inode
        return self._last_fd


def replayed(operations: list[tuple]) -> MemoryFiles:
    """The disk of a process that was killed after `operations`: nothing is lost, and what was not
    synced still is not.
    """
    files = MemoryFiles()
    files.operations = list(operations)
    chance = random.Random(0)  # noqa: S311 - not asked
    files.paths, contents = _after(operations, chance, 1.0)
    last = max([*contents, *files.paths.values()])
    files.inodes = [contents.get(inode, bytearray()) for inode in range(last + 1)]
    return files


def _put(content: bytearray, data: bytes, offset: int) -> None:
    if len(content) < offset + len(data):
        content.extend(bytes(offset + len(data) - len(content)))
    content[offset : offset + len(data)] = data


def _set_size(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))


def crash(operations: list[tuple], chance: random.Random, share: float) -> State:
    """A state that an empty disk may be in when it stops after `operations`; of what is not synced
    about `share` is there.
    """
    names, contents = _after(operations, chance, share)
    return {path: bytes(contents.get(inode, b"")) for path, inode in names.items()}


def _after(
    operations: list[tuple], chance: random.Random, share: float
) -> tuple[dict[Path, int], dict[int, bytearray]]:
    synced = {op[1]: at for at, op in enumerate(operations) if op[0] == "sync"}
    named = {op[1]: at for at, op in enumerate(operations) if op[0] == "sync_directory"}
    names: dict[Path, int] = {}
    contents: dict[int, bytearray] = {-1: bytearray()}
    for at, (name, what, *rest) in enumerate(operations):
        if name in ("create", "replace", "unlink"):
            if at < named.get(what.parent, -1) or chance.random() < share:
                _rename(names, name, what, rest)
        elif name in ("write", "allocate", "truncate"):
            content = contents.setdefault(what, bytearray())
            is_synced = at < synced.get(what, -1)
            if name == "write":
                _write(content, rest[0], rest[1], chance, 1.0 if is_synced else share)
            elif is_synced or chance.random() < share:
                _set_size(content, rest[0])
    return names, contents


def _rename(names: dict[Path, int], name: str, what: Path, rest: list) -> None:
    if name == "create":
        names[what] = rest[0]
    else:
        names.pop(what, None)
    if name == "replace":
        names[rest[0]] = rest[1]


def _write(
    content: bytearray, offset: int, data: bytes, chance: random.Random, share: float
) -> None:
    if share >= 1.0:
        _put(content, data, offset)
        return
    sector = chance.choice([512, 4096])
    start = 0
    while start < len(data):  # sectors lie in the file, not in what is written
        end = min(len(data), start + sector - (offset + start) % sector)
        if chance.random() < share:
            _put(content, data[start:end], offset + start)
        start = end


class Known(NamedTuple):
    """What is known of a log after so many operations: what must be, and what may be gone."""

    operations: int
    durable: dict[Lane, int]
    gone: dict[Lane, int]
    epochs: set[int]


def opened(files: MemoryFiles) -> EventLog:
    return EventLog(
        HOME,
        device="EWR",
        linger_ms=60_000,
        segment_bytes=SEGMENT_BYTES,
        bytes_max=LOG_BYTES,
        files=files,
        step=lambda: 1,
    )


def record_of(epoch: int, event_class: EventClass, seq: int) -> bytes:
    """The record that has this number, in every history."""
    return b"%d %s %d " % (epoch, event_class.encode(), seq) * (1 + seq % 9)


def play(seed: int) -> tuple[MemoryFiles, list[Known]]:
    """A history: groups of both classes made durable, segments learned or dropped, reopenings."""
    return asyncio.run(_play(random.Random(seed)))  # noqa: S311 - seeded on purpose


async def _play(chance: random.Random) -> tuple[MemoryFiles, list[Known]]:
    files, known = MemoryFiles(), [Known(0, {}, {}, set())]
    log = opened(files)
    known.append(Known(len(files.operations), {}, {}, {log.epoch}))
    for _ in range(STEPS):
        kind = chance.random()
        if kind < 0.07:
            log.close()
            log = opened(files)
        elif kind < 0.15:
            epoch, last = chance.choice(log.owed("event") or [(1, 0)])
            log.learned("event", epoch, chance.randint(0, last))
        else:
            await _append(log, chance)
        known.append(_known(log, len(files.operations), known[-1]))
    log.close()
    known.append(known[-1]._replace(operations=len(files.operations)))
    return files, known


async def _append(log: EventLog, chance: random.Random) -> None:
    last = {}
    for name in chance.sample(CLASSES, chance.randint(1, 2)):
        for _ in range(chance.choice([1, 3, 20])):
            seq = log.handed_out(name) + 1
            last[name] = log.append(name, record_of(log.epoch, name, seq))
    for name, seq in last.items():
        await log.wait_durable(name, seq)


def _known(log: EventLog, operations: int, before: Known) -> Known:
    known = Known(operations, dict(before.durable), dict(before.gone), before.epochs | {log.epoch})
    for name in CLASSES:
        for epoch, last in [*log.ends(name), log.durable(name)]:
            known.durable[epoch, name] = last
            known.gone[epoch, name] = _gone(log, epoch, name)
    return known


def _gone(log: EventLog, epoch: int, name: EventClass) -> int:
    last = 0
    while (piece := log.piece(name, epoch, last, 0, 1)) is not None and piece.skipped:
        last += piece.skipped
    return last


def told(log: EventLog) -> dict[Lane, list[bytes | str]]:
    """Each number of each earlier epoch: its record, or why it is lost."""
    found: dict[Lane, list[bytes | str]] = {}
    for name in CLASSES:
        for epoch, _ in log.ends(name):
            numbers = found.setdefault((epoch, name), [])
            while (piece := log.piece(name, epoch, len(numbers), 1 << 20, 1 << 20)) is not None:
                assert piece.base_seq == len(numbers) + piece.skipped + 1
                numbers += [piece.reason] * piece.skipped
                numbers += piece.records
    return found


def violations(state: State, before: Known, after: Known) -> Iterator[str]:
    """What is wrong with a log that is opened on `state`, which it was left in between the two."""
    files = MemoryFiles(state)
    with opened(files) as log:
        first, epoch = told(log), log.epoch
        if epoch in before.epochs:
            yield f"epoch {epoch} comes twice"
    with opened(files) as log:
        second = told(log)
    if any(second[lane] != numbers for lane, numbers in first.items()):
        yield "a second opening tells something else"
    for lane, durable in before.durable.items():
        numbers = first.get(lane, [])
        if len(numbers) < durable:
            yield f"{lane}: {durable} numbers were durable, {len(numbers)} are left"
    for lane, numbers in first.items():
        may_be_gone = max(after.gone.get(lane, 0), before.gone.get(lane, 0))
        for seq, what in enumerate(numbers, 1):
            is_record = what == record_of(*lane, seq)
            is_lost = what in ("dropped", "trimmed") and seq <= may_be_gone
            is_torn = what == "damaged" and seq > before.durable.get(lane, 0)
            if not (is_record or is_lost or is_torn):
                yield f"{lane} number {seq} is {what!r:.60}"


def violations_after_kill(operations: list[tuple], chance: random.Random) -> Iterator[str]:
    """What is wrong when the process is killed, and the power fails once the log is open again."""
    files = replayed(operations)
    log = opened(files)
    offered, count = told(log), len(files.operations)
    log.close()
    for share in (0.0, 0.5):
        with opened(MemoryFiles(crash(files.operations[:count], chance, share))) as log:
            found = told(log)
        if any(found.get(lane) != numbers for lane, numbers in offered.items()):
            yield "what was offered after a kill is lost by a power cut"


def explore(states: int, seed: int = 1) -> tuple[int, list[str]]:
    """Look at so many states, from histories of rising seeds; how many those were, and what was
    wrong with them: seed, prefix, subset and what.
    """
    count, found = 0, []
    while count < states:
        files, known = play(seed)
        step = 1 if states > 1000 else 1 + len(files.operations) * len(SHARES) // states
        for prefix in range(0, len(files.operations) + 1, step):
            after = next(each for each in known if each.operations >= prefix)
            before = [each for each in known if each.operations <= prefix][-1]
            for subset, share in enumerate(SHARES):
                chance = random.Random(f"{seed} {prefix} {subset}")  # noqa: S311
                done = files.operations[:prefix]
                try:
                    wrong = list(violations(crash(done, chance, share), before, after))
                    wrong += violations_after_kill(done, chance) if share == 1.0 else []
                except Exception as error:  # whatever it is, the log did not open
                    wrong = [f"{type(error).__name__} {error}"]
                found += [f"seed {seed}, prefix {prefix}, share {share}: {each}" for each in wrong]
                count += 1
        seed += 1
    return count, found


if __name__ == "__main__":
    count, found = explore(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
    print("\n".join(found[:20]))
    print(f"{count} crash states, {len(found)} violations")
    sys.exit(bool(found))
