"""Who signs: the trust domains, the first trust of a home, and what the gate looks at.

Why: each domain signs alone. Learner and gate must both sign a release, so a stolen learner key
ships nothing; the rollout key signs plans, which choose among genuine releases, and the gate's
approves those that take too large a step; snapshot and
timestamp are the publisher's; the time key answers what time it is; root and targets sign once and
then stay offline.

Invariants: existing keys are never overwritten. The rename of `tuf/1.root.json` makes a home's
trust; cut off before it, `create` goes on with the keys that it made. `trust/root.json` is what
devices embed. The gate signs no release that it has not passed, and no document that would give its
power to another key.

Knows nothing about the broker, and nothing about how keys are replaced: that is `ceremony`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from securesystemslib.signer import Key, Signature  # type: ignore[attr-defined] # no __all__
from tuf.api.metadata import (  # type: ignore[attr-defined] # tuf has no __all__
    DelegatedRole,
    Delegations,
    Role,
    Root,
    Targets,
)

from cloud_learner.release.collecting import Asks
from cloud_learner.release.custody import (
    ALL_KEYS,
    ROOT_KEYS,
    ROOT_THRESHOLD,
    Custody,
)
from cloud_learner.release.keyfiles import KeySigner
from cloud_learner.release.metadata import Signs, expiry, opened, releases_in, sealed
from edge_runtime.clock import Clock, SystemClock
from edge_runtime.errors import ConfigError, TrustError
from edge_runtime.files import write_atomic
from edge_runtime.update.approval import APPROVALS_ROLE
from edge_runtime.update.trust import ISSUED_FIELD, PLANS_ROLE, TIME_ROLE, models_role
from edge_runtime.wire.subjects import checked_name

ONLINE_KEYS = ("learner", "gate", "rollout", "snapshot", "timestamp")
OFFLINE_DAYS = 365

Tell = Callable[[str], None]


def _quiet(_step: str) -> None:
    """Nobody listens."""


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


def create(
    home: Path,
    families: Sequence[str],
    clock: Clock | None = None,
    custody: Custody | None = None,
    tell: Tell = _quiet,
) -> None:
    """Create all keys, and the first root and targets metadata for `families`.

    A key that lies in its place already is taken. Raises: ConfigError (keys_exist, bad_name, and
    what Custody.make raises), OSError.
    """
    custody = custody or Custody(home)
    names = [checked_name(family, "family") for family in families]
    _refuse_another(home)
    signers = {name: custody.make(name, "") for name in ALL_KEYS}
    for name, signer in signers.items():
        tell(f"key {name} {signer.public_key.keyid[:12]}: {custody.at_home(name)}")
    public = {name: signer.public_key for name, signer in signers.items()}
    now_s = (clock or SystemClock()).now_s()
    root = sealed(_root(public, now_s), [signers[name] for name in ROOT_KEYS])
    targets = sealed(_targets(public, names, now_s), [signers["targets"]])
    write(custody, home / "tuf" / "1.targets.json", targets)
    write(custody, home / "trust" / "root.json", root)
    write(custody, home / "tuf" / "1.root.json", root)
    tell(f"root 1 and targets 1: {home / 'tuf'}; devices embed {home / 'trust' / 'root.json'}")


def admit(
    home: Path,
    family: str,
    clock: Clock | None = None,
    custody: Custody | None = None,
    tell: Tell = _quiet,
) -> None:
    """Let learner and gate release `family` in this home; its keys are created if it has none.

    In a home that has keys, its targets metadata delegates one more role; the root of trust that
    devices embed stays as it is. Raises: ConfigError (bad_name, no_key, bad_key, no_trust).
    """
    custody = custody or Custody(home)
    if not any((home / "tuf").glob("*.root.json")):
        create(home, [family], clock, custody)
        tell(f"all keys, root's included, lie in {home / 'keys'}; before devices are enrolled,")
        tell(f"move {', '.join(ROOT_KEYS)} and targets to a place that is offline")
        return
    trust = custody.trust()
    document, role = trust.targets, models_role(checked_name(family, "family"))
    assert document.delegations is not None
    assert document.delegations.roles is not None
    if role in document.delegations.roles:
        return  # by a bootstrap that did not come to its end
    ids = trust.ids()
    both = [custody.signer(name, ids.get(name)).public_key for name in ("learner", "gate")]
    document.delegations.keys |= {key.keyid: key for key in both}
    document.delegations.roles[role] = _models(family, [key.keyid for key in both])
    delegate_approvals(document.delegations, both[1])
    document.version += 1
    document.expires = expiry((clock or SystemClock()).now_s(), OFFLINE_DAYS)
    data = sealed(document, [_targets_signer(custody, family, ids["targets"])])
    write(custody, home / "tuf" / f"{document.version}.targets.json", data)
    tell(f"targets {document.version}: learner and gate may release {family}")


def load(home: Path) -> Signers:
    """The signers of all publishing domains, for a process that hosts them all.

    Raises: ConfigError, as `load_signer`.
    """
    return Signers(**{name: load_signer(home, name) for name in ONLINE_KEYS})


def load_signer(home: Path, name: str) -> KeySigner:
    """The signer of one trust domain, such as `gate`: of the key that the home's trust names.

    In a folder without a trust, of the key that lies there. Raises: ConfigError (no_key,
    key_not_trusted, key_mode, key_encrypted, bad_passphrase, bad_key).
    """
    custody = Custody(home)
    known = any((home / "tuf").glob("*.root.json"))
    return custody.signer(name, custody.trust().ids().get(name) if known else None)


def trusted_root(home: Path) -> Root:
    """The root document that devices of this home were given. Raises: ConfigError `no_root`."""
    path = home / "trust" / "root.json"
    try:
        return opened(Root, path.read_bytes(), None, "root")
    except OSError as error:
        raise ConfigError("no_root", f"{path} cannot be read: {error}") from error


def write(custody: Custody, path: Path, data: bytes) -> None:
    """Replace a file of the trust in one commit point."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data, files=custody.files)


