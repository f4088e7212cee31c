"""Key files: private or refused, encrypted on request, and at a URI as well as on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Signer

from cloud_learner.release import keyfiles
from cloud_learner.release.keyfiles import load, public_pem, read_public, write_new
from edge_runtime.errors import ConfigError, TransportError

PASSPHRASE = "four words nobody takes"


def ask_nobody(name: str) -> str:
    raise AssertionError(name)


def refused(code: str, path: Path, secrets: keyfiles.Secrets = ask_nobody) -> ConfigError:
    with pytest.raises(ConfigError, match=code) as caught:
        load(path, secrets)
    return caught.value


def test_a_key_file_is_the_key_and_its_owners_alone(tmp_path: Path) -> None:
    made = write_new(tmp_path / "keys" / "gate.pem", None)
    assert (tmp_path / "keys" / "gate.pem").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    found = load(tmp_path / "keys" / "gate.pem", ask_nobody)
    assert found.public_key == made.public_key
    made.public_key.verify_signature(found.sign(b"payload"), b"payload")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_a_key_that_others_may_use_is_refused_by_name_with_the_mend(
    tmp_path: Path, mode: int
) -> None:
    path = tmp_path / "gate.pem"
    write_new(path, None)
    path.chmod(mode)
    error = refused("key_mode", path)
    assert f"{path} has mode {mode:04o}" in error.message
    assert error.hint.startswith(f"chmod 600 {path}")
    path.chmod(0o600)
    load(path, ask_nobody)


def test_an_encrypted_key_opens_with_its_passphrase_alone(tmp_path: Path) -> None:
    path = tmp_path / "root-1.pem"
    made = write_new(path, PASSPHRASE)
    assert b"ENCRYPTED PRIVATE KEY" in path.read_bytes()
    asked = []

    def answer(name: str) -> str:
        asked.append(name)
        return PASSPHRASE

    assert load(path, answer).public_key == made.public_key
    assert asked == ["root-1"]
    error = refused("bad_passphrase", path, lambda _name: "another one entirely")
    assert "another one" not in str(error)


def test_a_short_passphrase_makes_no_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weak_passphrase"):
        write_new(tmp_path / "root-1.pem", "short")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def passphrase_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "passphrase"
    path.write_text(f"{PASSPHRASE}\n")
    path.chmod(0o600)
    os.environ[keyfiles.PASSPHRASE_ENV] = str(path)
    yield path
    del os.environ[keyfiles.PASSPHRASE_ENV]


def test_a_process_that_nobody_sits_at_reads_the_passphrase_from_a_private_file(
    tmp_path: Path, passphrase_file: Path
) -> None:
    path = tmp_path / "gate.pem"
    write_new(path, PASSPHRASE)
    load(path, keyfiles.unattended)
    passphrase_file.chmod(0o644)
    assert str(passphrase_file) in refused("key_mode", path, keyfiles.unattended).message


def test_without_that_file_it_says_how_to_name_one(tmp_path: Path) -> None:
    path = tmp_path / "gate.pem"
    write_new(path, PASSPHRASE)
    error = refused("key_encrypted", path, keyfiles.unattended)
    assert keyfiles.PASSPHRASE_ENV in error.hint


@pytest.mark.parametrize("data", [b"", b"garbage", b"-----BEGIN PRIVATE KEY-----\nAAAA\n"])
def test_garbage_is_no_key(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "gate.pem"
    path.write_bytes(data)
    path.chmod(0o600)
    refused("bad_key", path)


@pytest.mark.parametrize("said", [True, False])
def test_a_key_at_a_uri_signs_as_one_in_a_file(tmp_path: Path, *, said: bool) -> None:
    """With `file2:`, the scheme of securesystemslib that needs no hardware."""
    made = write_new(tmp_path / "elsewhere" / "key.pem", None)
    public = public_pem(made.public_key).decode() if said else ""
    path = tmp_path / "learner.uri"
    path.write_text(f"file2:{tmp_path / 'elsewhere' / 'key.pem'}\n{public}")
    found = load(path, ask_nobody)
    assert found.public_key == made.public_key
    made.public_key.verify_signature(found.sign(b"payload"), b"payload")


def test_a_key_at_a_uri_is_private_as_well(tmp_path: Path) -> None:
    write_new(tmp_path / "key.pem", None)
    (tmp_path / "key.pem").chmod(0o644)
    path = tmp_path / "learner.uri"
    path.write_text(f"file2:{tmp_path / 'key.pem'}")
    assert str(tmp_path / "key.pem") in refused("key_mode", path).message


@pytest.mark.parametrize("uri", ["file2:/nowhere/key.pem", "tpm:1", "awskms:alias", ""])
def test_a_uri_that_leads_nowhere_is_named(tmp_path: Path, uri: str) -> None:
    path = tmp_path / "learner.uri"
    public = public_pem(CryptoSigner.generate_ed25519().public_key).decode()
    path.write_text(f"{uri}\n{public}")
    with pytest.raises(ConfigError, match=r"bad_key|no_key"):
        load(path, ask_nobody)


def test_a_uri_of_another_key_than_was_said_is_refused(tmp_path: Path) -> None:
    write_new(tmp_path / "key.pem", None)
    other = public_pem(CryptoSigner.generate_ed25519().public_key).decode()
    path = tmp_path / "learner.uri"
    path.write_text(f"file2:{tmp_path / 'key.pem'}\n{other}")
    refused("bad_key", path)


class Away(CryptoSigner):
    """A keeper that cannot be reached, or answers with a key that is not the one that was said."""

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri, public_key, secrets_handler=None) -> Signer:
        return cls.generate_ed25519()

    def sign(self, payload):
        if payload == b"away":
            raise ConnectionError("no route")
        return super().sign(payload)


@pytest.mark.parametrize("payload", [b"away", b"signed by another key"])
def test_a_keeper_that_fails_is_worth_a_retry(tmp_path: Path, payload: bytes) -> None:
    SIGNER_FOR_URI_SCHEME["away"] = Away
    path = tmp_path / "learner.uri"
    path.write_text("away:1\n" + public_pem(CryptoSigner.generate_ed25519().public_key).decode())
    signer = load(path, ask_nobody)
    del SIGNER_FOR_URI_SCHEME["away"]
    with pytest.raises(TransportError, match="signer_unreachable"):
        signer.sign(payload)


def test_a_public_key_file_is_read_back(tmp_path: Path) -> None:
    key = CryptoSigner.generate_ed25519().public_key
    (tmp_path / "ann.pub").write_bytes(public_pem(key))
    assert read_public(tmp_path / "ann.pub") == key
    for data in (b"", b"-----BEGIN PUBLIC KEY-----"):
        (tmp_path / "ann.pub").write_bytes(data)
        with pytest.raises(ConfigError, match="bad_key"):
            read_public(tmp_path / "ann.pub")
    with pytest.raises(ConfigError, match="no_key"):
        read_public(tmp_path / "bob.pub")
