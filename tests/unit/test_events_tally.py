"""The tally: gaps stay apart and few, and what is not written is not believed."""

from __future__ import annotations

import errno
import zlib

import pytest

from edge_runtime.events.gaps import Gap
from edge_runtime.events.tally import EPOCHS_KEPT, Lane, Tally
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
def tally(disk, tmp_path):
    tally = Tally(disk, tmp_path)
    tally.begin(5)
    return tally


def gaps(tally):
    return [(gap.first, gap.last, gap.reason) for gap in tally.lane("event", 5).gaps]


def lose(tally, first, last, reason="dropped"):
    return tally.lose([("event", 5, first, last, reason)])


def test_neighbours_of_one_reason_are_one_gap(tally):
    for first in range(1, 1000, 10):
        assert lose(tally, first, first + 9) == 10
    assert gaps(tally) == [(1, 1000, "dropped")]


def test_a_number_is_lost_once_for_its_first_reason(tally):
    assert lose(tally, 5, 8, "damaged") == 4
    assert lose(tally, 20, 20, "stalled") == 1
    assert lose(tally, 1, 30) == 25
    assert lose(tally, 1, 30) == 0
    assert gaps(tally) == [
        (1, 4, "dropped"),
        (5, 8, "damaged"),
        (9, 19, "dropped"),
        (20, 20, "stalled"),
        (21, 30, "dropped"),
    ]


@pytest.mark.parametrize(("seq", "first"), [(1, 5), (5, 5), (8, 5), (9, 20), (20, 20), (21, None)])
def test_the_next_gap_is_found(tally, seq, first):
    lose(tally, 5, 8)
    lose(tally, 20, 20)
    gap = tally.lane("event", 5).gap_from(seq)
    assert (gap.first if gap else None) == first


def test_a_number_that_is_lost_has_a_reason(tally):
    lose(tally, 5, 8, "stalled")
    found = [tally.reason("event", 5, seq) for seq in (4, 5, 8, 9)]
    assert found == ["", "stalled", "stalled", ""]
    assert tally.reason("event", 7, 5) == ""


def test_what_a_full_disk_does_not_take_did_not_happen(tally, disk, tmp_path):
    lose(tally, 1, 10)
    disk.is_full = True
    with pytest.raises(OSError, match="full"):
        lose(tally, 11, 20)
    with pytest.raises(OSError, match="full"):
        tally.learn("event", 5, 15, gives_back=True)
    assert gaps(tally) == [(1, 10, "dropped")]
    assert tally.lane("event", 5).learned == 0
    disk.is_full = False
    assert lose(tally, 11, 20) == 10
    again = Tally(disk, tmp_path)
    assert again.lane("event", 5).gaps == [Gap(1, 20, "dropped")]


def test_what_is_learned_is_kept_when_something_is_given_back_for_it(tally, disk, tmp_path):
    written = disk.written
    tally.learn("event", 5, 7, gives_back=False)
    assert (disk.written, tally.mark("event", 5)) == (written, 7)
    tally.learn("event", 5, 9, gives_back=True)
    assert Tally(disk, tmp_path).mark("event", 5) == 9
    tally.learn("event", 5, 3, gives_back=True)  # a learner that was put back
    assert (tally.mark("event", 5), tally.lane("event", 5).learned) == (3, 9)


def test_an_earlier_epoch_that_is_learned_whole_is_kept_so(tally, disk, tmp_path):
    tally.end({"event": 12, "label": 0})
    tally.begin(6)
    tally.learn("event", 5, 12, gives_back=False)
    again = Tally(disk, tmp_path)
    assert (again.lane("event", 5).learned, again.prior(6), again.prior(5)) == (12, 5, 0)


class Replaced:
    """A lane whose gaps another thread replaces whenever they are looked at."""

    def __init__(self, *gaps):
        self._gaps = list(gaps)

    @property
    def gaps(self):
        return self._gaps.pop(0)


def test_gaps_that_are_replaced_meanwhile_are_those_of_before_or_after():
    many = [Gap(1, 2, "dropped"), Gap(5, 6, "damaged"), Gap(9, 9, "stalled")]
    assert Lane.gap_from(Replaced(many, [], []), 5) == many[1]


def reopened(disk, directory, epoch):
    tally = Tally(disk, directory)
    tally.end({"event": 0, "label": 0})
    tally.begin(epoch)
    return tally


def test_an_epoch_keeps_its_prior_when_that_is_forgotten(tally, disk, tmp_path):
    tally.lose([("event", 5, 1, 9, "dropped")])
    tally.end({"event": 9, "label": 0})
    tally.begin(6)
    for epoch in range(7, EPOCHS_KEPT + 20):
        tally = reopened(disk, tmp_path, epoch)
    listed = [lane.epoch for lane in tally.lanes("event")]
    assert listed[0] == 5
    assert listed[1] > 7, "nothing is forgotten"
    assert [tally.prior(epoch) for epoch in listed] == [0, *(epoch - 1 for epoch in listed[1:])]
    assert tally.prior(6) == 6


def test_a_tally_of_an_earlier_release_has_its_priors_by_order(tmp_path, disk):
    lanes = b'[[4,"event",7,0,[]],[4,"label",0,0,[]],[9,"event",-1,0,[]],[9,"label",-1,0,[]]]'
    body = b'{"version":1,"generation":3,"epoch":9,"before":2,"lanes":%s}' % lanes
    (tmp_path / "tally.a").write_bytes(b"%08x\n%s" % (zlib.crc32(body), body))
    tally = Tally(disk, tmp_path)
    assert (tally.prior(9), tally.prior(4)) == (4, 2)
