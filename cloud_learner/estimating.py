"""Off-policy estimates over a home: its archive, asked by its family's own declaration.

Why: whoever wonders whether other shares would have earned more need not try them.

Invariants: nothing is written; the learner may run meanwhile.

Knows nothing about how estimates are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cloud_learner.config import Home
from cloud_learner.rollout.estimates import Estimated, read, table
from cloud_learner.store.archive import Archive
from cloud_learner.train.family import Family
from edge_runtime.errors import ConfigError, RequestError


def estimates(
    home: Home, family: str, releases: Sequence[str], shares: Mapping[str, float]
) -> list[Estimated]:
    """Each release alone, then `shares` where there are any.

    Raises: ConfigError (unknown_family), RequestError (nothing_logged, unknown_release).
    """
    if family not in home.families():
        known = ", ".join(home.families())
        raise ConfigError("unknown_family", f"{home.root} has no {family!r}", f"known: {known}")
    config = Family.load(Path(home.of(family).origin().folder)).config
    archive = Archive(home.archive)
    try:
        named = list(dict.fromkeys([*releases, *shares]))
        logged = read(archive, family, named, config.rollout.outcome, config.task)
    finally:
        archive.close()
    return table(logged, shares)


def shares_of(text: str) -> dict[str, float]:
    """`a=0.3,b=0.7` as shares by release. Raises: RequestError `bad_shares`."""
    try:
        pairs = (each.split("=") for each in text.split(",") if each)
        found = {name.strip(): float(share) for name, share in pairs}
    except ValueError as error:
        raise _bad(text) from error
    if any(not share >= 0 for share in found.values()) or (found and not sum(found.values()) > 0):
        raise _bad(text)
    return found


def _bad(text: str) -> RequestError:
    hint = "--shares r00010-ab=0.3,r00012-cd=0.7"
    return RequestError("bad_shares", f"{text!r:.100} names no shares of releases", hint)
