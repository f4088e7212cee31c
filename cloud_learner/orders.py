"""Orders of operators: a package that a person hands in, signed, with what shall become of it; or
the consent to a step of a rollout that is too large for some devices.

Why: whoever may hand in a model must be somebody; the gate knows operators by their public keys and
judges what they bring as it judges the learner's. An order holds no power to release.

Invariants: the signature covers the hashes of the packages, the whole request and its kind. Private
keys stay with their operators; a home holds `keys/operators/<name>.pub` (PEM, Ed25519) alone.

Knows nothing about gates and campaigns.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_runtime.bus import nkey
from edge_runtime.errors import ConfigError, RequestError
from edge_runtime.wire.subjects import checked_name


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for: `packages` are the hashes of the int8 (or only) and the float form.

    `stages` are shares of the devices in percent, `to` the attributes (`name=value,...`) of those
    that try it first; empty, they are what the family declares. `then` says what the learner's
    candidates do once it is decided: `follow` it, or `hold` until another is handed in.
    """

    family: str
    packages: list[str]
    stages: tuple[float, ...] = ()
    to: str = ""
    dry_run: bool = False
    then: Literal["follow", "hold"] = "follow"
    version: int = 1


class Consent(msgspec.Struct, frozen=True, kw_only=True):
    """That up to `percent` of the devices may run these releases of a family at once.

    `packages` are the hashes of their default packages, `reason` is for those who ask later.
    """

    family: str
    packages: list[str]
    percent: float
    reason: str = ""
    version: int = 1


class Order(msgspec.Struct, array_like=True, frozen=True):
    """A wish, or a consent, as JSON, and who signed it."""

    operator: str
    text: bytes
    signature: bytes


W = TypeVar("W", Wish, Consent)

_CONTEXTS = {Wish: b"headwater-order-1|", Consent: b"headwater-consent-1|"}


def signed(wish: Wish | Consent, operator: str, key: Path) -> Order:
    """The order for a wish. Raises: ConfigError (no_key, open_key, bad_key)."""
    text = msgspec.json.encode(wish, order="sorted")
    return Order(operator, text, _private(key).sign(_CONTEXTS[type(wish)] + text))


def checked(order: Order, operators: Path, kind: type[W]) -> W:
    """The wish of an order whose operator has a public key in the folder `operators`.

    Raises: RequestError (unknown_operator, bad_order_signature, bad_order).
    """
    try:
        name = checked_name(order.operator, "operator")
        data = (operators / f"{name}.pub").read_bytes()
        key = serialization.load_pem_public_key(data)
    except (OSError, ValueError, UnsupportedAlgorithm, ConfigError) as error:
        raise RequestError(
            "unknown_operator",
            f"the gate knows no operator {order.operator!r:.70}; nothing was judged",
            "put the operator's public key there: keys/operators/<name>.pub",
        ) from error
    try:
        if not isinstance(key, Ed25519PublicKey):
            raise RequestError("unknown_operator", f"the key of {name} is not Ed25519")
        key.verify(order.signature, _CONTEXTS[kind] + order.text)
        return msgspec.json.decode(order.text, type=kind)
    except InvalidSignature as error:
        raise RequestError(
            "bad_order_signature",
            f"the order is not signed by the key that the gate has of {name}; nothing was judged",
            "sign with that operator's key, or give the gate the new public one",
        ) from error
    except msgspec.DecodeError as error:
        raise RequestError("bad_order", f"the order of {name} cannot be read: {error}") from error


def seed(key: Path) -> str:
    """The seed by which the operator with this private key comes in to the broker; a secret.

    Raises: as `signed`.
    """
    return nkey.seed_of(_private(key))


def selector_of(wish: Wish) -> dict[str, str] | None:
    """The attributes that a wish asks for; None where it leaves them to the family.

    Raises: RequestError (bad_stages, bad_target) where it asks for what nobody can do.
    """
    stages = wish.stages
    if not all(0 < each <= 100 for each in stages) or any(a >= b for a, b in pairwise(stages)):
        raise RequestError(
            "bad_stages",
            f"stages {', '.join(f'{each:g}' for each in stages)} do not rise from above 0 to 100 "
            "at most; nothing was judged",
            "--stages 1,10,50,100",
        )
    if not wish.to:
        return None
    pairs = [each.partition("=") for each in wish.to.split(",")]
    if not all(name and value for name, _, value in pairs):
        raise RequestError(
            "bad_target",
            f"{wish.to!r:.70} names no attribute and its value; nothing was judged",
            "--to site=berlin",
        )
    return {name: value for name, _, value in pairs}


def create(private: Path, public: Path) -> None:
    """Make an operator's key. Raises: ConfigError `keys_exist`."""
    key = Ed25519PrivateKey.generate()
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    try:
        for path in (private, public):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError("keys_exist", f"{private} exists; it is unchanged") from error
    with os.fdopen(fd, "wb") as file:
        file.write(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, form))


def _private(path: Path) -> Ed25519PrivateKey:
    try:
        if path.stat().st_mode & 0o007:
            raise ConfigError("open_key", f"{path} can be read by others", f"chmod 600 {path}")
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except FileNotFoundError as error:
        hint = "an operator makes one; the gate's home gets its public half"
        raise ConfigError("no_key", f"there is no operator's key {path}", hint) from error
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError("bad_key", f"{path} is no usable private key: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError("bad_key", f"{path} is not an Ed25519 key")
    return key
