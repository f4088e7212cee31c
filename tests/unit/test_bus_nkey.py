"""NATS keys: text, file and signature, held against the library of NATS where it is installed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from edge_runtime.bus import nkey
from edge_runtime.bus.access import Access
from edge_runtime.errors import ConfigError

# Of the NATS documentation; secret to nobody.
SEED = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"
PUBLIC = "UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4"


def test_a_seed_gives_its_public_key():
    assert nkey.Key.parse(SEED).public == PUBLIC
    assert nkey.checked_public(PUBLIC) == PUBLIC


def test_keys_are_those_of_the_library(tmp_path):
    nkeys = pytest.importorskip("nkeys", reason="an independent implementation of NATS keys")
    for number in range(20):
        path = tmp_path / f"{number}.nk"
        ours = nkey.create(path)
        theirs = nkeys.from_seed(bytearray(path.read_bytes().strip()))
        assert theirs.public_key.decode() == ours.public
        assert theirs.sign(b"nonce") == ours.sign(b"nonce")


def test_a_seed_is_for_its_owner_only_and_is_never_written_over(tmp_path):
    path = tmp_path / "state" / "device.nk"
    old = os.umask(0)
    try:
        key = nkey.create(path)
    finally:
        os.umask(old)
    before = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ConfigError) as caught:
        nkey.create(path)
    assert caught.value.code == "key_exists"
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["device.nk"]
    assert nkey.load(path).public == key.public


def test_a_key_that_cannot_be_written_is_an_operators_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        nkey.create(tmp_path / "file" / "device.nk")
    assert caught.value.code == "unwritable_key"
    assert str(tmp_path / "file") in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        *("", "SU", PUBLIC, SEED[:-1], SEED + "A", SEED.lower(), SEED[:10] + "A" + SEED[11:]),
        *("SAAM" + SEED[4:], "0" * 58, "ä" * 58, SEED + "\nmore"),
    ],
)
def test_what_is_no_seed_is_refused_and_not_shown(text, tmp_path):
    path = tmp_path / "bad.nk"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        nkey.load(path)
    assert caught.value.code in {"bad_key", "unreadable_key"}
    assert str(path) in caught.value.message
    assert SEED[:12] not in str(caught.value)
    assert caught.value.__context__ is None or SEED[:12] not in repr(caught.value.__context__)


@pytest.mark.parametrize(
    "text", ["", "U", SEED, PUBLIC[:-1], PUBLIC + "A", "A" + PUBLIC[1:], PUBLIC[:9] + PUBLIC[10:]]
)
def test_what_is_no_public_key_is_refused(text):
    with pytest.raises(ConfigError) as caught:
        nkey.checked_public(text)
    assert caught.value.code == "bad_public_key"


def test_a_seed_that_others_may_read_is_refused(tmp_path):
    path = tmp_path / "device.nk"
    nkey.create(path)
    path.chmod(0o604)
    with pytest.raises(ConfigError) as caught:
        nkey.load(path)
    assert (caught.value.code, caught.value.hint) == ("open_key", f"chmod 600 {path}")
    path.chmod(0o640)
    assert nkey.load(path).public.startswith("U")


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"key": "none.nk"}, "unreadable_key"),
        ({"credentials": "none.creds"}, "unreadable_key"),
        ({"credentials": "junk"}, "bad_credentials"),
        ({"tls_ca": "none.pem"}, "bad_tls"),
        ({"tls_ca": "junk"}, "bad_tls"),
        ({"tls_cert": "junk", "tls_key": "junk"}, "bad_tls"),
        ({"tls_cert": "junk", "tls_key": "open"}, "open_key"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, files, code):
    (tmp_path / "junk").write_text("junk")
    (tmp_path / "junk").chmod(0o600)
    (tmp_path / "open").write_text("junk")
    (tmp_path / "open").chmod(0o644)
    with pytest.raises(ConfigError) as caught:
        Access(**{name: tmp_path / file for name, file in files.items()}).open("nats://host")
    assert caught.value.code == code
    assert str(tmp_path / list(files.values())[-1]) in caught.value.message
