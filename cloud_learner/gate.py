"""The root of the gate's trust domain: judges candidates itself and signs only what passed.

Why: updating is easy; knowing that an update is safe is hard. A learner that errs, or lies, must
not be able to ship: its key alone makes no release.

Invariants: a package passes only after this process scored these very bytes with the device's code,
on sets that no replica was trained on; `passed` knows its hash only then. The evidence of every
verdict goes to lineage.

Knows nothing about how candidates come about. Not thread-safe: one caller.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cloud_learner.evaluate.ages import age_groups, known_age_groups, score_groups
from cloud_learner.evaluate.baseline import over_persistence
from cloud_learner.evaluate.gates import (
    Evidence,
    Limits,
    Measured,
    Outcome,
    Verdict,
    judge,
    outcome,
)
from cloud_learner.evaluate.holdout import HoldOut, largest_share
from cloud_learner.evaluate.offline import (
    EvaluationSet,
    Mask,
    Matrix,
    ScoredSet,
    row_us,
    score,
)
from cloud_learner.evaluate.slices import Keys, Slices, score_slices, slices
from cloud_learner.package.inspect import spec_of
from cloud_learner.store.lineage import Lineage
from edge_runtime.errors import PackageError
from edge_runtime.inference.pipeline import score_batch
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.slot import load_arm

Prove = Callable[[Path], None]


class Judgement(msgspec.Struct, frozen=True):
    """What the gate says of a candidate: the outcome, every verdict, and the evidence.

    `variants` are the hashes of the packages that were judged to ship, by form, the default one
    first; that one's is `sha256`, too. `proof` is the hash of all the rest, in its lineage's words.
    """

    sha256: str
    outcome: Outcome
    verdicts: list[Verdict]
    evidence: Evidence | None
    variants: dict[str, str]
    proof: str = ""

    @property
    def signed(self) -> dict[str, Any]:
        """What of it is told to devices, in the signed metadata of a release."""
        rules = [verdict.rule for verdict in self.verdicts]
        return {"outcome": self.outcome, "rules": rules, "sha256": self.proof}

    @property
    def why_not(self) -> str:
        """Of all that decides and did not pass the reason, with its rule; empty when all passed."""
        against = (v for v in self.verdicts if v.decides and v.outcome != "pass")
        return "; ".join(f"{verdict.reason} ({verdict.rule})" for verdict in against)


class _Recent(msgspec.Struct, frozen=True):
    """The recent hold-out as it is during one judgement, cut into what is judged apart."""

    rows: EvaluationSet
    slices: Slices
    ages: list[Mask]
    label_ages: list[Mask]


class _Loaded(msgspec.Struct, frozen=True):
    """A package that was proved here, and how it did on the static set, which never changes."""

    runner: Runner
    spec: str
    size_bytes: int
    latency_us: float
    static: ScoredSet
    broken_rows: int


class Gate:
    """Judges the candidates of one family."""

    def __init__(
        self,
        limits: Limits,
        static: EvaluationSet,
        hold_out: HoldOut | None,
        lineage: Lineage,
        keys: Keys | None = None,
    ) -> None:
        """`hold_out` is None at the bootstrap, when there is no stream yet.

        `keys` are those that the bootstrap saw; without them no slice of new keys is judged.
        """
        self._limits, self._static, self._lineage = limits, static, lineage
        self._hold_out, self._keys = hold_out, keys
        self._serving: tuple[str, _Loaded | None] | None = None
        self._passed: dict[str, dict[str, Any]] = {}
        self.counts = {"judged": 0, "pass": 0, "fail": 0, "hold": 0}

    def passed(self, _path: str, sha256: str) -> bool:
        """Whether this gate passed the package with this hash; what its signer asks."""
        return sha256 in self._passed

    def verdict(self, sha256: str) -> dict[str, Any] | None:
        """The verdict on a package that this gate passed; None for any other."""
        return self._passed.get(sha256)

    def trust(self, sha256: str, verdict: dict[str, Any]) -> None:
        """A package that this gate passed in an earlier life, as its own lineage says."""
        self._passed[sha256] = verdict

    def judge(
        self,
        package: bytes,
        float_package: bytes,
        serving: Path | None,
        *,
        alarmed: bool = False,
        prove: Prove | None = None,
    ) -> Judgement:
        """Score a candidate's int8 and float form beside what serves, and rule on it.

        While an alarm stands (`alarmed`), less is allowed to be lost. `prove` may refuse a package
        of strangers before it is loaded into this process, by a PackageError.
        """
        forms = {"int8": package, "float32": float_package}
        shipped = {name: _sha256(forms[name]) for name in self._limits.variants}
        sha256 = shipped[self._limits.variants[0]]
        try:
            evidence = self._evidence(forms, serving, prove)
            verdicts = judge(evidence, self._limits, alarmed=alarmed)
            judgement = Judgement(sha256, outcome(verdicts), verdicts, evidence, shipped)
        except PackageError as error:
            broken = Verdict("loads", "fail", math.nan, math.nan, str(error))
            judgement = Judgement(sha256, "fail", [broken], None, shipped)
        proof = msgspec.json.encode(as_facts(judgement), order="sorted")
        judgement = msgspec.structs.replace(judgement, proof=_sha256(proof))
        self._remember(judgement)
        return judgement

    def _evidence(
        self, forms: dict[str, bytes], serving: Path | None, prove: Prove | None
    ) -> Evidence:
        recent = self._recent() if self._hold_out is not None else None
        loaded = {name: self._load(data, prove) for name, data in forms.items()}
        spec = next(iter(loaded.values())).spec
        served = self._served(serving, spec) if serving is not None else None
        return Evidence(
            forms={name: self._measure(each, recent) for name, each in loaded.items()},
            serving=self._measure(served, recent) if served is not None else None,
            small_slices=recent.slices.small if recent is not None else {},
            largest_share=largest_share(recent.rows) if recent is not None else math.nan,
        )

    def _recent(self) -> _Recent:
        assert self._hold_out is not None
        rows, limits, keys = self._hold_out.rows(), self._limits, self._keys
        return _Recent(
            rows,
            slices(rows, limits.slices, keys, limits.slice_rows_min),
            age_groups(rows, keys.indices if keys is not None else ()),
            known_age_groups(rows),
        )

    def _measure(self, loaded: _Loaded, recent: _Recent | None) -> Measured:
        task, runner = self._limits.task, loaded.runner
        measured = Measured(
            size_bytes=loaded.size_bytes,
            latency_us=loaded.latency_us,
            broken_rows=loaded.broken_rows,
            static=loaded.static,
        )
        if recent is None:
            return measured
        rows = recent.rows
        outputs = score_batch(runner, rows.features)
        return msgspec.structs.replace(
            measured,
            broken_rows=loaded.broken_rows + _broken(outputs),
            recent=score(task, rows, outputs),
            slices=score_slices(task, rows, outputs, recent.slices.large),
            ages=score_groups(task, rows, outputs, recent.ages),
            label_ages=score_groups(task, rows, outputs, recent.label_ages),
            over_persistence=over_persistence(task, rows, outputs),
        )

    def _served(self, path: Path, spec: str) -> _Loaded | None:
        """What serves, loaded once for as long as it does; None when it is given other features
        than the candidate: no row of these sets can be answered by both, and the canary compares.
        """
        package = path.read_bytes()
        sha256 = _sha256(package)
        if self._serving is None or self._serving[0] != sha256:
            alike = spec_of(path).hash == spec
            self._serving = sha256, self._load(package) if alike else None
        return self._serving[1]

    def _load(self, package: bytes, prove: Prove | None = None) -> _Loaded:
        """A runner takes a file, and none but these bytes may be in it."""
        with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
            path = Path(folder) / "package.onnx"
            path.write_bytes(package)
            if prove is not None:
                prove(path)
            arm = load_arm(path, None, "candidate", "candidate", 1.0)
        runner, spec = arm.runner, arm.info.spec.hash if arm.info is not None else ""
        self._check_width(runner)
        outputs = score_batch(runner, self._static.features)
        scored = score(self._limits.task, self._static, outputs)
        latency_us = row_us(runner, self._static)
        return _Loaded(runner, spec, len(package), latency_us, scored, _broken(outputs))

    def _check_width(self, runner: Runner) -> None:
        wanted = self._static.features.shape[1], self._limits.task.outputs
        if (runner.features, runner.scores) != wanted:
            raise PackageError(
                "wrong_signature",
                f"the package takes {runner.features} features and gives {runner.scores} outputs; "
                f"this family has {wanted[0]} and {wanted[1]}",
            )

    def _remember(self, judgement: Judgement) -> None:
        self.counts["judged"] += 1
        self.counts[judgement.outcome] += 1
        if judgement.outcome == "pass":
            self._passed.update(dict.fromkeys(judgement.variants.values(), judgement.signed))
        self._lineage.append("verdict", **as_facts(judgement))


def _broken(outputs: Matrix) -> int:
    """How many rows were answered with what is no number."""
    return int((~np.isfinite(outputs).all(1)).sum())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def as_facts(judgement: Judgement) -> dict[str, Any]:
    """The judgement as plain data; an undefined number becomes null."""
    facts: dict[str, Any] = msgspec.to_builtins(judgement)
    return {key: _plain(value) for key, value in facts.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value
