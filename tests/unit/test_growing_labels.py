"""A class that a release, a gate's old rows or a trial has never seen: what becomes of its labels,
from the device that is told one to the campaign that decides by it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper, parser

from cloud_learner.evaluate.gates import Limits
from cloud_learner.evaluate.holdout import HoldOut
from cloud_learner.evaluate.offline import EvaluationSet, is_held_out
from cloud_learner.gate import Gate, Judgement
from cloud_learner.rollout.evidence import TrialEvidence
from cloud_learner.rollout.rewards import Ledger, Tally
from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from cloud_learner.store.lineage import Lineage
from cloud_learner.train.dataset import Rows
from cloud_learner.train.replica import Replica
from cloud_learner.train.trust import Trust
from edge_runtime import factory
from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig
from edge_runtime.errors import RequestError
from edge_runtime.features.spec import Spec
from edge_runtime.inference.package import Interface, Kind, metadata_of
from edge_runtime.runtime import Event, Runtime
from edge_runtime.wire import codec
from edge_runtime.wire.messages import Scored

CLASSES, NEW = 4, 3
TASK = Task(kind="multiclass", classes=CLASSES)
NAMES = "abcd"
NOW_S = 1_360_000_000.0
SPEC = Spec.from_toml(
    "version = 1\n" + "".join(f'[[features]]\nname = "{x}"\nfield = "{x}"\n' for x in NAMES)
)
INTERFACE = Interface(
    family="kind",
    kinds={"asked": Kind(predicts=True, fields=dict.fromkeys(NAMES, "float"))},
    clock="event",
    skew_s_max=86400.0,
    lateness_s_max=0.0,
    output="kind",
)
LIMITS = Limits(
    static_drop_max=0.01,
    recent_drop_max=0.01,
    quality_min=0.6,
    int8_gap_max=0.001,
    calibration_min=0.7,
    calibration_max=1.4,
    recent_rows_min=50,
    latency_us_max=1e9,
    task=TASK,
)
OLD, NEXT = [0.0, 0.0, 0.0, -20.0], [0.0] * CLASSES
"""What is added to the logits: the first release has never seen the last class."""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[float]], Path]:
    """`write(bias)` is a package that answers softmax(8 * features + bias)."""

    def write(bias: list[float]) -> Path:
        model = parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17]>'
            "kind (float[n,4] features) => (float[n,4] probability) {"
            "scaled = MatMul (features, w) logits = Add (scaled, b)"
            "probability = Softmax <axis = -1> (logits) }"
        )
        weights = {"w": 8.0 * np.eye(CLASSES), "b": np.array(bias)}
        model.graph.initializer.extend(
            numpy_helper.from_array(each.astype(np.float32), name) for name, each in weights.items()
        )
        rows = np.eye(CLASSES, dtype=np.float32)
        odds = np.exp(8.0 * rows + np.float32(bias))
        metadata = metadata_of(
            INTERFACE,
            SPEC,
            golden_inputs=rows,
            golden_outputs=(odds / odds.sum(1, keepdims=True)).astype(np.float32),
            tolerance=1e-4,
            provenance={},
        )
        helper.set_model_props(model, metadata)
        path = tmp_path / f"{bias}.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write


def rows_of(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Rows (rows, 4) that show their classes well."""
    noise = np.random.default_rng(seed).normal(0, 0.1, (len(labels), CLASSES))
    return (np.eye(CLASSES)[labels] + noise).astype(np.float32)


def example(at: int, row: np.ndarray, label: float, scored: list[Scored] | None = None) -> Example:
    return Example(
        *("here", 1, at + 1, "kind", NOW_S + at, NOW_S + at + 1, row.astype("<f4").tobytes()),
        *(SPEC.hash, label, 1.0, scored or [], NOW_S, NOW_S),
    )


def judged(folder: Path, candidate: Path, serving: Path, *, each: int, seed: int = 0) -> Judgement:
    """By a static set without the new class, and `each` recent rows of every class."""
    old = np.arange(60) % NEW
    static = EvaluationSet(rows_of(old), old.astype(np.float32))
    recent = HoldOut(1000, rows_min=LIMITS.recent_rows_min, task=TASK)
    labels = np.arange(100 * CLASSES * each) % CLASSES
    told = [example(at, row, float(labels[at])) for at, row in enumerate(rows_of(labels, seed))]
    held = [one for one in told if is_held_out(one)]
    for label in range(CLASSES):
        recent.add([one for one in held if one.label == label][:each])
    gate = Gate(LIMITS, static, recent, Lineage(folder / "lineage"))
    package = candidate.read_bytes()
    return gate.judge(package, package, serving)


def test_a_device_takes_labels_of_classes_that_its_release_has_never_seen(tmp_path, write):
    path = write(OLD)
    config = EdgeConfig(
        device="b", families=["kind"], state_dir=tmp_path / "state", socket=tmp_path / "edge.sock"
    )
    factory.install(config, path, factory.inspect(path))
    with Runtime.open(config, clock=ManualClock(NOW_S)) as runtime:
        asked = Event("asked", NOW_S, dict(zip(NAMES, (0.0, 0.0, 0.0, 1.0), strict=True)))
        answer = runtime.predict("kind", asked)
        assert answer.outputs[NEW] < 1e-3
        for value in (CLASSES, -1, 0.5, 1e300):
            with pytest.raises(RequestError, match="one of the classes 0 to 3 of kind") as caught:
                runtime.label(answer.id, value)
            assert caught.value.code == "bad_label"
        assert runtime.label(answer.id, NEW) == 1
        assert runtime.label(answer.id, True + 1.0, final=False) == 2
    with Runtime.open(config, clock=ManualClock(NOW_S)) as runtime:
        tail = runtime.log.tail("label", 0, 0)
        assert [codec.decode_record(data).value for _, _, data in tail] == [3.0, 2.0]


