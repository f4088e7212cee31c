"""The keys of the trust domains, and the ceremony that creates them with the first metadata.

Why: each domain signs alone. Learner and gate must both sign a release, so a stolen learner key
ships nothing; the rollout key signs plans, which choose among genuine releases; snapshot and
timestamp are the publisher's; root and targets sign once and then stay offline.

Invariants: one private key per file, PKCS8 PEM, readable by its owner only; existing keys are never
overwritten. `trust/root.json` is what devices embed. The gate signs no release that it has not
passed, and no document that would give its power to another key.

Knows nothing about the broker.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import (  # type: ignore[attr-defined] # no __all__
    CryptoSigner,
    Signature,
)
from tuf.api.metadata import (  # type: ignore[attr-defined] # tuf has no __all__
    DelegatedRole,
    Delegations,
    Role,
    Root,
    Targets,
)

from cloud_learner.release.collecting import Asks
from cloud_learner.release.metadata import Signs, expiry, opened, releases_in, sealed
from cloud_learner.release.repository import Repository
from edge_runtime.clock import Clock, SystemClock
from edge_runtime.errors import ConfigError, TrustError
from edge_runtime.files import fsync_directory, write_atomic
from edge_runtime.update.trust import PLANS_ROLE, models_role
from edge_runtime.wire.subjects import checked_name

ROOT_KEYS = ("root-1", "root-2", "root-3")
ROOT_THRESHOLD = 2
ONLINE_KEYS = ("learner", "gate", "rollout", "snapshot", "timestamp")
OFFLINE_DAYS = 365


@dataclass(frozen=True)
class Signers:
    """One signer for each trust domain that takes part in publishing."""

    learner: Signs
    gate: Signs | Asks
    rollout: Signs
    snapshot: Signs
    timestamp: Signs

    def of_role(self, role: str) -> list[Signs | Asks]:
        """Who signs the delegated role `role`: plans alone, or the releases of a family."""
        return [self.rollout] if role == PLANS_ROLE else [self.learner, self.gate]


class GateSigner:
    """The gate's signer: looks at what it signs.

    `passed(path, sha256)` says whether the gate's verdict on that package was a pass.
    """

    def __init__(self, signer: Signs, passed: Callable[[str, str], bool]) -> None:
        self._signer = signer
        self._passed = passed

    def sign(self, payload: bytes) -> Signature:
        """Sign a family's releases. Raises: TrustError (not_passed, not_releases)."""
        for path, sha256 in releases_in(payload):
            if not self._passed(path, sha256):
                raise TrustError(
                    "not_passed",
                    f"the gate has not passed {path} ({sha256[:12]}); nothing is signed",
                )
        return self._signer.sign(payload)


def create(home: Path, families: Sequence[str], clock: Clock | None = None) -> None:
    """Create all keys, and the first root and targets metadata for `families`.

    Raises: ConfigError (keys_exist, bad_name).
    """
    names = [checked_name(family, "family") for family in families]
    if (home / "keys").exists() and any((home / "keys").iterdir()):
        raise ConfigError(
            "keys_exist",
            f"{home / 'keys'} already holds keys; they are unchanged",
            "use another home, or move the old keys away",
        )
    signers = {
        name: CryptoSigner.generate_ed25519() for name in (*ROOT_KEYS, "targets", *ONLINE_KEYS)
    }
    for name, signer in signers.items():
        _write_private(home / "keys" / f"{name}.pem", signer.private_bytes)
    now_s = (clock or SystemClock()).now_s()
    root = sealed(_root(signers, now_s), [signers[name] for name in ROOT_KEYS])
    targets = sealed(_targets(signers, names, now_s), [signers["targets"]])
    write_atomic(home / "tuf" / "1.targets.json", targets)
    write_atomic(home / "tuf" / "1.root.json", root)
    write_atomic(home / "trust" / "root.json", root)


def admit(home: Path, family: str, clock: Clock | None = None) -> None:
    """Let learner and gate release `family` in this home; its keys are created if it has none.

    In a home that has keys, its targets metadata delegates one more role; the root of trust that
    devices embed stays as it is. Raises: ConfigError (bad_name, no_key, bad_key, no_trust).
    """
    if not (home / "keys").exists():
        create(home, [family], clock)
        return
    document = opened(Targets, Repository(home / "tuf").targets, None, "targets")
    assert document.delegations is not None
    assert document.delegations.roles is not None
    role = models_role(checked_name(family, "family"))
    if role in document.delegations.roles:
        return  # by a bootstrap that did not come to its end
    document.delegations.roles[role] = _models(family, _online_ids(home))
    document.version += 1
    document.expires = expiry((clock or SystemClock()).now_s(), OFFLINE_DAYS)
    data = sealed(document, [load_signer(home, "targets")])
    write_atomic(home / "tuf" / f"{document.version}.targets.json", data)


def load(home: Path) -> Signers:
    """The signers of all publishing domains, for a process that hosts them all.

    Raises: ConfigError (no_key, bad_key).
    """
    return Signers(**{name: load_signer(home, name) for name in ONLINE_KEYS})


def load_signer(home: Path, name: str) -> CryptoSigner:
    """The signer of one trust domain, such as `gate`. Raises: ConfigError (no_key, bad_key)."""
    path = home / "keys" / f"{name}.pem"
    try:
        return CryptoSigner(load_pem_private_key(path.read_bytes(), None))
    except FileNotFoundError as error:
        raise ConfigError(
            "no_key", f"there is no key {path}", "create the keys of this home first"
        ) from error
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError("bad_key", f"{path} is no usable private key: {error}") from error


def trusted_root(home: Path) -> Root:
    """The root document that devices of this home were given. Raises: ConfigError `no_root`."""
    path = home / "trust" / "root.json"
    try:
        return opened(Root, path.read_bytes(), None, "root")
    except OSError as error:
        raise ConfigError("no_root", f"{path} cannot be read: {error}") from error


def _write_private(path: Path, pem: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(path.parent)


def _root(signers: dict[str, CryptoSigner], now_s: float) -> Root:
    holders = {"root": ROOT_KEYS} | {name: (name,) for name in ("targets", "snapshot", "timestamp")}
    ids = {name: signer.public_key.keyid for name, signer in signers.items()}
    return Root(
        version=1,
        expires=expiry(now_s, OFFLINE_DAYS),
        keys={ids[name]: signers[name].public_key for names in holders.values() for name in names},
        roles={
            role: Role([ids[name] for name in names], ROOT_THRESHOLD if role == "root" else 1)
            for role, names in holders.items()
        },
        consistent_snapshot=True,
    )


def _targets(signers: dict[str, CryptoSigner], families: list[str], now_s: float) -> Targets:
    keys = {name: signers[name].public_key for name in ("learner", "gate", "rollout")}
    both = [keys["learner"].keyid, keys["gate"].keyid]
    roles = {PLANS_ROLE: DelegatedRole(PLANS_ROLE, [keys["rollout"].keyid], 1, True, ["p/*"])}
    for family in families:
        roles[models_role(family)] = _models(family, both)
    delegations = Delegations({key.keyid: key for key in keys.values()}, roles)
    return Targets(version=1, expires=expiry(now_s, OFFLINE_DAYS), delegations=delegations)


def _models(family: str, both: list[str]) -> DelegatedRole:
    """The releases of a family, which learner and gate must both sign."""
    return DelegatedRole(models_role(family), list(both), 2, True, [f"m/{family}/*"])


def _online_ids(home: Path) -> list[str]:
    """The ids of the keys of learner and gate."""
    return [load_signer(home, name).public_key.keyid for name in ("learner", "gate")]
