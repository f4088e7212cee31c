"""Patches: what is made is applied to the byte, and what is not a patch is never a package."""

from __future__ import annotations

import io
import lzma
import random
import resource

import numpy as np
import pytest

from cloud_learner.package.delta import patch_between
from edge_runtime.errors import PackageError
from edge_runtime.update.patch import FILTERS, KIND, PatchEntry, applied, entries
from edge_runtime.update.trust import CHUNK_BYTES

SIZES = [8, 1000, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES - 1]


def moved(base: bytes, seed: int) -> bytes:
    """As weights move: most bytes stay, some go a step, few go far."""
    random_ = np.random.default_rng(seed)
    data = np.frombuffer(base, np.uint8).copy()
    steps = random_.choice([0, 1, 255, 77], len(data), p=[0.8, 0.09, 0.09, 0.02])
    return (data + steps.astype(np.uint8)).tobytes()


def made(size: int, seed: int = 1) -> tuple[bytes, bytes, bytes]:
    base = random.Random(seed).randbytes(size)
    package = moved(base, seed)
    patch = patch_between(base, package) if size > 100 else None
    return base, package, patch or b""


def apply(base: bytes, patch: bytes, length: int) -> bytes:
    return b"".join(applied(io.BytesIO(base), patch, length))


@pytest.mark.parametrize("size", [s for s in SIZES if s > 100])
def test_a_patch_gives_the_package_to_the_byte_and_is_smaller(size: int) -> None:
    base, package, patch = made(size)
    assert apply(base, patch, size) == package
    assert len(patch) < size / 3


@pytest.mark.parametrize(("before", "after"), [(5000, 5007), (5007, 5000), (5000, CHUNK_BYTES)])
def test_packages_of_other_lengths_are_patched_too(before: int, after: int) -> None:
    longer = bytes(max(before, after))
    base, package = longer[:before], moved(longer[:after], 2)
    patch = patch_between(base, package)
    assert patch is not None
    assert apply(base, patch, after) == package


def test_the_same_packages_give_the_same_patch() -> None:
    base, package, patch = made(4000)
    assert patch_between(base, package) == patch


def test_what_would_save_little_is_no_patch() -> None:
    one, other = random.Random(1).randbytes(5000), random.Random(2).randbytes(5000)
    assert patch_between(one, other) is None
    assert patch_between(b"", b"") is None


def outcome(base: bytes, patch: bytes, length: int) -> str:
    try:
        return "whole" if len(apply(base, patch, length)) == length else "of another length"
    except PackageError as error:
        return error.code


@pytest.mark.parametrize("seed", range(200))
def test_a_damaged_patch_gives_a_named_error_or_bytes_of_the_signed_length(seed: int) -> None:
    base, package, patch = made(3000)
    random_ = random.Random(seed)
    damaged = bytearray(patch)
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(damaged))
        match random_.randrange(3):
            case 0:
                damaged[at] = random_.randrange(256)
            case 1:
                del damaged[at:]
                damaged += b"\0"
            case 2:
                damaged[at:at] = random_.randbytes(random_.randrange(20))
    assert outcome(base, bytes(damaged), len(package)) in {"bad_patch", "whole"}


def test_a_patch_that_inflates_is_cut_at_the_signed_length() -> None:
    bomb = lzma.compress(bytes(256 << 20), lzma.FORMAT_RAW, filters=FILTERS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert apply(b"base", bomb, 4) == b"base"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 32 << 10  # KiB


def test_entries_that_cannot_be_used_here_are_passed_over() -> None:
    one, other = "a" * 64, "b" * 64
    good = {"from": one, "sha256": other, "length": 3, "kind": KIND}
    bad = [
        *(None, {}, good | {"kind": "later"}, good | {"length": -1}, good | {"length": "3"}),
        *(good | {"from": "../" + one}, good | {"sha256": other + "\n"}),
    ]
    assert entries({"patches": [*bad, good]}) == [PatchEntry(one, other, 3)]
    for custom in (None, {}, {"counter": 3}, {"patches": 5}, {"patches": {"a": 1}}):
        assert entries(custom) == []