def test_a_gate_whose_static_rows_lack_the_class_passes_who_has_learned_it(tmp_path, write):
    judgement = judged(tmp_path, write(NEXT), write(OLD), each=40)

    assert judgement.outcome == "pass", judgement.why_not
    found, serving = judgement.evidence.forms["int8"], judgement.evidence.serving
    assert found.static.quality == serving.static.quality == 1.0
    assert (found.recent.quality, serving.recent.quality) == (1.0, 0.75)


@pytest.mark.parametrize(
    ("candidate", "serving", "failed"),
    [
        ([0.0, 0.0, 0.0, 20.0], OLD, "static_drop"),  # the new class pushes the old ones out
        (OLD, NEXT, "recent_drop"),  # the class is forgotten again
    ],
)
def test_a_gate_refuses_who_pays_for_the_class_or_has_none_of_it(
    tmp_path, write, candidate, serving, failed
):
    judgement = judged(tmp_path, write(candidate), write(serving), each=40)

    assert judgement.outcome == "fail"
    assert failed in {each.rule for each in judgement.verdicts if each.outcome == "fail"}


def test_of_classes_with_few_rows_each_calibration_is_said_and_holds_nothing(tmp_path, write):
    """Of 77 classes one has thirty held-out rows after twenty thousand labels."""
    judgement = judged(tmp_path, write(NEXT), write(OLD), each=20)

    assert judgement.outcome == "pass", judgement.why_not
    calibration = [each for each in judgement.verdicts if "calibration_" in each.rule]
    assert {(each.outcome, each.decides) for each in calibration} == {("hold", False)}


def test_a_class_that_is_answered_too_rarely_fails_calibration_as_soon_as_it_has_rows(
    tmp_path, write
):
    judgement = judged(tmp_path, write(OLD), write(OLD), each=40)

    failed = [each for each in judgement.verdicts if each.outcome == "fail"]
    assert {each.rule for each in failed} >= {"calibration_low", "float32_calibration_low"}


def test_labels_of_the_class_speak_for_the_release_that_knows_it():
    evidence = TrialEvidence.start(
        "kind", "r1", "r2", TASK, margin=0.05, alpha_promote=0.02, alpha_stop=0.01
    )
    labels = np.arange(200) % CLASSES
    for at, row in enumerate(rows_of(labels)):
        label = int(labels[at])
        old = [float(at == min(label, NEW - 1)) for at in range(CLASSES)]
        new = [float(at == label) for at in range(CLASSES)]
        both = [Scored("r1", "stable", old), Scored("r2", "canary", new)]
        evidence.examples([example(2 * at, row, label, both)])
        evidence.examples([example(2 * at + 1, row, label, both[:1])])  # of a device without it

    assert evidence.not_worse
    assert (evidence.pairs, evidence.quality.other_pair, evidence.quality.unusable) == (200, 200, 0)


def test_a_contest_earns_by_labels_of_the_class_too():
    ledger = Ledger(family="kind", outcome="quality", task=TASK, arms=[Tally("r1"), Tally("r2")])
    ledger.plan([0.5, 0.5])
    answers = [Scored("r1", "stable", [1.0, 0, 0, 0]), Scored("r2", "canary", [0, 0, 0, 1.0])]
    told = msgspec.structs.replace(example(0, np.zeros(4), NEW, answers), propensity=0.5)

    assert ledger.take(told).estimates == (0.0, 1.0)


def test_a_label_beyond_all_classes_enters_no_hold_out():
    hold_out = HoldOut(10, task=TASK)
    held = [example(at, np.zeros(4), CLASSES) for at in range(100)]
    hold_out.add(each for each in held if is_held_out(each))

    assert len(hold_out.rows()) == 0


@pytest.mark.parametrize("contributors", [3, 0])
def test_who_alone_brings_a_class_looks_like_a_liar_where_devices_are_judged(contributors):
    """So a family whose classes grow judges nobody; models/intent does."""
    torch.manual_seed(1)
    random = np.random.default_rng(1)
    replica = Replica(torch.nn.Linear(CLASSES, CLASSES), TASK, 5e-2)
    trust, devices = Trust(TASK, contributors), ["a"] * 100 + ["b"] * 100
    for number in range(20):
        before = number < 8
        labels = random.integers(0, NEW, 200)
        labels[150:] = labels[150:] if before else NEW
        rows = Rows(rows_of(labels, number), labels.astype(np.float32))
        admitted = trust.admitted(replica, rows, devices)
        for _ in range(5):
            replica.train(rows.take(np.flatnonzero(admitted)), random)

    new = rows_of(np.full(50, NEW), 99)
    learned = float((replica.answers(new).argmax(1) == NEW).mean())
    assert (
        ("b" in trust.quarantined) == (trust.counters["quarantined_rows"] > 0) == bool(contributors)
    )
    assert contributors or learned > 0.9
