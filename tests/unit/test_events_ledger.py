"""The ledger: gaps stay apart and few, and what is not written is not believed."""

from __future__ import annotations

import errno

import pytest

from edge_runtime.events.ledger import Gap, Ledger
from edge_runtime.files import OsFiles


class Full(OsFiles):
    """A disk that takes no byte while it is full."""

    is_full = False

    def write(self, fd, data, offset):
        if self.is_full:
            raise OSError(errno.ENOSPC, "full")
        super().write(fd, data, offset)


@pytest.fixture
def disk():
    return Full()


@pytest.fixture
def ledger(disk, tmp_path):
    ledger = Ledger(disk, tmp_path)
    ledger.begin(5)
    return ledger


def gaps(ledger):
    return [(gap.first, gap.last, gap.reason) for gap in ledger.lane("event", 5).gaps]


def lose(ledger, first, last, reason="dropped"):
    return ledger.lose([("event", 5, first, last, reason)])


def test_neighbours_of_one_reason_are_one_gap(ledger):
    for first in range(1, 1000, 10):
        assert lose(ledger, first, first + 9) == 10
    assert gaps(ledger) == [(1, 1000, "dropped")]


def test_a_number_is_lost_once_for_its_first_reason(ledger):
    assert lose(ledger, 5, 8, "damaged") == 4
    assert lose(ledger, 20, 20, "stalled") == 1
    assert lose(ledger, 1, 30) == 25
    assert lose(ledger, 1, 30) == 0
    assert gaps(ledger) == [
        (1, 4, "dropped"),
        (5, 8, "damaged"),
        (9, 19, "dropped"),
        (20, 20, "stalled"),
        (21, 30, "dropped"),
    ]


@pytest.mark.parametrize(("seq", "first"), [(1, 5), (5, 5), (8, 5), (9, 20), (20, 20), (21, None)])
def test_the_next_gap_is_found(ledger, seq, first):
    lose(ledger, 5, 8)
    lose(ledger, 20, 20)
    gap = ledger.lane("event", 5).gap_from(seq)
    assert (gap.first if gap else None) == first


def test_what_a_full_disk_does_not_take_did_not_happen(ledger, disk, tmp_path):
    lose(ledger, 1, 10)
    disk.is_full = True
    with pytest.raises(OSError, match="full"):
        lose(ledger, 11, 20)
    with pytest.raises(OSError, match="full"):
        ledger.learn("event", 5, 15, gives_back=True)
    assert gaps(ledger) == [(1, 10, "dropped")]
    assert ledger.lane("event", 5).learned == 0
    disk.is_full = False
    assert lose(ledger, 11, 20) == 10
    again = Ledger(disk, tmp_path)
    assert again.lane("event", 5).gaps == [Gap(1, 20, "dropped")]


def test_what_is_learned_is_kept_when_something_is_given_back_for_it(ledger, disk, tmp_path):
    written = disk.written
    ledger.learn("event", 5, 7, gives_back=False)
    assert (disk.written, ledger.mark("event", 5)) == (written, 7)
    ledger.learn("event", 5, 9, gives_back=True)
    assert Ledger(disk, tmp_path).mark("event", 5) == 9
    ledger.learn("event", 5, 3, gives_back=True)  # a learner that was put back
    assert (ledger.mark("event", 5), ledger.lane("event", 5).learned) == (3, 9)


def test_an_earlier_epoch_that_is_learned_whole_is_kept_so(ledger, disk, tmp_path):
    ledger.end({"event": 12, "label": 0})
    ledger.begin(6)
    ledger.learn("event", 5, 12, gives_back=False)
    again = Ledger(disk, tmp_path)
    assert (again.lane("event", 5).learned, again.prior(6), again.prior(5)) == (12, 5, 0)
