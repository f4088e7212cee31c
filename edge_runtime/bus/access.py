"""With what a connection shows who it is, and how it knows the broker: keys, credentials, TLS.

Why: both sides name the same few files; what is wrong with one of them is said before anything is
dialled, in words that say which file and what to do.

Invariants: the files are read at each dial and signature, so a renewed one is taken at the next. No
secret is kept longer than that, printed, or part of an error. Where TLS is asked for, nothing
is ever said in the clear but that.

Knows nothing about subjects or permissions.
"""

from __future__ import annotations

import base64
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_runtime.bus.nkey import Key, load, read_secret
from edge_runtime.errors import ConfigError
from edge_runtime.wire import subjects

if TYPE_CHECKING:
    from edge_runtime.config import EdgeConfig

_CREDENTIALS = re.compile(
    r"-----BEGIN NATS USER JWT-----\s+(?P<jwt>\S+)\s+-+END NATS USER JWT-+"
    r".*?-----BEGIN USER NKEY SEED-----\s+(?P<seed>\S+)\s",
    re.DOTALL,
)


class Identity(NamedTuple):
    """What a dial needs: a public key or a JWT, how a nonce is signed, and how TLS is spoken."""

    public: str
    jwt: str
    sign: Callable[[str], bytes] | None
    tls: ssl.SSLContext | None


@dataclass(frozen=True, slots=True)
class Access:
    """Files by which to come in: an nkey's seed or a `.creds` file, and TLS.

    `tls_ca` holds the certificates that vouch for the broker (without it, the system's); `tls_cert`
    and `tls_key` are shown to a broker that asks for them. Answers come to subjects below `inbox`.
    """

    key: Path | None = None
    credentials: Path | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    inbox: str = "_INBOX"

    def open(self, url: str) -> Identity:
        """Read the files, for a dial to `url`.

        Raises: ConfigError (unreadable_key, open_key, bad_key, bad_credentials, bad_tls).
        """
        tls = self._tls() if url.startswith("tls://") or self._names_tls() else None
        jwt, key = self._key()
        if key is None:
            return Identity("", "", None, tls)
        return Identity("" if jwt else key.public, jwt, _signer(key), tls)

    def sign(self, data: bytes) -> bytes | None:
        """The signature over `data`; None where no key is named. Raises: ConfigError as `open`."""
        _, key = self._key()
        return None if key is None else key.sign(data)

    def _key(self) -> tuple[str, Key | None]:
        """The JWT, if any, and the key that belongs to it."""
        if self.credentials is not None:
            return _credentials(self.credentials)
        return "", None if self.key is None else load(self.key)

    def _names_tls(self) -> bool:
        return any((self.tls_ca, self.tls_cert, self.tls_key))

    def _tls(self) -> ssl.SSLContext:
        named = ", ".join(str(each) for each in (self.tls_ca, self.tls_cert, self.tls_key) if each)
        if self.tls_key is not None:
            read_secret(self.tls_key)
        try:
            context = ssl.create_default_context(cafile=self.tls_ca)
            if self.tls_cert is not None:
                context.load_cert_chain(self.tls_cert, self.tls_key)
        except (OSError, ValueError) as error:
            hint = "tls_ca, tls_cert and tls_key are PEM files; the last two belong together"
            raise ConfigError("bad_tls", f"{named}: {error}", hint) from error
        return context


def of_device(config: EdgeConfig) -> Access:
    """As a device's configuration says; without a word of it, with the key that init made."""
    broker, key = config.broker, config.broker.key
    if key is None and broker.credentials is None and config.own_key.exists():
        key = config.own_key
    return Access(
        key=key,
        credentials=broker.credentials,
        tls_ca=broker.tls_ca,
        tls_cert=broker.tls_cert,
        tls_key=broker.tls_key,
        inbox=subjects.inbox(config.device),
    )


def _signer(key: Key) -> Callable[[str], bytes]:
    return lambda nonce: base64.b64encode(key.sign(nonce.encode()))


def _credentials(path: Path) -> tuple[str, Key]:
    found = _CREDENTIALS.search(read_secret(path))
    if found is None:
        hint = "it holds a user's JWT and seed, as `nsc generate creds` writes them"
        raise ConfigError("bad_credentials", f"{path} is no credentials file", hint)
    try:
        return found["jwt"], Key.parse(found["seed"])
    except ConfigError as error:
        raise ConfigError(error.code, f"{path}: {error.message}", error.hint) from None
