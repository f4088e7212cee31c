"""The trust of a home, and who keeps the keys that it names.

Why: metadata names keys by their ids, people by what they are for. The order of the ids in a role
ties the two: root's are those of `root-1..3`, a family's those of `learner` and `gate`.

Invariants: a root counts if it is the newest; a targets document, if that root says so: so the
rename that brings a root is the commit point of all that comes with it. A key file counts if the
trust names its key: of `NAME.pem` and `NAME.next.pem` that is always exactly one, whenever a
ceremony was cut off.

Knows nothing about how a trust comes about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tuf.api.metadata import Root, Targets  # type: ignore[attr-defined] # tuf has no __all__

from cloud_learner.release import keyfiles
from cloud_learner.release.keyfiles import KeySigner, Secrets
from cloud_learner.release.metadata import opened
from edge_runtime.errors import ConfigError, TrustError
from edge_runtime.files import Files, OsFiles
from edge_runtime.update.approval import APPROVALS_ROLE
from edge_runtime.update.trust import PLANS_ROLE, TIME_ROLE

ROOT_KEYS = ("root-1", "root-2", "root-3")
ROOT_THRESHOLD = 2
IN_ROOT = (*ROOT_KEYS, "targets", "snapshot", "timestamp")
IN_TARGETS = ("learner", "gate", "rollout", "time")
OFFLINE = (*ROOT_KEYS, "targets")
ALL_KEYS = (*OFFLINE, "learner", "gate", "rollout", "snapshot", "timestamp", "time")


@dataclass(frozen=True)
class Trust:
    """The newest root of a home and the newest targets that it trusts; the files of both."""

    root: Root
    targets: Targets
    roots: dict[int, bytes]
    targets_file: bytes

    @classmethod
    def read(cls, directory: Path) -> Trust:
        """The trust in the folder `tuf` of a home. Raises: ConfigError (no_trust)."""
        roots, found = _versioned(directory, "root"), _versioned(directory, "targets")
        if not roots:
            raise _no_trust(f"{directory} holds no root of trust")
        root = opened(Root, roots[max(roots)], None, "root")
        for number in sorted(found, reverse=True):
            try:
                targets = opened(Targets, found[number], root, "targets")
            except TrustError:  # of a ceremony that was cut off, or of before a rotation
                continue
            return cls(root, targets, roots, found[number])
        raise _no_trust(f"{directory} holds no targets document that root {root.version} trusts")

    def listed(self, role: str, document: bytes) -> dict[str, str]:
        """The hash of each file that a signed document of `role` lists.

        Raises: TrustError (bad_metadata, below_threshold).
        """
        found = opened(Targets, document, self.targets, role)
        return {path: target.hashes["sha256"] for path, target in found.targets.items()}

    def ids(self) -> dict[str, str]:
        """The id of each key that counts, by the name of the key."""
        roles = self.root.roles
        found = dict(zip(ROOT_KEYS, roles["root"].keyids, strict=True))
        found |= {name: roles[name].keyids[0] for name in ("targets", "snapshot", "timestamp")}
        assert self.targets.delegations is not None
        for name, role in (self.targets.delegations.roles or {}).items():
            found |= dict(zip(signers_of(name), role.keyids, strict=True))
        return found


def signers_of(role: str) -> tuple[str, ...]:
    """The names of the keys that sign a delegated role, in the order of their ids in it."""
    alone = {PLANS_ROLE: ("rollout",), TIME_ROLE: ("time",), APPROVALS_ROLE: ("gate",)}
    return alone.get(role, ("learner", "gate"))


@dataclass(frozen=True)
class Custody:
    """The keys of the home `home`: in its folder `keys`, or in `offline`, apart from it.

    `encrypt` is for new keys; one that replaces an encrypted key is encrypted in any case.
    """

    home: Path
    offline: Sequence[Path] = ()
    secrets: Secrets = keyfiles.unattended
    new_secrets: Secrets = keyfiles.unattended
    encrypt: bool = False
    files: Files = field(default_factory=OsFiles)

    @property
    def folders(self) -> list[Path]:
        """Where keys may lie."""
        return [self.home / "keys", *self.offline]

    def trust(self) -> Trust:
        """What counts in this home now. Raises: ConfigError (no_trust)."""
        return Trust.read(self.home / "tuf")

    def signer(self, name: str, wanted: str | None) -> KeySigner:
        """The signer of the key `name` whose id is `wanted`; None: whichever is there.

        Raises: ConfigError (no_key, key_not_trusted, and what keyfiles.load raises).
        """
        other = None
        for path in self.paths(name):
            signer = keyfiles.load(path, self.secrets)
            if wanted in (None, signer.public_key.keyid):
                return signer
            other = other or path
        if other is not None:
            raise ConfigError(
                "key_not_trusted",
                f"{other} is not the key {(wanted or '')[:12]} that this home trusts as {name};"
                " it was replaced, or belongs to another home",
                lost_hint(name, self.home),
            )
        where = ", ".join(str(folder) for folder in self.folders)
        raise ConfigError(
            "no_key",
            f"there is no key {name} in {where}; nothing was changed",
            lost_hint(name, self.home),
        )

    def paths(self, name: str) -> Iterator[Path]:
        """The files that hold a key of that name, the successor of a ceremony's last."""
        kinds = (".pem", ".uri") if name in OFFLINE else (".pem", ".uri", ".pub")
        for end in (*kinds, *(f".next{kind}" for kind in kinds)):
            for folder in self.folders:
                path = folder / f"{name}{end}"
                if path.exists():
                    yield path

    def at_home(self, name: str) -> Path:
        """The folder where the key `name` lies, or belongs if it is nowhere."""
        for path in self.paths(name):
            return path.parent
        if name in OFFLINE and self.offline:
            return self.offline[OFFLINE.index(name) % len(self.offline)]
        return self.home / "keys"

    def make(self, name: str, end: str) -> KeySigner:
        """The key in the file of `name` that ends so, made if there is none.

        A key that lies there already was put there on purpose, or by a ceremony that was cut off.
        Raises: ConfigError (key_elsewhere, and as keyfiles.write_new and keyfiles.load); OSError.
        """
        for path in self.paths(name):
            if path.stem == f"{name}{end}":
                return keyfiles.load(path, self.secrets)
        before = [path for path in self.paths(name) if ".next." not in path.name]
        if any(path.suffix != ".pem" for path in before):
            raise ConfigError(
                "key_elsewhere",
                f"{before[0]} says that {name} has a keeper of its own; nothing was changed",
                "make its successor there, and tell of it in "
                f"{before[0].with_name(f'{name}.next{before[0].suffix}')}",
            )
        old = any(keyfiles.is_encrypted(path) for path in before)
        secret = self.new_secrets(name) if self.encrypt or old else None
        return keyfiles.write_new(self.at_home(name) / f"{name}{end}.pem", secret, self.files)

    def promote(self, name: str, wanted: str) -> bool:
        """Let the successor of the key `name` take its place, if it is the key that counts now."""
        for path in self.paths(name):
            if ".next." not in path.name:
                continue
            if keyfiles.load(path, self.secrets).public_key.keyid == wanted:
                self._take_place(name, path)
                return True
        return False

    def _take_place(self, name: str, successor: Path) -> None:
        place = successor.with_name(f"{name}{successor.suffix}")
        self.files.replace(successor, place)
        for path in list(self.paths(name)):
            if path != place:
                self.files.unlink(path)
        self.files.sync_directory(place.parent)


def lost_hint(name: str, home: Path) -> str:
    """What to do next where a key is not there."""
    bring = "bring the folder it lies in with `--offline FOLDER`"
    if name not in OFFLINE:
        bring = "put its file back from a copy"
    return f"{bring}; if it is lost for good: tools/key-ceremony revoke {name} --home {home}"


def _versioned(directory: Path, role: str) -> dict[int, bytes]:
    paths = directory.glob(f"[0-9]*.{role}.json")
    return {int(path.name.split(".")[0]): path.read_bytes() for path in paths}


def _no_trust(what: str) -> ConfigError:
    return ConfigError("no_trust", what, "create the keys of this home first")
