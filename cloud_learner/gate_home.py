"""The gate moves out: from a learner's home, a home of the gate's own, and the key with it.

Why: the bootstrap makes all keys in one folder; the separation of domains begins where the gate's
key leaves it.

Invariants: after it, exactly one folder holds the gate's key, and the new home needs nothing of the
old one: families, static sets, known keys, the trust root, what was passed, and where in the stream
it goes on. The key moves last: whatever ends this before leaves the learner's home as it was.

Knows nothing about running either.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec

from cloud_learner.admission import GATE_KEY, gate_public
from cloud_learner.config import Home
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.registry import Registry
from edge_runtime.bus import nkey
from edge_runtime.errors import CapacityError, ConfigError
from edge_runtime.files import fsync_directory, write_atomic

_FILES = ("static.set", "reference.set", "known.keys", "recent.hold-out")


def move_out(source: Home, home: Home) -> None:
    """Make `home` the gate's from the learner's `source`, which must not be served meanwhile.

    Raises: ConfigError (no_home, no_key, home_exists, already_owned), CapacityError.
    """
    origins = source.origins()
    if not source.key("gate").exists():
        raise ConfigError(
            "no_key",
            f"{source.root} has no gate's key: its gate has moved out already; nothing was changed",
            "that gate's home is the one to serve: cloud-learner gate --home DIR",
        )
    if home.root.exists() and any(home.root.iterdir()):
        raise ConfigError(
            "home_exists", f"{home.root} is not empty; nothing was changed", "name another folder"
        )
    with source.owned():
        home.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            home.key("gate").parent.mkdir(mode=0o700)
            _copy_shared(source, home)
            for name, origin in origins.items():
                _copy_family(source, home, name, Path(origin.folder))
            public = nkey.create(home.root / GATE_KEY).public
            write_atomic(gate_public(source), public.encode())
            os.sync()  # the key must not arrive before all that was copied
            _move_key(source.key("gate"), home.key("gate"))
        except OSError as error:
            raise CapacityError(
                "not_written", f"{home.root} cannot be written: {error}", "make room there"
            ) from error


def _copy_shared(source: Home, home: Home) -> None:
    pairs = (
        (source.trusted_root.parent, home.trusted_root.parent),
        (source.operators, home.operators),
        (source.ingest_db, home.ingest_db),
        (source.archive, home.archive),
        (source.raw, home.raw),
        (source.lineage, home.lineage),
    )
    for old, new in pairs:
        if old.exists():
            shutil.copytree(old, new)


def _copy_family(source: Home, home: Home, name: str, folder: Path) -> None:
    old, new = source.of(name), home.of(name)
    new.root.mkdir(parents=True)
    for file in _FILES:
        if (old.root / file).exists():
            shutil.copy2(old.root / file, new.root / file)
    shutil.copytree(folder, new.root / "family", ignore=shutil.ignore_patterns("__pycache__"))
    packages, kept = Registry(source.registry), Registry(home.registry)
    origin = old.origin()
    released = {each["sha256"] for each in Lineage(source.lineage).of(name).read("release")}
    for sha256 in released | {origin.sha256}:
        kept.put(packages.path(sha256).read_bytes())
    moved = str((new.root / "family").resolve())
    new.write_origin(msgspec.structs.replace(origin, folder=moved))


def _move_key(old: Path, new: Path) -> None:
    """The key is on disk there before it is gone here."""
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(old.read_bytes())
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(new.parent)
    old.unlink()
    fsync_directory(old.parent)
