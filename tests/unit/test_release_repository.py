"""The repository: what the broker lacks is sent, and sent again before it can fade."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from cloud_learner.release import keys
from cloud_learner.release.metadata import ReleaseFile
from cloud_learner.release.repository import STREAM_BYTES, Repository, SignedFile, State
from edge_runtime.clock import ManualClock
from edge_runtime.errors import CapacityError, ConfigError
from edge_runtime.wire import subjects

RELEASE = ReleaseFile("f", "r1", 1, b"package")
LIVE = {RELEASE.sha256}
PACKAGE = subjects.chunk(RELEASE.sha256, 0)


def state(version: int) -> State:
    return State(roles={"m-f": SignedFile(version, 0.0, "{}")})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    keys.create(tmp_path, ["f"], ManualClock(0.0))
    return tmp_path / "tuf"


def test_only_what_the_broker_lacks_is_sent(directory: Path) -> None:
    repository = Repository(directory)
    first = repository.commit(state(1), RELEASE, LIVE)
    assert [subject for subject, _ in first] == [
        subjects.metadata("1.root.json"),
        subjects.metadata("1.targets.json"),
        subjects.metadata("1.m-f.json"),
        PACKAGE,
    ]
    repository.mark_sent(first)
    assert repository.commit(state(1), None, LIVE) == []
    assert repository.commit(state(2), None, LIVE) == [(subjects.metadata("2.m-f.json"), b"{}")]
    repository.forget_sent()
    assert len(repository.commit(state(2), None, LIVE)) == 4


def test_all_variants_of_a_release_are_kept_and_sent(directory: Path) -> None:
    release = ReleaseFile("f", "r1", 1, b"package", variants={"float32": b"another"})
    live = {hashlib.sha256(data).hexdigest() for data in release.packages().values()}

    sent = Repository(directory).commit(state(1), release, live)

    assert {data for _, data in sent} >= {b"package", b"another"}
    assert {path.name for path in (directory / "blobs").iterdir()} == live


def test_what_is_live_is_sent_again_before_the_stream_drops_it(directory: Path) -> None:
    repository = Repository(directory)
    first = repository.commit(state(1), RELEASE, LIVE)
    repository.mark_sent(first)
    megabyte = bytes(1 << 20)
    megabytes = STREAM_BYTES // 2 // len(megabyte)
    repository.mark_sent([("elsewhere", megabyte)] * (megabytes - 1))
    assert repository.commit(state(1), None, LIVE) == []
    repository.mark_sent([("elsewhere", megabyte)])
    assert repository.commit(state(1), None, LIVE) == first


def test_state_and_packages_survive_a_restart(directory: Path) -> None:
    Repository(directory).commit(state(5), RELEASE, LIVE)
    reborn = Repository(directory)
    assert reborn.state == state(5)
    assert (PACKAGE, b"package") in reborn.commit(state(6), None, LIVE)
    assert PACKAGE not in dict(reborn.commit(state(7), None, set()))


def test_a_lost_package_is_named(directory: Path) -> None:
    repository = Repository(directory)
    with pytest.raises(CapacityError, match="state_unwritable"):
        repository.commit(state(1), None, LIVE)


@pytest.mark.parametrize("text", ["", "{", '{"version": 2}'])
def test_unreadable_state_is_named(directory: Path, text: str) -> None:
    (directory / "online.json").write_text(text)
    with pytest.raises(ConfigError, match="bad_state"):
        Repository(directory)


def test_a_home_without_keys_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_trust"):
        Repository(tmp_path / "tuf")
