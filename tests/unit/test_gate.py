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
from cloud_learner.evaluate.slices import Keys
from cloud_learner.gate import Gate, as_facts
from cloud_learner.gate_signing import JudgedSigner
from cloud_learner.release import keys
from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from cloud_learner.store.lineage import Lineage
from edge_runtime.errors import TrustError
from edge_runtime.features.spec import Spec

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


@pytest.mark.parametrize("names", [["seen_1h"], None], ids=["fewer features", "other features"])
def test_a_release_of_other_features_is_not_compared_with(gate, write_package, toy_spec, names):
    package = write_package()[0].read_bytes()
    text = toy_spec.to_json().replace("3600.0", "60.0")
    spec = toy_spec.subset(names) if names else Spec.from_json(text)

    judgement = gate.judge(package, package, write_package(spec=spec)[0])

    assert judgement.outcome == "pass"
    assert judgement.evidence.serving is None


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


def test_the_gates_key_signs_no_verdict_but_its_own(gate, tmp_path, write_package):
    package = write_package()[0].read_bytes()
    keys.create(tmp_path / "home", ["toy"])
    own = gate.judge(package, package, None).signed
    signer = JudgedSigner(keys.load(tmp_path / "home").gate, lambda _, each: gate.verdict(each))

    def payload(verdict):
        custom = {"counter": 1, "verdict": verdict}
        entry = {"hashes": {"sha256": sha256(package)}, "length": 1, "custom": custom}
        return json.dumps({"_type": "targets", "targets": {"m/toy/r1.onnx": entry}}).encode()

    assert own["outcome"] == "pass"
    assert signer.sign(payload(own))
    for lie in ({**own, "rules": []}, {**own, "sha256": "0" * 64}, {}):
        with pytest.raises(TrustError) as caught:
            signer.sign(payload(lie))
        assert caught.value.code == "other_verdict"


@pytest.mark.parametrize("payload", [b"", b"[]", b"null", b"[" * 100_000, b'{"targets": 1}'])
def test_the_gates_key_signs_nothing_that_is_no_list_of_releases(gate, tmp_path, payload):
    keys.create(tmp_path / "home", ["toy"])
    signer = JudgedSigner(keys.load(tmp_path / "home").gate, lambda *_: None)
    with pytest.raises(TrustError, match="not_releases"):
        signer.sign(payload)


def test_a_gate_trusts_what_it_passed_in_an_earlier_life(gate):
    gate.trust("0" * 64, {"outcome": "pass", "rules": [], "sha256": ""})

    assert gate.passed("m/toy/r1.onnx", "0" * 64)


def stream(count, features, **changes):
    """Examples of two devices, half of whose labels are what `sum(x)` says."""
    random = np.random.default_rng(5)
    return [
        Example(
            device="ab"[number % 2],
            epoch=1,
            seq=number,
            family="toy",
            time_s=float(number),
            label_time_s=number + 5.0,
            features=row.astype("<f4").tobytes(),
            spec="",
            label=float((row.sum() > 0) ^ (random.random() < 0.1)),
            propensity=1.0,
            scored=[],
            arrived_s=0.0,
            matured_s=0.0,
            fields={"carrier": "UA" if number % 3 else "AA"},
            **changes,
        )
        for number, row in enumerate(features)
    ]


@pytest.fixture
def recent():
    features = np.random.default_rng(6).normal(size=(6000, 5)).astype(np.float32) * 100
    hold_out = HoldOut(1000, rows_min=300, fields=("carrier",))
    hold_out.add(stream(6000, features))
    return hold_out


def test_on_a_stream_every_rule_has_its_verdict(static, recent, tmp_path, write_package):
    limits = msgspec.structs.replace(LIMITS, slices=("carrier",), slice_rows_min=50)
    keys = Keys({}, {"carrier": ["UA"]})
    gate = Gate(limits, static, recent, Lineage(tmp_path / "lineage"), keys)
    package, better = (write_package(bias)[0].read_bytes() for bias in (0.0, 0.1))

    judgement = gate.judge(better, better, write_package()[0])

    assert package != better
    assert judgement.outcome == "pass"
    verdicts = {each.rule: each for each in judgement.verdicts}
    for rule in ("slice_device", "slice_carrier", "slice_keys"):
        assert "(2 judged, 0 too small)" in verdicts[rule].reason
    assert verdicts["recent_devices"].found <= 0.5
    assert verdicts["persistence"].found > 0.5
    form = judgement.evidence.forms["int8"]
    assert sum(group.rows for group in form.ages) == form.recent.rows > 300
    (told,) = Lineage(tmp_path / "lineage").read("verdict")
    assert told["evidence"]["forms"]["int8"]["slices"]["keys"]["new"]["rows"] > 100


def test_what_one_device_lies_about_does_not_outweigh_the_others(
    static, recent, tmp_path, write_package
):
    lies = np.random.default_rng(7).normal(size=(9000, 5)).astype(np.float32) * 100
    turned = [
        msgspec.structs.replace(each, device="liar", label=1.0 - each.label)
        for each in stream(9000, lies)
    ]
    recent.add(turned)
    gate = Gate(LIMITS, static, recent, Lineage(tmp_path / "lineage"))
    package = write_package()[0]

    judgement = gate.judge(package.read_bytes(), package.read_bytes(), package)

    found = judgement.evidence
    assert found.largest_share <= 0.5
    assert found.forms["int8"].recent.quality > 0.5


def test_answers_that_are_no_numbers_fail(static, tmp_path, write_package):
    broken = EvaluationSet(static.features.copy(), static.labels)
    broken.features[0] = np.nan  # what a model makes of it is no number
    gate = Gate(LIMITS, broken, None, Lineage(tmp_path / "lineage"))
    package = write_package()[0].read_bytes()

    judgement = gate.judge(package, package, None)

    assert judgement.outcome == "fail"
    assert judgement.evidence.forms["int8"].broken_rows == 1
    failed = {each.rule for each in judgement.verdicts if each.outcome == "fail"}
    assert failed == {"finite_answers", "float32_finite_answers"}


def test_a_static_set_of_one_class_or_none_holds(static, tmp_path, write_package):
    package = write_package()[0].read_bytes()
    for labels in (np.ones(500, np.float32), np.zeros(0, np.float32)):
        rows = EvaluationSet(static.features[: len(labels)], labels)
        gate = Gate(LIMITS, rows, None, Lineage(tmp_path / f"lineage{len(labels)}"))

        assert gate.judge(package, package, None).outcome == "hold"


def test_a_package_of_another_number_of_outputs_fails(static, tmp_path, write_package):
    limits = msgspec.structs.replace(LIMITS, task=Task(kind="multiclass", classes=3))
    gate = Gate(limits, static, None, Lineage(tmp_path / "lineage"))
    package = write_package()[0].read_bytes()

    judgement = gate.judge(package, package, None)

    assert judgement.verdicts[0].reason.startswith("the package takes 5 features and gives 1")


def test_another_release_that_serves_is_scored_anew(static, tmp_path, write_package):
    gate = Gate(LIMITS, static, None, Lineage(tmp_path / "lineage"))
    package = write_package()[0].read_bytes()
    served = tmp_path / "served.onnx"
    qualities = []
    for content in (package, package, write_package(0.4)[0].read_bytes()):
        served.write_bytes(content)
        found = gate.judge(package, package, served).evidence.serving
        qualities.append((found.static.quality, found.static.loss))

    assert qualities[0] == qualities[1]
    assert qualities[0] != qualities[2]
