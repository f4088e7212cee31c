"""Whose signatures `tuf-client` counts: thresholds, duplicates, kinds of keys, their rotation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner

SIGNERS = {
    "ed25519": CryptoSigner.generate_ed25519,
    "ecdsa-sha2-nistp256": CryptoSigner.generate_ecdsa,
    "rsassa-pss-sha256": CryptoSigner.generate_rsa,
    "rsa-pkcs1v15-sha256": lambda: CryptoSigner.generate_rsa(scheme="rsa-pkcs1v15-sha256"),
}


def signature_of(content: dict[str, Any], signer: CryptoSigner) -> dict[str, str]:
    keyid = signer.public_key.keyid
    return next(each for each in content["signatures"] if each["keyid"] == keyid)


def test_a_threshold_counts_the_signatures_that_are_there(repository, device):
    repository.root.roles["snapshot"].threshold = 3
    for _ in range(2):
        repository.add_key("snapshot")
    repository.publish_all("root")
    assert device.refresh() == 0
    repository.signers["snapshot"].pop()
    repository.publish_all()
    assert device.refresh() == 1
    assert device.trusted()["snapshot"] == 2


def test_a_threshold_above_the_number_of_keys_is_never_met(repository, device):
    for _ in range(4):
        repository.add_key("snapshot")
    repository.root.roles["snapshot"].threshold = 6
    repository.publish("root", "snapshot", "timestamp")
    assert device.refresh() == 1
    assert device.trusted() == {"root": 2, "timestamp": 2}


def test_a_threshold_of_nothing_is_refused(repository, device):
    repository.root.roles["snapshot"].threshold = 0
    repository.publish("root")
    assert device.refresh() == 1
    assert device.trusted() == {"root": 1}


def test_one_key_under_many_ids_counts_once(repository, device):
    signer = repository.add_key("snapshot")
    repository.root.roles["snapshot"].threshold = 6
    repository.root.roles["snapshot"].keyids += [signer.public_key.keyid] * 8
    repository.publish("root", "snapshot", "timestamp")
    repository.spoil(
        "snapshot",
        lambda content: content["signatures"].extend([signature_of(content, signer)] * 8),
    )
    assert device.refresh() == 1
    assert "snapshot" not in device.trusted()


def test_a_key_that_signs_twice_is_refused(repository, device):
    repository.spoil(
        "snapshot", lambda content: content["signatures"].append(content["signatures"][0])
    )
    assert device.refresh() == 1
    assert "snapshot" not in device.trusted()


def test_a_key_of_another_role_counts_for_nothing(repository, device):
    repository.signers["targets"] = repository.signers["snapshot"]
    repository.publish_all()
    assert device.refresh() == 1
    assert "targets" not in device.trusted()


@pytest.mark.parametrize("scheme", SIGNERS)
def test_every_kind_of_key_counts_and_its_bad_signature_does_not(repository, device, scheme):
    signer = repository.add_key("root", SIGNERS[scheme]())
    assert signer.public_key.scheme == scheme
    repository.root.roles["root"].threshold = 2
    repository.publish("root")
    good = signature_of(json.loads(repository.file("root")), signer)["sig"]
    assert device.refresh() == 0
    assert device.trusted()["root"] == 2
    repository.publish("root")
    repository.spoil("root", lambda content: signature_of(content, signer).update(sig=good))
    assert device.refresh() == 1
    assert device.trusted()["root"] == 2


@pytest.mark.parametrize("bad", ["of another version", "ab" * 64, "", "no hex"])
def test_a_bad_signature_beside_enough_good_ones_does_no_harm(repository, device, bad):
    first = repository.signers["timestamp"][0]
    old = signature_of(json.loads(repository.file("timestamp")), first)["sig"]
    repository.add_key("timestamp")
    repository.publish("root", "timestamp")
    bad = old if bad == "of another version" else bad
    repository.spoil("timestamp", lambda content: signature_of(content, first).update(sig=bad))
    assert device.refresh() == 0
    assert device.trusted()["timestamp"] == 2


# Each version of root: its keys, its threshold, who signs. The last one is taken or refused.
ROTATIONS: dict[str, tuple[list[tuple[str, int, str]], bool]] = {
    "one key gives way to another": ([("b", 1, "b"), ("c", 1, "cb"), ("c", 1, "c")], True),
    "others sign along": ([("b", 1, "dbe"), ("c", 1, "dcbe"), ("c", 1, "dce")], True),
    "always other three of five": (
        [("abcde", 3, "ace"), ("abcde", 3, "aeb"), ("abcde", 3, "abd"), ("abcde", 3, "abd")],
        True,
    ),
    "one of five at once": ([("abcde", 3, "ace"), ("abdef", 3, "aeb")], True),
    "one of five step by step": (
        [("abcde", 3, "ace"), ("abdef", 3, "acef"), ("abdef", 3, "aef")],
        True,
    ),
    "all of five": ([("abcde", 3, "ace"), ("fghij", 3, "acefgh"), ("fghij", 3, "fgh")], True),
    "the threshold rises": ([("bcd", 1, "b"), ("bcd", 2, "bc")], True),
    "the threshold falls": ([("bcd", 2, "bc"), ("bcd", 1, "bc"), ("bcd", 1, "b")], True),
    "a second key comes": ([("b", 1, "b"), ("bc", 2, "bc")], True),
    "the old key did not sign": ([("b", 1, "b"), ("c", 1, "cde")], False),
    "the new key did not sign": ([("b", 1, "b"), ("c", 1, "bde")], False),
    "too few new keys signed": ([("abcde", 3, "ace"), ("abdef", 3, "ace")], False),
    "too few old keys signed": ([("abcde", 3, "ace"), ("abdef", 3, "aef")], False),
    "the new threshold is not met": ([("bcd", 1, "b"), ("bcd", 2, "c")], False),
    "the old threshold is not met": ([("bcd", 2, "bc"), ("bcd", 1, "b")], False),
}


@pytest.mark.parametrize("case", ROTATIONS)
def test_root_keys_rotate_by_the_thresholds_of_both_sides(repository, new_device, case):
    versions, taken = ROTATIONS[case]
    keys = {name: CryptoSigner.generate_ed25519() for name in "abcdefghij"}
    repository.root.version = 0
    for holders, threshold, signed_by in versions:
        repository.root.roles["root"].keyids.clear()
        repository.root.roles["root"].threshold = threshold
        for name in holders:
            repository.root.add_key(keys[name].public_key, "root")
        repository.signers["root"] = [keys[name] for name in signed_by]
        repository.publish("root")
    device = new_device(repository.files["/metadata/1.root.json"])
    assert device.refresh() == (0 if taken else 1)
    number = len(versions) if taken else len(versions) - 1
    kept = (device.metadata / "root.json").read_bytes()
    assert kept == repository.files[f"/metadata/{number}.root.json"]


# Keys, threshold and signers that a role gets in a newer root.
CHANGES: dict[str, tuple[str, int, str, bool]] = {
    "another key": ("c", 1, "c", True),
    "others sign along": ("b", 1, "dbe", True),
    "three of five": ("abcde", 3, "bcd", True),
    "the new key did not sign": ("c", 1, "bde", False),
    "one of three is none of its keys": ("abdef", 3, "ace", False),
    "one too few": ("abdef", 3, "ae", False),
}


@pytest.mark.parametrize(
    ("role", "case"),
    [("timestamp", case) for case in CHANGES]
    + [(role, case) for role in ("snapshot", "targets") for case in list(CHANGES)[2:4]],
)
def test_a_newer_root_says_who_signs_a_role(repository, device, role, case):
    holders, threshold, signed_by, taken = CHANGES[case]
    keys = {name: CryptoSigner.generate_ed25519() for name in "abcdef"}
    for signer in repository.signers[role]:
        repository.root.revoke_key(signer.public_key.keyid, role)
    repository.root.roles[role].threshold = threshold
    for name in holders:
        repository.root.add_key(keys[name].public_key, role)
    repository.signers[role] = [keys[name] for name in signed_by]
    repository.publish_all("root")
    assert device.refresh() == (0 if taken else 1)
    path = device.metadata / f"{role}.json"
    assert path.exists() == taken
    assert not taken or path.read_bytes() == repository.file(role)


def test_fifty_missed_roots_are_followed_and_a_revoked_key_is_refused(repository, device):
    assert device.refresh() == 0
    stolen = repository.signers["timestamp"]
    for _ in range(50):
        old = repository.signers["root"][-1]
        repository.rotate_keys("root", "timestamp")
        repository.signers["root"].insert(0, old)
        repository.publish("root")
    repository.publish_all()
    assert device.refresh() == 0
    assert device.trusted()["root"] == 51
    repository.signers["timestamp"] = stolen
    repository.publish("timestamp")
    assert device.refresh() == 1
    assert "below_threshold" in device.said
    assert device.trusted()["timestamp"] == 2
