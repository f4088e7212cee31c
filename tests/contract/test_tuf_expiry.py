"""When `tuf-client` holds metadata for expired, and that newer metadata takes its place."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta

import pytest


@pytest.fixture
def day():
    """`day(n)` is the time in n days."""
    start = datetime.now(UTC).replace(microsecond=0)
    return lambda number: start + timedelta(days=number)


def at(time: datetime) -> tuple[str, str]:
    return ("--now", str(time.timestamp()))


EXPIRED = {
    "root": {"root": 2, "timestamp": 1, "snapshot": 1, "targets": 1},
    "timestamp": {"root": 2, "timestamp": 1, "snapshot": 1, "targets": 1},
    "snapshot": {"root": 2, "timestamp": 2, "snapshot": 1, "targets": 1},
    "targets": {"root": 2, "timestamp": 2, "snapshot": 2, "targets": 1},
}


@pytest.mark.parametrize("role", EXPIRED)
def test_an_expired_role_is_refused_and_what_came_before_it_kept(repository, device, day, role):
    assert device.refresh() == 0
    repository.documents[role].expires = day(-1)
    repository.publish_all("root")
    assert device.refresh() == 1
    assert "expired" in device.said
    assert device.trusted() == EXPIRED[role]


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_a_cached_role_that_expired_is_followed_by_a_newer_one(repository, device, day, role):
    repository.documents[role].expires = day(7)
    repository.publish_all("root")
    assert device.refresh(*at(day(0))) == 0
    assert device.refresh(*at(day(18))) == 1
    assert "expired" in device.said
    repository.documents[role].expires = day(21)
    repository.publish_all("root")
    assert device.refresh(*at(day(18))) == 0
    assert device.trusted() == dict.fromkeys(["root", "timestamp", "snapshot", "targets"], 3)


def test_roots_that_expired_on_the_way_are_passed_through(repository, device, day):
    for number in (-30, -20, 30):
        repository.root.expires = day(number)
        repository.publish("root")
    assert device.refresh() == 0
    assert device.trusted()["root"] == 4


def test_an_expired_delegated_role_is_not_taken(repository, device, day):
    repository.delegate("targets", "extra", ["extra/*"], expires=day(-1))
    repository.add_target("extra/file", b"content", "extra")
    repository.publish_all("extra")
    assert device.refresh() == 0
    assert device.download("extra/file") == 1
    assert device.held() == []
    assert device.trusted() == {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 2}


def test_a_cached_delegated_role_that_expired_is_followed_by_a_newer_one(repository, device, day):
    repository.delegate("targets", "extra", ["extra/*"], expires=day(7))
    repository.add_target("extra/one", b"one", "extra")
    repository.add_target("extra/two", b"two", "extra")
    repository.publish_all("extra")
    assert device.download("extra/one") == 0
    assert device.download("extra/two", options=at(day(18))) == 1
    assert device.held() == [b"one"]
    repository.documents["extra"].expires = day(21)
    repository.publish_all("extra")
    assert device.download("extra/two", options=at(day(18))) == 0
    assert device.held() == [b"one", b"two"]


def test_the_clock_is_that_of_the_process(repository, device, day):
    faketime = shutil.which("faketime")
    if faketime is None:
        pytest.skip("no faketime on this machine")
    repository.root.expires = day(7)
    repository.publish("root")
    assert device.refresh() == 0
    assert device.run_apart(*device.asking(), before=(faketime, str(day(8)))) == 1
    assert "expired" in device.said
