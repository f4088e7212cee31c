"""Who holds which key: the trust of a home set beside the files that are here.

Why: before a ceremony, and after a theft, somebody must see at a glance which key counts for what,
until when, and where its private half lies.

Invariants: reads only, asks for no passphrase, and goes on over what it cannot read: it says so.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any

from cloud_learner.release import keyfiles
from cloud_learner.release.ceremony import OPERATORS
from cloud_learner.release.custody import (
    ALL_KEYS,
    IN_ROOT,
    ROOT_KEYS,
    ROOT_THRESHOLD,
    Custody,
    Trust,
    signers_of,
)
from cloud_learner.release.repository import Repository
from edge_runtime.errors import ConfigError


def facts(custody: Custody) -> dict[str, Any]:
    """The trust, and a row for each key. Raises: ConfigError (no_trust, bad_state)."""
    trust = custody.trust()
    return {
        "home": str(custody.home),
        "root": {"version": trust.root.version, "expires": f"{trust.root.expires:%Y-%m-%d}"},
        "targets": {
            "version": trust.targets.version,
            "expires": f"{trust.targets.expires:%Y-%m-%d}",
        },
        "keys": [*_rows(custody, trust), *_operators(custody)],
    }


def table(found: dict[str, Any]) -> str:
    """The facts as text."""
    heads = {name: name for name in ("key", "id", "signs", "threshold", "expires", "private")}
    rows = [heads, *found["keys"]]
    cells = [[str(row[name])[: 12 if name == "id" else None] for name in heads] for row in rows]
    widths = [max(len(row[place]) for row in cells) for place in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    versions = (f"{name} {found[name]['version']}" for name in ("root", "targets"))
    return "\n".join([f"{found['home']}: {', '.join(versions)}", *lines])


def _rows(custody: Custody, trust: Trust) -> Iterator[dict[str, Any]]:
    roles = Repository(custody.home / "tuf").state.roles
    expiries = {role: dt.datetime.fromtimestamp(f.expires_s, dt.UTC) for role, f in roles.items()}
    expiries |= {"root": trust.root.expires, "targets": trust.targets.expires}
    for name in ALL_KEYS:
        signs = _roles(trust, name)
        until = [expiries[role] for role in signs if role in expiries]
        yield {
            "key": name,
            "id": trust.ids().get(name, ""),
            "signs": ", ".join(signs),
            "threshold": _threshold(name) if signs else "",
            "expires": f"{min(until):%Y-%m-%d}" if until else "",
            "private": _where(custody, name, trust.ids().get(name)),
        }


def _roles(trust: Trust, name: str) -> list[str]:
    if name in IN_ROOT:
        return ["root" if name in ROOT_KEYS else name]
    assert trust.targets.delegations is not None
    return [role for role in trust.targets.delegations.roles or {} if name in signers_of(role)]


def _threshold(name: str) -> str:
    if name in ROOT_KEYS:
        return f"{ROOT_THRESHOLD} of {len(ROOT_KEYS)}"
    return "2 of 2" if name in signers_of("") else "1 of 1"


def _operators(custody: Custody) -> Iterator[dict[str, Any]]:
    for path in sorted((custody.home / "keys" / OPERATORS).glob("*.pub")):
        name, key = f"{OPERATORS}/{path.stem}", keyfiles.read_public(path)
        private = _where(custody, name, key.keyid)
        yield {"key": name, "id": key.keyid, "signs": "submissions", "threshold": "1 of 1"} | {
            "expires": "",
            "private": private,
        }


def _where(custody: Custody, name: str, wanted: str | None) -> str:
    said = ["not here" if wanted else "none: this home has no such role"]
    for path in custody.paths(name):
        try:
            signer = keyfiles.load(path, _silent)
        except ConfigError as error:
            said.append(f"{path}: {_REASONS.get(error.code, error.code)}")
            continue
        if signer.public_key.keyid == wanted:
            return str(path) if path.suffix != ".pub" else "with a keeper of its own"
        said.append(f"{path}: another key")
    return "; ".join(said[1:] or said)


_REASONS = {"key_encrypted": "encrypted", "key_mode": "others may read it: chmod 600"}


def _silent(name: str) -> str:
    raise ConfigError("key_encrypted", f"{name} is encrypted")
