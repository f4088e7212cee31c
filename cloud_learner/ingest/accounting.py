"""The accounting: for every device, epoch and class, what became of each number up to the mark.

Why: "no event lost" is a sum, and a sum that is not written down cannot be checked.

Invariants: for each lane, archived + quarantined + dropped = its mark, always; dropped are the
numbers that the device says are lost, and those of records that it keeps to itself, by reason. Two
epochs of one device after the same one are two logs under one name: counted and named, and both
accepted, for their ids differ. What a device says of itself is bounded: the lanes that it may have,
and what it may claim of them. What changed is written with the commit that changed it.

Knows nothing about how records are accepted or joined.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from cloud_learner.ingest.guard import NUMBER_MAX
from cloud_learner.store.ingest_db import put_account
from cloud_learner.store.ingest_state import Account, Lane
from cloud_learner.store.rocks import Transaction
from edge_runtime.wire.messages import NO_PRIOR, OMITTED, WIRE_VERSION, Mark, Record, Watermark

LANES_TOLD_MAX = 1024  # of one device in a watermark, those that came last
LANES_MAX = 16_384  # of one device: twenty years of a restart a day

log = logging.getLogger("cloud_learner.ingest")


class Accounting:
    """The accounts of all lanes; `accounts` go on from what was committed."""

    def __init__(self, accounts: Mapping[Lane, Account]) -> None:
        self.accounts = dict(sorted(accounts.items()))
        self.counters: Counter[str] = Counter()
        self.moved: set[Lane] = set()
        self.duplicates: set[str] = set()
        self._forks: set[tuple[str, int]] = set()
        self._changed: set[Lane] = set()
        self._lanes: dict[str, list[Lane]] = {}
        self._after: dict[tuple[str, int], int] = {}
        self._totals: Counter[str] = Counter(_parts(Account()))
        for lane, account in self.accounts.items():
            self._totals.update(_parts(account))
            self._lanes.setdefault(lane[0], []).append(lane)
            self._note_prior(lane, account.prior)
        self.counters.clear()  # they were counted when they were noticed

    def enter(
        self,
        lane: Lane,
        lost: int,
        reason: str,
        records: Sequence[Record | int],
        prior: int,
        *,
        newest_s: Mapping[str, float],
    ) -> None:
        """Account for `lost` numbers and then for `records`, which follow the mark.

        `newest_s` is how far they move the time of each family in the lane.
        """
        account = self._account(lane)
        self._totals.subtract(_parts(account))
        if prior and not account.prior:
            account.prior = prior
            self._note_prior(lane, prior)
        if lost:
            self._drop(account, reason, lost)
        rest = [record for record in records if isinstance(record, int)]
        self._enter_rest(account, rest)
        account.archived += len(records) - len(rest)
        for family, time_s in newest_s.items():
            account.newest_s[family] = max(account.newest_s.get(family, time_s), time_s)
        account.seq += lost + len(records)
        assert account.is_balanced, f"{lane}: {account}"
        self._totals.update(_parts(account))
        self._changed.add(lane)
        self.moved.add(lane)

    def notice(self, lane: Lane) -> None:
        """A lane exists. Of one that nothing is held of, its device must hear just that: it may
        have been held once, by a learner that was put back to before.
        """
        self._account(lane)
        lanes = self._lanes[lane[0]]
        if lanes[-1] != lane:  # what came last is told first
            lanes.remove(lane)
            lanes.append(lane)

    def has_room(self, lane: Lane) -> bool:
        """Whether the device may have this lane: it starts anew now and then, not for ever."""
        return lane in self.accounts or len(self._lanes.get(lane[0], ())) < LANES_MAX

    def hear(self, device: str, marks: Iterable[Mark]) -> None:
        """Where lanes end on the device itself, by its own word."""
        for mark in marks:
            lane = (device, mark.epoch, mark.event_class)
            is_number = 0 < mark.epoch <= NUMBER_MAX and 0 <= mark.seq <= NUMBER_MAX
            if not is_number or not self.has_room(lane):
                self.counters["bad_marks"] += 1
                continue
            account = self._account(lane)
            if account.durable != mark.seq:
                self._totals.subtract(_parts(account))
                account.durable = mark.seq
                self._totals.update(_parts(account))
                self._changed.add(lane)

    def write(self, change: Transaction) -> None:
        """Hand over what changed since the last time."""
        for lane in self._changed:
            put_account(change, lane, self.accounts[lane])
        self._changed, self.moved = set(), set()

    def marks(self) -> dict[Lane, int]:
        """The mark of each lane."""
        return {lane: account.seq for lane, account in self.accounts.items()}

    def devices(self) -> list[str]:
        """All devices of which anything is held."""
        return sorted(self._lanes)

    def watermark(self, device: str) -> Watermark:
        """What is held of a device, for the device: of the lanes that came last."""
        lanes = self._lanes.get(device, [])[-LANES_TOLD_MAX:]
        marks = [Mark(lane[1], lane[2], self.accounts[lane].seq) for lane in lanes]
        return Watermark(WIRE_VERSION, device, marks)

    def totals(self) -> dict[str, int]:
        """Sums over all lanes, and whether they are balanced (1) or not (0)."""
        totals = {name: min(number, NUMBER_MAX) for name, number in self._totals.items()}
        accounted = totals["archived"] + totals["quarantined"] + totals["dropped"]
        return {**totals, "balanced": int(accounted == totals["held"])}

    def _account(self, lane: Lane) -> Account:
        account = self.accounts.get(lane)
        if account is None:
            account = self.accounts[lane] = Account(dropped={}, newest_s={})
            self._lanes.setdefault(lane[0], []).append(lane)
        return account

    def _enter_rest(self, account: Account, rest: list[int]) -> None:
        """What is no record: omitted on the device, or refused here."""
        for key, number in Counter(rest).items():
            if key in OMITTED:
                self._drop(account, OMITTED[key], number)
            else:
                account.quarantined += number

    def _drop(self, account: Account, reason: str, number: int) -> None:
        account.dropped[reason] = account.dropped.get(reason, 0) + number
        self.counters["dropped"] += number
        self.counters[f"dropped_{reason}"] += number

    def _note_prior(self, lane: Lane, prior: int) -> None:
        device, epoch, _ = lane
        known = self._after.setdefault((device, prior), epoch) if prior else epoch
        if known == epoch or (device, epoch) in self._forks:
            return
        self._forks.add((device, epoch))
        self.duplicates.add(device)
        self.counters["duplicate_identity"] += 1
        where = "was the first of a log" if prior == NO_PRIOR else f"followed epoch {prior}"
        log.warning(
            "%s: its epochs %d and %d each %s: two logs under one name", device, known, epoch, where
        )


def _parts(account: Account) -> dict[str, int]:
    """What a lane adds to the totals."""
    return {
        "held": account.seq,
        "archived": account.archived,
        "quarantined": account.quarantined,
        "dropped": sum(account.dropped.values()),
        "under_way": max(0, account.durable - account.seq),
    }
