"""Provenance: what a package says of where it came from, in its own metadata.

Why: who finds a model on a device must learn what it was made from, without asking the cloud.

Knows nothing about what the numbers do. Implements proto/package.md (provenance).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from edge_runtime.features.spec import Spec

NOTHING_S = float("inf"), 0.0
"""From the first event time to the last, of what was learned, before anything was."""


def widened(learned_s: tuple[float, float], times_s: Iterable[float]) -> tuple[float, float]:
    """The range with these event times in it."""
    times = list(times_s)
    return min([learned_s[0], *times]), max([learned_s[1], *times])


def origin(parent: str, learned_s: tuple[float, float], spec: Spec) -> dict[str, Any]:
    """The release that served when it was made, the event times it learned (null where none), its
    features and the code.
    """
    return {
        "parent": parent,
        "learned_from_s": learned_s[0] if math.isfinite(learned_s[0]) else None,
        "learned_through_s": learned_s[1],
        "features": spec.hash,
        "code": _code(),
    }


def _code() -> str:
    try:
        return f"headwater {version('headwater')}"
    except PackageNotFoundError:
        return "headwater, not installed"