def delegate_time(delegations: Delegations, key: Key) -> None:
    """The role whose key answers what time it is. It publishes nothing."""
    assert delegations.roles is not None
    delegations.keys[key.keyid] = key
    delegations.roles[TIME_ROLE] = DelegatedRole(
        TIME_ROLE, [key.keyid], 1, terminating=True, paths=["t/*"]
    )


def delegate_approvals(delegations: Delegations, gate: Key) -> None:
    """The role in which the gate's key approves plans, unless it is there. It publishes nothing."""
    assert delegations.roles is not None
    delegations.keys[gate.keyid] = gate
    delegations.roles.setdefault(
        APPROVALS_ROLE, DelegatedRole(APPROVALS_ROLE, [gate.keyid], 1, True, ["a/*"])
    )


def _refuse_another(home: Path) -> None:
    tuf, embedded = home / "tuf", home / "trust" / "root.json"
    if any(tuf.glob("*.root.json")):
        raise ConfigError(
            "keys_exist",
            f"{home} already has keys and a trust; they are unchanged",
            f"tools/key-ceremony show --home {home}; `rotate` replaces keys",
        )
    if embedded.exists() and not any(tuf.glob("*.targets.json")):
        raise ConfigError(
            "keys_exist",
            f"devices embed {embedded}, but the trust in {tuf} is gone; nothing was changed",
            f"put {tuf} back from a copy; a new trust needs another home, and devices enrol anew",
        )


def _targets_signer(custody: Custody, family: str, wanted: str) -> KeySigner:
    try:
        return custody.signer("targets", wanted)
    except ConfigError as error:
        if error.code != "no_key":
            raise
        raise ConfigError(
            "no_key",
            f"to let learner and gate release {family!r} the targets key is needed, and it is not"
            f" in {', '.join(str(folder) for folder in custody.folders)}; nothing was changed",
            f"tools/key-ceremony admit {family} --home {custody.home} --offline FOLDER, "
            "then the same again",
        ) from error


def _root(public: Mapping[str, Key], now_s: float) -> Root:
    holders = {"root": ROOT_KEYS} | {name: (name,) for name in ("targets", "snapshot", "timestamp")}
    return Root(
        version=1,
        expires=expiry(now_s, OFFLINE_DAYS),
        keys={public[name].keyid: public[name] for names in holders.values() for name in names},
        roles={
            role: Role(
                [public[name].keyid for name in names], ROOT_THRESHOLD if role == "root" else 1
            )
            for role, names in holders.items()
        },
        consistent_snapshot=True,
        unrecognized_fields={ISSUED_FIELD: int(now_s)},
    )


def _targets(public: Mapping[str, Key], families: list[str], now_s: float) -> Targets:
    keys = {name: public[name] for name in ("learner", "gate", "rollout")}
    both = [keys["learner"].keyid, keys["gate"].keyid]
    roles = {PLANS_ROLE: DelegatedRole(PLANS_ROLE, [keys["rollout"].keyid], 1, True, ["p/*"])}
    for family in families:
        roles[models_role(family)] = _models(family, both)
    delegations = Delegations({key.keyid: key for key in keys.values()}, roles)
    delegate_time(delegations, public["time"])
    delegate_approvals(delegations, public["gate"])
    return Targets(version=1, expires=expiry(now_s, OFFLINE_DAYS), delegations=delegations)


def _models(family: str, both: list[str]) -> DelegatedRole:
    """The releases of a family, which learner and gate must both sign."""
    return DelegatedRole(models_role(family), list(both), 2, True, [f"m/{family}/*"])
