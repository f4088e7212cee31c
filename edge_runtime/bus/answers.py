"""What a server says, in our words: answers, refusals, and why a dial failed.

Why: the client library hands on texts and numbers; rooms act on the family of an error, people on
its hint, so the translation stands in one place.

Invariants: every answer becomes a value or one of our errors; a text that is not known becomes
`refused` or `unreachable` and keeps its words.

Knows nothing about connections.
"""

from __future__ import annotations

import re
import ssl
from typing import Any

import msgspec

from edge_runtime.bus.access import Identity
from edge_runtime.errors import CapacityError, TransportError

_FULL_CODES = {10023, 10047, 10077}  # insufficient resources, storage limit, stream limit
_FULL_WORDS = ("maximum", "insufficient", "exceeded")
_NOT_ADMITTED = ("authorization violation", "authentication", "account")
# Under TLS 1.3 a client learns only after its handshake that its certificate is not taken; by then
# its first bytes may meet a closed socket, before it could read the alert that says so.
_HUNG_UP = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)
_HUNG_UP_WORDS = ("unexpected eof", "connection closed")
_REFUSED = re.compile(r'permissions violation for (?P<what>publish|subscription) to "(?P<on>[^"]*)')
_NO_KEY = "edge-runtime init makes a key; cloud-learner admit DEVICE KEY lets it in"


class ApiError(msgspec.Struct):
    """What JetStream says when it refuses."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class Place(msgspec.Struct):
    """How far a consumer is: all up to `stream_seq` is acknowledged."""

    stream_seq: int = 0


class ConsumerInfo(msgspec.Struct):
    """What JetStream says of a consumer."""

    ack_floor: Place


class ApiReply(msgspec.Struct):
    """The part of any JetStream answer that is read here; the rest is ignored.

    `total` counts what a list has in all, which may be more than one answer holds.
    """

    seq: int = 0
    duplicate: bool = False
    consumers: list[ConsumerInfo] | None = None
    total: int = 0
    purged: int = 0
    error: ApiError | None = None


_reply_decoder = msgspec.json.Decoder(ApiReply)


def read_reply(message: Any, what: str) -> ApiReply:
    """The JetStream answer in `message`. Raises: TransportError, CapacityError."""
    if status_of(message) == "503":
        raise TransportError("no_stream", f"nothing at the broker answers on {what}")
    try:
        reply = _reply_decoder.decode(message.data)
    except msgspec.DecodeError as error:
        raise TransportError("refused", f"the answer on {what} is not JetStream's") from error
    if reply.error is None:
        return reply
    text = f"{what}: {reply.error.description} ({reply.error.err_code})"
    if reply.error.err_code in _FULL_CODES and _says_full(reply.error.description):
        raise CapacityError("stream_full", text, "the learner frees room when it catches up")
    raise TransportError("refused", text)


def status_of(message: Any) -> str:
    """The status code of a control message, such as `503`; empty for any other."""
    return (message.headers or {}).get("Status", "") if not message.reply else ""


def own_headers(message: Any) -> dict[str, str]:
    """The headers that the publisher set, without those of the broker."""
    headers = message.headers or {}
    return {key: value for key, value in headers.items() if not key.startswith("Nats-")}


def refusal_of(error: Exception | None) -> tuple[str, str] | None:
    """(`publish` or `subscription`, the subject in small letters) if a permission was refused."""
    found = _REFUSED.search(str(error).lower())
    return (found["what"], found["on"]) if found else None


def not_allowed(what: str, subject: str) -> TransportError:
    """The error of who may not do `what` on `subject`."""
    hint = "is the device named as it was admitted? cloud-learner devices lists them"
    return TransportError("not_allowed", f"the broker refuses a {what} to {subject}", hint)


def dial_error(error: Exception, url: str, identity: Identity) -> TransportError:
    """Why no connection to `url` came about, and what to do."""
    text = str(error).lower()
    if isinstance(error, ssl.SSLCertVerificationError):
        return TransportError(
            "untrusted_broker",
            f"the certificate of {url} is not trusted: {error.verify_message}",
            "name the authority that signed it as tls_ca, and the host as the certificate does",
        )
    hung_up = isinstance(error, _HUNG_UP) or any(word in text for word in _HUNG_UP_WORDS)
    if isinstance(error, ssl.SSLError) or (identity.tls and hung_up):
        hint = "if it asks for a certificate, name it with tls_cert and tls_key"
        return TransportError("tls_failed", f"no TLS with {url}: {error}", hint)
    if any(word in text for word in _NOT_ADMITTED):
        who = f"the key {identity.public}" if identity.public else "the credentials"
        known = identity.sign is not None
        return TransportError(
            "not_admitted",
            f"the broker at {url} does not admit {who if known else 'a connection without a key'}",
            f"cloud-learner admit DEVICE {identity.public or 'KEY'}" if known else _NO_KEY,
        )
    return TransportError("unreachable", f"no broker answers at {url}: {text}")


def _says_full(description: str) -> bool:
    return any(word in description for word in _FULL_WORDS)
