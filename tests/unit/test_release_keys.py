"""The gate's signer: it signs lists of releases that it passed, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Snapshot, Targets

from cloud_learner.release.keys import GateSigner
from cloud_learner.release.metadata import ReleaseFile, expiry
from edge_runtime.errors import TrustError

GOOD = ReleaseFile("f", "good", 1, b"good")
BAD = ReleaseFile("f", "bad", 2, b"bad")


def payload(*releases: ReleaseFile, delegations: Delegations | None = None) -> bytes:
    targets = {path: each for release in releases for path, each in release.targets().items()}
    document = Targets(version=1, expires=expiry(0.0, 7), targets=targets, delegations=delegations)
    return Metadata(document).signed_bytes


def gate() -> tuple[GateSigner, CryptoSigner]:
    signer = CryptoSigner.generate_ed25519()
    passed = (GOOD.path, GOOD.sha256)
    return GateSigner(signer, lambda path, sha256: (path, sha256) == passed), signer


def test_the_gate_signs_what_it_passed_and_an_empty_list() -> None:
    signer, key = gate()
    for document in (payload(GOOD), payload()):
        key.public_key.verify_signature(signer.sign(document), document)


def test_the_gate_refuses_what_it_did_not_pass() -> None:
    signer, _ = gate()
    with pytest.raises(TrustError, match="not_passed"):
        signer.sign(payload(GOOD, BAD))


def test_the_gate_refuses_passed_content_under_another_name() -> None:
    signer, _ = gate()
    renamed = ReleaseFile("f", "renamed", 1, GOOD.data)
    with pytest.raises(TrustError, match="not_passed"):
        signer.sign(payload(renamed))


def test_the_gate_refuses_to_delegate_its_power() -> None:
    signer, _ = gate()
    thief = CryptoSigner.generate_ed25519().public_key
    role = DelegatedRole("x", [thief.keyid], 1, terminating=True, paths=["m/f/*"])
    with pytest.raises(TrustError, match="not_releases"):
        signer.sign(payload(GOOD, delegations=Delegations({thief.keyid: thief}, {"x": role})))


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.update(_type="root"),
        lambda document: document.pop("targets"),
        lambda document: document.update(targets=[1]),
        lambda document: document["targets"].update({"p/f.json": {"hashes": {"sha256": "00"}}}),
        lambda document: document["targets"].update({"m/g/x": {"hashes": {"sha256": "00"}}}),
        lambda document: document["targets"].update({"m/f/x": {}}),
    ],
)
def test_the_gate_refuses_other_documents(change: Callable[[dict[str, Any]], Any]) -> None:
    signer, _ = gate()
    document = json.loads(payload(GOOD))
    change(document)
    with pytest.raises(TrustError, match="not_releases"):
        signer.sign(json.dumps(document).encode())


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"null"])
def test_the_gate_refuses_garbage(data: bytes) -> None:
    signer, _ = gate()
    with pytest.raises(TrustError, match="not_releases"):
        signer.sign(data)


def test_the_gate_refuses_a_snapshot() -> None:
    signer, _ = gate()
    with pytest.raises(TrustError, match="not_releases"):
        signer.sign(Metadata(Snapshot(expires=expiry(0.0, 7))).signed_bytes)
