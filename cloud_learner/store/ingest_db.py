"""The ingest database: what the learner holds of each device, and what it still waits for.

Why: a record counts as held only together with everything that follows from it; one transaction of
RocksDB makes it so.

Invariants: one commit point, `commit`: accounts, the position of the raw log, names of the example
files, predictions and labels, released examples, their batches, quarantine and counters move
together or not at all. One thread commits; the reading methods may be called from any. A batch is
kept until it is trimmed, an example until it lies in a file and no batch needs it.

| table | key | value |
|---|---|---|
| meta | `meta`, `counters` | Meta; counts by name, of each family |
| accounts | lane | Account |
| examples | number of the release | whether a batch may hold it, and the Example |
| quarantine | number | arrival, subject, reason, first bytes |
| files | name of an example file | |
| F/rows | prediction | Row |
| F/runs | first prediction of a run | its last number, and the envelope with its records |
| F/due | see `cloud_learner.store.runs` | |
| F/early | prediction that has not come | Label |
| F/batches | number | numbers of its examples |

Each family F has tables of its own for what waits and for its batches: families share no key, and a
key costs what it costs with one family. Lanes, releases and files are numbered in common. An
envelope with predictions of several families lies in `runs` of each.

Knows nothing about how records are accepted, joined or batched.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cloud_learner.store.examples import Batch, Example
from cloud_learner.store.ingest_state import (
    Account,
    IngestState,
    Lane,
    Meta,
    Progress,
    account_key,
    lane_of,
    number_key,
)
from cloud_learner.store.part import Part
from cloud_learner.store.rocks import Rocks, Table, Transaction, is_owned, tables_in
from edge_runtime.errors import ConfigError, TransportError

VERSION = 3
QUARANTINE_ROWS, QUARANTINE_BYTES = 1000, 4096
TRIMMED_AT_ONCE = 20
READS_MAX, READ_AGAIN_S = 60, 0.05  # while a learner has it: its first start makes ten tables
DAMAGED = "ingest_db_damaged"

TABLES = {
    "meta": Table(),
    "accounts": Table(),
    "examples": Table(buffer_bytes=8 << 20),
    "quarantine": Table(),
    "files": Table(),
}
FAMILY_TABLES = {
    "rows": Table(buffer_bytes=32 << 20, is_looked_up=True),
    "runs": Table(buffer_bytes=16 << 20, has_blobs=True),
    "due": Table(),
    "early": Table(),
    "batches": Table(),
}
_META, _COUNTERS, _END = b"meta", b"counters", b"\xff" * 96
_FOR_FILES, _FOR_BATCHES = b"\0", b"\1"

Quarantined = tuple[float, str, str, bytes]
Counts = Mapping[str, Mapping[str, int]]

_encode = msgspec.msgpack.Encoder().encode
_meta = msgspec.msgpack.Decoder(Meta).decode
_account = msgspec.msgpack.Decoder(Account).decode
_example = msgspec.msgpack.Decoder(Example).decode
_counters = msgspec.msgpack.Decoder(dict[str, dict[str, int]]).decode
_quarantined = msgspec.msgpack.Decoder(Quarantined).decode


class IngestDb:
    """The database in the directory `path`, made when absent, with tables for `families`.

    Without a word about families it has those that it was made for. Raises: ConfigError
    `already_owned`, `bad_version`, `family_gone`, `ingest_db_damaged`; CapacityError.
    """

    def __init__(self, path: Path, families: Collection[str] | None = None) -> None:
        held = tables_in(path)
        if "rows" in held:  # of no family: before version 3 there was only one
            raise _bad_version(path, 2)
        of_families = {name.partition("/")[0] for name in held if "/" in name}
        self.families = sorted(of_families if families is None else families)
        if gone := sorted(of_families - set(self.families)):
            raise ConfigError(
                "family_gone",
                f"{path} holds {', '.join(gone)}, which is not served; nothing was changed",
                "restore the folder of that family below families/ from a copy",
            )
        tables = dict(TABLES)
        for family in self.families:
            tables |= {f"{family}/{name}": table for name, table in FAMILY_TABLES.items()}
        self.rocks = Rocks(path, tables, damaged=DAMAGED)
        try:
            self._begin(path)
        except BaseException:
            self.rocks.close()
            raise

    def _begin(self, path: Path) -> None:
        if data := self.rocks.get("meta", _META):
            return _check_version(path, data)
        first = self.begin()
        first.put("meta", _META, _encode(Meta(VERSION)))
        return self.rocks.write(first)

    def part(self, family: str) -> Part:
        """The tables of one family."""
        return Part(self.rocks, family)

    def meta(self) -> Meta:
        """The numbers of the last commit."""
        data = self.rocks.get("meta", _META)
        assert data is not None, "it is there since the first start"
        meta = _meta(data)
        for family in self.families:
            meta.families.setdefault(family, Progress())
        return meta

    def load(self) -> IngestState:
        """What was committed so far."""
        meta = self.meta()
        data = self.rocks.get("meta", _COUNTERS)
        batched = {
            number
            for family, progress in meta.families.items()
            for _, numbers in self.batches(family, progress.trimmed)
            for number in numbers
        }
        unbatched, unarchived, for_files_only = [], [], []
        for key, value in self.rocks.scan("examples", b"", _END):
            number, example = int.from_bytes(key, "big"), _example(value[1:])
            if value[:1] == _FOR_FILES:
                for_files_only.append(number)
            elif number not in batched:
                unbatched.append((number, example))
            if number > meta.archived:
                unarchived.append((number, example))
        return IngestState(
            meta,
            accounts=accounts_of(self.rocks),
            counters=_counters(data) if data else {},
            unbatched=unbatched,
            unarchived=unarchived,
            for_files_only=for_files_only,
            files=self.files(),
        )

    def begin(self) -> Transaction:
        """An empty transaction."""
        return self.rocks.begin()

    def commit(self, change: Transaction, meta: Meta, counters: Counts) -> None:
        """Commit, with the counters of each family; durable on return.

        Raises: CapacityError `disk_full`; then open it anew, to see what was committed.
        """
        change.put("meta", _META, _encode(meta))
        change.put("meta", _COUNTERS, _encode(counters))
        self.rocks.write(change)

    def close(self) -> None:
        """Close, and let another process in."""
        self.rocks.close()

    def files(self) -> list[str]:
        """Names of the files of examples."""
        return [key.decode() for key, _ in self.rocks.scan("files", b"", _END)]

    def examples_of(self, family: str, batch: int) -> list[Example]:
        """The examples of one batch, in release order."""
        value = self.part(family).get("batches", number_key(batch))
        numbers = np.frombuffer(value or b"", ">u8").tolist()
        found = self.rocks.get_many("examples", [number_key(number) for number in numbers])
        return [_example(value[1:]) for value in found if value is not None]

    def batches_after(self, family: str, number: int) -> Iterator[Batch]:
        """The committed batches above `number`, in order: what a restarted trainer has missed."""
        for following in range(number + 1, self.meta().families[family].batch + 1):
            yield Batch(following, self.examples_of(family, following))

    def examples_after(self, number: int) -> list[Example]:
        """The examples that were released after `number` and are for batches, in order."""
        entries = self.rocks.scan("examples", number_key(number + 1), _END)
        return [_example(value[1:]) for _, value in entries if value[:1] == _FOR_BATCHES]

    def quarantined(self) -> list[Quarantined]:
        """The newest refused messages and records: arrival, subject, reason, first bytes."""
        return [_quarantined(value) for _, value in self.rocks.scan("quarantine", b"", _END)]

    def batches(self, family: str, after: int) -> Iterator[tuple[int, list[int]]]:
        """The batches above a number that are kept, and the numbers of their examples."""
        for key, value in self.part(family).scan("batches", number_key(after + 1), _END):
            yield int.from_bytes(key, "big"), np.frombuffer(value, ">u8").tolist()


def put_account(change: Transaction, lane: Lane, account: Account) -> None:
    """Set what became of a lane; every number of it is accounted for."""
    assert account.is_balanced, f"{lane}: {account}"
    change.put("accounts", account_key(lane), _encode(account))


def put_quarantined(change: Transaction, number: int, what: Quarantined) -> None:
    """Keep the first bytes of what was refused, and forget what was refused long before."""
    arrived_s, subject, reason, data = what
    kept = (arrived_s, subject[:QUARANTINE_BYTES], reason, data[:QUARANTINE_BYTES])
    change.put("quarantine", number_key(number), _encode(kept))
    if number > QUARANTINE_ROWS:
        change.delete("quarantine", number_key(number - QUARANTINE_ROWS))


def put_example(change: Transaction, number: int, example: Example, *, for_batches: bool) -> None:
    """Keep a released example; one that is for no batch goes when it lies in a file."""
    mark = _FOR_BATCHES if for_batches else _FOR_FILES
    change.put("examples", number_key(number), mark + _encode(example))


def put_batch(change: Transaction, family: str, number: int, examples: Sequence[int]) -> None:
    """Keep which examples a batch of a family holds."""
    packed = np.asarray(examples, ">u8").tobytes()
    change.put(f"{family}/batches", number_key(number), packed)


def trim_batches(db: IngestDb, change: Transaction, meta: Meta, family: str, through: int) -> None:
    """Forget batches up to `through` whose examples lie in files, a few at each commit."""
    progress = meta.families[family]
    for number, examples in islice(db.batches(family, progress.trimmed), TRIMMED_AT_ONCE):
        if number > through or max(examples) > meta.archived:
            break
        for example in examples:
            change.delete("examples", number_key(example))
        change.delete(f"{family}/batches", number_key(number))
        progress.trimmed = number


def put_files(change: Transaction, new: Iterable[str], old: Iterable[str] = ()) -> None:
    """Name files of examples, and take back the names of what they replace."""
    for name in new:
        change.put("files", name.encode(), b"")
    for name in old:
        change.delete("files", name.encode())


def accounts_of(rocks: Rocks) -> dict[Lane, Account]:
    """The accounts of all lanes."""
    return {lane_of(key): _account(value) for key, value in rocks.scan("accounts", b"", _END)}


def read_accounts(path: Path) -> dict[Lane, Account]:
    """The accounts in the database at `path`, whether or not a learner runs.

    Raises: ConfigError `ingest_db_damaged`, `bad_version`; TransportError `busy`.
    """
    for _ in range(READS_MAX):
        try:
            with Rocks.reader(path, TABLES, damaged=DAMAGED) as rocks:
                if data := rocks.get("meta", _META):
                    _check_version(path, data)
                return accounts_of(rocks)
        except ConfigError as error:
            # The learner may have put one file in the place of others while this one opened them.
            if error.code != DAMAGED or not is_owned(path):
                raise
            time.sleep(READ_AGAIN_S)
    raise TransportError("busy", f"the learner is changing {path}", "ask again in a moment")


def _check_version(path: Path, meta: bytes) -> None:
    """Raises: ConfigError `bad_version`, whatever form `meta` had then."""
    version = msgspec.msgpack.decode(meta, type=list[Any])[0]
    if version != VERSION:
        raise _bad_version(path, version)


def _bad_version(path: Path, version: int) -> ConfigError:
    return ConfigError(
        "bad_version",
        f"{path} has version {version}; this reads {VERSION}; nothing was changed",
        "bootstrap a new home: the devices send again what they still hold",
    )
