"""What `tuf-client` refuses because it is old, and how a repository is mended after a theft."""

from __future__ import annotations

import fcntl
import shutil

import pytest

with_hashes = pytest.mark.parametrize("hashed", [False, True], ids=["basic", "with hashes"])


def test_an_older_snapshot_behind_the_same_timestamp_is_not_looked_at(repository, device):
    repository.publish("snapshot", "timestamp")
    assert device.refresh() == 0
    repository.serve("snapshot", repository.files["/metadata/1.snapshot.json"])
    assert device.refresh() == 0
    assert device.trusted()["snapshot"] == 2
    assert repository.asked[-1] == "/metadata/timestamp"


def test_an_older_timestamp_is_refused(repository, device):
    old = repository.file("timestamp")
    repository.publish("timestamp")
    assert device.refresh() == 0
    repository.serve("timestamp", old)
    assert device.refresh() == 1
    assert "rolled_back" in device.said
    assert device.trusted()["timestamp"] == 2
    assert repository.asked[-1] == "/metadata/timestamp"


@with_hashes
def test_a_newer_timestamp_of_an_older_snapshot_is_refused(repository, device, hashed):
    repository.hashed = hashed
    repository.publish("snapshot", "timestamp")
    assert device.refresh() == 0
    repository.snapshot.version = 0
    repository.publish("snapshot", "timestamp")
    assert device.refresh() == 1
    assert "rolled_back" in device.said
    assert device.trusted() == {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 1}
    assert repository.asked[-1] == "/metadata/timestamp"


@with_hashes
def test_a_newer_snapshot_of_older_targets_is_refused(repository, device, hashed):
    repository.hashed = hashed
    repository.publish_all()
    assert device.refresh() == 0
    repository.targets.version = 0
    repository.publish_all()
    assert device.refresh() == 1
    assert "rolled_back" in device.said
    assert device.trusted() == {"root": 1, "timestamp": 3, "snapshot": 2, "targets": 2}


def test_a_role_that_a_newer_snapshot_lists_no_more_is_refused(repository, device):
    repository.delegate("targets", "extra")
    repository.publish_all("extra")
    assert device.refresh() == 0
    del repository.snapshot.meta["extra.json"]
    repository.publish("snapshot", "timestamp")
    assert device.refresh() == 1
    assert device.trusted()["snapshot"] == 2


def test_a_snapshot_that_no_timestamp_names_yet_is_not_taken(repository, device):
    listed = repository.timestamp.snapshot_meta
    repository.publish("snapshot")
    repository.timestamp.snapshot_meta = listed
    repository.publish("root", "timestamp")
    assert device.refresh() == 0
    assert device.trusted() == {"root": 2, "timestamp": 2, "snapshot": 1, "targets": 1}


@pytest.mark.parametrize(
    ("role", "rotated"),
    [
        ("timestamp", ["timestamp"]),
        ("snapshot", ["snapshot", "timestamp"]),
        ("targets", ["snapshot"]),
        ("extra", ["snapshot"]),
    ],
)
def test_versions_that_were_run_up_are_undone_by_new_keys(repository, device, role, rotated):
    repository.delegate("targets", "extra")
    repository.publish_all("extra")
    repository.documents[role].version = (1 << 31) - 1
    repository.publish_all(role)
    assert device.refresh() == 0
    assert device.download("absent") == 1
    assert device.trusted()[role] == 1 << 31

    repository.documents[role].version = 0
    repository.publish_all(role)
    assert device.refresh() == 1
    repository.rotate_keys(*rotated)
    repository.documents[role].version = 0
    repository.publish_all("root", role)
    assert device.refresh() == 0
    assert device.download("absent") == 1
    assert device.trusted()[role] < 10
    assert device.refresh() == 0


@pytest.mark.parametrize("damage", ["removed", "emptied", "cut"])
def test_older_metadata_is_refused_by_the_floor_when_the_cache_is_lost(
    repository, device, new_device, damage
):
    old = dict(repository.files)
    repository.publish_all()
    assert device.refresh() == 0
    repository.files.clear()
    repository.files.update(old)
    for path in device.metadata.glob("*.json"):
        data = path.read_bytes()
        path.unlink()
        if damage != "removed":
            path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    shutil.rmtree(device.metadata / "root_history")
    assert device.refresh() == 1
    assert "metadata_rolled_back" in device.said
    assert new_device().refresh() == 0  # who never saw the new one


@pytest.mark.parametrize("copies", [["a"], ["b"], ["a", "b"]])
def test_a_damaged_floor_is_told_by_its_other_copy_or_stops_updates(repository, device, copies):
    assert device.refresh() == 0
    for copy in copies:
        (device.metadata / ".device" / f"floor.{copy}").write_bytes(b"?")
    repository.publish_all()
    assert device.refresh() == (1 if len(copies) == 2 else 0)
    assert ("floor_unreadable" in device.said) == (len(copies) == 2)


def test_a_second_client_on_the_same_state_is_refused(repository, device):
    assert device.refresh() == 0
    with (device.metadata / ".device" / "update.lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert device.refresh() == 1
        assert "already_owned" in device.said
    assert device.refresh() == 0
