"""The ceremonies that replace keys: while they last a home has the old trust, and then the new.

Why: a key that is old, lost or stolen is replaced without a visit to any device. Root N+1, signed
by thresholds of N and of N+1, leads every device from the root that it was given to the newest.

Invariants: nothing is written before all signatures that are needed can be given. Then new private
keys are on disk before anything names them; the targets document comes before the root that trusts
it; one rename is the commit point; old keys go last. What a ceremony that was cut off left is
finished, or used, by the next one. Snapshot and timestamp keys are replaced together, also with a
stolen key that numbers plans or releases: so whoever ran a number out of reach is undone (TUF
5.3.11, `binding` of edge_runtime/update/trust.py). What the replaced keys had signed online,
the publisher has signed anew at its next start.

Knows nothing about the broker and about people: who prints its steps decides how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from securesystemslib.signer import Key  # type: ignore[attr-defined] # no __all__
from tuf.api.metadata import Root  # type: ignore[attr-defined] # tuf has no __all__

from cloud_learner.config import Home
from cloud_learner.release import keyfiles, keys
from cloud_learner.release.custody import (
    ALL_KEYS,
    IN_ROOT,
    IN_TARGETS,
    OFFLINE,
    ROOT_KEYS,
    ROOT_THRESHOLD,
    Custody,
    Trust,
    signers_of,
)
from cloud_learner.release.keyfiles import KeySigner
from cloud_learner.release.metadata import expiry, opened, sealed
from edge_runtime.clock import Clock, SystemClock
from edge_runtime.errors import ConfigError
from edge_runtime.update.trust import ISSUED_FIELD
from edge_runtime.wire.subjects import checked_name

ONLINE_PAIR = ("snapshot", "timestamp")
NUMBERING = ({"rollout"}, {"learner", "gate"})
"""Who may run a number out of reach that devices hold on to: of plans, and of releases."""
OPERATORS = "operators"

Tell = Callable[[str], None]
Signers = Mapping[str, KeySigner]


def create(custody: Custody, families: Sequence[str], operators: Sequence[str], tell: Tell) -> None:
    """A home's trust, unless only operators are named and it has one; and a key for each of them.

    Raises: ConfigError (keys_exist, bad_name, already_owned, weak_passphrase), OSError.
    """
    with Home(custody.home).owned():
        if families or not operators:
            tell("make the keys, each once, and the trust that names them")
            keys.create(custody.home, families, custody=custody, tell=lambda did: tell(f"  {did}"))
        for name in operators:
            tell(f"make a key for the operator {name}: {_operator(custody, name)}")
        _say_where(custody, tell)


def admit(custody: Custody, family: str, tell: Tell, clock: Clock | None = None) -> None:
    """Let learner and gate release one more family. Raises: as keys.admit, and already_owned."""
    custody.trust()  # before a folder of that name is made
    with Home(custody.home).owned():
        keys.admit(custody.home, family, clock, custody, tell)


def rotate(custody: Custody, names: Sequence[str], tell: Tell, clock: Clock | None = None) -> None:
    """Replace keys, which sign a last time where root needs it. `root` is all three of its keys.

    Raises: ConfigError (unknown_key, below_threshold, no_key, already_owned, and what loading and
    making keys raises), OSError; with the trust as it was, or as it shall be.
    """
    _ceremony(custody, _chosen(names), (), tell, clock or SystemClock())


def revoke(custody: Custody, names: Sequence[str], tell: Tell, clock: Clock | None = None) -> None:
    """Replace keys that are lost or stolen: none of them signs again. `operators/NAME` too.

    Raises: as `rotate`.
    """
    for name in [each for each in names if each.startswith(f"{OPERATORS}/")]:
        checked_name(name.removeprefix(f"{OPERATORS}/"), "operator")
        path = custody.home / "keys" / f"{name}.pub"
        if not path.exists():
            raise ConfigError("unknown_key", f"{path} is not there; no such operator is known")
        custody.files.unlink(path)
        custody.files.sync_directory(path.parent)
        tell(f"drop {name}: {path} is gone, the gate of this home takes nothing of theirs any more")
    rest = [each for each in names if not each.startswith(f"{OPERATORS}/")]
    if not rest:
        return
    chosen = _chosen(rest)
    numbered = any(thieves <= set(chosen) for thieves in NUMBERING)
    if numbered or any(name in IN_ROOT for name in chosen):
        chosen = _chosen([*chosen, *ONLINE_PAIR])
    if numbered:
        tell("take the online pair along: new ones undo numbers that a thief ran out of reach")
    _ceremony(custody, chosen, tuple(_chosen(rest, alone=True)), tell, clock or SystemClock())


def _ceremony(
    custody: Custody, chosen: list[str], gone: Sequence[str], tell: Tell, clock: Clock
) -> None:
    custody.trust()  # before a folder of that name is made
    with Home(custody.home).owned():
        trust = custody.trust()
        tell(f"read the trust: root {trust.root.version}, targets {trust.targets.version}")
        settle(custody, trust, tell)
        old = _old_signers(custody, trust, chosen, gone)
        tell(f"find who signs: {', '.join(sorted(old)) or 'new keys alone'}")
        fresh = {name: custody.make(name, ".next") for name in chosen}
        for name, signer in fresh.items():
            tell(f"make a key {name}: {signer.public_key.keyid[:12]}, in {custody.at_home(name)}")
        _Change(custody, trust, trust.ids(), old, fresh, clock.now_s(), tell).write()
        settle(custody, custody.trust(), tell)
        _say_next(chosen, tell)


def settle(custody: Custody, trust: Trust, tell: Tell) -> None:
    """Bring keys and the embedded root to what the trust says: the end of every ceremony."""
    ids = trust.ids()
    for name in ALL_KEYS:
        if name in ids and custody.promote(name, ids[name]):
            tell(f"put the key {name} in its place; the one before it is gone")
    embedded, newest = custody.home / "trust" / "root.json", trust.roots[trust.root.version]
    if not embedded.exists() or embedded.read_bytes() != newest:
        keys.write(custody, embedded, newest)
        tell(f"give root {trust.root.version} to new devices: {embedded}")


def _chosen(names: Sequence[str], *, alone: bool = False) -> list[str]:
    """The keys that are meant, in the order of the ceremony; of the online pair both."""
    unknown = [name for name in names if name not in (*ALL_KEYS, "root")]
    if unknown:
        raise ConfigError(
            "unknown_key",
            f"there is no key {unknown[0]!r}; nothing was changed",
            f"one of: root {' '.join(ALL_KEYS)}",
        )
    meant = {key for name in names for key in (ROOT_KEYS if name == "root" else (name,))}
    if not alone and meant & set(ONLINE_PAIR):
        meant |= set(ONLINE_PAIR)
    return [name for name in ALL_KEYS if name in meant]


def _old_signers(
    custody: Custody, trust: Trust, chosen: list[str], gone: Sequence[str]
) -> dict[str, KeySigner]:
    """Those of the keys until now that must sign, before anything is written.

    Raises: ConfigError (below_threshold, no_key, and what loading raises).
    """
    ids, found = trust.ids(), {}
    if any(name in IN_ROOT for name in chosen):
        for name in ROOT_KEYS:
            if name not in gone and (signer := _if_here(custody, name, ids[name])):
                found[name] = signer
        after = found.keys() | (set(chosen) & set(ROOT_KEYS))
        if len(found) < ROOT_THRESHOLD or len(after) < ROOT_THRESHOLD:
            raise _too_few(trust, sorted(found))
    if any(name in IN_TARGETS for name in chosen) and "targets" not in chosen:
        found["targets"] = custody.signer("targets", ids["targets"])
    return found


def _if_here(custody: Custody, name: str, wanted: str) -> KeySigner | None:
    try:
        return custody.signer(name, wanted)
    except ConfigError as error:
        if error.code not in {"no_key", "key_not_trusted"}:
            raise
        return None


@dataclass(frozen=True)
class _Change:
    """One trust on its way to the next: `fresh` keys take the places of those of the same name."""

    custody: Custody
    trust: Trust
    ids: Mapping[str, str]
    old: Signers
    fresh: Signers
    now_s: float
    tell: Tell

    def write(self) -> None:
        """The targets document first, then the root that trusts it."""
        if self.fresh.keys() & {"targets", *IN_TARGETS}:
            self._write_targets()
        if self.fresh.keys() & set(IN_ROOT):
            self._write_root()

    def _write_targets(self) -> None:
        document = self.trust.targets
        assert document.delegations is not None
        assert document.delegations.roles is not None
        for role, delegated in document.delegations.roles.items():
            self._swap(document.delegations.keys, delegated.keyids, signers_of(role))
        if "time" in self.fresh and "time" not in self.ids:  # a home of before there was such a key
            keys.delegate_time(document.delegations, self.fresh["time"].public_key)
        if "gate" in self.fresh:  # as for time
            keys.delegate_approvals(document.delegations, self.fresh["gate"].public_key)
        document.version += 1
        document.expires = expiry(self.now_s, keys.OFFLINE_DAYS)
        data = sealed(document, [self.fresh.get("targets") or self.old["targets"]])
        path = self.custody.home / "tuf" / f"{document.version}.targets.json"
        keys.write(self.custody, path, data)
        self.tell(f"sign targets {document.version} with the key targets: {path}")

    def _write_root(self) -> None:
        document = self.trust.root
        before = opened(Root, self.trust.roots[document.version], None, "root")
        for role, delegated in document.roles.items():
            names = ROOT_KEYS if role == "root" else (role,)
            self._swap(document.keys, delegated.keyids, names)
        document.version += 1
        document.expires = expiry(self.now_s, keys.OFFLINE_DAYS)
        document.unrecognized_fields[ISSUED_FIELD] = int(self.now_s)
        signing = [name for name in ROOT_KEYS if name in self.old]
        new = [name for name in ROOT_KEYS if name in self.fresh]
        data = sealed(
            document, [*(self.old[name] for name in signing), *(self.fresh[name] for name in new)]
        )
        for delegator in (before, document):
            opened(Root, data, delegator, "root")
        path = self.custody.home / "tuf" / f"{document.version}.root.json"
        keys.write(self.custody, path, data)
        self.tell(
            f"sign root {document.version} with {', '.join(signing)}"
            f"{' and the new ' + ', '.join(new) if new else ''}: {path}; from here on it counts"
        )

    def _swap(self, public: dict[str, Key], keyids: list[str], names: Sequence[str]) -> None:
        """Put the new for the old: in the keys of a document, and in the ids of a role."""
        for place, name in enumerate(names):
            if name in self.fresh:
                public.pop(self.ids[name], None)
                key = self.fresh[name].public_key
                public[key.keyid], keyids[place] = key, key.keyid


def _operator(custody: Custody, name: str) -> str:
    """The private half goes away with the operator; the gate knows them by the public one."""
    public = custody.home / "keys" / OPERATORS / f"{checked_name(name, 'operator')}.pub"
    folder = custody.offline[0] if custody.offline else custody.home / "keys"
    private = folder / OPERATORS / f"{name}.pem"
    for path in (public, private):
        if path.exists():
            raise ConfigError(
                "keys_exist",
                f"{path} is there already and is unchanged",
                f"tools/key-ceremony revoke {OPERATORS}/{name} --home {custody.home}, "
                "and remove the private key",
            )
    secret = custody.new_secrets(f"{OPERATORS}/{name}") if custody.encrypt else None
    signer = keyfiles.write_new(private, secret, custody.files)
    keys.write(custody, public, keyfiles.public_pem(signer.public_key))
    return f"{private}, for them alone; {public}, for the gate"


def _say_where(custody: Custody, tell: Tell) -> None:
    together: dict[Path, list[str]] = {}
    for name in OFFLINE:
        together.setdefault(custody.at_home(name), []).append(name)
    for folder, names in together.items():
        tell(f"next: take {', '.join(names)} offline, with a copy: {folder}")
        if len(set(names) & set(ROOT_KEYS)) >= ROOT_THRESHOLD:
            tell("next: move these root keys apart: together they may replace every other key")


def _say_next(chosen: list[str], tell: Tell) -> None:
    online = [name for name in chosen if name not in OFFLINE]
    if online:
        tell(f"next: if another machine or user holds {', '.join(online)}, move the new file there")
    tell(
        "next: start `cloud-learner serve`; it signs anew what the old keys had signed, and devices"
        " follow by themselves"
    )


def _too_few(trust: Trust, found: list[str]) -> ConfigError:
    return ConfigError(
        "below_threshold",
        f"root {trust.root.version + 1} needs {ROOT_THRESHOLD} of the keys"
        f" {', '.join(ROOT_KEYS)} that devices trust now; {', '.join(found) or 'none'} may sign,"
        " so nothing was changed",
        "bring their folders with `--offline FOLDER`; if two are lost for good, make another home "
        "and enrol the devices anew",
    )
