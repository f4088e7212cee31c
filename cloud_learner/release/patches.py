"""Patches on their way to be published: which packages get one, and how the metadata lists it.

Why: a device that runs what the current plan names can make the new release of it, for a twentieth
of the bytes; one that runs anything else fetches the whole file.

Invariants: a patch belongs to the entry of the package that it leads to, and goes when that goes.

Knows nothing about how a patch is made, and needs no trust for it: the package's hash judges it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from tuf.api.metadata import Targets  # type: ignore[attr-defined] # tuf has no __all__

from edge_runtime.rollout.plan import PlanArm
from edge_runtime.update.patch import FIELD, PatchEntry
from edge_runtime.update.trust import PLANS_ROLE

Between = Callable[[bytes, bytes], bytes | None]


class Patch(NamedTuple):
    """The hash of the package that it is made for, and its bytes."""

    base: str
    data: bytes


def patches_for(
    packages: Mapping[str, bytes],
    release: str,
    arms: Iterable[PlanArm],
    stored: Callable[[str], bytes | None],
    between: Between,
) -> dict[str, list[Patch]]:
    """Patches to the `packages` (by path) of `release` from those of `arms`, like to like.

    `stored` gives a package by its hash, `between` what makes the second of the first, if anything.
    """
    found: dict[str, list[Patch]] = {}
    for arm in arms:
        for old in arm.packages:
            path = old.path.replace(f"/{arm.release}.", f"/{release}.", 1)
            base, new = stored(old.sha256), packages.get(path)
            if base is None or new is None or base == new:
                continue
            patch = between(base, new)
            if patch is not None:
                found.setdefault(path, []).append(Patch(old.sha256, patch))
    return found


def listed(patches: Iterable[Patch]) -> dict[str, Any]:
    """The custom fields that list patches in the entry of their package."""
    plain = [
        msgspec.to_builtins(PatchEntry(base, hashlib.sha256(data).hexdigest(), len(data)))
        for base, data in patches
    ]
    return {FIELD: plain} if plain else {}


def hashes_in(custom: Mapping[str, Any] | None) -> Iterator[str]:
    """The hashes of the patches that an entry lists."""
    return (each["sha256"] for each in (custom or {}).get(FIELD, ()))


def files_in(documents: Mapping[str, Targets]) -> set[str]:
    """The hashes of all packages that the families' roles list, and of the patches to them."""
    roles = [document for role, document in documents.items() if role != PLANS_ROLE]
    targets = [target for document in roles for target in document.targets.values()]
    packages = {target.hashes["sha256"] for target in targets}
    return packages.union(*(hashes_in(target.custom) for target in targets))
