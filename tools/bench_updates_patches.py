"""The bytes of an update in tools/bench-updates: patches beside whole files, at what quality.

Why: a patch is worth what it saves against the best that would be sent without it.

Invariants: both sides carry the same learning: the int8 package that devices run, as a patch to the
one before it, and the float32 package of the same student without golden rows, by zstandard 19.
Quality is that of the very files, by the device's runner, on flights that nobody has learned yet.
"""

from __future__ import annotations

import io
import statistics
import time
from pathlib import Path

import numpy as np
import onnx
import zstandard
from bench_rows import Row
from bench_updates_models import BATCH_ROWS, flights, students

from cloud_learner.cycle import Candidate
from cloud_learner.evaluate.offline import probabilities
from cloud_learner.package.delta import patch_between
from cloud_learner.stats.scores import auc
from edge_runtime.inference.runner import Runner
from edge_runtime.update.patch import applied

RATIO, AUC_LOST = 13.0, 0.002
FURTHER = (2, 6, 24)  # micro-batches


def measure(home: Path, count: int) -> list[Row]:
    """The ratio for a micro-batch and for more of them, time of both sides, and the AUC lost."""
    found = students(home, count)
    unit = "x fewer"
    rows = [
        Row(
            "delta of a weights-only update against the zstd-compressed fp32 file without golden "
            "samples",
            statistics.median(ratios(found, 1)),
            unit,
            RATIO,
            at_least=True,
        ),
        Row("delta, the least ratio of all micro-batches", min(ratios(found, 1)), unit),
        Row("delta, bytes of a patch", statistics.median(map(len, made(found, 1))), "B"),
        Row("whole int8 package", len(found[-1].package), "B"),
        Row("delta by zstandard's patch-from, ratio", statistics.median(by_zstd(found)), unit),
    ]
    rows += [
        Row(
            f"delta over {step} micro-batches ({step * BATCH_ROWS:,} labels), ratio",
            statistics.median(ratios(found, step)),
            unit,
        )
        for step in FURTHER
        if step < count
    ]
    return [*rows, *times(found), quality(home, found[-1], (count - 1) * BATCH_ROWS)]


def pairs(found: list[Candidate], step: int) -> list[tuple[Candidate, Candidate]]:
    return list(zip(found, found[step:], strict=False))


def made(found: list[Candidate], step: int) -> list[bytes]:
    """A patch for each pair, proven."""
    patches = []
    for old, new in pairs(found, step):
        patch = patch_between(old.package, new.package)
        assert patch is not None
        assert b"".join(applied(io.BytesIO(old.package), patch, len(new.package))) == new.package
        patches.append(patch)
    return patches


def ratios(found: list[Candidate], step: int) -> list[float]:
    whole = [len(plain(each.float_package)) for each in found[step:]]
    return [size / len(patch) for size, patch in zip(whole, made(found, step), strict=True)]


def plain(package: bytes) -> bytes:
    """A package without golden rows, compressed."""
    model = onnx.load_model_from_string(package)
    for entry in [each for each in model.metadata_props if each.key == "headwater.golden"]:
        model.metadata_props.remove(entry)
    return zstandard.ZstdCompressor(level=19).compress(model.SerializeToString())


def by_zstd(found: list[Candidate]) -> list[float]:
    ratios = []
    for old, new in pairs(found, 1):
        known = zstandard.ZstdCompressionDict(old.package, zstandard.DICT_TYPE_RAWCONTENT)
        patch = zstandard.ZstdCompressor(level=19, dict_data=known).compress(new.package)
        ratios.append(len(plain(new.float_package)) / len(patch))
    return ratios


def times(found: list[Candidate]) -> list[Row]:
    spent: dict[str, list[float]] = {"making": [], "applying": []}
    for old, new in pairs(found, 1):
        started_s = time.perf_counter()
        patch = patch_between(old.package, new.package) or b""
        made_s = time.perf_counter()
        b"".join(applied(io.BytesIO(old.package), patch, len(new.package)))
        spent["making"].append(made_s - started_s)
        spent["applying"].append(time.perf_counter() - made_s)
    return [
        Row(f"{what} a patch", statistics.median(each) * 1000, "ms") for what, each in spent.items()
    ]


def quality(home: Path, candidate: Candidate, learned: int) -> Row:
    """AUC of the float32 package less that of the int8 one that patches lead to."""
    _, _, later = flights(home)
    later = later.take(np.arange(learned, len(later)))
    scores = []
    for name, data in (("float", candidate.float_package), ("int8", candidate.package)):
        path = home / f"{name}.onnx"
        path.write_bytes(data)
        scores.append(auc(later.labels, probabilities(Runner(path), later.features)))
    return Row("AUC that int8 loses against fp32", scores[0] - scores[1], "", AUC_LOST)
