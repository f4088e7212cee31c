"""Patches: what differs between two packages, for devices that have the older one.

Why: see edge_runtime/update/patch.py, which applies what is made here.

What makes patches small is decided before: packages of one graph have their tensors in the same
places, and int8 weights move by a step or none. docs/adr/0016-patches.md has what else was tried.

Invariants: same packages give the same bytes; a patch that would save less than half is none.
"""

from __future__ import annotations

import lzma

import numpy as np

from edge_runtime.update.patch import ESCAPE, FILTERS, SHIFTS, STEPS, Bytes
from edge_runtime.update.trust import chunk_sizes

_SLOW_BYTES_MAX = 1 << 20
"""Up to here a patch is compressed as well as can be; a larger one in a fraction of the time."""


def patch_between(base: bytes, package: bytes) -> bytes | None:
    """What makes `package` of `base`; None where a device had better fetch it whole."""
    old = np.zeros(len(package), np.uint8)
    common = min(len(base), len(package))
    old[:common] = np.frombuffer(base, np.uint8)[:common]
    steps = np.frombuffer(package, np.uint8) - old
    codes = _codes(steps)
    if np.count_nonzero(codes == ESCAPE) > len(package) // 2:
        return None
    parts, start = [], 0
    for size in chunk_sizes(len(package)):
        block = slice(start, start + size)
        parts += [_packed(codes[block]), steps[block][codes[block] == ESCAPE].tobytes()]
        start += size
    preset = {"preset": 9 if len(package) <= _SLOW_BYTES_MAX else 1}
    patch = lzma.compress(
        b"".join(parts), lzma.FORMAT_RAW, filters=[each | preset for each in FILTERS]
    )
    return patch if len(patch) <= len(package) // 2 else None


def _codes(steps: Bytes) -> Bytes:
    codes = np.full(len(steps), ESCAPE, np.uint8)
    for code, step in enumerate(STEPS[:ESCAPE]):
        codes[steps == step] = code
    return codes


def _packed(codes: Bytes) -> bytes:
    padded = np.append(codes, np.zeros(-len(codes) % 4, np.uint8)).reshape(-1, 4)
    packed: Bytes = np.bitwise_or.reduce(padded << SHIFTS, axis=1)
    return packed.tobytes()
