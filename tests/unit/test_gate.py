"""The gate: judges packages itself, and its key signs only what it passed."""

from __future__ import annotations

import hashlib
import json

import msgspec
import numpy as np
import pytest

from cloud_learner.evaluate.gates import Limits
from cloud_learner.evaluate.holdout import HoldOut
from cloud_learner.evaluate.offline import EvaluationSet
from cloud_learner.gate import Gate, as_facts
from cloud_learner.release import keys
from cloud_learner.store.lineage import Lineage
from edge_runtime.errors import TrustError

LIMITS = Limits(
    static_drop_max=0.01,
    recent_drop_max=0.01,
    quality_min=0.6,
    int8_gap_max=0.001,
    calibration_min=0.1,
    calibration_max=10.0,
    recent_rows_min=300,
)


@pytest.fixture
def static():
    """Rows on which sum(x) is right nine times of ten."""
    random = np.random.default_rng(0)
    features = random.normal(size=(500, 5)).astype(np.float32) * 100
    labels = (features.sum(1) > 0) ^ (random.random(500) < 0.1)
    return EvaluationSet(features, labels.astype(np.float32))


@pytest.fixture
def gate(static, tmp_path):
    return Gate(LIMITS, static, None, Lineage(tmp_path / "lineage"))


def sha256(package):
    return hashlib.sha256(package).hexdigest()


def targets(*releases):
    """A family's metadata as the publisher would have it signed."""
    found = {
        path: {"length": 1, "hashes": {"sha256": each}, "custom": {"counter": 1}}
        for path, each in releases
    }
    signed = {"_type": "targets", "spec_version": "1.0.31", "version": 1}
    return json.dumps({**signed, "expires": "2030-01-01T00:00:00Z", "targets": found}).encode()


def test_a_good_package_passes_and_only_then_is_known(gate, write_package):
    package = write_package()[0].read_bytes()
    assert not gate.passed("m/toy/r1.onnx", sha256(package))

    judgement = gate.judge(package, package, None)

    assert (judgement.outcome, judgement.sha256) == ("pass", sha256(package))
    assert gate.passed("m/toy/r1.onnx", sha256(package))
    assert gate.counts == {"judged": 1, "pass": 1, "fail": 0, "hold": 0}


def test_every_variant_that_ships_is_passed_and_no_other(static, tmp_path, write_package):
    int8, plain = (write_package(bias)[0].read_bytes() for bias in (0.0, 0.1))
    both = Gate(LIMITS, static, None, Lineage(tmp_path / "both"))
    one = Gate(
        msgspec.structs.replace(LIMITS, variants=("float32",)), static, None, Lineage(tmp_path)
    )

    judgements = both.judge(int8, plain, None), one.judge(int8, plain, None)

    assert judgements[0].variants == {"int8": sha256(int8), "float32": sha256(plain)}
    assert both.passed("", sha256(int8))
    assert both.passed("", sha256(plain))
    assert judgements[1].variants == {"float32": sha256(plain)}
    assert judgements[1].sha256 == sha256(plain)
    assert one.passed("", sha256(plain))
    assert not one.passed("", sha256(int8))


def test_a_float_form_that_is_bad_takes_its_int8_form_with_it(gate, write_package):
    int8 = write_package()[0].read_bytes()

    judgement = gate.judge(int8, b"garbage", None)

    assert judgement.outcome == "fail"
    assert not gate.passed("", sha256(int8))


def test_a_package_that_ranks_the_wrong_way_round_fails(static, tmp_path, write_package):
    turned = EvaluationSet(static.features, 1 - static.labels)
    gate = Gate(LIMITS, turned, None, Lineage(tmp_path / "lineage"))
    package = write_package()[0].read_bytes()

    judgement = gate.judge(package, package, None)

    assert judgement.outcome == "fail"
    assert not gate.passed("m/toy/r1.onnx", sha256(package))


def test_without_recent_rows_a_package_is_held(static, tmp_path, write_package):
    gate = Gate(LIMITS, static, HoldOut(100), Lineage(tmp_path / "lineage"))
    package = write_package()[0].read_bytes()

    judgement = gate.judge(package, package, write_package()[0])

    assert judgement.outcome == "hold"
    held = [v.rule for v in judgement.verdicts if v.outcome == "hold" and v.decides]
    assert held == ["recent_rows", "float32_recent_rows"]
    assert not gate.passed("m/toy/r1.onnx", sha256(package))


@pytest.mark.parametrize(
    "broken",
    [
        {"model_bias": 3.0},  # answers other than its golden samples
        {"drop": "headwater.golden"},
        {"columns": 6},
    ],
)
def test_a_package_that_no_device_could_serve_fails(gate, write_package, broken):
    package = write_package(**broken)[0].read_bytes()

    judgement = gate.judge(package, package, None)

    assert (judgement.outcome, judgement.evidence) == ("fail", None)
    assert judgement.verdicts[0].rule == "loads"
    assert not gate.passed("", sha256(package))


def test_garbage_and_a_package_of_another_width_fail(gate, write_package, toy_spec):
    narrow = write_package(spec=toy_spec.subset(["distance", "seen_1h"]))[0].read_bytes()

    for package in (b"garbage", narrow):
        assert gate.judge(package, package, None).outcome == "fail"
    assert gate.counts["fail"] == 2


def test_every_verdict_goes_to_lineage_with_its_evidence(gate, tmp_path, write_package):
    package = write_package()[0].read_bytes()
    gate.judge(package, package, None)
    gate.judge(b"garbage", b"garbage", None)

    first, second = Lineage(tmp_path / "lineage").read("verdict")

    assert (first["sha256"], first["outcome"]) == (sha256(package), "pass")
    assert first["evidence"]["forms"]["int8"]["static"]["quality"] > 0.8
    assert (second["outcome"], second["verdicts"][0]["found"]) == ("fail", None)


def test_facts_of_a_judgement_are_json(gate):
    assert "NaN" not in json.dumps(as_facts(gate.judge(b"garbage", b"", None)))


def test_the_gates_key_refuses_what_did_not_pass(gate, tmp_path, write_package):
    package = write_package()[0].read_bytes()
    keys.create(tmp_path / "home", ["toy"])
    signer = keys.GateSigner(keys.load(tmp_path / "home").gate, gate.passed)
    payload = targets(("m/toy/r1.onnx", sha256(package)))

    with pytest.raises(TrustError, match="r1") as caught:
        signer.sign(payload)
    assert caught.value.code == "not_passed"

    gate.judge(package, package, None)
    assert signer.sign(payload)

    with pytest.raises(TrustError, match="r2"):
        signer.sign(targets(("m/toy/r1.onnx", sha256(package)), ("m/toy/r2.onnx", "0" * 64)))


def test_a_gate_trusts_what_it_passed_in_an_earlier_life(gate):
    gate.trust("0" * 64)

    assert gate.passed("m/toy/r1.onnx", "0" * 64)
