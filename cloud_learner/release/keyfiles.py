"""Key files: what a private key looks like at rest, and how it becomes a signer.

Why: a key is a PKCS8 PEM file today and a key of a KMS or an HSM tomorrow. The one is `NAME.pem`;
the other `NAME.uri`: a line that securesystemslib understands (`awskms:...`, `hsm:...`,
`file2:...`), and below it the public key as PEM. Whoever signs cannot tell which it was. Where only
`NAME.pub` lies, the private half is another's, who never shows it.

Invariants: a private key is written whole or not at all, with mode 0600; one that others may read
is refused, not used. What a key at a URI signs is checked by the public key that was said. No error
holds a passphrase or a key.

Knows nothing about which key may sign what.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import (  # type: ignore[attr-defined] # no __all__
    CryptoSigner,
    Key,
    Signature,
    Signer,
    SSlibKey,
)

from edge_runtime.errors import ConfigError, HeadwaterError, TransportError
from edge_runtime.files import Files, OsFiles, write_atomic

MODE = 0o600
PASSPHRASE_MIN = 12
PASSPHRASE_ENV = "HEADWATER_PASSPHRASE_FILE"  # noqa: S105 - its name, not itself

Secrets = Callable[[str], str]
"""The passphrase of the key of that name, as securesystemslib asks for secrets."""


class KeySigner(Protocol):
    """What signs with one key, wherever that lies."""

    @property
    def public_key(self) -> Key: ...

    def sign(self, payload: bytes) -> Signature: ...


def unattended(name: str) -> str:
    """The passphrase for a process that nobody sits at: of the file that the environment names.

    Raises: ConfigError (key_encrypted, key_mode).
    """
    path = os.environ.get(PASSPHRASE_ENV)
    if path is None:
        raise ConfigError(
            "key_encrypted",
            f"the key {name} is encrypted, and nobody is there to ask for its passphrase",
            f"{PASSPHRASE_ENV}=FILE names a file of mode 0600 that holds it",
        )
    return passphrase_in(Path(path))


def passphrase_in(path: Path) -> str:
    """The first line of a file that only its owner reads.

    Raises: ConfigError (key_mode, no_key).
    """
    check_mode(path)
    return (path.read_text(encoding="utf-8").splitlines() or [""])[0]


def write_new(path: Path, passphrase: str | None, files: Files | None = None) -> KeySigner:
    """Make an Ed25519 key, encrypted if there is a passphrase; it lies at `path` when this returns.

    Raises: ConfigError (weak_passphrase), OSError.
    """
    if passphrase is not None and len(passphrase) < PASSPHRASE_MIN:
        raise ConfigError(
            "weak_passphrase",
            f"the passphrase for {path} has fewer than {PASSPHRASE_MIN} characters; no key is made",
            "take several words that nobody else would take",
        )
    key = Ed25519PrivateKey.generate()
    at_rest = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, at_rest)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(path, pem, MODE, files or OsFiles())
    return CryptoSigner(key)


def public_pem(key: Key) -> bytes:
    """The file `NAME.pub` of an Ed25519 public key."""
    raw = cast(SSlibKey, key)._crypto_key()  # noqa: SLF001 - its one way to a key object
    return raw.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def read_public(path: Path) -> Key:
    """The public key in a PEM file. Raises: ConfigError (no_key, bad_key)."""
    try:
        return SSlibKey.from_crypto(load_pem_public_key(path.read_bytes()))
    except FileNotFoundError as error:
        raise ConfigError("no_key", f"there is no public key {path}") from error
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError("bad_key", f"{path} is no usable public key: {error}") from error


def load(path: Path, secrets: Secrets) -> KeySigner:
    """The signer of a `.pem` or a `.uri` file; of a `.pub` file, one that has nothing to sign with.

    Raises: ConfigError (no_key, key_mode, key_encrypted, bad_passphrase, bad_key).
    """
    if path.suffix == ".pub":
        return _Another(path)
    return _at_uri(path, secrets) if path.suffix == ".uri" else _from_pem(path, secrets)


def is_encrypted(path: Path) -> bool:
    """Whether a private key needs a passphrase; one at a URI is its keeper's affair."""
    return path.suffix == ".pem" and b"ENCRYPTED" in path.read_bytes()


def check_mode(path: Path) -> None:
    """Refuse a secret file that anybody but its owner may read or write.

    Raises: ConfigError (key_mode, no_key).
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError("no_key", f"{path} cannot be read: {error}") from error
    if mode & 0o077:
        raise ConfigError(
            "key_mode",
            f"{path} has mode {mode:04o}, so others than its owner may use it; it is not used",
            f"chmod 600 {path}    # and revoke the key if somebody else was on this machine",
        )


def _from_pem(path: Path, secrets: Secrets) -> KeySigner:
    check_mode(path)
    name = path.name.removesuffix(".pem").removesuffix(".next")
    passphrase = secrets(name).encode() if is_encrypted(path) else None
    try:
        return CryptoSigner(load_pem_private_key(path.read_bytes(), passphrase))
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        if passphrase is not None:
            raise ConfigError(
                "bad_passphrase", f"{path} does not open with that passphrase; nothing was changed"
            ) from error
        raise ConfigError("bad_key", f"{path} is no usable private key: {error}") from error


def _at_uri(path: Path, secrets: Secrets) -> KeySigner:
    uri, _, public = path.read_text(encoding="utf-8").strip().partition("\n")
    try:
        if uri.startswith("file2:") and not public:
            return _from_pem(Path(uri.removeprefix("file2:")), secrets)
        key = SSlibKey.from_crypto(load_pem_public_key(public.encode()))
        return _Elsewhere(Signer.from_priv_key_uri(uri, key, secrets), key, path)
    except HeadwaterError:
        raise
    except Exception as error:  # each scheme has errors of its own
        raise ConfigError(
            "bad_key",
            f"{path} leads to no usable key: {error}",
            "its first line is a URI that securesystemslib knows, with what that scheme needs "
            "installed; below it stands the public key as PEM",
        ) from error


class _Elsewhere:
    """A key that lies with a keeper of its own, which may be away or sign with another."""

    def __init__(self, signer: Signer, key: Key, path: Path) -> None:
        self._signer, self.public_key, self._path = signer, key, path

    def sign(self, payload: bytes) -> Signature:
        try:
            signature = self._signer.sign(payload)
            self.public_key.verify_signature(signature, payload)
        except Exception as error:  # each scheme has errors of its own
            raise TransportError(
                "signer_unreachable", f"the key at {self._path} signs nothing now: {error}"
            ) from error
        return signature


class _Another:
    """A key whose private half somebody else holds."""

    def __init__(self, path: Path) -> None:
        self.public_key, self._path = read_public(path), path

    def sign(self, _payload: bytes) -> Signature:
        raise ConfigError(
            "no_key", f"{self._path} is a public key; who holds the private one signs elsewhere"
        )
