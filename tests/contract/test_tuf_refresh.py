"""What `tuf-client` asks for, holds for trusted and refuses when metadata is wrong in itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.metadata import MetaFile

FIRST = {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 1}
WORKFLOW = ["root", "timestamp", "snapshot", "targets"]
REQUESTS = [
    "/metadata/2.root",
    "/metadata/timestamp",
    "/metadata/1.snapshot",
    "/metadata/1.targets",
]
OF_OTHERS = "30" * 71


def test_a_refresh_asks_for_each_file_once_and_keeps_the_very_bytes(repository, device):
    repository.serve("timestamp", repository.file("timestamp") + b" ")
    assert device.refresh() == 0
    assert repository.asked == REQUESTS
    assert device.trusted() == FIRST
    for role in WORKFLOW:
        assert (device.metadata / f"{role}.json").read_bytes() == repository.file(role)


def test_setting_up_asks_for_nothing(repository, device):
    assert repository.asked == []
    assert (device.metadata / "root.json").read_bytes() == repository.first_root


def test_what_is_cached_is_not_asked_for_again(repository, device):
    assert device.refresh() == 0
    repository.asked.clear()
    assert device.refresh() == 0
    assert repository.asked == REQUESTS[:2]


def test_a_download_refreshes_first(repository, device):
    assert device.download("absent artifact") == 1
    assert repository.asked == REQUESTS
    assert device.trusted() == FIRST
    assert device.held() == []


def without_version(root: dict[str, Any]) -> None:
    del root["signed"]["version"]


def signed_by_nobody(root: dict[str, Any]) -> None:
    root["signatures"][0]["sig"] = OF_OTHERS


@pytest.mark.parametrize("change", [without_version, signed_by_nobody, dict.clear])
def test_a_bad_first_root_is_refused_before_anything_is_asked(repository, new_device, change):
    root = json.loads(repository.first_root)
    change(root)
    assert new_device(json.dumps(root).encode()).refresh() == 1
    assert repository.asked == []


PROVEN_BEFORE = {
    "root": {"root": 1},
    "timestamp": {"root": 2},
    "snapshot": {"root": 2, "timestamp": 2},
    "targets": {"root": 2, "timestamp": 2, "snapshot": 2},
}


@pytest.mark.parametrize("role", WORKFLOW)
def test_an_unsigned_role_is_refused_and_what_came_before_it_kept(repository, device, role):
    repository.signers[role].clear()
    repository.publish("root", "targets", "snapshot", "timestamp")
    assert device.refresh() == 1
    assert "below_threshold" in device.said
    assert device.trusted() == PROVEN_BEFORE[role]


@pytest.mark.parametrize("role", ["root", "snapshot", "targets"])
def test_a_version_other_than_that_of_its_address_is_refused(repository, device, role):
    repository.documents[role].version += 1
    repository.publish(role)
    data = repository.file(role)
    repository.documents[role].version -= 1
    repository.serve(role, data)
    repository.snapshot.meta["targets.json"] = MetaFile(repository.targets.version)
    others = [each for each in ("root", "snapshot", "timestamp") if each != role]
    if role == "snapshot":
        repository.timestamp.snapshot_meta = MetaFile(2)
    repository.publish(*others)
    assert device.refresh() == 1
    assert device.trusted() == PROVEN_BEFORE[role]


def test_another_timestamp_of_the_same_version_changes_nothing(repository, device):
    assert device.refresh() == 0
    repository.timestamp.snapshot_meta.version = 100
    repository.timestamp.version = 0
    repository.publish("timestamp")
    assert device.refresh() == 0
    assert repository.asked[-1] == "/metadata/timestamp"
    kept = json.loads((device.metadata / "timestamp.json").read_bytes())["signed"]
    assert kept["meta"]["snapshot.json"]["version"] == 1


def test_listed_hashes_of_metadata_bind(repository, device):
    repository.hashed = True
    repository.publish_all()
    assert device.refresh() == 0
    repository.publish("targets")
    repository.snapshot.meta["targets.json"].hashes["sha256"] = "ab" * 32
    repository.publish("snapshot", "timestamp")
    assert device.refresh() == 1
    assert "hash_mismatch" in device.said
    assert device.trusted() == {"root": 1, "timestamp": 3, "snapshot": 3, "targets": 2}


def test_a_listed_length_of_metadata_binds(repository, device):
    repository.hashed = True
    repository.publish_all()
    repository.serve("targets", repository.file("targets") + b" " * 1000)
    assert device.refresh() == 1
    assert "wrong_length" in device.said


def test_unknown_fields_are_signed_along_and_change_nothing(repository, device):
    assert device.refresh() == 0
    made = CryptoSigner.generate_ed25519()
    key = made.public_key
    odd = SSlibKey(
        "odd",
        key.keytype,
        key.scheme,
        key.keyval,
        {"keyid_hash_algorithms": "md5", "more": {"a": 1}},
    )
    repository.root.unrecognized_fields["custom"] = "value"
    repository.root.roles["root"].unrecognized_fields["another"] = ["value"]
    repository.rotate_keys("snapshot")
    repository.root.revoke_key(repository.signers["snapshot"][0].public_key.keyid, "snapshot")
    repository.signers["snapshot"] = [CryptoSigner(made._private_key, odd)]
    repository.root.add_key(odd, "snapshot")
    repository.publish("root", "snapshot", "timestamp")
    assert device.refresh() == 0
    assert device.trusted() == {"root": 2, "timestamp": 2, "snapshot": 2, "targets": 1}


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("timestamp", FIRST),
        ("snapshot", FIRST | {"timestamp": 2}),
        ("targets", FIRST | {"timestamp": 2, "snapshot": 2}),
    ],
)
def test_a_missing_file_is_no_news_and_no_success(repository, device, role, expected):
    assert device.refresh() == 0
    repository.publish_all()
    del repository.files[repository.address(role)]
    assert device.refresh() == 1
    assert "absent" in device.said
    assert repository.asked[-1] == repository.address(role).removesuffix(".json")
    assert device.trusted() == expected


def test_a_snapshot_is_no_timestamp_though_its_key_signed_it(repository, device):
    repository.add_key("snapshot", repository.signers["timestamp"][0])
    repository.snapshot.meta = {"snapshot.json": MetaFile(1)}
    repository.publish("root", "snapshot")
    repository.serve("timestamp", repository.file("snapshot"))
    assert device.refresh() == 1
    assert device.trusted() == {"root": 2}


def test_the_client_is_a_program_that_the_public_suite_can_start(repository, device):
    assert device.run_apart(*device.asking()) == 0
    assert device.trusted() == FIRST
    del repository.files["/metadata/timestamp.json"]
    assert device.run_apart(*device.asking()) == 1
    assert "absent" in device.said


def test_a_server_that_is_away_is_no_success(repository, device):
    assert device.refresh() == 0
    assert device.run("--metadata-url", "http://127.0.0.1:9/metadata", "refresh") == 1
    assert "unreachable" in device.said
    assert device.trusted() == FIRST
