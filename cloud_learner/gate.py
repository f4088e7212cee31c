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
from pathlib import Path
from typing import Any

import msgspec

from cloud_learner.evaluate.gates import Evidence, Limits, Outcome, Verdict, judge, outcome
from cloud_learner.evaluate.offline import EvaluationSet, HoldOut, ScoredSet, score
from cloud_learner.store.lineage import Lineage
from edge_runtime.errors import PackageError
from edge_runtime.inference.slot import load_arm


class Judgement(msgspec.Struct, frozen=True):
    """What the gate says of a candidate: the outcome, every verdict, and the evidence.

    `variants` are the hashes of the packages that were judged to ship, by form, the default one
    first; that one's is `sha256`, too.
    """

    sha256: str
    outcome: Outcome
    verdicts: list[Verdict]
    evidence: Evidence | None
    variants: dict[str, str]


class Gate:
    """Judges the candidates of one family."""

    def __init__(
        self, limits: Limits, static: EvaluationSet, hold_out: HoldOut | None, lineage: Lineage
    ) -> None:
        """`hold_out` is None at the bootstrap, when there is no stream yet."""
        self._limits, self._static, self._lineage = limits, static, lineage
        self._hold_out = hold_out
        self._passed: set[str] = set()
        self.counts = {"judged": 0, "pass": 0, "fail": 0, "hold": 0}

    def passed(self, _path: str, sha256: str) -> bool:
        """Whether this gate passed the package with this hash; what its signer asks."""
        return sha256 in self._passed

    def trust(self, sha256: str) -> None:
        """A package that this gate passed in an earlier life, as its own lineage says."""
        self._passed.add(sha256)

    def judge(self, package: bytes, float_package: bytes, serving: Path | None) -> Judgement:
        """Score a candidate's int8 and float form beside what serves, and rule on it."""
        forms = {"int8": package, "float32": float_package}
        shipped = {name: _sha256(forms[name]) for name in self._limits.variants}
        sha256 = shipped[self._limits.variants[0]]
        try:
            evidence = self._evidence(package, float_package, serving)
            verdicts = judge(evidence, self._limits)
            judgement = Judgement(sha256, outcome(verdicts), verdicts, evidence, shipped)
        except PackageError as error:
            broken = Verdict("loads", "fail", math.nan, math.nan, str(error))
            judgement = Judgement(sha256, "fail", [broken], None, shipped)
        self._remember(judgement)
        return judgement

    def _evidence(self, package: bytes, float_package: bytes, serving: Path | None) -> Evidence:
        recent = self._hold_out.rows() if self._hold_out is not None else None
        static, recent_score = self._score(package, recent)
        static_float, recent_float = self._score(float_package, recent)
        serving_static = serving_recent = None
        if serving is not None:
            serving_static, serving_recent = self._score(serving.read_bytes(), recent)
        return Evidence(
            static, static_float, recent_score, serving_static, serving_recent, recent_float
        )

    def _score(
        self, package: bytes, recent: EvaluationSet | None
    ) -> tuple[ScoredSet, ScoredSet | None]:
        with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
            path = Path(folder) / "package.onnx"
            path.write_bytes(package)
            runner = load_arm(path, None, "candidate", "candidate", 1.0).runner
            return score(runner, self._static), None if recent is None else score(runner, recent)

    def _remember(self, judgement: Judgement) -> None:
        self.counts["judged"] += 1
        self.counts[judgement.outcome] += 1
        if judgement.outcome == "pass":
            self._passed.update(judgement.variants.values())
        self._lineage.append("verdict", **as_facts(judgement))


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
