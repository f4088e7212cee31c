"""Agreement: whether a model that was loaded is what its package says, found by running it.

Why: an operator that computes something else on this CPU, a vocabulary larger than the model's, or
an answer that depends on what stands behind a text would show in nobody's log, only in answers.

Invariants: whatever disagrees is a PackageError that names the file; nothing else is changed.

Knows nothing about hashes and arms. Implements proto/package.md (the graph, golden rows).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from edge_runtime.errors import PackageError
from edge_runtime.inference.package import PackageInfo
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.signature import EMBEDDING, INPUT, OUTPUT
from edge_runtime.inference.tensors import Array, Tensor, described

PADDING_TOLERANCE = 1e-4
"""What padding may change: rounding, since both runs are on this machine, and no more."""


def check(runner: Runner, info: PackageInfo, path: str) -> None:
    """Refuse a model that is not as its package, at `path`, says.

    Raises: PackageError (wrong_signature, wrong_vocabulary, golden_mismatch, padding_counts,
    run_failed).
    """
    _check_widths(runner, info, path)
    _check_vocabulary(runner, info, path)
    _check_padding(runner, info, path)
    _check_golden(runner, info, path)


def _check_widths(runner: Runner, info: PackageInfo, path: str) -> None:
    if not runner.scores:
        raise PackageError(
            "wrong_signature",
            f"{path} takes {_described(runner.inputs)} and gives {_described(runner.outputs)}",
            f"a package maps {INPUT!r} FP32 [-1, F] to {OUTPUT!r} FP32 [-1, K]",
        )
    widths = info.spec.size, info.golden_outputs.shape[1]
    if (runner.features, runner.scores) != widths:
        raise PackageError(
            "wrong_signature",
            f"{path} takes {runner.features} features and gives {runner.scores} outputs; "
            f"its metadata says {widths[0]} and {widths[1]}",
        )
    width = runner.width if info.policy is None else info.policy.prior.width
    if runner.width != width or (info.policy is not None and runner.scores > 1):
        what = f"{path} gives not one number and {EMBEDDING!r} FP32 [-1, {width}] for its sessions"
        raise PackageError("wrong_signature", what)


def _described(tensors: Iterable[Tensor]) -> str:
    return ", ".join(f"{tensor.name!r} {described(tensor)}" for tensor in tensors)


def _check_golden(runner: Runner, info: PackageInfo, path: str) -> None:
    """Row by row, as requests come, which also warms the runner; all at once; with embeddings."""
    inputs = info.golden_inputs
    single = np.concatenate([runner.run(row) for row in np.split(inputs, len(inputs))])
    embedded = [runner.embed(inputs)[1]] if runner.width else []
    for answers in (single, runner.run(inputs), *embedded):
        gap = _gap(answers, info.golden_outputs)
        if not gap <= info.tolerance:  # a NaN is no agreement either
            raise PackageError(
                "golden_mismatch",
                f"{path} is off its golden samples by {gap:.6g}, more than {info.tolerance:.6g}",
                "this machine computes the model differently from the one that built it",
            )


def _check_vocabulary(runner: Runner, info: PackageInfo, path: str) -> None:
    """The last id of each tokenizer is one that the model can look up."""
    texts = [at for at, column in enumerate(info.spec.columns) if column.pad is not None]
    if not texts:
        return
    row = info.golden_inputs[:1].copy()
    row[0, texts] = [info.spec.columns[at].indices - 1 for at in texts]
    try:
        runner.run(row)
    except PackageError as error:
        raise PackageError(
            "wrong_vocabulary",
            f"{path} cannot be run on all ids of its tokenizer: {error.message}",
            "model and tokenizer are not of the same vocabulary",
        ) from error


def _check_padding(runner: Runner, info: PackageInfo, path: str) -> None:
    """In each bucket a row gets the answer and embedding that it gets with all its padding; an
    embedding to the tolerance's share of its largest number.
    """
    if runner.buckets is None:
        return
    for row, sizes in runner.buckets.proofs(info.spec.columns[0].indices):
        expected = runner.whole({INPUT: row})
        for size in sizes:
            found = runner.whole({INPUT: row[:, :size]})
            for output, cut, whole in zip(runner.outputs, found, expected, strict=True):
                _check_cut(output.name, cut, whole, path)


def _check_cut(name: str, cut: Array, whole: Array, path: str) -> None:
    allowed = PADDING_TOLERANCE * (float(np.abs(whole).max()) if name == EMBEDDING else 1.0)
    gap = _gap(cut, whole)
    if not gap <= allowed:
        raise PackageError(
            "padding_counts",
            f"{path} changes a text's {name!r} by {gap:.6g} with the padding behind it, more than "
            f"{allowed:.6g}",
            "leave out of attention and pooling what is padding: the mask is id != pad",
        )


def _gap(answers: Array, golden: Array) -> float:
    return float(np.abs(answers - golden).max())
