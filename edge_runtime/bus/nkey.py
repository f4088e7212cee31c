"""A NATS key: its text, its file and its signatures.

Why: a broker knows a connection by a signature over a nonce, so that the secret never travels. The
usual library for it brings a second implementation of Ed25519; `cryptography` is there already.

Invariants: a seed is written once, to a file that only its owner may read, and nothing here ever
prints one or writes over one. Text that is not whole (its checksum is wrong) is refused.

A key is 32 bytes of Ed25519. As text it is base32, without padding, of a prefix that says what it
is, those bytes, and their CRC-16: `U...` for a user's public key, `SU...` for its seed.

Durable state: the seed's file; the commit point is its link to its name.
Knows nothing about connections.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from edge_runtime.errors import ConfigError
from edge_runtime.files import fsync_directory

_USER = 20 << 3
_SEED = 18 << 3
_SEED_OF_USER = bytes([_SEED | _USER >> 5, (_USER & 31) << 3])
_KEY_BYTES = 32


class Key:
    """A user's key; made by `parse` from its seed, or by `create` and `load` with its file."""

    def __init__(self, raw: bytes) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(raw)
        self.public = _text(bytes([_USER]) + self._private.public_key().public_bytes_raw())

    @classmethod
    def parse(cls, seed: str) -> Key:
        """The key of this seed. Raises: ConfigError `bad_key`, which does not show the seed."""
        try:
            return cls(_raw(seed, _SEED_OF_USER))
        except ValueError as error:
            hint = "a seed starts with SU; edge-runtime init makes one"
            raise ConfigError("bad_key", f"not the seed of a user's key: {error}", hint) from None

    def sign(self, data: bytes) -> bytes:
        """The signature over `data`, 64 bytes."""
        return self._private.sign(data)


def create(path: Path) -> Key:
    """Make a new key, its seed in a file of mode 0600 at `path`.

    Raises: ConfigError (key_exists, unwritable_key), with the file unchanged.
    """
    raw = os.urandom(_KEY_BYTES)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_once(path, _text(_SEED_OF_USER + raw) + "\n")
    except OSError as error:
        if isinstance(error, FileExistsError) and path.exists():
            hint = "a key that the broker has admitted is kept; move the file away to make another"
            raise ConfigError("key_exists", f"{path} exists and was not changed", hint) from error
        hint = f"let user {os.getuid()} write there, on a file system that knows hard links"
        raise ConfigError("unwritable_key", f"{path}: {error}", hint) from error
    return Key(raw)


def _write_once(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # unlike a rename, it never replaces
    finally:
        os.unlink(temporary)
    fsync_directory(path.parent)


def public_of(pem: bytes) -> str:
    """The user's public key that an Ed25519 key in PEM, its public half, is.

    Raises: ConfigError `bad_public_key`.
    """
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError("bad_public_key", f"not a public key in PEM: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError("bad_public_key", "not an Ed25519 key")
    return _text(bytes([_USER]) + key.public_bytes_raw())


def seed_of(private: Ed25519PrivateKey) -> str:
    """The seed of the user whose key this is; a secret."""
    return _text(_SEED_OF_USER + private.private_bytes_raw())


def load(path: Path) -> Key:
    """The key whose seed is in the file at `path`.

    Raises: ConfigError (unreadable_key, open_key: others may read it; bad_key).
    """
    try:
        return Key.parse(read_secret(path).strip())
    except ConfigError as error:
        if error.code != "bad_key":
            raise
        raise ConfigError(error.code, f"{path}: {error.message}", error.hint) from None


def read_secret(path: Path) -> str:
    """What is in a file that others must not read.

    Raises: ConfigError (unreadable_key, open_key).
    """
    try:
        with open(path, encoding="ascii") as file:
            if os.fstat(file.fileno()).st_mode & 0o007:
                raise ConfigError("open_key", f"{path} can be read by others", f"chmod 600 {path}")
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        hint = "it is a text file; edge-runtime init makes a device's key"
        raise ConfigError("unreadable_key", f"{path}: {error}", hint) from error


def checked_public(text: str) -> str:
    """`text` if it is a user's public key. Raises: ConfigError `bad_public_key`."""
    try:
        _raw(text, bytes([_USER]))
    except ValueError as error:
        raise ConfigError(
            "bad_public_key",
            f"{text!r} is not the public key of a user: {error}",
            "edge-runtime init prints it; it starts with U and has 56 letters and digits",
        ) from None
    return text


def is_signed(data: bytes, signature: bytes, public: str) -> bool:
    """Whether `signature` over `data` is by the user's key whose public half is `public`."""
    try:
        _public(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


@lru_cache(1 << 14)
def _public(text: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(_raw(text, bytes([_USER])))


def _text(body: bytes) -> str:
    checksum = binascii.crc_hqx(body, 0).to_bytes(2, "little")
    return base64.b32encode(body + checksum).decode().rstrip("=")


def _raw(text: str, prefix: bytes) -> bytes:
    """The key in `text`. Raises: ValueError saying what is wrong."""
    padded = text + "=" * (-len(text) % 8)
    data = base64.b32decode(padded)
    body, checksum = data[:-2], data[-2:]
    if not body.startswith(prefix) or len(body) != len(prefix) + _KEY_BYTES:
        raise ValueError("it is of another kind")
    if _text(body) != text or binascii.crc_hqx(body, 0).to_bytes(2, "little") != checksum:
        raise ValueError("its checksum is wrong")
    return body[len(prefix) :]
