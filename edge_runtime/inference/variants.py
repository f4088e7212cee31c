"""Variants: of the packages of one release, the one that this machine runs fastest and right.

Why: int8 is slower than float on one CPU and faster on the next, and on some it is wrong. Nobody
knows the fleet's CPUs; each device finds out by running what it was given.

Invariants: a package is kept only after its golden samples came out right here; what is not kept
is freed, and its memory given back, before the choice returns. A difference within the noise of
the measurement decides nothing: the package that stands first is then kept.

Knows nothing about plans, shelves or hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from edge_runtime import memory
from edge_runtime.errors import PackageError
from edge_runtime.inference.slot import Arm

FASTER = 0.9
"""How much of the time of the best so far a package may take to replace it."""


def fastest(loads: Iterable[Callable[[], Arm]]) -> Arm:
    """Load each in turn and keep the best; where none loads, the first one's error is raised.

    Raises: PackageError of the first; at once, all else that a load raises.
    """
    best, errors, losers = None, [], 0
    for load in loads:
        try:
            arm = load()
        except PackageError as error:
            errors.append(error.with_traceback(None))  # whose frames would keep the model alive
            continue
        losers += best is not None
        if best is None or is_faster(arm.runner.run_us, best.runner.run_us):
            best = arm
        del arm
    if errors or losers:
        memory.trim()
    if best is None:
        raise errors[0]
    return best


def is_faster(one_us: float | None, other_us: float | None) -> bool:
    """Whether the first takes less time by more than noise; None, not timed, is slowest."""
    if one_us is None or other_us is None:
        return one_us is not None
    return one_us < FASTER * other_us
